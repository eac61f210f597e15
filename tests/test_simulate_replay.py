"""A deployment request by request: lines, routes, cold starts, spot, billing; against theory and the fluid tier."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from neaptide.control.peers import peers
from neaptide.control.policy import Floats, Seen, State
from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Lists, Rates, Requests, Tokens
from neaptide.simulate.cold import Nodes, Stage, boot_s, remaining
from neaptide.simulate.counts import counts
from neaptide.simulate.engine import Traits
from neaptide.simulate.fluid import Entry, run
from neaptide.simulate.replay import Tier, replay
from neaptide.simulate.sample import sample
from neaptide.simulate.settings import Setup, capacity, of_world, read_setup
from neaptide.simulate.spot import Reclaims, Spot
from neaptide.simulate.steps import Linear
from neaptide.simulate.synthetic import synthetic
from neaptide.simulate.world import World
from tests.engine_runs import chat, requests

TENTH = Traits(step=Linear(base_s=0.1), max_batch=2, kv_tokens=None)  # every step takes .1 s
BOTH: tuple[Tier, ...] = ("fast", "exact")


class Scripted:
    """Wants what it was told, tick by tick; the last word stays."""

    name, every_s, lanes = "scripted", 5.0, 1

    def __init__(self, *wants: int) -> None:
        self.wants = wants
        self.seen: list[Seen] = []

    def start(self) -> State:
        return {}

    def observe(self, seen: Seen, state: State) -> None:
        self.seen.append(seen)

    def want(self, seen: Seen, state: State) -> Floats:
        return np.array([float(self.wants[min(len(self.seen), len(self.wants)) - 1])])


def steady(rps: float, seconds: float, seed: int = 1, out: int = 20) -> Requests:
    random = np.random.default_rng(seed)
    t_s = np.sort(random.random(int(rps * seconds))) * seconds
    return requests([(at, 1, out) for at in t_s])


# ------------------------------------------------------------------------------------------------- theory


def poisson(rps: float, rows: int, seed: int, lengths: Callable[[np.random.Generator], object]) -> Requests:
    random = np.random.default_rng(seed)
    t_s = np.cumsum(random.exponential(1 / rps, rows))
    out = np.broadcast_to(np.asarray(lengths(random), dtype=np.int64), rows).copy()
    return Requests(t_s=t_s, in_tokens=np.ones(rows, dtype=np.int64), out_tokens=out)


def mean_wait_s(asked: Requests, places: int) -> float:
    """Steps of 1/200 s; a first token comes one and a half of them after the wait, on average."""
    engine = Traits(step=Linear(base_s=0.005), max_batch=places, kv_tokens=None)
    found = replay(asked, Setup(engine=engine, replicas=1, line="replica"))
    assert found.unserved == 0
    return float(found.ttft_s.mean()) - 1.5 * 0.005


def test_one_place_and_equal_lengths_wait_as_long_as_pollaczek_and_khinchin_say() -> None:
    load = 0.8
    waited_s = mean_wait_s(poisson(load, 60_000, 11, lambda _: 200), 1)
    assert waited_s == pytest.approx(load / (2 * (1 - load)), rel=0.05)


def test_four_places_and_geometric_lengths_wait_as_long_as_erlang_says() -> None:
    places, load = 4, 0.8
    waited_s = mean_wait_s(poisson(places * load, 60_000, 12, lambda random: random.geometric(1 / 200, 60_000)), places)
    offered = places * load
    queued = offered**places / math.factorial(places) / (1 - load)
    probability = queued / (queued + sum(offered**k / math.factorial(k) for k in range(places)))
    assert waited_s == pytest.approx(probability / (places - offered), rel=0.08)


# ------------------------------------------------------------------------------------------------- the fluid tier


@pytest.mark.parametrize(("name", "u"), [("hpa", 0.9), ("keda", 0.8), ("knative", 0.7)])
def test_the_fluid_world_request_by_request_costs_and_reaches_what_the_fluid_tier_says(name: str, u: float) -> None:
    world, capacity_rps = World(name="test"), 2.0
    rates = synthetic("ramp", mean_rps=12.0, days=0.05, window_s=600, dispersion=3.0, seed=2)
    drawn = counts(rates, world.tick_s, 0).astype(float)
    (days,) = run(world, capacity_rps, drawn[None, :], [Entry(peers([name], {name: u})[name], np.zeros(1, dtype=int))])
    fluid = days.over(0, 0)
    asked, setup = sample(rates, 0), of_world(world, capacity_rps)
    found = replay(asked, setup, peers([name], {name: u})[name])
    assert len(asked.t_s) == drawn.sum()
    assert found.replica_hours == pytest.approx(fluid.replica_hours[0], rel=0.02)
    started_s = found.t_s + found.ttft_s - 1.5 * world.service_s / setup.out_tokens
    due_s = np.ceil((found.t_s + world.slack_s) / world.tick_s) * world.tick_s  # the fluid tier looks at tick ends
    on_time = np.mean(started_s <= due_s)
    assert found.attainment <= on_time
    assert on_time == pytest.approx(fluid.attainment[0], abs=0.01)
    assert on_time < 0.998  # or there would be nothing to agree on


# ------------------------------------------------------------------------------------------------- lines and routes


@pytest.mark.parametrize("tier", BOTH)
@pytest.mark.parametrize("line", ["gateway", "replica"])
@pytest.mark.parametrize("route", ["least-loaded", "round-robin", "two-choices", "prefix"])
def test_everybody_is_served_once_whatever_the_route_and_wherever_the_line(
    tier: Tier, line: Literal["gateway", "replica"], route: Literal["least-loaded", "round-robin"]
) -> None:
    asked = steady(12.0, 100.0)
    setup = Setup(engine=TENTH, line=line, route=route, boot=(Stage(name="all", seconds=7.0),), replicas=3)
    found = replay(asked, setup, Scripted(3, 5, 5, 5, 1, 0, 4), tier=tier)
    assert found.unserved == 0
    assert len(found.t_s) == 1200
    assert (found.finish_s > found.t_s + found.ttft_s).all()
    assert found.tpot_s == pytest.approx(np.full(1200, 0.1), abs=1e-6)  # whoever ran was never disturbed
    assert (found.replica >= 0).all()


def test_both_tiers_say_the_same() -> None:
    asked = chat(800, 25.0, 4)
    policies = [Scripted(1, 3, 3, 2, 4) for _ in BOTH]
    setup = Setup(boot=(Stage(name="all", seconds=8.0),), replicas=1, engine=Traits(max_batch=8))
    fast, exact = (replay(asked, setup, policy, tier=tier) for policy, tier in zip(policies, BOTH))
    assert fast.ttft_s == pytest.approx(exact.ttft_s)
    assert fast.finish_s == pytest.approx(exact.finish_s)
    assert (fast.replica == exact.replica).all()
    assert fast.summary() == pytest.approx(exact.summary())


def test_a_line_in_the_gateway_is_shared_and_first_in_first_out() -> None:
    asked = steady(30.0, 20.0)
    found = replay(asked, Setup(engine=TENTH, replicas=2, lookahead=0))
    first_s = found.t_s + found.ttft_s
    assert (np.diff(first_s) >= -0.2 - 1e-9).all()  # steps of two replicas end at different times
    assert Counter(found.replica) == {0: pytest.approx(300, abs=10), 1: pytest.approx(300, abs=10)}


def test_lines_in_the_replicas_make_the_wait_longer_than_one_for_all() -> None:
    asked = poisson(6.5, 3000, 3, lambda random: random.geometric(0.1, 3000))
    shared = replay(asked, Setup(engine=TENTH, replicas=4, lookahead=1))
    apart = replay(asked, Setup(engine=TENTH, replicas=4, line="replica", route="round-robin"))
    assert apart.ttft_s.mean() > 1.05 * shared.ttft_s.mean()


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    asked, setup = steady(8.0, 200.0), Setup(engine=TENTH, replicas=4, route="two-choices", line="replica")
    runs = [replay(asked, setup, seed=seed).finish_s for seed in (1, 1, 2)]
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()


def test_the_prefix_route_finds_more_of_a_prompt_computed_than_the_least_loaded_one() -> None:
    asked = chat(1500, 20.0, 6, prompt=3000.0, users=60)
    setup = Setup(engine=Traits(kv_tokens=60_000), replicas=4, line="replica")
    least = replay(asked, setup).summary()
    prefix = replay(asked, msgspec.structs.replace(setup, route="prefix")).summary()
    assert prefix["cached_share"] > 1.3 * least["cached_share"]
    assert prefix["p50_ttft_s"] < least["p50_ttft_s"]


# ------------------------------------------------------------------------------------------------- replicas


def test_a_cold_start_is_the_sum_of_its_stages_and_a_warm_node_skips_what_it_has() -> None:
    stages = (
        Stage(name="node", seconds=40.0),
        Stage(name="weights", seconds=20.0, cacheable=True),
        Stage(name="graphs", seconds=10.0),
    )
    assert boot_s(stages) == 70.0
    assert boot_s(remaining(stages, warm=True)) == 50.0
    assert Setup(boot=stages).cold_start_s == 70.0
    policy = Scripted(1, 2, *[2] * 20, 1, 2)  # launched at 10 s, drained at 115 s, launched again at 120 s
    found = replay(steady(1.0, 300.0), Setup(engine=TENTH, boot=stages, replicas=1, warm_s=60.0), policy)
    starting = dict(zip(found.ticks_s, found.starting))
    assert [t for t in starting if starting[t]] == [*range(15, 80, 5), *range(125, 170, 5)]


def test_a_node_is_warm_for_a_while_only() -> None:
    nodes = Nodes(60.0)
    assert not nodes.take(0.0)
    nodes.give(10.0)
    assert nodes.take(70.0)
    assert not nodes.take(70.0)
    nodes.give(80.0)
    assert not nodes.take(140.1)


def test_a_launch_is_paid_from_the_first_and_nobody_is_served_before_it_is_ready() -> None:
    asked = requests([(1.0, 1, 10)])
    found = replay(
        asked, Setup(engine=TENTH, replicas=0, boot=(Stage(name="all", seconds=33.0),)), Scripted(1), to_s=60.0
    )
    assert found.ttft_s == pytest.approx([5 + 33 - 1 + 0.1])
    assert found.replica_hours == pytest.approx((60 - 5) / 3600)
    assert (found.launches, found.drains) == (1, 0)


def test_a_drained_replica_ends_what_it_runs_takes_nothing_more_and_is_paid_until_then() -> None:
    asked = requests([(1.0, 1, 200), (2.0, 1, 200), (16.0, 1, 10)])
    found = replay(asked, Setup(engine=TENTH, replicas=2, billing_s=0.0), Scripted(2, 2, 1), to_s=100.0)
    # One of the two is drained at 15 s, in the middle of its request.
    assert found.unserved == 0
    assert found.drains == 1
    drained_until_s = min(found.finish_s[0], found.finish_s[1])
    assert found.replica_hours * 3600 == pytest.approx(100 + drained_until_s, abs=1.01)


def test_who_starts_is_cancelled_before_somebody_who_is_ready_is_drained() -> None:
    policy = Scripted(1, 3, 2, 1)
    replay(steady(1.0, 40.0), Setup(engine=TENTH, replicas=1, boot=(Stage(name="all", seconds=100.0),)), policy)
    assert [(s.ready[0], s.starting[0]) for s in policy.seen[:5]] == [(1, 0), (1, 0), (1, 2), (1, 1), (1, 0)]


def test_billing_rounds_each_replica_up() -> None:
    asked = steady(1.0, 200.0)
    hours = {}
    for billing_s in (0.0, 60.0, 3600.0):
        policy = Scripted(1, 2, 1)  # launched at 10 s, cancelled at 15 s
        setup = Setup(engine=TENTH, replicas=1, billing_s=billing_s)
        hours[billing_s] = replay(asked, setup, policy, to_s=1000.0).replica_hours * 3600
    assert hours == {0.0: pytest.approx(1005), 60.0: pytest.approx(1060), 3600.0: pytest.approx(1000 + 990)}


def test_what_is_reported_is_the_asked_time_and_what_was_before_warms_the_policy_up() -> None:
    asked = steady(5.0, 100.0)
    policy = Scripted(2)
    found = replay(asked, Setup(engine=TENTH, replicas=2), policy, from_s=50.0, to_s=80.0)
    assert found.t_s.min() >= 50
    assert found.t_s.max() < 80
    assert len(found.t_s) == np.sum((asked.t_s >= 50) & (asked.t_s < 80))
    assert found.replica_hours * 3600 == pytest.approx(2 * 30)
    assert policy.seen[0].now_s == 5.0
    assert sum(float(seen.arrivals[0]) for seen in policy.seen) == np.sum(asked.t_s < 80)
    assert found.ticks_s.tolist() == [55, 60, 65, 70, 75, 80]


def test_a_policy_sees_the_load_as_it_was_and_its_replicas_as_they_are() -> None:
    asked = steady(5.0, 100.0)
    setup = Setup(engine=TENTH, replicas=1, boot=(Stage(name="all", seconds=5.0),))
    prompt, late = Scripted(1, 4), Scripted(1, 4)
    replay(asked, setup, prompt)
    replay(asked, msgspec.structs.replace(setup, lag_s=15.0), late)
    for now, then in zip(late.seen[3:], prompt.seen):
        assert (now.arrivals, now.in_flight, now.waiting) == (then.arrivals, then.in_flight, then.waiting)
    assert [float(seen.ready[0]) for seen in late.seen[:4]] == [1, 1, 4, 4]


# ------------------------------------------------------------------------------------------------- spot


def test_reclaims_come_as_often_as_told_and_follow_the_seed() -> None:
    lives = [Reclaims(Spot(reclaims_per_hour=2.0), 1) for _ in range(2)]
    drawn = [[each.lifetime_s() for _ in range(4000)] for each in lives]
    assert drawn[0] == drawn[1]
    assert np.mean(drawn[0]) == pytest.approx(1800, rel=0.05)
    assert Reclaims(None, 1).lifetime_s() == math.inf


@pytest.mark.parametrize("tier", BOTH)
def test_a_reclaimed_replica_has_its_notice_and_what_it_leaves_undone_is_done_by_others(tier: Tier) -> None:
    asked = steady(6.0, 300.0, out=40)
    setup = Setup(
        engine=TENTH, replicas=4, boot=(Stage(name="all", seconds=10.0),),
        spot=Spot(reclaims_per_hour=60.0, notice_s=2.0),
    )  # fmt: skip
    found = replay(asked, setup, Scripted(14), tier=tier)
    assert found.reclaims > 20
    assert found.lost.sum() > 20
    assert found.unserved == 0
    assert found.launches >= found.reclaims  # each is replaced
    calm = replay(asked, msgspec.structs.replace(setup, spot=None), Scripted(14), tier=tier)
    assert calm.reclaims == calm.lost.sum() == 0
    assert found.quantile("ttft_s", 0.99) >= calm.quantile("ttft_s", 0.99)


def test_with_a_notice_longer_than_any_request_nothing_is_lost() -> None:
    spot = Spot(reclaims_per_hour=60.0, notice_s=60.0)
    found = replay(steady(6.0, 300.0), Setup(engine=TENTH, replicas=4, spot=spot), Scripted(14))
    assert found.reclaims > 20
    assert found.lost.sum() == 0


# ------------------------------------------------------------------------------------------------- what came out


def test_attainment_counts_first_tokens_within_the_slo_and_the_unserved_are_late() -> None:
    asked = requests([(0.0, 1, 1), (1.0, 1, 1), (2.0, 900, 1), (3.0, 1, 1)])
    setup = Setup(engine=Traits(step=Linear(base_s=0.1), kv_tokens=160), replicas=1, slo_ttft_s=0.15)
    found = replay(asked, setup)
    assert found.unserved == 1  # 900 tokens never fit
    assert found.attainment == 0.75
    assert found.summary()["p99_ttft_s"] == pytest.approx(0.1)
    assert math.isnan(found.summary()["p50_tpot_s"])  # single tokens have no pace


def test_requests_without_lengths_get_those_of_the_setup() -> None:
    asked = Requests(t_s=np.array([0.0, 1.0]))
    found = replay(asked, Setup(replicas=1, in_tokens=77, out_tokens=5))
    assert (found.in_tokens.tolist(), found.out_tokens.tolist()) == ([77, 77], [5, 5])


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    replay(steady(2.0, 50.0), Setup(engine=TENTH, replicas=1), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_time_in_which_nothing_comes_is_an_error_and_so_is_a_policy_of_several_lanes() -> None:
    with pytest.raises(ConfigError, match="no request comes from 500 s") as refused:
        replay(steady(2.0, 50.0), Setup(replicas=1), from_s=500.0, to_s=600.0)
    assert refused.value.code == "E124"
    with pytest.raises(ValueError, match="has 2 lanes"):
        replay(steady(2.0, 50.0), Setup(replicas=1), peers(["hpa"], {"hpa": [0.5, 0.7]})["hpa"])


def test_a_replicas_capacity_is_where_its_line_begins_to_grow() -> None:
    setup = Setup(replicas=1)
    rps, slots = capacity(setup, 500, 100)
    assert slots == 256
    waits = []
    for load in (0.9, 1.1):
        lengths = requests([(at, 500, 100) for at in np.arange(2500) / (load * rps)])
        waits.append(replay(lengths, setup).ttft_s[-100:].mean())
    assert waits[0] < 1.0
    assert waits[1] > 2.0
    tight = capacity(msgspec.structs.replace(setup, slo_tpot_s=0.02), 500, 100)
    assert tight.slots < slots
    assert tight.rps < rps


# ------------------------------------------------------------------------------------------------- samples


def test_sampled_requests_are_the_counts_of_each_tick_whatever_stretch_is_asked_for() -> None:
    rates = synthetic("diurnal", mean_rps=2.0, days=2.0, dispersion=2.0, seed=5)
    asked = sample(rates, 3)
    binned = np.bincount((asked.t_s // 5).astype(int), minlength=2 * 17280)
    assert (binned == counts(rates, 5.0, 3)).all()
    assert (np.diff(asked.t_s) >= 0).all()
    part = sample(rates, 3, 80_000.0, 100_000.0)
    assert (part.t_s == asked.t_s[(asked.t_s >= 80_000) & (asked.t_s < 100_000)]).all()
    assert asked.in_tokens is None
    assert len(sample(rates, 4).t_s) != len(asked.t_s)


def test_sampled_lengths_follow_the_clients_of_the_hour() -> None:
    """Client 1 asks in the first half, client 2 in the second; the third row is client 2's later habit."""
    rates = Rates(
        series="x", window_s=600.0, start_s=0.0, rates=np.full(12, 5.0),
        clients=np.array([[5.0] * 6 + [0.0] * 6, [0.0] * 6 + [5.0] * 6]), client_names=("1", "2"),
        tokens=Tokens(
            levels=np.array([0.5, 1.0]), client=np.array([1, 2, 2]), t_s=np.array([0.0, 0.0, 5400.0]),
            input=np.array([[10.0, 20.0], [1000.0, 2000.0], [50.0, 60.0]]),
            output=np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
        ),
    )  # fmt: skip
    asked = sample(rates, 0)
    assert asked.in_tokens is not None
    assert asked.out_tokens is not None
    assert set(asked.out_tokens[asked.t_s < 3600]) == {1}
    assert set(asked.out_tokens[(asked.t_s >= 3600) & (asked.t_s < 5400)]) == {2}
    assert set(asked.out_tokens[asked.t_s >= 5400]) == {3}
    first = asked.in_tokens[asked.t_s < 3600]
    assert (first.min(), first.max()) == (10, 20)
    assert np.median(first) == pytest.approx(10, abs=1)  # half of them lie at the lowest level or below


