"""The loop: beats and nudges, a control that dies between deciding and acting, and clocks that jump."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from neaptide.control.decisions import DecisionJournal
from neaptide.control.keep import Kept
from neaptide.control.loop import JUMP_S, Loop, SteadyWall
from neaptide.control.traits import Told
from neaptide.simulate.driver import SimulatedDriver
from neaptide.simulate.live import Live
from neaptide.simulate.settings import Setup
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Carry, Deployment, Launch, Override, Plan, Replica, Revision, Scale


class Broken(SimulatedDriver):
    """Its supervisor goes away at a launch, and control with it."""

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        raise ConnectionResetError


class World:
    """A loop over simulated replicas that are ready a moment after their launch, and what gateways would say."""

    def __init__(self, tmp_path: Path, scale: Scale) -> None:
        self.live, self.path = Live(Setup(boot=())), tmp_path / "decisions.jsonl"
        self.driver = self.live.driver
        self.deployment = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=scale)
        self.gauge: ModelGauge | None = None
        self.overrides: dict[str, Override] = {}
        self.kept: list[Kept] = []
        self.plans: list[Plan] = []

    def loop(self) -> Loop:
        return Loop(
            (self.driver,), lambda: [self.deployment], self.gauges, self.told, DecisionJournal(self.path),
            about=lambda: {"m": Told(slots=4)}, overrides=lambda: self.overrides, keep=self.kept.append,
            clock=self.live.clock,
        )  # fmt: skip

    async def ids(self) -> set[str]:
        return {r.id for r in await self.driver.observe()}

    def gauges(self) -> list[Gauges]:
        if self.gauge is None:
            return []
        now_s, models = self.live.clock.mono_s(), {"m": self.gauge}
        return [Gauges(gateway="gateway-0", mono_s=now_s, fast=1, slow=1, models=models)]

    def told(self, replicas: Sequence[Replica], plan: Plan, carry: Carry) -> None:
        self.plans.append(plan)


def test_a_control_that_dies_between_deciding_and_acting_leaves_the_same_decision_to_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=2, max=2))
        whole, world.driver = world.driver, Broken(world.live.replay.replicas, world.live.clock)
        with pytest.raises(ConnectionResetError):
            await world.loop().tick()
        assert not await world.ids()
        world.driver = whole
        second = world.loop()
        await second.tick()
        assert await world.ids() == {"m-0", "m-1"}
        await world.loop().tick()  # a third adopts what is there
        assert await world.ids() == {"m-0", "m-1"}

    asyncio.run(story())


def test_a_successor_holds_what_runs_until_gateways_speak_whatever_was_kept(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=1, max=9, policy="knative"))
        first = world.loop()
        world.overrides = {"m": Override(count=5, until_wall_s=1e12)}
        await first.tick()
        assert len(await world.ids()) == 5
        world.overrides = {}
        second = world.loop()
        second.resume(first.kept())
        await second.tick()
        assert len(await world.ids()) == 5
        assert "no gateway has told" in world.plans[-1].choices[0].sentence

    asyncio.run(story())


def test_a_tick_between_two_beats_takes_no_counts_but_wakes_a_model_at_zero(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=0, max=3, policy="hpa"))
        loop = world.loop()
        world.gauge = ModelGauge(arrivals=10)
        await loop.tick()
        world.live.advance(0.2)
        world.gauge = ModelGauge(arrivals=12, waiting=2)
        await loop.tick()
        assert await world.ids() == {"m-0"}
        world.live.advance(0.2)
        world.gauge = ModelGauge(arrivals=13, running=3)
        await loop.tick()
        assert loop.snapshot is not None
        assert loop.snapshot.loads["m"].arrivals == 3  # since the beat: nothing was taken meanwhile
        assert loop.snapshot.traits["m"].slots == 4

    asyncio.run(story())


def test_nudges_do_not_make_the_beat_faster_or_slower(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path, Scale(min=1, max=3, policy="hpa"))
        world.gauge, loop = ModelGauge(), world.loop()
        beats: list[float] = []
        task = asyncio.create_task(loop.run())
        for tick in range(1, 200):
            world.live.advance(0.02)
            loop.nudge()
            while len(world.plans) < tick:
                await asyncio.sleep(0)
            if loop._heard.at_s not in beats:
                beats.append(loop._heard.at_s)
        task.cancel()
        assert len(beats) == 5
        assert all(0.9 <= later - earlier < 0.95 for earlier, later in itertools.pairwise(beats))

    asyncio.run(story())


def test_policy_time_never_goes_back_and_follows_a_clock_that_was_set_ahead() -> None:
    clock = SteadyWall()
    assert clock.at(100.0, 5000.0) == 5000.0
    assert clock.at(110.0, 4000.0) == 5010.0  # set back: not followed
    assert clock.at(120.0, 5021.0) == 5020.0  # a little ahead: not followed either
    assert clock.at(130.0, 5030.0 + JUMP_S + 1) == 5030.0 + JUMP_S + 1
    assert clock.at(131.0, 9.0) == 5030.0 + JUMP_S + 2
