"""The real scaling loop over the simulated service, in virtual time: load, the warm pool, and what may go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neaptide.control.decide import STUCK_S, pause_s
from neaptide.control.decisions import DecisionJournal, read, replays
from neaptide.control.loop import Loop
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.cold import Stage
from neaptide.simulate.engine import Traits
from neaptide.simulate.fates import NOTICED_S, Fate
from neaptide.simulate.live import NOBODY, Live
from neaptide.simulate.settings import Setup
from neaptide.simulate.steps import Linear
from neaptide.types import Carry, Deployment, Override, Plan, Replica, Revision, Scale, Spares, Standby
from tests.engine_runs import requests

COLD_S = 10.0
BOOT = (Stage(name="process", seconds=4.0, spared=True), Stage(name="weights", seconds=COLD_S - 4.0))
ENGINE = Traits(step=Linear(base_s=0.1), max_batch=4, kv_tokens=None)  # a request of ten tokens takes 1 s
SETUP = Setup(engine=ENGINE, boot=BOOT, lookahead=0)


class Story:
    """A loop that scales simulated replicas; `plans` has what each tick decided."""

    def __init__(self, tmp_path: Path, asked: Requests = NOBODY, *fates: Fate, spares: int = 0, **scale: Any) -> None:
        self.live, self.path = Live(SETUP, asked, fates), tmp_path / "decisions.jsonl"
        given = {"min": 0, "max": 4, "policy": "knative"} | scale
        self.deployment = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=Scale(**given))
        self.overrides: dict[str, Override] = {}
        self.plans: list[Plan] = []
        self.errors: set[str] = set()  # of the dead
        self.loop = Loop(
            (self.live.driver,), lambda: [self.deployment], self.live.gauges,
            self.told, DecisionJournal(self.path), about=self.live.about, overrides=lambda: self.overrides,
            spares=lambda: Spares(max=spares), clock=self.live.clock,
        )  # fmt: skip

    def told(self, replicas: Sequence[Replica], plan: Plan, carry: Carry) -> None:
        self.plans.append(plan)
        self.errors |= {r.error for r in replicas if r.state == "dead"}

    def until(self, seconds: float) -> dict[str, str]:
        """States by replica then."""

        async def told() -> dict[str, str]:
            await self.live.drive(self.loop, seconds)
            return {r.id: r.state for r in await self.live.driver.observe()}

        return asyncio.run(told())

    def set(self, count: int) -> None:
        self.overrides = {"m": Override(count=count, until_wall_s=1e12)}

    @property
    def launched(self) -> int:
        return sum(len(p.launches) for p in self.plans)


def work(begin_s: float, seconds: int, rps: int) -> list[tuple[float, int, int]]:
    return [(begin_s + at, 1, 10) for at in np.arange(0, seconds, 1 / rps)]


# ------------------------------------------------------------------------------------------------- load


def test_from_zero_a_request_waits_for_one_start_and_what_is_learnt_is_what_was_simulated(tmp_path: Path) -> None:
    story = Story(tmp_path, requests(work(5.5, 60, 2)))
    assert story.until(5.0) == {}
    assert set(story.until(40.0).values()) == {"ready"}
    found = story.live.served(0.0, 40.0)
    assert found.ttft_s[0] <= COLD_S + 1.0  # until the next beat
    learnt = story.loop.snapshot.traits["m"] if story.loop.snapshot else None
    assert learnt is not None
    assert abs(learnt.cold_start_s - COLD_S) <= 1.0  # a beat
    assert abs(learnt.service_s - 1.0) < 0.2
    assert (learnt.slots, learnt.spawn_s) == (4.0, 4.0)


def test_more_load_gets_more_replicas_none_is_left_at_the_end_and_the_journal_replays(tmp_path: Path) -> None:
    story = Story(tmp_path, requests(work(1.0, 60, 8)))
    assert len(story.until(60.0)) >= 3
    assert story.until(250.0) == {}
    found = story.live.served(0.0, 250.0)
    assert found.unserved == 0
    assert found.launches == found.drains == story.launched
    whole = [line for line in read(story.path) if line.whole]
    assert any(line.plan.drains for line in whole)
    assert all(map(replays, whole))


# ------------------------------------------------------------------------------------------------- the warm pool


def test_a_burst_that_comes_back_finds_a_standby_and_the_bill_has_its_rent(tmp_path: Path) -> None:
    asked = requests([*work(1.0, 20, 2), *work(130.5, 20, 2)])
    kept = Story(tmp_path, asked, max=1, standby=Standby(max=2, rent=0.1))
    none = Story(tmp_path, asked, max=1)
    assert set(kept.until(130.0).values()) == {"standby"}
    assert none.until(130.0) == {}
    for story in (kept, none):
        story.until(160.0)
    assert (kept.launched, none.launched) == (1, 2)
    with_pool, without = (story.live.served(0.0, 160.0) for story in (kept, none))
    first = with_pool.t_s == 130.5
    assert with_pool.ttft_s[first] < 2.0
    assert without.ttft_s[first] > COLD_S
    stood_s = with_pool.standby_hours * 3600
    (only,) = kept.live.replay.replicas.all
    assert stood_s > 0
    assert with_pool.replica_hours * 3600 == pytest.approx(160.0 - only.launched_s - 0.9 * stood_s)


def test_a_start_from_a_spare_is_shorter_and_is_not_learnt(tmp_path: Path) -> None:
    story = Story(tmp_path, spares=1)
    story.set(1)
    story.until(20.0)
    story.set(0)
    story.until(21.0)
    assert story.live.driver.spares == {"openvino": 1}
    story.set(1)
    assert story.until(28.0) == {"m-0": "ready"}
    assert story.loop.learnt.models["m"].starts == 1


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_replica_that_dies_is_started_again_after_its_pause_and_what_it_held_is_served(tmp_path: Path) -> None:
    story = Story(tmp_path, requests(work(1.0, 40, 2)), Fate(dies_s=20.0), min=1, max=1)
    story.until(100.0)
    found = story.live.served(0.0, 100.0)
    assert found.unserved == 0
    assert found.lost.sum() > 0
    assert story.launched == 2
    (died,) = [i for i, plan in enumerate(story.plans) if any("next start" in text for text in plan.reasons)][:1]
    assert pause_s(1) < 1.0
    assert story.plans[died + 1].launches


def test_a_replica_that_hangs_is_found_out_and_replaced(tmp_path: Path) -> None:
    story = Story(tmp_path, requests(work(1.0, 60, 2)), Fate(hangs_s=30.0), min=2, max=2)
    assert story.until(30.0 + NOTICED_S - 1.0) == {"m-0": "ready", "m-1": "ready"}
    assert story.until(30.0 + NOTICED_S + 1.0).get("m-0") != "ready"
    assert story.until(80.0) == {"m-0": "ready", "m-1": "ready"}
    assert story.live.served(0.0, 80.0).unserved == 0


def test_a_start_that_never_gets_ready_is_given_up_and_tried_again(tmp_path: Path) -> None:
    story = Story(tmp_path, NOBODY, Fate(ready_s=float("inf")), min=1, max=1)
    story.until(STUCK_S + COLD_S + 5.0)
    assert [plan.stuck for plan in story.plans if plan.stuck] == [("m-0",)]
    assert story.until(STUCK_S + 2 * COLD_S + 5.0) == {"m-0": "ready"}


def test_starts_that_are_refused_are_deaths_with_longer_and_longer_pauses(tmp_path: Path) -> None:
    story = Story(tmp_path, NOBODY, *[Fate(refused="no memory")] * 4, min=1, max=1)
    assert story.until(30.0) == {"m-0": "ready"}
    tries = [at for at, plan in enumerate(story.plans) if plan.launches]
    assert len(tries) == 5
    assert np.all(np.diff(np.diff(tries)) >= 0)
    assert any("no memory" in error for error in story.errors)


def test_the_same_story_is_told_twice_alike(tmp_path: Path) -> None:
    told = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        story = Story(tmp_path / name, requests(work(1.0, 40, 6)), Fate(dies_s=25.0), standby=Standby(max=1))
        story.until(80.0)
        told.append((story.plans, story.live.served(0.0, 80.0).finish_s.tolist()))
    assert str(told[0]) == str(told[1])
