"""Observe, decide, act: once a second, and at once when a replica became ready or died or a request found none.

A tick on the beat takes the gateways' counts and asks the policies; one between two beats only looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from neaptide.clock import Clock, RealClock
from neaptide.control.decide import decide
from neaptide.control.decisions import DecisionJournal, Line
from neaptide.control.keep import EVERY_S, Kept
from neaptide.control.shadow import Shadows
from neaptide.control.signals import Heard, read
from neaptide.control.size import BEAT_S, TICK_S, is_stale
from neaptide.control.traits import Memory as Learnt
from neaptide.control.traits import Told as Replicas
from neaptide.control.traits import learn, traits
from neaptide.errors import NeaptideError
from neaptide.fleet.driver import Driver
from neaptide.table import Gauges, ReplicaRow
from neaptide.types import Carry, Deployment, Override, Plan, Replica, Snapshot, Spares

REAL = RealClock()
JUMP_S = 60.0  # by which the wall clock may run ahead before it is followed
Told = Callable[[Sequence[Replica], Plan, Carry], None]


class Loop:
    """Runs the tick over `drivers`; `deployments`, `gauges`, `about` (what a model's replicas say of themselves),
    `overrides`, `currency` and `spares` are asked anew each time, `told` hears the outcome, `keep` what a successor
    needs."""

    def __init__(
        self,
        drivers: Sequence[Driver],
        deployments: Callable[[], Sequence[Deployment]],
        gauges: Callable[[], Sequence[Gauges]],
        told: Told,
        journal: DecisionJournal,
        *,
        about: Callable[[], Mapping[str, Replicas]] = dict,
        overrides: Callable[[], Mapping[str, Override]] = dict,
        currency: Callable[[], str] = str,
        spares: Callable[[], Spares] = Spares,
        keep: Callable[[Kept], None] = lambda kept: None,
        clock: Clock = REAL,
    ) -> None:
        self._drivers, self._deployments, self._gauges = drivers, deployments, gauges
        self._about, self._overrides, self._currency = about, overrides, currency
        self._told, self._journal, self._keep, self._spares = told, journal, keep, spares
        self._stillborn: list[Replica] = []
        self._nudge = asyncio.Event()
        self._heard, self._clock, self._wall = Heard(), clock, SteadyWall()
        self._kept_s = clock.mono_s()
        self.learnt, self.shadows = Learnt(), Shadows(Kept().shadows)
        self.carry, self.plan = Carry(), Plan()
        self.snapshot: Snapshot | None = None

    def resume(self, kept: Kept) -> None:
        """Go on from what another control kept; before the first tick."""
        self.carry = Carry(policies=kept.policies)
        self.learnt = msgspec.structs.replace(kept.learnt, watched={})
        self.shadows = Shadows(kept.shadows)

    def kept(self) -> Kept:
        now_s, days = self._clock.wall_s(), self.shadows.days()
        return Kept(wall_s=now_s, policies=self.carry.policies, learnt=self.learnt, shadows=days)

    def nudge(self) -> None:
        """Something changed: tick now."""
        self._nudge.set()

    async def run(self) -> None:
        while True:
            self._nudge.clear()
            await self.tick()
            rest_s = min(TICK_S, max(0.0, self._heard.at_s + TICK_S - self._clock.mono_s()))
            try:
                await asyncio.wait_for(self._nudge.wait(), rest_s)
            except TimeoutError:
                continue

    async def tick(self) -> None:
        snapshot, on_beat = await self.observe()
        carry, wall_s = self.carry, self._clock.wall_s()
        plan, self.carry = decide(snapshot, carry)
        self._journal.note(Line(wall_s=wall_s, snapshot=snapshot, carry=carry, plan=plan, carry_after=self.carry))
        self.snapshot, self.plan = snapshot, plan
        self._stillborn = await self.act(plan, snapshot)
        self._told([*snapshot.replicas, *self._stillborn], plan, self.carry)
        if on_beat:
            self._shadow(snapshot)
            if snapshot.now_s - self._kept_s >= EVERY_S:
                self._kept_s = snapshot.now_s
                self._keep(self.kept())

    async def observe(self) -> tuple[Snapshot, bool]:
        """What there is, and whether this tick is on the beat: its counts are taken."""
        gauges, about = self._gauges(), self._about()
        busy = in_flight(gauges)
        replicas = [
            msgspec.structs.replace(r, running=busy.get(r.id, r.running))
            for driver in self._drivers
            for r in await driver.observe()
        ]
        deployments, now_s = tuple(self._deployments()), self._clock.mono_s()
        pool_of = {model: d.model for d in deployments for model in d.members}
        loads, heard = read(gauges, self._heard, now_s, about, pool_of)
        on_beat = now_s - self._heard.at_s >= BEAT_S * TICK_S
        self._heard = heard if on_beat else self._heard
        self.learnt = learn(self.learnt, deployments, replicas, loads if on_beat else {}, about, now_s)
        snapshot = Snapshot(
            now_s=now_s,
            now_wall_s=self._wall.at(now_s, self._clock.wall_s()),
            deployments=deployments,
            replicas=(*replicas, *self._stillborn),
            loads=loads,
            traits={d.model: traits(d, self.learnt) for d in deployments},
            overrides=dict(self._overrides()),
            currency=self._currency(),
            spares=self._spares(),
        )
        return snapshot, on_beat

    async def act(self, plan: Plan, snapshot: Snapshot) -> list[Replica]:
        """Carry out `plan`; each step is safe to repeat. A launch that fails at once is told as a dead replica."""
        deployments = {d.model: d for d in snapshot.deployments}
        failed = []
        for replica in snapshot.replicas:
            if replica.state == "dead":
                for driver in self._drivers:
                    await driver.forget(replica.id)
        for driver in self._drivers:  # first: a request may wait for it
            for id in plan.wakes:
                await driver.wake(id)
        for launch in plan.launches:
            try:
                await self._drivers[0].launch(launch, deployments[launch.deployment])
            except NeaptideError as e:
                failed.append(_stillborn(launch.replica, deployments[launch.deployment], e))
        for driver in self._drivers:
            for id in plan.parks:
                await driver.park(id)
            for id in plan.drains:
                await driver.drain(id)
            await driver.keep_spares(plan.spares)
        return failed

    def rows(self) -> tuple[ReplicaRow, ...]:
        return tuple(row for driver in self._drivers for row in driver.rows().values())

    def _shadow(self, snapshot: Snapshot) -> None:
        elastic = [d for d in snapshot.deployments if d.scale.max > d.scale.min]
        self.shadows.keep_only(d.model for d in elastic)
        for d in elastic:
            load = snapshot.loads.get(d.model)
            if load is not None and not is_stale(load) and load.tick_s > 0:
                shares = {"starting": 1.0, "ready": 1.0, "standby": d.scale.standby.rent}
                paid = sum(shares.get(r.state, 0.0) for r in snapshot.replicas if r.deployment == d.model)
                self.shadows.step(d, load, snapshot.traits[d.model], paid, snapshot.now_wall_s)


class SteadyWall:
    """Wall time that never goes back: daily patterns and timers lean on it. It follows a clock that was set ahead;
    one that was set back is followed by the next control."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None  # of the monotonic clock

    def at(self, mono_s: float, wall_s: float) -> float:
        if self._ahead_s is None or wall_s - mono_s - self._ahead_s > JUMP_S:
            self._ahead_s = wall_s - mono_s
        return mono_s + self._ahead_s


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
