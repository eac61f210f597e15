"""The fluid world and its clairvoyant bound: by hand where numbers are small, else against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.control.policy import Floats, Seen, State
from neaptide.errors import ConfigError
from neaptide.simulate.bound import bound, level_loads, schedule, taut_string
from neaptide.simulate.fluid import Days, Entry, run
from neaptide.simulate.pooled import PooledLanes
from neaptide.simulate.world import World, read_world

WORLD = World(cold_start_s=20)  # ready four ticks after launch
CAPACITY = 2.0  # rps: twenty slots, ten starts a tick when steady


class Scripted:
    """Wants what it was told, tick by tick; the last word stays."""

    name, every_s = "scripted", 5.0

    def __init__(self, *wants: list[float]) -> None:
        self.wants = np.array(wants, dtype=float)  # [lanes, ticks]
        self.lanes = len(wants)
        self.seen: list[tuple[float, ...]] = []

    def start(self) -> State:
        return {}

    def observe(self, seen: Seen, state: State) -> None:
        self.seen.append((seen.arrivals[0], seen.in_flight[0], seen.waiting[0], seen.ready[0], seen.starting[0]))

    def want(self, seen: Seen, state: State) -> Floats:
        wants: Floats = self.wants[:, min(len(self.seen), self.wants.shape[1]) - 1]
        return wants


def simulated(counts: list[float], *wants: list[float]) -> tuple[Scripted, Days]:
    policy = Scripted(*wants)
    (days,) = run(WORLD, CAPACITY, np.array([counts], dtype=float), [Entry(policy, np.zeros(len(wants), dtype=int))])
    return policy, days


def test_work_that_fits_is_never_late_and_every_replica_is_paid_for_every_tick() -> None:
    policy, days = simulated([10.0] * 200, [1.0])
    assert policy.seen[-1] == (10.0, 20.0, 0.0, 1.0, 0.0)
    assert (days.late.sum(), days.replica_s.sum()) == (0.0, 1000.0)


def test_a_launched_replica_is_paid_from_the_next_tick_and_ready_after_its_cold_start() -> None:
    policy, days = simulated([10.0] * 130, [1.0, 1.0, 3.0])
    ready = [s[3] for s in policy.seen]
    starting = [s[4] for s in policy.seen]
    assert starting[:8] == [0, 0, 0, 2, 2, 2, 2, 0]  # told in the third tick
    assert ready[:8] == [1, 1, 1, 1, 1, 1, 1, 3]
    assert days.replica_s.sum() == 5 * (3 * 1 + 127 * 3)
    assert (days.launches.sum(), days.drains.sum()) == (2, 0)


def test_what_cannot_start_within_two_seconds_is_late_once() -> None:
    _, days = simulated([10.0] * 120 + [20.0] + [0.0] * 10, [1.0])
    # Twenty arrive where ten can start. The first twelve are due by the tick's end, so two are late; the other eight
    # are due, and start, in the next tick.
    assert days.late.sum() == pytest.approx(2.0)
    _, days = simulated([10.0] * 120 + [20.0, 20.0] + [0.0] * 10, [1.0])
    # In the second tick 32 are due and 20 have started; in the third 40 are due and 30 have, of which 32 were counted.
    assert days.late.sum() == pytest.approx(2 + 12 + 8)


def test_starting_replicas_are_cancelled_first_and_the_youngest_of_them() -> None:
    policy, _ = simulated([10.0] * 130, [1.0, 2.0, 4.0, 2.0])
    assert [s[3:] for s in policy.seen[1:8]] == [(1, 0), (1, 1), (1, 3), (1, 1), (1, 1), (2, 0), (2, 0)]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_lanes_do_not_see_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = list(rng.poisson(25, 150).astype(float))
    wants = [list(rng.integers(0, 6, 60).astype(float)) for _ in range(3)]
    _, together = simulated(counts, *wants)
    for lane, mine in enumerate(wants):
        _, alone = simulated(counts, mine)
        for name in ("replica_s", "late", "launches", "drains"):
            assert getattr(together, name)[:, lane] == pytest.approx(getattr(alone, name)[:, 0])


def test_requests_are_neither_lost_nor_made() -> None:
    rng = np.random.default_rng(1)
    lanes = PooledLanes(WORLD, CAPACITY, 4)
    lanes.ready[:] = (1, 2, 3, 0)
    for _ in range(500):
        lanes.work(rng.poisson(20, 4).astype(float))
        assert lanes.arrived == pytest.approx(lanes.started + lanes.queue)
        assert (lanes.in_flight - lanes.queue <= lanes.slots * lanes.ready + 1e-9).all()
    assert lanes.started[3] == 0


# --- the bound


corridors = st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1)), min_size=1, max_size=60)


@given(corridors)
def test_the_string_stays_in_its_corridor_and_has_no_steeper_slope_than_any_path_must(corridor) -> None:
    counts = np.array([c for c, _ in corridor])
    slack = np.array([c * f for c, f in corridor])
    high = np.cumsum(counts)
    low = high - slack
    path = taut_string(low, high)
    high[-1] = low[-1]
    tolerance = 1e-6 + 1e-9 * high[-1]
    assert (path >= low - tolerance).all()
    assert (path <= high + tolerance).all()
    edges_low, edges_high = np.concatenate([[0.0], low]), np.concatenate([[0.0], high])
    must = max(
        (edges_low[j] - edges_high[i]) / (j - i) for i in range(len(edges_low)) for j in range(i + 1, len(edges_low))
    )
    assert np.diff(np.concatenate([[0.0], path])).max() <= max(must, 0.0) + tolerance


def brute_force(world: World, load: Floats, price: float) -> float:
    total = 0.0
    for level in load.T:
        costs = []
        for on in itertools.product((False, True), repeat=len(level)):
            starts = sum(b and not a for a, b in itertools.pairwise(on))
            lost = sum(w / world.held_ticks for w, o in zip(level, on, strict=True) if w and not o)
            costs.append(sum(on) + world.cold_ticks * starts + (price * lost if lost else 0.0))
        total += min(costs)
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 0, 5, 12, 25]), min_size=2, max_size=9), st.sampled_from([0.1, 0.4, 1.0, np.inf])
)
def test_the_schedule_is_the_cheapest_there_is(counts: list[int], price: float) -> None:
    load = level_loads(WORLD, CAPACITY, np.array(counts, dtype=float))
    found = schedule(WORLD, load, price)
    paid = found.ticks + (price * found.dropped if found.dropped else 0.0)
    assert paid == pytest.approx(brute_force(WORLD, load, price))


def test_the_budget_is_kept_and_saves_something() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(30 + 20 * np.sin(np.arange(4000) / 300)).astype(float)
    found = bound(WORLD, CAPACITY, counts)
    assert 0.008 < found.dropped <= 0.01
    assert 0.85 < found.replica_hours / found.replica_hours_no_budget < 0.99


def test_the_schedule_without_a_budget_serves_its_world_in_time() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(30 + 20 * np.sin(np.arange(6000) / 300)).astype(float)
    ready = schedule(WORLD, level_loads(WORLD, CAPACITY, counts), np.inf).on.sum(axis=1).astype(float)
    lanes = PooledLanes(WORLD, CAPACITY, 1)
    late = 0.0
    for count, replicas in zip(counts, ready, strict=True):
        lanes.ready[:] = replicas  # a clairvoyant has launched them in time
        lanes.work(np.array([count]))
        late += lanes.late[0]
    assert late / counts.sum() < 0.001


# --- its file


def test_the_goals_world_is_what_the_decision_says() -> None:
    world = read_world()
    assert (world.tick_s, world.service_s, world.slack_s, world.cold_start_s) == (5, 10, 2, 180)
    assert (world.held_ticks, world.cold_ticks, world.on_time_share) == (2, 36, pytest.approx(0.6))


@pytest.mark.parametrize(
    ("text", "said"),
    [("tik_s: 5", "tik_s"), ("service_s: 7", "service_s"), ("slack_s: 9", "slack_s"), ("name: [", "world.yaml")],
)
def test_a_world_that_cannot_be_is_refused_by_the_name_of_its_key(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "world.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_world(file)
