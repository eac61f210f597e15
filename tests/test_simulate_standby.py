"""A warm pool in the simulator: who stands by, what it saves and costs; request by request, as a fluid, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.cli.simulate import standbys
from neaptide.control.policy import Floats, Seen, State
from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.cold import Stage
from neaptide.simulate.compare import Comparison, Question, compare
from neaptide.simulate.engine import Traits
from neaptide.simulate.fluid import Days, Entry, run
from neaptide.simulate.outcome import outcome
from neaptide.simulate.replay import Replay, Tier, replay
from neaptide.simulate.report import page
from neaptide.simulate.served import Served
from neaptide.simulate.settings import Setup, of_world, read_setup
from neaptide.simulate.singly import singly
from neaptide.simulate.spot import Spot
from neaptide.simulate.steps import Linear
from neaptide.simulate.synthetic import synthetic
from neaptide.simulate.world import World, changed, read_world
from neaptide.types import Standby
from tests.cli_run import cli
from tests.engine_runs import requests

TENTH = Traits(step=Linear(base_s=0.1), max_batch=2, kv_tokens=None)  # every step takes .1 s
COLD_S, RENT = 40.0, 0.2
HOLD_S = COLD_S / RENT  # 200 s
POOL = Standby(max=2, rent=RENT)
BOOT = (Stage(name="all", seconds=COLD_S),)
BOTH: tuple[Tier, ...] = ("fast", "exact")


class Scripted:
    """Wants what it was told, tick by tick; the last word stays."""

    name, lanes = "scripted", 1

    def __init__(self, *wants: int, every_s: float = 5.0) -> None:
        self.wants, self.every_s = wants, every_s
        self.ticks = 0

    def start(self) -> State:
        return {}

    def observe(self, seen: Seen, state: State) -> None:
        self.ticks += 1

    def want(self, seen: Seen, state: State) -> Floats:
        return np.array([float(self.wants[min(self.ticks, len(self.wants)) - 1])])


def twice(gap_s: float) -> Requests:
    """Ten seconds of work, and the same again after a gap."""
    return requests([(begin_s + at, 1, 10) for begin_s in (0.0, gap_s) for at in range(10)])


def gone_and_back(gap_s: float, standby: Standby = POOL, tier: Tier = "fast", **more: Any) -> Served:
    """A policy that lets its only replica go at 20 s and wants it again when the work comes back."""
    wants = [1] * 3 + [0] * round(gap_s / 5 - 3) + [1]
    given = {"engine": TENTH, "replicas": 1, "boot": BOOT, "billing_s": 0.0, "standby": standby} | more
    return replay(twice(gap_s), Setup(**given), Scripted(*wants), tier=tier, to_s=gap_s + 60)


# ------------------------------------------------------------------------------------------------- request by request


@pytest.mark.parametrize("tier", BOTH)
def test_work_that_comes_back_within_the_rents_time_finds_the_standby(tier: Tier) -> None:
    kept, none = gone_and_back(100.0, tier=tier), gone_and_back(100.0, Standby(), tier=tier)
    first = kept.t_s == 100.0
    assert kept.launches == 0
    assert kept.ttft_s[first] == pytest.approx([5.1])  # the policy sees it a tick later; then it is there
    assert none.launches == 1
    assert none.ttft_s[first] == pytest.approx([5.1 + COLD_S])
    assert kept.attainment > none.attainment


def test_after_the_rents_time_it_is_gone_and_work_waits_for_a_start() -> None:
    found = gone_and_back(HOLD_S + 60.0)
    assert (found.launches, found.drains) == (1, 1)
    assert found.standby_hours * 3600 == pytest.approx(HOLD_S)
    assert found.ttft_s[found.t_s == HOLD_S + 60.0] == pytest.approx([5.1 + COLD_S])


def test_the_bill_is_all_that_it_serves_and_the_rent_of_what_it_stands_by() -> None:
    found = gone_and_back(100.0)
    stood_s = 105.0 - 20.0
    assert found.standby_hours * 3600 == pytest.approx(stood_s)
    assert found.replica_hours * 3600 == pytest.approx(160.0 - stood_s + RENT * stood_s)
    told = found.summary()
    assert told["standby_paid_hours"] == pytest.approx(RENT * told["standby_hours"])
    assert found.standing.sum() * 5.0 == pytest.approx(stood_s)


def test_a_replica_that_still_runs_when_it_is_parked_finishes_and_takes_nothing_more() -> None:
    asked = requests([(1.0, 1, 400), (2.0, 1, 400), (30.0, 1, 10)])
    setup = Setup(engine=TENTH, replicas=2, boot=BOOT, standby=POOL, route="round-robin", lookahead=0)
    found = replay(asked, setup, Scripted(2, 2, 1), to_s=100.0)
    assert found.unserved == 0
    assert found.drains == 0
    assert found.finish_s[2] < found.finish_s[:2].max()
    assert found.finish_s[:2] == pytest.approx([41.0, 42.0], abs=0.2)


def test_only_as_many_stand_by_as_may_and_those_that_start_are_not_kept() -> None:
    setup = Setup(engine=TENTH, replicas=4, boot=BOOT, standby=POOL)
    found = replay(twice(50.0), setup, Scripted(6, 1), to_s=60.0)
    assert (found.launches, found.drains) == (2, 3)  # two had not begun to serve, and one is more than two
    assert found.standing.max() == 2


def test_between_two_words_of_a_policy_time_runs_out_all_the_same() -> None:
    setup = Setup(engine=TENTH, replicas=1, boot=BOOT, standby=POOL)
    found = replay(twice(400.0), setup, Scripted(0, every_s=1000.0), to_s=400.0)
    assert found.standby_hours * 3600 == pytest.approx(HOLD_S)


def test_a_standby_whose_machine_is_reclaimed_is_gone() -> None:
    patient = Standby(max=2, rent=0.01)
    setup = Setup(engine=TENTH, replicas=2, boot=BOOT, standby=patient, spot=Spot(reclaims_per_hour=60.0))
    found = replay(twice(180.0), setup, Scripted(2, 0), to_s=1000.0)
    assert (found.reclaims, found.launches, found.drains) == (2, 0, 0)
    assert found.standing[0] == found.standing[-1] == 0
    assert found.standing.max() > 0


@pytest.mark.parametrize("route", ["least-loaded", "round-robin", "two-choices", "prefix"])
@pytest.mark.parametrize("line", ["gateway", "replica"])
def test_everybody_is_served_once_whatever_stands_by(route: Any, line: Any) -> None:
    random = np.random.default_rng(1)
    asked = requests([(at, 1, 20) for at in np.sort(random.random(1200)) * 100.0])
    setup = Setup(engine=TENTH, replicas=3, boot=BOOT, line=line, route=route, standby=POOL)
    found = replay(asked, setup, Scripted(3, 5, 1, 0, 4, 1, 1, 3, 0, 2, 6))
    assert found.unserved == 0
    assert found.tpot_s == pytest.approx(np.full(1200, 0.1), abs=1e-6)
    assert found.standby_hours > 0


# ------------------------------------------------------------------------------------------------- as a fluid


WORLD = World(cold_start_s=20, standby=Standby(max=3, rent=0.5))  # ready after four ticks, held for eight
wanted = st.lists(st.integers(0, 6), min_size=1, max_size=40)


def fluid(world: World, wants: list[int], beside: list[int]) -> Days:
    """Without arrivals; the ticks after the last want are told the same."""
    lanes = [wants, beside]
    ticks = max(map(len, lanes)) + 60

    class Both(Scripted):
        def want(self, seen: Seen, state: State) -> Floats:
            return np.array([float(w[min(self.ticks, len(w)) - 1]) for w in lanes])

    policy = Both()
    policy.lanes = len(lanes)  # type: ignore[misc]
    (days,) = run(world, 2.0, np.zeros((1, ticks)), [Entry(policy, np.zeros(len(lanes), dtype=int))])
    return days


def single(world: World, wants: list[int], end_s: float) -> Served:
    """The same request by request. A replica that is ready at a tick's end is seen so there and in the next tick by the
    fluid tier: here it takes a moment longer, and stands by for a moment less."""
    moment = 1 + 1e-6
    boot = (Stage(name="start", seconds=world.cold_start_s * moment),)
    standby = Standby(max=world.standby.max, rent=world.standby.rent * moment**2)
    setup = msgspec.structs.replace(of_world(world, 2.0), replicas=0, boot=boot, standby=standby)
    one = Replay(Requests(t_s=np.zeros(0)), setup, Scripted(*wants), "fast", 0, 0.0, end_s)
    for now_s in np.arange(5.0, end_s + 1.0, 5.0):
        one.advance(float(now_s))
    return one.served(0.0, end_s + 1.0)


@given(wanted, wanted, st.integers(0, 4), st.sampled_from([0.1, 0.3, 0.5, 0.9]))
@settings(max_examples=25, deadline=None)
def test_both_tiers_launch_drain_and_pay_the_same(wants: list[int], beside: list[int], most: int, rent: float) -> None:
    world = changed(WORLD, standby=Standby(max=most, rent=rent))
    days = fluid(world, wants, beside)
    end_s = 5.0 * (max(len(wants), len(beside)) + 60)
    for lane, each in enumerate((wants, beside)):
        found = single(world, each, end_s)
        assert (found.launches, found.drains) == (days.launches[0, lane], days.drains[0, lane])
        assert 5.0 * found.standing.sum() == pytest.approx(days.standby_s[0, lane])
        paid_s = 5.0 * (found.ready + found.starting + rent * found.standing).sum()
        assert paid_s == pytest.approx(days.replica_s[0, lane])


# ------------------------------------------------------------------------------------------------- told


def compared(tier: str, standby: Standby, days: float = 0.25) -> Comparison:
    rates = synthetic("on-off", mean_rps=3.0, days=days, seed=1)
    asked = Question(policies=("neaptide",), first_day=0, last_day=0, tune=(0, 0), capacity_rps=1.0)
    found = compare(changed(World(seeds=1), standby=standby), rates, asked)
    return found if tier == "fluid" else singly(found, "fast")


@pytest.mark.parametrize("tier", ["fluid", "fast"])
def test_a_comparison_says_what_a_warm_pool_saves_and_costs(tier: str) -> None:
    kept, none = (outcome(compared(tier, standby)) for standby in (Standby(max=2, rent=0.1), Standby()))
    (with_pool,), (without,) = kept["policies"], none["policies"]
    assert with_pool["standby_hours"] > 0
    assert with_pool["standby_paid_hours"] == pytest.approx(0.1 * with_pool["standby_hours"])
    assert without["standby_hours"] == 0
    assert with_pool["scale_events"] < without["scale_events"]
    assert with_pool["attainment"] >= without["attainment"]
    assert kept["bound"] == none["bound"]


@pytest.mark.parametrize(("most", "is_told"), [(2, True), (0, False)])
def test_the_page_tells_of_a_pool_where_there_is_one(most: int, is_told: bool) -> None:
    text = page(compared("fluid", Standby(max=most, rent=0.25), days=0.05))
    assert ("standby-hours a day" in text) == is_told
    assert (f"{most} × 0.25" in text) == is_told


def test_the_command_line_takes_a_warm_pool_and_shows_its_hours() -> None:
    told = cli(
        "simulate", "--arrivals", "synthetic:on-off,mean_rps=3,days=0.1", "--from", "0", "--tune", "0-0", "--capacity",
        "1", "--policy", "neaptide", "--tier", "fluid", "--standby", "2:0.1",
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "standby-hours" in told.stdout


@pytest.mark.parametrize("text", ["x", "-1", "2:0", "2:1.5", "2:x", "2:nan", ":0.1"])
def test_a_warm_pool_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="how many may stand by") as refused:
        standbys(text)
    assert (refused.value.code, refused.value.fix) == ("E110", "--standby 2:0.1")


def test_a_warm_pool_is_a_count_and_perhaps_a_rent() -> None:
    assert standbys("3") == Standby(max=3, rent=0.1)
    assert standbys("2:0.25") == Standby(max=2, rent=0.25)


def test_world_and_setup_files_may_have_a_pool_and_name_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("standby: {max: 2, rent: 0.2}\n")
    assert read_world(file).standby == read_setup(file).standby == Standby(max=2, rent=0.2)
    file.write_text("standby: {max: 2, rent: 0}\n")
    for read in (read_world, read_setup):
        with pytest.raises(ConfigError, match="standby") as refused:
            read(file)
        assert refused.value.code == "E105"