def test_prefix_ids_of_a_trace_reach_the_replicas() -> None:
    asked = Requests(
        t_s=np.array([0.0, 5.0]), in_tokens=np.array([1100, 1100]), out_tokens=np.array([2, 2]),
        prefixes=Lists(np.array([7, 8, 7, 8]), np.array([0, 2, 4])),
    )  # fmt: skip
    assert replay(asked, Setup(replicas=1)).cached_tokens.tolist() == [0, 1024]
    assert replay(asked, Setup(replicas=1, lengths="fixed")).cached_tokens.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------- settings


def test_the_example_of_the_decision_note_is_read(tmp_path: Path) -> None:
    note = (Path(__file__).parent.parent / "docs/decisions/0022-request-level-tiers.md").read_text(encoding="utf-8")
    file = tmp_path / "setup.yaml"
    file.write_text(note.split("```yaml\n")[1].split("```")[0])
    read = read_setup(file)
    assert isinstance(read.engine.step, Linear)
    assert (read.engine.kv_tokens, read.cold_start_s, read.billing_s) == (380_000, 130.0, 60.0)
    assert read.spot == Spot(reclaims_per_hour=0.5, notice_s=120.0)
    file.write_text("")
    assert read_setup(file) == Setup()


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("tick_s: 5\ntick_s: 6", "E102", "tick_s"),
        ("engine: {batch: 3}", "E105", "batch"),
        ("engine: {step: {type: linear, base_s: 0}}", "E105", "base_s over 0"),
        ("lag_s: -1", "E105", "lag_s"),
        ("route: fastest", "E105", "fastest"),
        ("boot: [{name: node, seconds: -1}]", "E105", "node"),
        ("spot: {reclaims_per_hour: -1}", "E105", "reclaims_per_hour"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(tmp_path: Path, text: str, code: str, told: str) -> None:
    file = tmp_path / "setup.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=told) as refused:
        read_setup(file)
    assert refused.value.code == code
    with pytest.raises(ConfigError, match="cannot be read"):
        read_setup(tmp_path / "none.yaml")
