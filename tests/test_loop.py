"""The loop: beats and nudges, a control that dies between deciding and acting, and clocks that jump."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from neaptide.clock import mono_s
from neaptide.control.decisions import DecisionJournal
from neaptide.control.keep import Kept
from neaptide.control.loop import JUMP_S, Loop, SteadyWall
from neaptide.control.traits import Told
from neaptide.table import Gauges, ModelGauge, ReplicaRow
from neaptide.types import Carry, Deployment, Launch, Override, Plan, Replica, Revision, Scale


class MemoryDriver:
    """Replicas in memory; `broken` makes every launch fail as a killed control would leave it: not done."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.broken = False

    async def observe(self) -> Sequence[Replica]:
        return list(self.replicas.values())

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        if self.broken:
            raise ConnectionResetError
        if launch.replica not in self.replicas:
            self.replicas[launch.replica] = Replica(
                id=launch.replica, deployment=deployment.model, revision=deployment.stable.id, state="ready",
                endpoint="", started_s=mono_s(),
            )  # fmt: skip

    async def drain(self, id: str) -> None:
        self.replicas.pop(id, None)

    async def park(self, id: str) -> None:
        if (r := self.replicas.get(id)) is not None and r.state == "ready":
            self.replicas[id] = replace(r, state="standby", parked_s=mono_s())

    async def wake(self, id: str) -> None:
        if (r := self.replicas.get(id)) is not None and r.state == "standby":
            self.replicas[id] = replace(r, state="ready", parked_s=0.0)

    async def keep_spares(self, wanted: Mapping[str, int]) -> None:
        self.spares = dict(wanted)

    async def forget(self, id: str) -> None:
        self.replicas.pop(id, None)

    def rows(self) -> Mapping[str, ReplicaRow]:
        return {}

    async def close(self) -> None: ...


class World:
    """A loop over a driver in memory, and what gateways would say."""

    def __init__(self, tmp_path: Path, scale: Scale) -> None:
        self.driver, self.path = MemoryDriver(), tmp_path / "decisions.jsonl"
        self.deployment = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=scale)
        self.gauge: ModelGauge | None = None
        self.overrides: dict[str, Override] = {}
        self.kept: list[Kept] = []
        self.plans: list[Plan] = []

    def loop(self) -> Loop:
        return Loop(
            (self.driver,), lambda: [self.deployment], self.gauges, self.told, DecisionJournal(self.path),
            about=lambda: {"m": Told(slots=4)}, overrides=lambda: self.overrides, keep=self.kept.append,
        )  # fmt: skip

    def gauges(self) -> list[Gauges]:
        models = {"m": self.gauge} if self.gauge else {}
        return [Gauges(gateway="gateway-0", mono_s=mono_s(), fast=1, slow=1, models=models)] if models else []

    def told(self, replicas: Sequence[Replica], plan: Plan, carry: Carry) -> None:
        self.plans.append(plan)


def test_a_control_that_dies_between_deciding_and_acting_leaves_the_same_decision_to_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=2, max=2))
        world.driver.broken = True
        with pytest.raises(ConnectionResetError):
            await world.loop().tick()
        assert not world.driver.replicas
        world.driver.broken = False
        second = world.loop()
        await second.tick()
        assert set(world.driver.replicas) == {"m-0", "m-1"}
        await world.loop().tick()  # a third adopts what is there
        assert set(world.driver.replicas) == {"m-0", "m-1"}

    asyncio.run(story())


def test_a_successor_holds_what_runs_until_gateways_speak_whatever_was_kept(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=1, max=9, policy="knative"))
        first = world.loop()
        world.overrides = {"m": Override(count=5, until_wall_s=1e12)}
        await first.tick()
        assert len(world.driver.replicas) == 5
        world.overrides = {}
        second = world.loop()
        second.resume(first.kept())
        await second.tick()
        assert len(world.driver.replicas) == 5
        assert "no gateway has told" in world.plans[-1].choices[0].sentence

    asyncio.run(story())


def test_a_tick_between_two_beats_takes_no_counts_but_wakes_a_model_at_zero(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=0, max=3, policy="hpa"))
        loop = world.loop()
        world.gauge = ModelGauge(arrivals=10)
        await loop.tick()
        world.gauge = ModelGauge(arrivals=12, waiting=2)
        await loop.tick()
        assert set(world.driver.replicas) == {"m-0"}
        world.gauge = ModelGauge(arrivals=13, running=3)
        await loop.tick()
        assert loop.snapshot is not None
        assert loop.snapshot.loads["m"].arrivals == 3  # since the beat: nothing was taken meanwhile
        assert loop.snapshot.traits["m"].slots == 4

    asyncio.run(story())


def test_nudges_do_not_make_the_beat_faster_or_slower(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=1, max=3, policy="hpa"))
        world.gauge = ModelGauge()
        loop = world.loop()
        seen: list[float] = []
        task = asyncio.create_task(loop.run())
        while len(seen) < 4:
            at_s = loop._heard.at_s
            if at_s > 0 and (not seen or at_s != seen[-1]):
                seen.append(at_s)
            loop.nudge()
            await asyncio.sleep(0.02)
        task.cancel()
        assert len(world.plans) > 3 * len(seen)
        assert all(later - earlier >= 0.9 for earlier, later in itertools.pairwise(seen))

    asyncio.run(story())


def test_policy_time_never_goes_back_and_follows_a_clock_that_was_set_ahead() -> None:
    clock = SteadyWall()
    assert clock.at(100.0, 5000.0) == 5000.0
    assert clock.at(110.0, 4000.0) == 5010.0  # set back: not followed
    assert clock.at(120.0, 5021.0) == 5020.0  # a little ahead: not followed either
    assert clock.at(130.0, 5030.0 + JUMP_S + 1) == 5030.0 + JUMP_S + 1
    assert clock.at(131.0, 9.0) == 5030.0 + JUMP_S + 2
