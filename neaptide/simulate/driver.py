"""A fleet in virtual time: a request-level run's replicas as control sees them (fleet/driver.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from neaptide.clock import Clock
from neaptide.errors import ProcessError
from neaptide.fleet.local import CUT_S
from neaptide.simulate import replica as simulated
from neaptide.simulate.fates import USUAL, Fate
from neaptide.simulate.replicas import Replicas
from neaptide.table import ReplicaRow
from neaptide.types import SPARE, Deployment, Launch, Replica


class Known(NamedTuple):
    replica: simulated.Replica
    deployment: Deployment
    spared: bool


class SimulatedDriver:
    """Of one deployment. Time is `clock`'s; whoever moves it has let `replicas` do what was due. The nth launch has the
    nth of `fates`, those after them the usual one."""

    def __init__(self, replicas: Replicas, clock: Clock, fates: Iterable[Fate] = ()) -> None:
        self._replicas, self._clock, self._fates = replicas, clock, iter(fates)
        self._launched: dict[str, Known] = {}
        self.spares: dict[str, int] = {}

    async def observe(self) -> Sequence[Replica]:
        return [k.replica.told(id, k.deployment.model, k.deployment.stable.id) for id, k in self._known().items()]

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        if launch.replica in self._known():
            return
        fate = next(self._fates, USUAL)
        if fate.refused:
            raise ProcessError(f"{launch.replica} cannot start", why=fate.refused)
        engine = deployment.stable.engine
        spared = self.spares.get(engine, 0) > 0
        if spared:
            self.spares[engine] -= 1
        replica = self._replicas.launch(self._clock.mono_s(), fate, spared=spared)
        self._launched[launch.replica] = Known(replica, deployment, spared)

    async def drain(self, id: str) -> None:
        known = self._known().get(id)
        if known is None or known.replica.state == "draining":
            return
        if known.replica.state == "dead":
            del self._launched[id]
            return
        self._replicas.drain(known.replica, self._clock.mono_s(), known.deployment.drain_s + CUT_S)

    async def park(self, id: str) -> None:
        known = self._known().get(id)
        if known is not None and known.replica.state == "ready":
            self._replicas.park(known.replica, self._clock.mono_s())

    async def wake(self, id: str) -> None:
        known = self._known().get(id)
        if known is not None and known.replica.state == "standby":
            self._replicas.wake(known.replica, self._clock.mono_s())

    async def keep_spares(self, wanted: Mapping[str, int]) -> None:
        """They are up at once: what a spare itself takes to start is not simulated."""
        self.spares = dict(wanted)

    async def forget(self, id: str) -> None:
        known = self._launched.get(id)
        if known is not None and known.replica.state == "dead":
            del self._launched[id]

    def rows(self) -> Mapping[str, ReplicaRow]:
        serving = ("ready", "standby", "draining")
        return {id: _row(id, k) for id, k in self._known().items() if k.replica.state in serving}

    async def close(self) -> None: ...

    def in_flight(self) -> dict[str, int]:
        """By replica, as gateways tell it."""
        return {id: k.replica.engine.in_flight for id, k in self._known().items() if k.replica.engine.in_flight}

    def stages(self) -> dict[str, dict[str, float]]:
        """By replica: what its start took, as replicas tell it."""
        return {id: _stages(k) for id, k in self._known().items()}

    def _known(self) -> dict[str, Known]:
        """A replica that has ended in draining is gone."""
        self._launched = {id: k for id, k in self._launched.items() if k.replica.state != "gone"}
        return self._launched


def _row(id: str, known: Known) -> ReplicaRow:
    deployment, target = known.deployment, known.replica.target.row
    return ReplicaRow(
        id=id,
        model=deployment.model,
        endpoint=target.endpoint,
        revision=deployment.stable.id,
        epoch=known.replica.number + 1,
        state="ready" if known.replica.state == "ready" else "draining",
        max_running=target.max_running,
    )


def _stages(known: Known) -> dict[str, float]:
    """Those that are no model's are what a spare has behind it: `spawn_s`."""
    stages = known.replica.stages
    spawn_s = sum((s.seconds for s in stages if s.spared), 0.0)
    told = {s.name: s.seconds for s in stages if not s.spared}
    return told | ({SPARE: 0.0} if known.spared else {"spawn_s": spawn_s})
