"""What the page asks of control, and control's answers: the only file here that knows how control is built."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Protocol

import msgspec

from neaptide import __version__
from neaptide.clock import mono_s, wall_s
from neaptide.control.port import UsageFilter, UsageRow
from neaptide.dashboard.live import NAN, Fleet
from neaptide.table import Gauges
from neaptide.tls.context import ANY_TIME, first_pem, pinned
from neaptide.types import Deployment, Override, Plan, Replica, Slo, Traits

if TYPE_CHECKING:
    from neaptide.control.app import Control

STALE_S = 5.0  # a gateway that was silent for so long tells nothing
NO_FLEET = Fleet(slots=0.0)  # of a model whose pool has the replicas


class About(msgspec.Struct, frozen=True, kw_only=True):
    """One model as it is configured, for the page."""

    model: str  # or a pool ...
    members: tuple[str, ...] = ()  # ... of these models
    engine: str = ""
    remote: bool = False
    slo: Slo = Slo()
    min: int = 0
    max: int = 0
    policy: str = ""
    price_per_hour: float = 0.0  # of one replica; 0: not known
    learnt: str = ""  # what one replica serves: assumed | measured
    failing: str = ""
    override: Override | None = None  # a count that is set by hand, and until when


class ReplicaLine(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    model: str
    state: str
    running: int = 0
    slots: int | None = None  # None: without limit, or not told
    started_wall_s: float = 0.0  # 0: not told
    error: str = ""


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that control holds, at one moment."""

    wall_s: float
    mono_s: float
    gauges: tuple[Gauges, ...] = ()
    fleets: dict[str, Fleet] = {}
    about: tuple[About, ...] = ()
    replicas: tuple[ReplicaLine, ...] = ()
    plans: tuple[tuple[float, Plan], ...] = ()  # the last ticks', oldest first


class Source(Protocol):
    """Where the page's numbers come from, and whom its playground asks."""

    version: str
    api_url: str  # http://host:port/v1
    admin_url: str

    @property
    def currency(self) -> str: ...

    def key(self) -> str:
        """The API key that the playground uses."""

    def api_tls(self) -> ssl.SSLContext | None:
        """How to speak to the inference API where that is https; NeaptideError when nothing is known of it."""

    def look(self) -> Look: ...

    async def newest(self, since_wall_s: float, limit: int) -> tuple[UsageRow, ...]:
        """Requests that started since then, newest first; NeaptideError while the ledger is away."""


class ControlSource:
    """Control's memory; nothing here is asked of another process but the ledger's rows."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.version = __version__
        self.api_url, self.admin_url = control.spec.api_url, control.spec.admin_url

    @property
    def currency(self) -> str:
        return self._control.settings.currency

    def key(self) -> str:
        state = self._control.state
        return state.secret(state.key)

    def api_tls(self) -> ssl.SSLContext | None:
        if not self.api_url.startswith("https:"):
            return None
        return pinned(first_pem(str(self._control.state.api_leaf)), ANY_TIME)

    async def newest(self, since_wall_s: float, limit: int) -> tuple[UsageRow, ...]:
        return (await self._control.usage(UsageFilter(since_s=since_wall_s), None, limit)).rows

    def look(self) -> Look:
        c, now_s = self._control, mono_s()
        heard = (g for g in c.publisher.gateways.values() if now_s - g.heard_s <= STALE_S)
        slots = {r.id: self._slots(r) for r in c.replicas}
        pooled = {model for u in c.units for model in u.members}
        shown = [*c.deployments, *(u for u in c.units if u.members)]  # a pool has replicas, its models have traffic
        return Look(
            wall_s=wall_s(),
            mono_s=now_s,
            gauges=tuple(g.gauges for g in heard if g.gauges is not None),
            fleets={d.model: NO_FLEET if d.model in pooled else self._fleet(d, slots) for d in shown},
            about=tuple(self._about(d, d.model in pooled) for d in shown),
            replicas=tuple(self._line(r, slots[r.id], now_s) for r in c.replicas),
            plans=tuple(c.plans),
        )

    def _slots(self, replica: Replica) -> int | None:
        remote = self._control.static.rows().get(replica.id)
        if remote is not None:
            return remote.max_running
        told = self._control.local.about(replica.id).description
        return told.max_running or None if told else None

    def _fleet(self, d: Deployment, slots: dict[str, int | None]) -> Fleet:
        model, scale, remote = d.model, d.scale, not d.stable.engine
        mine = [r for r in self._control.replicas if r.deployment == model]
        ready = [slots[r.id] for r in mine if r.state == "ready"]
        traits = self._traits(model)
        serves = traits.slots / traits.service_s if traits and traits.service_s else NAN
        wanted = self._control.loop.carry.wanted.get(model, scale.min)
        return Fleet(
            ready=len(ready),
            starting=sum(r.state == "starting" for r in mine),
            billed=sum(scale.standby.rent if r.state == "standby" else 1.0 for r in mine),
            wanted=NAN if remote else float(wanted),
            slots=sum(NAN if n is None else n for n in ready),
            capacity_per_s=serves * len(ready),
            price_per_hour=scale.price_per_hour,
            remote=remote,
        )

    def _about(self, d: Deployment, pooled: bool) -> About:
        model, engine, failing = d.model, d.stable.engine, self._control.failing
        if pooled:
            shared = self._traits(self._control.unit_of(model).model)
            learnt = shared.learnt if shared else ""
            return About(model=model, engine=engine, slo=d.slo, learnt=learnt, failing=failing.get(model, ""))
        scale, traits = d.scale, self._traits(model)
        return About(
            model=model,
            members=d.members,
            engine=engine,
            remote=not engine,
            slo=d.slo,
            min=scale.min,
            max=scale.max,
            policy=scale.policy,
            price_per_hour=scale.price_per_hour,
            learnt=traits.learnt if traits else "",
            failing=next((failing[m] for m in d.models if m in failing), ""),
            override=self._control.scaling.overrides().get(model),
        )

    def _traits(self, model: str) -> Traits | None:
        """What the loop has learnt of one replica; None before it has looked, and for replicas that others run."""
        seen = self._control.loop.snapshot
        return seen.traits.get(model) if seen else None

    def _line(self, replica: Replica, slots: int | None, now_s: float) -> ReplicaLine:
        return ReplicaLine(
            id=replica.id,
            model=replica.deployment,
            state="queued" if replica.queued else replica.state,
            running=replica.running,
            slots=slots,
            started_wall_s=wall_s() - (now_s - replica.started_s) if replica.started_s else 0.0,
            error=replica.error,
        )
