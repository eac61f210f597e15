"""The default policy: it learns the demand and its own margin, and needs no target from anybody."""

from __future__ import annotations

import numpy as np
import pytest

from neaptide.control.forecast import Expected, Forecast
from neaptide.control.policy import Floats, Seen, State
from neaptide.control.slo import KEEP_FIRST_S, Slo
from neaptide.simulate.fluid import Entry, Totals, run
from neaptide.simulate.world import World

WORLD = World(cold_start_s=60)
CAPACITY = 2.0  # requests/s of a replica
HOUR = 720  # ticks


def seen(now_s: float, arrivals: float | list[float], replicas: float = 0.0, *, cold_start_s: float = 60.0) -> Seen:
    came = np.atleast_1d(np.asarray(arrivals, dtype=float))
    zeros = np.zeros(len(came))
    return Seen(
        now_s=now_s,
        tick_s=5.0,
        arrivals=came,
        in_flight=zeros,
        waiting=zeros.copy(),
        ready=zeros + replicas,
        starting=zeros.copy(),
        capacity_rps=CAPACITY,
        slots=20.0,
        cold_start_s=cold_start_s,
    )


def walk(policy: Slo, counts: Floats, state: State | None = None, start_s: float = 0.0) -> tuple[State, Floats]:
    """`counts` [ticks] or [ticks, lanes]: the state at the end, what was wanted at each tick."""
    state = policy.start() if state is None else state
    wanted = []
    for i, count in enumerate(counts):
        tick = seen(start_s + 5.0 * (i + 1), count)
        policy.observe(tick, state)
        wanted.append(policy.want(tick, state).copy())
    return state, np.array(wanted)


def poisson(rate: float, ticks: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).poisson(rate * 5.0, ticks).astype(float)


def simulated(counts: Floats, slo: float = 0.99) -> Totals:
    return run(WORLD, CAPACITY, counts[None], [Entry(Slo(1, slo), np.zeros(1, dtype=np.int64))])[0].over(0, 0)


def overdispersed(rate: float, ticks: int, seed: int = 3) -> Floats:
    """A rate that wanders by 20 % with a memory of a minute."""
    rng = np.random.default_rng(seed)
    keep, level, out = np.exp(-5 / 60), 0.0, []
    for noise in rng.standard_normal(ticks):
        level = keep * level + np.sqrt(1 - keep**2) * noise
        out.append(rng.poisson(rate * 5 * np.exp(0.2 * level - 0.02)))
    return np.array(out, dtype=float)


