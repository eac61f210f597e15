"""A ControlPort of plain memory and a server around the real admin app, for the tests of the admin API and the CLI."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvicorn

from neaptide.clock import Clock, RealClock
from neaptide.config import parse
from neaptide.control.admin import build_app
from neaptide.control.gate import Access
from neaptide.control.port import (
    ApplyReport,
    BackupReport,
    BudgetRow,
    Budgets,
    Change,
    ChoiceRow,
    Choices,
    ConfigView,
    CreatedKey,
    Decision,
    Decisions,
    DeploymentStatus,
    DiskStatus,
    DownReport,
    GatewayStatus,
    GroupBy,
    KeyChange,
    KeyInfo,
    Keys,
    LedgerStatus,
    Models,
    NewBudget,
    NewKey,
    NewOverride,
    NotFoundError,
    ProcessStatus,
    ReplicaStatus,
    ScaleRow,
    Scales,
    ShadowRow,
    Shadows,
    Stage,
    Status,
    UsageFilter,
    UsagePage,
    UsageRow,
    UsageTotal,
    UsageTotals,
)
from neaptide.fleet.state import StateDir
from neaptide.types import Choice, Override, Reason, Scale, Traits, Usage

TOKEN = "t" * 64


class FakeControl:
    """Answers from memory; `asked` notes what came."""

    def __init__(self, state: Path, api_url: str = "http://127.0.0.1:9/v1") -> None:
        self.state, self.api_url, self.admin_url = state, api_url, ""
        self.text = "models: {guide: {}}\n"
        self.prices: dict[str, dict[str, float | None]] = {"guide": {"prompt": 1.0, "cached": 0.5, "output": 2.0}}
        self.held = [KeyInfo(id="k1", name="default", tail="abcd", created_wall_s=1_760_000_000.0)]
        self.budgets_set: dict[str, BudgetRow] = {}
        self.asked: list[object] = []
        self.broken: Exception | None = None
        self.override: Override | None = None
        self.why: tuple[Reason, ...] = ()  # of the choices; without any they say their English sentence

    async def status(self) -> Status:
        if self.broken is not None:
            raise self.broken
        return Status(
            version="0.1.0", ready=True, now_wall_s=1_760_000_100.0, started_wall_s=1_760_000_000.0,
            api_url=self.api_url, admin_url=self.admin_url, fast=7, slow=3,
            processes=(ProcessStatus(role="control", id="control", pid=41, rss_bytes=50 << 20),),
            deployments=(await self.models()).rows,
            replicas=(
                ReplicaStatus(
                    id="guide-0", deployment="guide", revision="guide-1a2b", state="ready", epoch=2, pid=43,
                    running=1, free_kv_tokens=900, kv_tokens=1000,
                    stages=(Stage(name="spawn", seconds=0.12), Stage(name="load", seconds=1.5)),
                ),
            ),
            gateways=(GatewayStatus(id="gateway-0", pid=42, epoch=1, connected=True, heard_s=0.1, connections=5,
                                    in_flight=1, fast=7, slow=3),),
            ledger=LedgerStatus(url="sqlite:///ledger.db", lag_bytes=2048, lag_s=0.2),
            disks=(DiskStatus(path=str(self.state), free_bytes=10 << 30, total_bytes=100 << 30),),
        )  # fmt: skip

    async def apply(self, text: str, dry_run: bool, origin: str) -> ApplyReport:
        self.asked.append(("apply", text, dry_run))
        new = set(parse(text, "neaptide.yaml").models)
        old = set(parse(self.text, "neaptide.yaml").models)
        if not dry_run:
            self.text = text
        changes = (Change(key="models.small.scale.max", old="1", new="4"),) if new != old else ()
        return ApplyReport(
            dry_run=dry_run, added=tuple(sorted(new - old)), removed=tuple(sorted(old - new)),
            unchanged=tuple(sorted(new & old)), changes=changes,
        )  # fmt: skip

    async def config(self) -> ConfigView:
        models = {"guide": {"cache": {"price": 0.1}}}
        settings = {"currency": "CNY", "prices": self.prices, "models": models}
        return ConfigView(path="", text=self.text, settings=settings)

    async def decisions(self, limit: int) -> Decisions:
        rows = [Decision(wall_s=float(i), reasons=(f"reason {i}",)) for i in range(5, 0, -1)]
        return Decisions(rows=tuple(rows[:limit]))

    async def models(self) -> Models:
        remote = DeploymentStatus(model="mock", aliases=("gpt-4o-mini",), ready=1)
        own = DeploymentStatus(
            model="guide", revision="guide-1a2b", engine="openvino", precision="int8", context_tokens=4096,
            scale=Scale(min=1, max=2), ready=1, running=1,
        )  # fmt: skip
        return Models(rows=(own, remote))

    async def scales(self) -> Scales:
        remote = ScaleRow(
            model="mock", scalable=False, policy="", ready=1, starting=0, wanted=1, min=1, max=1, in_flight=0
        )
        return Scales(currency="CNY", rows=(self.scale_row(), remote))

    def scale_row(self) -> ScaleRow:
        return ScaleRow(
            model="guide", scalable=True, policy="slo", ready=1, starting=1, wanted=2, min=0, max=4,
            arrivals_per_s=3.1, expected_per_s=3.8, in_flight=5, capacity_rps=4.0,
            traits=Traits(slots=8.0, service_s=2.0, cold_start_s=12.0, learnt="measured"),
            stages=(Stage(name="load_s", seconds=9.0),), starts=3, override=self.override,
            sentence="guide: 1 to 2 replicas: slo wants 2", choice=self.choice(1), cost_per_hour=6.4,
        )  # fmt: skip

    def choice(self, i: int) -> Choice:
        sentence = "guide: 1 to 2 replicas: slo wants 2" if i == 1 else f"guide: reason {i}"
        return Choice(
            model="guide", action="hold" if i % 2 else "launch", before=1, after=1 if i % 2 else 2, sentence=sentence,
            why=self.why, numbers={"capacity_rps": 4.0}, policy="slo", cost_per_hour=3.2, currency="CNY",
        )  # fmt: skip

    async def choices(self, model: str, limit: int) -> Choices:
        self.asked.append(("why", model, limit))
        if model not in ("", "guide"):
            raise NotFoundError(f"no model {model!r} is served", fix="neaptide models list")
        rows = [ChoiceRow(wall_s=1_760_000_000.0 + 60 * i, choice=self.choice(i)) for i in range(5, 0, -1)]
        return Choices(rows=tuple(rows[:limit]))

    async def set_override(self, new: NewOverride) -> ScaleRow:
        self.asked.append(new)
        if new.model != "guide":
            raise NotFoundError(f"no model {new.model!r} is served", fix="neaptide models list")
        self.override = Override(count=new.replicas, until_wall_s=1_760_000_000.0 + min(new.for_s, 1e9), by=new.by)
        return self.scale_row()

    async def clear_override(self, model: str) -> ScaleRow:
        self.asked.append(("clear", model))
        self.override = None
        return self.scale_row()

    async def shadows(self, model: str, days: int) -> Shadows:
        self.asked.append(("shadows", model, days))
        real = ShadowRow(
            day="2026-05-01", model="guide", policy="slo", real=True, replica_hours=10.0, cost=32.0, arrivals=1000.0,
            attainment=0.995,
        )  # fmt: skip
        hpa = ShadowRow(
            day="2026-05-01", model="guide", policy="hpa", real=False, replica_hours=22.8, cost=73.0, arrivals=1000.0,
            attainment=0.97,
        )  # fmt: skip
        return Shadows(currency="CNY", rows=(real, hpa))

    async def keys(self) -> Keys:
        return Keys(rows=tuple(self.held))

    async def create_key(self, new: NewKey) -> CreatedKey:
        self.asked.append(new)
        info = KeyInfo(id=f"k{len(self.held) + 1}", tail="wxyz", **msgspec.structs.asdict(new))
        self.held.append(info)
        return CreatedKey(key="sk-neap-secretwxyz", info=info)

    async def set_key(self, key_id: str, change: KeyChange) -> KeyInfo:
        self.asked.append(change)
        named = {k: v for k, v in msgspec.structs.asdict(change).items() if v is not msgspec.UNSET}
        for i, info in enumerate(self.held):
            if info.id == key_id:
                self.held[i] = msgspec.structs.replace(info, **named)
                return self.held[i]
        raise NotFoundError(f"no key {key_id!r}", fix="neaptide keys list")

    async def revoke_key(self, key_id: str) -> KeyInfo:
        for i, info in enumerate(self.held):
            if info.id == key_id:
                self.held[i] = msgspec.structs.replace(info, disabled=True)
                return self.held[i]
        raise NotFoundError(f"no key {key_id!r}", fix="neaptide keys list")

    async def budgets(self) -> Budgets:
        return Budgets(currency="CNY", rows=tuple(self.budgets_set.values()))

    async def set_budget(self, new: NewBudget) -> BudgetRow:
        self.asked.append(new)
        id = f"{new.scope}:{new.unit}:{new.period}"
        amount = int(new.amount * (10**9 if new.unit == "money" else 1))
        row = BudgetRow(
            id=id, name=id, scope=new.scope, unit=new.unit, period=new.period, amount=amount, strict=new.strict,
            spent=amount // 4, lent=amount // 10, left=amount - amount // 4, renews_wall_s=1_790_000_000.0,
        )  # fmt: skip
        self.budgets_set[id] = row
        return row

    async def remove_budget(self, budget_id: str) -> BudgetRow:
        if budget_id not in self.budgets_set:
            raise NotFoundError(f"no budget {budget_id!r}", fix="neaptide budgets list")
        return self.budgets_set.pop(budget_id)

    async def usage(self, where: UsageFilter, cursor: str | None, limit: int) -> UsagePage:
        self.asked.append((where, cursor, limit))
        first = int(cursor or 0)
        rows = [
            UsageRow(usage=Usage(request_id=f"r{i}", model="guide", output_tokens=i), amount_nanos=i * 1000)
            for i in range(first, min(first + limit, 7))
        ]
        return UsagePage(rows=tuple(rows), next=str(first + limit) if first + limit < 7 else None, currency="CNY")

    async def usage_totals(self, where: UsageFilter, by: GroupBy) -> UsageTotals:
        self.asked.append((where, by))
        row = UsageTotal(group="guide", requests=3, ok=2, aborted=1, output_tokens=1234, amount_nanos=5_000_000)
        return UsageTotals(by=by, currency="CNY", rows=(row,), total=msgspec.structs.replace(row, group=""))

    async def backup(self) -> BackupReport:
        return BackupReport(path="/b.tar.gz", bytes=1, files=1, sha256="0" * 64, duration_s=0.1)

    async def down(self, grace_s: float) -> DownReport:
        self.asked.append(("down", grace_s))
        return DownReport(accepted=True, grace_s=grace_s)


def access(state: Path, clock: Clock | None = None) -> Access:
    """The tokens and the log of a state directory whose own token is TOKEN."""
    found = StateDir(state)
    found.create()
    found.secret(found.admin_token, TOKEN)
    return Access.open(found, clock or RealClock())


@contextlib.contextmanager
def admin_server(control: FakeControl) -> Iterator[str]:
    """The base URL of the real app on a free port; its state directory's files point to it."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    control.admin_url = url
    app = build_app(control, access(control.state))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    write_state(control.state, control.api_url, url)
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def write_state(state: Path, api: str, admin: str) -> None:
    """What `neaptide up` leaves for the CLI."""
    (state / "run").mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    (state / "run" / "up.json").write_bytes(msgspec.json.encode({"api": api, "admin": admin, "pids": {}}))
    for name, secret in (("admin-token", TOKEN), ("key", "sk-test-key")):
        path = state / name
        path.touch(mode=0o600)
        path.write_text(secret + "\n", encoding="ascii")
