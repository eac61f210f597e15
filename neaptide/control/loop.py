"""Observe, decide, act: once a second, and at once when a replica became ready or died."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from neaptide.clock import mono_s, wall_s
from neaptide.control.decide import decide
from neaptide.control.decisions import DecisionJournal, Line
from neaptide.errors import NeaptideError
from neaptide.fleet.driver import Driver
from neaptide.table import Gauges, ReplicaRow
from neaptide.types import Carry, Deployment, Plan, Replica, Snapshot

TICK_S = 1.0
Told = Callable[[Sequence[Replica], Plan, Carry], None]


class Loop:
    """Runs the tick over `drivers`; `deployments` and `gauges` are asked anew each time, `told` hears the outcome."""

    def __init__(
        self,
        drivers: Sequence[Driver],
        deployments: Callable[[], Sequence[Deployment]],
        gauges: Callable[[], Sequence[Gauges]],
        told: Told,
        journal: DecisionJournal,
    ) -> None:
        self._drivers, self._deployments, self._gauges = drivers, deployments, gauges
        self._told, self._journal = told, journal
        self._stillborn: list[Replica] = []
        self._nudge = asyncio.Event()
        self.carry = Carry()

    def nudge(self) -> None:
        """Something changed: tick now."""
        self._nudge.set()

    async def run(self) -> None:
        while True:
            self._nudge.clear()
            await self.tick()
            try:
                await asyncio.wait_for(self._nudge.wait(), TICK_S)
            except TimeoutError:
                continue

    async def tick(self) -> None:
        snapshot = await self.observe()
        carry = self.carry
        plan, self.carry = decide(snapshot, carry)
        self._journal.note(Line(wall_s=wall_s(), snapshot=snapshot, carry=carry, plan=plan, carry_after=self.carry))
        self._stillborn = await self.act(plan, snapshot)
        self._told([*snapshot.replicas, *self._stillborn], plan, self.carry)

    async def observe(self) -> Snapshot:
        busy = in_flight(self._gauges())
        replicas = [
            msgspec.structs.replace(r, running=busy.get(r.id, r.running))
            for driver in self._drivers
            for r in await driver.observe()
        ]
        return Snapshot(now_s=mono_s(), deployments=tuple(self._deployments()), replicas=(*replicas, *self._stillborn))

    async def act(self, plan: Plan, snapshot: Snapshot) -> list[Replica]:
        """Carry out `plan`; each step is safe to repeat. A launch that fails at once is told as a dead replica."""
        deployments = {d.model: d for d in snapshot.deployments}
        failed = []
        for replica in snapshot.replicas:
            if replica.state == "dead":
                for driver in self._drivers:
                    await driver.forget(replica.id)
        for launch in plan.launches:
            try:
                await self._drivers[0].launch(launch, deployments[launch.deployment])
            except NeaptideError as e:
                failed.append(_stillborn(launch.replica, deployments[launch.deployment], e))
        for id in plan.drains:
            for driver in self._drivers:
                await driver.drain(id)
        return failed

    def rows(self) -> tuple[ReplicaRow, ...]:
        return tuple(row for driver in self._drivers for row in driver.rows().values())


def in_flight(gauges: Sequence[Gauges]) -> Mapping[str, int]:
    """Requests in flight per replica, all gateways together."""
    out: dict[str, int] = {}
    for g in gauges:
        for id, n in g.replicas.items():
            out[id] = out.get(id, 0) + n
    return out


def _stillborn(id: str, deployment: Deployment, error: NeaptideError) -> Replica:
    return Replica(
        id=id, deployment=deployment.model, revision=deployment.stable.id, state="dead", endpoint="", error=str(error)
    )