def test_a_goal_is_kept_without_a_target_from_anybody() -> None:
    rises_and_falls = 20 + 12 * np.sin(np.arange(16) * 2 * np.pi / 16)  # a step each quarter of an hour
    counts = np.concatenate([overdispersed(rate, HOUR // 4, seed=i) for i, rate in enumerate(rises_and_falls)])
    found = simulated(counts)
    peak = counts.reshape(-1, 12).sum(axis=1).max() / 60 / CAPACITY  # replicas that the busiest minute needs
    assert found.attainment[0] > 0.98
    assert found.replica_hours[0] < 0.75 * peak * len(counts) / HOUR


def test_a_stricter_goal_costs_more_and_reaches_more() -> None:
    counts = overdispersed(20.0, 4 * HOUR)
    loose, strict = simulated(counts, 0.9), simulated(counts, 0.999)
    assert strict.replica_hours[0] > loose.replica_hours[0]
    assert strict.attainment[0] > loose.attainment[0]


def test_noisy_arrivals_get_a_wider_margin_than_steady_ones() -> None:
    _, steady = walk(Slo(), np.full(2 * HOUR, 200.0))
    _, noisy = walk(Slo(), overdispersed(40.0, 2 * HOUR))
    assert np.abs(steady[HOUR:] - 20).max() <= 1  # 40 requests/s of 2 a replica
    assert noisy[HOUR:].mean() > 22


def test_steady_demand_does_not_flap() -> None:
    _, wanted = walk(Slo(), poisson(40.0, 5 * HOUR))
    changes = np.abs(np.diff(wanted[2 * HOUR :, 0])).sum()
    assert changes < 3 * 12  # replicas launched or drained in three hours


def test_a_jump_is_followed_within_minutes() -> None:
    _, wanted = walk(Slo(), np.concatenate([poisson(10.0, 4 * HOUR), poisson(40.0, HOUR)]))
    assert wanted[4 * HOUR - 1, 0] < 10
    assert wanted[4 * HOUR + 5 * 12, 0] >= 20


def test_the_calendar_raises_what_is_expected_a_cold_start_ahead() -> None:
    usual, event = Slo(), Slo(events=[Expected(7200.0, 10800.0, 3.0)])
    counts = np.full(2 * HOUR + 60, 50.0)  # 10 requests/s, 5 replicas; three times as much from 7200 s on
    counts[2 * HOUR :] *= 3
    _, without = walk(usual, counts)
    _, with_it = walk(event, counts)
    ahead = 2 * HOUR - 60 // 5
    assert (with_it[: ahead - 1] == without[: ahead - 1]).all()
    assert (with_it[ahead:, 0] >= 3 * 5).all()
    assert without[ahead : 2 * HOUR].max() < 3 * 5


def test_what_came_at_this_time_yesterday_is_expected_again() -> None:
    forecast = Forecast(1)
    state = forecast.start()
    early = 0.0  # requests/s expected an hour before 09:00, when six times as much comes every day
    minutes = 3 * 1440 + 9 * 60
    for i in range(minutes):
        rate = 10.0 if i % 1440 < 9 * 60 else 60.0
        tick = seen(60.0 * (i + 1), rate * 60.0, cold_start_s=600.0)
        tick.tick_s = 60.0
        if forecast.observe(tick, state):
            forecast.note(forecast.rate(tick, state), state)
        if i == minutes - 60:
            early = float(forecast.rate(tick, state)[0])
    late = float(forecast.rate(tick, state)[0])
    assert early == pytest.approx(10.0, rel=0.1)
    assert late > 1.3 * early


def test_the_last_replica_leaves_when_no_more_is_expected() -> None:
    policy = Slo(min_replicas=0)
    state, wanted = walk(policy, np.concatenate([poisson(0.5, HOUR), np.zeros(2 * HOUR)]))
    gone = int(np.argmax(wanted[HOUR:, 0] == 0))
    assert (wanted[:HOUR, 0] >= 1).all()
    assert gone * 5 >= min(KEEP_FIRST_S, float(state["s.keep_s"][0])) - 60
    assert (wanted[HOUR + gone :] == 0).all()


def test_rare_requests_teach_how_long_to_keep_the_last_replica() -> None:
    every_ten_minutes = np.zeros(6 * HOUR)
    every_ten_minutes[::120] = 1.0
    state, wanted = walk(Slo(min_replicas=0), every_ten_minutes)
    assert state["s.keep_s"][0] >= 600
    assert (wanted[-HOUR:] == 1).mean() > 0.98


def test_a_waiting_request_is_never_left_at_zero() -> None:
    policy, state = Slo(min_replicas=0), Slo().start()
    tick = seen(5.0, 0.0)
    tick.waiting = np.array([1.0])
    policy.observe(tick, state)
    assert policy.want(tick, state)[0] == 1


def test_it_stays_between_its_bounds() -> None:
    _, wanted = walk(Slo(min_replicas=3, max_replicas=8), np.concatenate([np.zeros(100), poisson(50.0, HOUR)]))
    assert wanted.min() == 3
    assert wanted.max() == 8


def test_lanes_do_not_know_of_each_other() -> None:
    one, two = poisson(30.0, HOUR, seed=1), poisson(6.0, HOUR, seed=2)
    _, both = walk(Slo(2), np.stack([one, two], axis=1))
    np.testing.assert_array_equal(both[:, 0], walk(Slo(), one)[1][:, 0])
    np.testing.assert_array_equal(both[:, 1], walk(Slo(), two)[1][:, 0])


def test_what_is_remembered_can_be_copied_and_gone_on_with() -> None:
    counts, later = poisson(30.0, HOUR), poisson(50.0, HOUR)
    state, _ = walk(Slo(), counts)
    copied = {name: array.copy() for name, array in state.items()}
    first = walk(Slo(), later, state, start_s=3600.0)[1]
    np.testing.assert_array_equal(first, walk(Slo(), later, copied, start_s=3600.0)[1])


def test_a_replica_that_turns_out_slower_to_start_is_taken_as_it_is() -> None:
    policy, state = Slo(), Slo().start()
    for i in range(HOUR):
        tick = seen(5.0 * (i + 1), 100.0, cold_start_s=60.0 if i < HOUR // 2 else 300.0)
        policy.observe(tick, state)
        wanted = policy.want(tick, state)
    assert 10 <= wanted[0] <= 14
    assert np.isfinite(np.concatenate([a.ravel() for a in state.values()])).all()


def test_the_first_requests_after_silence_do_not_launch_a_crowd() -> None:
    _, wanted = walk(Slo(min_replicas=0), np.concatenate([np.zeros(HOUR // 4), poisson(1.0, HOUR // 2)]))
    assert wanted.max() <= 3  # one request a second, where a replica serves two


def test_what_waits_is_launched_for_beyond_what_is_forecast() -> None:
    state, _ = walk(Slo(), np.full(HOUR // 4, 50.0))
    tick = seen(5.0 * HOUR // 4 + 5.0, 50.0, replicas=5.0)
    tick.waiting = np.array([600.0])
    policy = Slo()
    policy.observe(tick, state)
    assert policy.want(tick, state)[0] == 10  # ten a second come, ten a second of those that wait within a cold start


def test_a_memory_of_hours_ago_says_nothing_of_just_now() -> None:
    state, _ = walk(Slo(), np.full(HOUR, 200.0))
    later, wanted = walk(Slo(), np.full(HOUR // 8, 10.0), state, start_s=5.0 * HOUR + 4 * 3600)
    assert later["f.means"][:, 0] == pytest.approx([2.0] * 5)
    assert wanted[-1, 0] <= 3
