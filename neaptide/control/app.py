"""Control's process: connects the supervisor, the drivers, the loop, the table and the admin API, and answers for them.

Starts without waiting for the ledger: replicas load while the database opens. A restart adopts the running replicas and
tells gateways the table again; no request notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from neaptide import lifeline
from neaptide.clock import RealClock, wall_s
from neaptide.config import ModelSettings, Settings, StoreSettings, parse
from neaptide.control import answers, keep
from neaptide.control.admin import build_app
from neaptide.control.books import Books
from neaptide.control.decisions import DecisionJournal
from neaptide.control.desired import deployment, difference, grouped, members, redacted, slow_part
from neaptide.control.gate import Access
from neaptide.control.gpus import GpuWatch
from neaptide.control.guard import Front
from neaptide.control.listen import AdminServer, hosts
from neaptide.control.loop import Loop, in_flight
from neaptide.control.port import (
    ApplyReport,
    BackupReport,
    BudgetRow,
    Budgets,
    Choices,
    ConfigView,
    CreatedKey,
    Decisions,
    DownReport,
    GroupBy,
    KeyChange,
    KeyInfo,
    Keys,
    Models,
    NewBudget,
    NewKey,
    NewOverride,
    ScaleRow,
    Scales,
    Shadows,
    Status,
    UsageFilter,
    UsagePage,
    UsageTotals,
)
from neaptide.control.prime import Priming
from neaptide.control.publish import Gateway, Publisher
from neaptide.control.scaling import Scaling, check
from neaptide.cost.prices import rates
from neaptide.errors import ConfigError, NeaptideError
from neaptide.fleet import cores
from neaptide.fleet.line import starts_at_once
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.process import ChildStatus
from neaptide.fleet.rpc import Client
from neaptide.fleet.state import StateDir, write_private
from neaptide.fleet.static import StaticDriver
from neaptide.fleet.supervisor import Report
from neaptide.models.hold import hold, release
from neaptide.models.sources import resolve
from neaptide.specs import ControlSpec, ReplicaSpec
from neaptide.table import Fast, Gauges, ModelGauge
from neaptide.tls.served import Served
from neaptide.types import Carry, Deployment, Launch, Plan, Replica

HOPELESS = "E2"  # a model error: starting the replica again will not mend it
DEATHS_BEFORE_FAILING = 3
PLANS_KEPT = 64  # ticks; who shows them looks once a second


class Control:
    """Implements ControlPort. All of it runs on one loop; only the ledger has a thread."""

    def __init__(self, spec: ControlSpec, front: Callable[[Control], Front] | None = None) -> None:
        self.spec, self.state = spec, StateDir(Path(spec.state_dir))
        self._make_front = front
        self.started_wall_s = wall_s()
        self.text, self.origin = _kept(self.state)
        self.settings = parse(self.text, str(self.origin), self.origin.parent)
        self.sources: dict[str, Weights] = {}
        self._held: list[int | None] = []  # those of them that a node's cache must not evict
        self.deployments: tuple[Deployment, ...] = ()  # one a model
        self.units: tuple[Deployment, ...] = ()  # what has replicas: pools, and models in none
        self.replicas: Sequence[Replica] = ()
        self.plans: deque[tuple[float, Plan]] = deque(maxlen=PLANS_KEPT)  # (wall s, plan), newest last
        self.failing: dict[str, str] = {}
        self.created_s: dict[str, int] = {}
        self.restarts: dict[str, int] = {}
        self.processes: tuple[ChildStatus, ...] = ()
        self._told_ready = False
        self._reports: set[asyncio.Task[None]] = set()
        self._event_loop = asyncio.get_running_loop()
        self.supervisor = Client(self._event, self._orphaned)
        self.books = Books(self.state, self.settings)
        self.publisher = Publisher(spec.token, self._on_gauges, self.books.lender)
        self.local = LocalDriver(
            self.supervisor,
            self.state,
            spec.token,
            self._replica_spec,
            self._nudge,
            at_once=starts_at_once(cores.usable()),
        )
        self.static = StaticDriver({}, {})
        self.gpus = GpuWatch()
        self.priming = Priming(self.local.http_path, spec.token)
        self.journal = DecisionJournal(self.state.log / "decisions.jsonl")
        self.scaling = Scaling(self)
        self.loop = Loop(
            (self.local, self.static),
            self._scaled,
            self._gauges,
            self._told,
            self.journal,
            about=self.scaling.about,
            overrides=self.scaling.overrides,
            currency=self.scaling.currency,
            spares=lambda: self.settings.spares,
            keep=self.scaling.keep,
        )
        tls = spec.admin_tls
        self.served = Served(tls, "admin.listen", str(self.state.admin_leaf)) if tls is not None else None
        self.ending = asyncio.Event()

    # -- life --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until SIGTERM; raises nothing for what a model or the ledger does wrong: that is reported and shown."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.ending.set)
        if await keep.hold(self.state.root / "control.lock", self.ending) is None:
            return
        await self.supervisor.connect(self.state.supervisor_sock)
        opening = asyncio.create_task(self.books.open(self.state.secret(self.state.key)))
        await self.publisher.listen(self.state.control_sock)
        await self._list_processes()
        await self.local.adopt()
        try:
            await self._configure(self.settings)
            self.loop.resume(self.scaling.resume())
            access = await asyncio.to_thread(Access.open, self.state, RealClock())
            loop = asyncio.create_task(self.loop.run())
            await opening
        except NeaptideError as e:
            await self._report(Report(stage="failed", error=e.as_dict()))
            await self.ending.wait()
            return
        self._publish()
        keeping = asyncio.create_task(self.books.keep(self.local, self.spec.token))
        watching = asyncio.create_task(self.gpus.run())
        lending = asyncio.create_task(self.books.lender.run())
        await self._serve_admin(access, (loop, keeping, watching, lending))

    async def _serve_admin(self, access: Access, tasks: tuple[asyncio.Task[None], ...]) -> None:
        front = self._make_front(self) if self._make_front else None
        names = hosts(self.spec.admin_url, self.settings.admin.listen, self.served)
        app = build_app(self, access, names, front=front)
        tasks = (*tasks, asyncio.create_task(front.run())) if front else tasks
        server = AdminServer(app, self.served)
        serving = asyncio.create_task(server.serve([socket.socket(fileno=self.spec.admin_fd)]))
        ending = asyncio.create_task(self.ending.wait())
        await asyncio.wait({serving, ending, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        for task in tasks:
            if task.done():
                task.result()  # it ended by itself: it failed; say why, and be started again
            task.cancel()
        self.scaling.keep(self.loop.kept())
        await self.books.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(serving, 1.0)
        await access.close()

    # -- what happens ------------------------------------------------------------------------------------------

    def _event(self, event: str, body: msgspec.Raw) -> None:
        if event != "exit":
            return
        status = msgspec.json.decode(body, type=ChildStatus)
        self.restarts[status.id] = self.restarts.get(status.id, 0) + 1
        if status.kind in ("replica", "spare"):
            self.local.exited(status)
        elif status.kind == "gateway":
            self.books.gateway_died()

    def _orphaned(self) -> None:
        self.ending.set()  # the lifeline ends us too; this only hurries a clean close

    def _nudge(self) -> None:
        self.loop.nudge()

    def _on_gauges(self, gateway: Gateway) -> None:
        if not self._told_ready or self.scaling.is_starving():
            self._nudge()

    def _gauges(self) -> list[Gauges]:
        return [g.gauges for g in self.publisher.gateways.values() if g.gauges is not None]

    def load_of(self) -> Mapping[str, int]:
        """Requests in flight per replica."""
        return in_flight(self._gauges())

    def left_out(self) -> Mapping[str, str]:
        """Why gateways give a replica nothing, by its id."""
        notes: dict[str, str] = {}
        for g in self._gauges():
            notes |= dict.fromkeys(g.erring, f"gateway {g.gateway} leaves it out: it answers with errors")
            notes |= dict.fromkeys(g.unreachable, f"gateway {g.gateway} cannot reach it")
        return notes

    def waiting_of(self) -> Mapping[str, int]:
        """Requests that wait in the gateways, per model."""
        return self._of_models(lambda gauge: gauge.waiting)

    def running_of(self) -> Mapping[str, int]:
        """Requests at replicas, per model."""
        return self._of_models(lambda gauge: gauge.running)

    def _of_models(self, level: Callable[[ModelGauge], int]) -> dict[str, int]:
        out: dict[str, int] = {}
        for g in self._gauges():
            for model, gauge in g.models.items():
                out[model] = out.get(model, 0) + level(gauge)
        return out

    def _scaled(self) -> list[Deployment]:
        """The deployments whose replicas are ours to start."""
        return [d for d in self.units if d.stable.engine]

    def unit_of(self, model: str) -> Deployment:
        """The deployment whose replicas serve `model`: its pool, or itself."""
        return next(d for d in self.units if model in d.models)

    def _told(self, replicas: Sequence[Replica], plan: Plan, carry: Carry) -> None:
        self.replicas = [r for r in replicas if r.state != "dead"]
        self.plans.append((wall_s(), plan))
        for d in self.units:
            dead = [r for r in replicas if r.deployment == d.model and r.state == "dead"]
            hopeless = any(f"error[{HOPELESS}" in r.error for r in dead)
            stuck = [r for r in replicas if r.deployment == d.model and r.id in plan.stuck]
            if any(r.deployment == d.model and r.state == "ready" for r in replicas):
                self._fails(d, "")
            elif stuck:
                self._fails(d, f"error[E305]: {stuck[-1].id} did not get ready in time and was stopped")
            elif dead and (hopeless or carry.failures.get(d.model, 0) >= DEATHS_BEFORE_FAILING):
                self._fails(d, dead[-1].error)
        self.priming.launched(plan.launches, {d.model: d.stable.id for d in self._scaled()}, replicas)
        self._publish()
        self._check_ready()

    def _fails(self, unit: Deployment, error: str) -> None:
        """Why none of its replicas starts, for each model they would serve; "" where one has."""
        for model in unit.models:
            self.failing.pop(model, None)
            if error:
                self.failing[model] = error

    def _publish(self) -> None:
        keys = self.books.keys
        if keys is None:
            return  # the ledger is still opening; gateways keep what they have
        keys = self.books.lender.rows(keys, wall_s())
        slow = slow_part(self.settings, self.deployments, keys, self.failing, self.created_s, self.books.prices)
        self.publisher.replace(Fast(replicas=self.loop.rows()), slow)

    def _check_ready(self) -> None:
        """Tell `up`, once: all is there, or why it cannot be."""
        if self._told_ready or self.books.keys is None:
            return
        for model, error in self.failing.items():
            self._told_ready = True
            self._nudge_report(Report(stage="failed", text=model, error=_as_dict(error)))
            return
        if self.publisher.in_force() and self.whole():
            self._told_ready = True
            for r in self.local.ready():
                self._nudge_report(Report(stage="replica", text=r.id, seconds=round(r.ready_s, 3)))
            self._nudge_report(Report(stage="ready"))

    def whole(self) -> bool:
        ready: dict[str, int] = {}
        for r in self.replicas:
            ready[r.deployment] = ready.get(r.deployment, 0) + (r.state == "ready")
        return all(ready.get(d.model, 0) >= d.scale.min for d in self._scaled())

    def _nudge_report(self, report: Report) -> None:
        task = asyncio.get_running_loop().create_task(self._report(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    def _progress(self, line: str) -> None:
        """From the thread that looks for a model; a download takes its time and should show."""
        self._event_loop.call_soon_threadsafe(self._nudge_report, Report(stage="model", text=line))

    async def _report(self, report: Report) -> None:
        await self.supervisor.call("report", report)

    async def _list_processes(self) -> None:
        listed = await self.supervisor.call("list")
        self.processes = msgspec.json.decode(listed, type=tuple[ChildStatus, ...])

    # -- configuration -----------------------------------------------------------------------------------------

    async def _configure(self, settings: Settings) -> None:
        """Put `settings` in force. ModelError when a source cannot be had: nothing has changed then."""
        sources = {}
        for name, model in settings.models.items():
            sources[name] = await asyncio.to_thread(locate, model, self.state.cache, self._progress, settings.store)
        deployments = tuple(deployment(n, m, sources[n].digest) for n, m in settings.models.items())
        units = grouped(settings, deployments)
        check(units)
        held = [hold(Path(w.path)) for w in sources.values() if w.path]  # a replica may start at any moment
        for left in self._held:
            release(left)
        self.settings, self.sources, self._held = settings, sources, held
        self.deployments, self.units = deployments, units
        now = int(wall_s())
        self.created_s = {d.model: self.created_s.get(d.model, now) for d in self.deployments}
        self.failing = {k: v for k, v in self.failing.items() if k in settings.models}
        self.gpus.configure(settings.models)
        self.static.configure(settings.models, {d.model: d.stable.id for d in self.deployments})
        self.books.configure(settings)

    def _replica_spec(self, launch: Launch, d: Deployment) -> ReplicaSpec:
        options = self.settings.models[d.models[0]].options
        paths = {name: weights.path for name, weights in self.sources.items()}
        told = members(self.settings, d, paths, {x.model: x.stable.id for x in self.deployments})
        spec = ReplicaSpec(
            id=launch.replica,
            epoch=self.state.next_epoch(),
            model=d.model,
            revision=d.stable.id,
            engine=d.stable.engine,
            token=self.spec.token,
            link_path=str(self.local.link_path(launch.replica)),
            http_path=str(self.local.http_path(launch.replica)),
            cache_dir=str(self.state.cache),
            log_path=str(self.state.log / f"{launch.replica}.log"),
            grace_s=d.drain_s,
            engine_cpus=options.cpus,
            io_cpus=options.io_cpus,
            members=tuple(told),
        )
        return spec if d.members else msgspec.structs.replace(spec.each()[0], members=())

    # -- ControlPort -------------------------------------------------------------------------------------------

    async def status(self) -> Status:
        await self._list_processes()
        return await answers.status(self)

    async def apply(self, text: str, dry_run: bool, origin: str) -> ApplyReport:
        place = Path(origin) if origin else self.origin
        if not place.is_absolute():
            raise ConfigError(
                f"origin {origin!r} is not an absolute path", code="E605", fix="send the file's full path"
            )
        new = parse(text, str(place), place.parent)
        rates(new.prices)  # a price that is none is refused before anything has changed
        ids: dict[str, list[str]] = {}
        for r in self.replicas:
            ids.setdefault(r.deployment, []).append(r.id)
        report = difference(self.settings, new, ids, dry_run)
        if not dry_run:
            await self._configure(new)
            self.text, self.origin = text, place
            kept = {"origin": str(place), "text": text}
            write_private(self.state.config_json, msgspec.json.encode(kept).decode())
            self._publish()
            self._nudge()
        return report

    async def config(self) -> ConfigView:
        return ConfigView(path=str(self.origin), text=self.text, settings=redacted(self.settings))

    async def decisions(self, limit: int) -> Decisions:
        return Decisions(rows=tuple(list(self.journal.recent)[:limit]))

    async def models(self) -> Models:
        return Models(rows=answers.deployments(self))

    async def scales(self) -> Scales:
        return self.scaling.rows()

    async def choices(self, model: str, limit: int) -> Choices:
        return self.scaling.choices(model, limit)

    async def set_override(self, new: NewOverride) -> ScaleRow:
        return self.scaling.set(new)

    async def clear_override(self, model: str) -> ScaleRow:
        return self.scaling.clear(model)

    async def shadows(self, model: str, days: int) -> Shadows:
        return self.scaling.shadows(model, days)

    async def keys(self) -> Keys:
        return await self.books.list_keys()

    async def create_key(self, new: NewKey) -> CreatedKey:
        created = await self.books.create_key(new)
        self._publish()
        return created

    async def set_key(self, key_id: str, change: KeyChange) -> KeyInfo:
        changed = await self.books.set_key(key_id, change)
        self._publish()
        return changed

    async def revoke_key(self, key_id: str) -> KeyInfo:
        revoked = await self.books.revoke_key(key_id)
        self._publish()
        return revoked

    async def budgets(self) -> Budgets:
        return await self.books.list_budgets()

    async def set_budget(self, new: NewBudget) -> BudgetRow:
        row = await self.books.set_budget(new)
        self._publish()
        return row

    async def remove_budget(self, budget_id: str) -> BudgetRow:
        row = await self.books.remove_budget(budget_id)
        self._publish()
        return row

    async def usage(self, where: UsageFilter, cursor: str | None, limit: int) -> UsagePage:
        return await self.books.usage(where, cursor, limit)

    async def usage_totals(self, where: UsageFilter, by: GroupBy) -> UsageTotals:
        return await self.books.totals(where, by)

    async def backup(self) -> BackupReport:
        return await self.books.backup()

    async def down(self, grace_s: float) -> DownReport:
        await self.supervisor.call("down")
        return DownReport(accepted=True, grace_s=min(grace_s, self.spec.grace_s))


class Weights(NamedTuple):
    """Where a model lies on this host and what it is; empty for echo and for replicas that somebody else runs."""

    path: str = ""
    digest: str = ""
    precision: str = ""


def locate(model: ModelSettings, cache: Path, say: Callable[[str], None], store: StoreSettings) -> Weights:
    """Find (and fetch, from hub or store) a model's weights. ModelError when they cannot be had."""
    if model.replicas or model.engine == "echo":
        return Weights()
    found = resolve(model.source, cache, say, store)
    return Weights(str(found.path), found.digest, found.precision)


def _kept(state: StateDir) -> tuple[str, Path]:
    kept = msgspec.json.decode(state.config_json.read_bytes(), type=dict[str, str])
    return kept["text"], Path(kept["origin"])


def _as_dict(error: str) -> dict[str, str]:
    """An error text as fields again; what replicas leave in their logs comes as text."""
    lines = error.splitlines() or [""]
    code, _, what = lines[0].partition("]: ")
    out = {"code": code.removeprefix("error["), "what": what} if what else {"code": "E305", "what": lines[0]}
    for line in lines[1:]:
        word, _, rest = line.strip().partition("  ")
        if word in ("why", "fix"):
            out[word] = rest
    return out


def run(front: Callable[[Control], Front] | None = None) -> None:
    """The process: spec from stdin, until SIGTERM or the supervisor's end. `front` makes the dashboard."""
    spec = lifeline.read_spec(ControlSpec)
    lifeline.hold()

    async def live() -> None:
        await Control(spec, front).run()

    asyncio.run(live())
