"""The peers' policies against cases computed by hand. A replica here has 10 slots and serves 1 request a second; a tick
lasts 5 s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.control.peers import DEFAULT_U, GRID, PEERS, peers
from neaptide.control.peers.base import Peer, Static
from neaptide.control.peers.delayed import Ray, Sky
from neaptide.control.peers.engines import Dynamo, DynamoKalman, Wva
from neaptide.control.peers.knative import Knative
from neaptide.control.peers.kubernetes import Aibrix, Hpa, Keda
from neaptide.control.policy import Floats, Seen, State, mean_window, note, ring

SLOTS, CAPACITY_RPS, TICK_S = 10.0, 1.0, 5.0


class Stage:
    """Calls a policy as the loop does: observes each tick, asks when its time has come."""

    def __init__(self, policy: Peer, ready: float | Sequence[float] = 1, starting: float | Sequence[float] = 0) -> None:
        self.policy, self.state = policy, policy.start()
        self.ready, self.starting = self._lanes(ready), self._lanes(starting)
        self.now_s = self._next_s = 0.0

    def _lanes(self, value: float | Sequence[float] | Floats) -> Floats:
        return np.broadcast_to(np.asarray(value, dtype=float), (self.policy.lanes,)).copy()

    def tick(self, load: float | Floats = 0.0, rate: float | Floats = 0.0) -> Floats | None:
        """One tick with `load` requests in flight and `rate` arrivals a second: what is wanted, if it was asked."""
        self.now_s += TICK_S
        seen = Seen(
            now_s=self.now_s,
            tick_s=TICK_S,
            arrivals=self._lanes(rate) * TICK_S,
            in_flight=self._lanes(load),
            waiting=self._lanes(0),
            ready=self.ready,
            starting=self.starting,
            capacity_rps=CAPACITY_RPS,
            slots=SLOTS,
            cold_start_s=180.0,
        )
        self.policy.observe(seen, self.state)
        if self.now_s < self._next_s:
            return None
        self._next_s = self.now_s + self.policy.every_s - 1e-9
        return self.policy.want(seen, self.state)

    def last(self, seconds: float, load: float = 0.0, rate: float = 0.0) -> float:
        """What lane 0 wanted at last, after `seconds` of the same."""
        wants = [self.tick(load, rate) for _ in range(round(seconds / TICK_S))]
        return float([w for w in wants if w is not None][-1][0])

    def first(self, seconds: float, wanted: float, load: float = 0.0, rate: float = 0.0) -> float:
        """After how many seconds of the same lane 0 first wants `wanted`; fails if it does not within `seconds`."""
        began_s = self.now_s
        while self.now_s < began_s + seconds:
            want = self.tick(load, rate)
            if want is not None and want[0] == wanted:
                return self.now_s - began_s
        raise AssertionError(f"{self.policy.name} did not want {wanted} within {seconds} s")

    def obeyed(self, seconds: float, load: float = 0.0, rate: float = 0.0) -> list[float]:
        """What lane 0 wants and gets at once, each time it is asked."""
        wants = []
        for _ in range(round(seconds / TICK_S)):
            want = self.tick(load, rate)
            if want is not None:
                self.ready = want.copy()
                wants.append(float(want[0]))
        return wants


# Static


def test_static_keeps_its_number_within_the_bounds() -> None:
    policy = Static([3, 7, 200], max_replicas=100)
    assert Stage(policy).tick(load=500).tolist() == [3, 7, 100]


# HPA: 10 slots at .8 are a target of 8 a pod


def test_hpa_changes_nothing_within_a_tenth_of_its_target() -> None:
    assert Stage(Hpa(0.8), ready=10).last(300, load=88) == 10
    assert Stage(Hpa(0.8), ready=10).last(300, load=72) == 10


def test_hpa_scales_to_load_over_target_beyond_a_tenth() -> None:
    assert Stage(Hpa(0.8), ready=10).last(5, load=88.8) == 12  # 11.1


def test_hpa_at_most_doubles_or_adds_four_in_one_sync() -> None:
    assert Stage(Hpa(0.8)).obeyed(60, load=160) == [5, 10, 20, 20]


def test_hpa_scales_down_only_after_five_minutes_at_less() -> None:
    stage = Stage(Hpa(0.8), ready=10)
    stage.last(5, load=80)
    assert stage.first(600, wanted=5, load=40) == 300


def test_hpa_goes_down_to_the_highest_proposal_of_the_window() -> None:
    stage = Stage(Hpa(0.8), ready=10)
    stage.last(300, load=80)
    stage.last(150, load=40)  # proposes 5
    stage.last(15, load=56)  # proposes 7, in the middle of the window
    stage.last(120, load=40)
    assert stage.last(60, load=40) == 7


def test_hpa_keeps_the_replicas_it_finds_for_five_minutes() -> None:
    assert Stage(Hpa(0.8), ready=10).first(600, wanted=3, load=20) == 305


def test_hpa_counts_pods_that_start_as_idle_when_it_would_scale_up() -> None:
    assert Stage(Hpa(0.8), ready=10, starting=5).last(5, load=120) == 15  # 15 a ready pod, but 8 a pod
    assert Stage(Hpa(0.8), ready=10, starting=2).last(5, load=120) == 15
    assert Stage(Hpa(0.8), ready=10, starting=10).last(5, load=120) == 20  # on the other side of the target: no change


def test_hpa_counts_pods_that_start_as_fully_used_when_it_would_scale_down() -> None:
    stage = Stage(Hpa(0.8), ready=10, starting=5)
    assert stage.last(320, load=40) == 10  # (40 + 5 x 8) / 8


def test_hpa_does_nothing_while_no_pod_is_ready() -> None:
    assert Stage(Hpa(0.8), ready=0, starting=3).last(60, load=500) == 3


def test_hpa_never_goes_to_zero() -> None:
    assert Stage(Hpa(0.8, min_replicas=0), ready=4).last(600) == 1


# KEDA: .8 of 1 request a second a replica


def test_keda_scales_to_the_rate_of_the_last_minute() -> None:
    stage = Stage(Keda(0.8), ready=10)
    assert stage.last(60, rate=8) == 10
    assert stage.last(30, rate=16) == 14  # asked 20 s after the step: a minute's mean of 10.67
    assert stage.last(60, rate=16) == 20


def test_keda_changes_nothing_within_a_tenth_and_waits_before_it_scales_down() -> None:
    stage = Stage(Keda(0.8), ready=10)
    assert stage.last(60, rate=8.7) == 10
    assert stage.last(60, rate=8) == 10
    assert stage.first(600, wanted=5, rate=4) >= 300


def test_keda_goes_to_zero_after_more_than_five_idle_minutes_and_back_within_a_poll() -> None:
    stage = Stage(Keda(0.8, min_replicas=0), ready=2)
    stage.last(60, rate=1.6)
    gone_s = stage.first(900, wanted=0)
    assert 300 < gone_s - 60 <= 330 + 30  # the window empties after 60 s; it looks every 30 s
    stage.ready[:] = 0
    assert stage.last(60) == 0
    assert stage.first(60, wanted=1, rate=1) <= 30


def test_keda_keeps_one_where_zero_is_not_allowed() -> None:
    assert Stage(Keda(0.8), ready=2).last(900) == 1


# Knative: .7 of 10 slots are a target of 7


def test_knative_follows_the_mean_of_the_last_minute() -> None:
    stage = Stage(Knative(0.7), ready=1)
    assert stage.last(60, load=7) == 1
    stage.ready[:] = 3
    assert stage.last(30, load=21) == 2  # the minute's mean is 14
    assert stage.last(30, load=21) == 3


def test_knative_panics_at_twice_what_is_ready_and_never_goes_down_in_panic() -> None:
    stage = Stage(Knative(0.7), ready=1)
    stage.last(60, load=7)
    assert stage.last(5, load=70) == 10  # the stable window alone would say 2
    stage.ready[:] = 10
    assert stage.last(60, load=7) == 10


def test_knative_leaves_panic_more_than_a_minute_after_the_last_excess() -> None:
    stage = Stage(Knative(0.7), ready=1)
    stage.last(60, load=7)
    stage.last(5, load=70)
    stage.ready[:] = 10
    assert stage.first(120, wanted=5, load=7) == 65  # then no further down than half of what is ready


def test_knative_that_starts_over_several_replicas_keeps_them_for_a_minute() -> None:
    assert Stage(Knative(0.7), ready=8).first(120, wanted=4, load=7) == 70


def test_knative_in_panic_serves_the_longer_window_too() -> None:
    stage = Stage(Knative(0.7), ready=10)
    stage.last(120, load=100)
    stage.ready[:] = 2
    assert stage.last(5, load=40) == 14  # panic for 6 of 2; the minute's mean is 95
    assert stage.last(30, load=40) == 14  # though the minute's mean falls


def test_knative_at_most_multiplies_what_is_ready_by_a_thousand() -> None:
    assert Stage(Knative(0.7, max_replicas=5000), ready=1).last(60, load=7 * 3000) == 1000
    assert Stage(Knative(0.7, max_replicas=5000), ready=4).last(60, load=7 * 3000) == 3000


def test_knative_just_short_of_twice_what_is_ready_does_not_panic() -> None:
    stage = Stage(Knative(0.7), ready=1)
    stage.last(60, load=7)
    stage.ready[:] = 10
    assert stage.last(5, load=19 * 7) == 5  # half of what is ready: the minute's mean asks for 3


def test_knative_goes_to_zero_half_a_minute_after_an_empty_minute_and_back_at_once() -> None:
    stage = Stage(Knative(0.7, min_replicas=0), ready=1)
    stage.last(60, load=3)
    assert stage.first(120, wanted=0) == 90
    stage.ready[:] = 0
    assert stage.last(5, load=1) == 1


# Ray: .4 of 10 slots are a target of 4


def test_ray_scales_up_when_more_was_wanted_for_half_a_minute() -> None:
    stage = Stage(Ray(0.4), ready=5)
    stage.last(60, load=20)
    assert stage.first(120, wanted=10, load=40) == 35  # first wanted at 5 s: 6 at the first mean, 10 at the last
    assert stage.last(60, load=40) == 10


def test_ray_starts_over_when_the_wish_breaks_off() -> None:
    stage = Stage(Ray(0.4), ready=5)
    stage.last(60, load=20)
    stage.last(5, load=40)
    assert stage.last(30, load=20) == 5  # more was wanted for 30 s, not for over 30 s
    assert stage.first(120, wanted=10, load=40) == 35


def test_ray_scales_down_when_fewer_were_wanted_for_ten_minutes() -> None:
    stage = Stage(Ray(0.4), ready=5)
    stage.last(60, load=20)
    assert stage.first(900, wanted=2, load=8) == pytest.approx(605, abs=5)


def test_ray_goes_to_zero_only_from_one_and_back_at_once() -> None:
    stage = Stage(Ray(0.4, min_replicas=0), ready=3)
    stage.last(60, load=12)
    wants = stage.obeyed(1500)
    assert list(dict.fromkeys(wants)) == [3, 1, 0]
    assert stage.last(5, load=1) == 1


def test_ray_changes_nothing_while_what_it_launched_starts() -> None:
    assert Stage(Ray(0.4), ready=0, starting=2).last(300, load=400) == 2
    stage = Stage(Ray(0.4), ready=5)
    stage.last(60, load=20)
    assert stage.last(30, load=40) == 5  # one more decision would do
    stage.ready[:] = 0
    assert stage.last(60, load=40) == 5


# AIBrix: .8 of 10 slots are a target of 8


def test_aibrix_scales_beyond_a_tenth_by_the_ratio_of_the_three_minutes_mean() -> None:
    assert Stage(Aibrix(0.8), ready=10).last(180, load=88) == 10
    assert Stage(Aibrix(0.8), ready=10).last(180, load=96) == 12
    stage = Stage(Aibrix(0.8), ready=10)
    stage.last(180, load=80)
    assert stage.last(90, load=160) == 15  # the mean is 12 a pod


def test_aibrix_at_most_doubles_in_one_sync() -> None:
    assert Stage(Aibrix(0.8), ready=4).last(5, load=900) == 8


def test_aibrix_at_most_halves_and_goes_down_to_the_highest_proposal_of_five_minutes() -> None:
    stage = Stage(Aibrix(0.8), ready=10)
    assert stage.last(180, load=80) == 10
    assert stage.first(900, wanted=5, load=8) > 300


def test_aibrix_has_no_first_recommendation_to_hold_it() -> None:
    assert Stage(Aibrix(0.8), ready=10).last(5, load=8) == 5


# WVA: capacity 10 a replica, up at .85, down at .70


def test_wva_adds_what_demand_over_its_upper_threshold_lacks() -> None:
    assert Stage(Wva(0.85), ready=10).last(5, load=85) == 10
    assert Stage(Wva(0.85), ready=10).last(5, load=86) == 11
    assert Stage(Wva(0.85), ready=10).last(5, load=170) == 20


def test_wva_counts_replicas_that_start_as_supply() -> None:
    assert Stage(Wva(0.85), ready=10, starting=10).last(5, load=170) == 20


def test_wva_removes_only_what_is_spare_at_its_lower_threshold() -> None:
    assert Stage(Wva(0.85), ready=10).last(5, load=63.1) == 10  # 9.01 of 10 are needed at .70
    assert Stage(Wva(0.85), ready=10).last(5, load=35) == 5
    assert Stage(Wva(0.85), ready=10, starting=4).last(5, load=35) == 9  # of what is ready 5 are spare


def test_wva_keeps_the_last_replica() -> None:
    assert Stage(Wva(0.85, min_replicas=0), ready=10).last(5) == 1


# Dynamo: 1 request a second a replica at u = 1


def test_dynamo_plans_for_what_the_last_three_minutes_had() -> None:
    stage = Stage(Dynamo(1.0), ready=7)
    assert stage.last(5, rate=4) == 7  # nothing known yet
    assert stage.last(180, rate=4) == 4
    for _ in range(18):
        assert stage.tick(rate=4) is None
    assert stage.last(90, rate=8) == 6


def test_dynamo_changes_only_every_three_minutes() -> None:
    stage = Stage(Dynamo(0.5), ready=1)
    asked = [stage.now_s for _ in range(120) if stage.tick(rate=4) is not None]
    assert asked == [5, 185, 365, 545]


def test_dynamo_keeps_one_replica_without_requests() -> None:
    assert Stage(Dynamo(1.0, min_replicas=0), ready=7).last(400) == 1


def test_dynamo_kalman_follows_a_trend_beyond_the_last_value() -> None:
    constant, kalman = Stage(Dynamo(1.0)), Stage(DynamoKalman(1.0))
    for stage in (constant, kalman):
        stage.last(5, rate=10)
    wants = [(constant.last(180, rate=rate), kalman.last(180, rate=rate)) for rate in (10, 20, 30, 40, 50)]
    assert wants[-1] == (50, 60)


def test_dynamo_kalman_starts_with_the_first_interval_that_has_requests() -> None:
    late, fresh = Stage(DynamoKalman(1.0)), Stage(DynamoKalman(1.0))
    fresh.last(5)
    assert late.last(5 + 540) == 1
    assert [late.last(180, rate=r) for r in (9, 30, 5)] == [fresh.last(180, rate=r) for r in (9, 30, 5)]


# SkyServe: .8 of 1 request a second


def test_skyserve_scales_up_at_the_fifteenth_decision_that_wants_more() -> None:
    stage = Stage(Sky(0.8), ready=5)
    stage.last(65, rate=4)
    asked_s = stage.first(600, wanted=10, rate=8)
    assert asked_s == 15 * 20  # the decision 20 s after the step is the first of them
    assert stage.last(600, rate=8) == 10


def test_skyserve_scales_down_at_the_sixtieth_decision_that_wants_fewer() -> None:
    stage = Stage(Sky(0.8), ready=5)
    stage.last(65, rate=4)
    assert stage.first(1800, wanted=2, rate=1.6) == 60 * 20


def test_skyserve_starts_over_when_the_wish_breaks_off() -> None:
    stage = Stage(Sky(0.8), ready=5)
    stage.last(65, rate=4)
    stage.last(200, rate=8)  # 10 decisions want more, and 2 while the minute empties
    stage.last(80, rate=4)
    assert stage.last(200, rate=8) == 5


def test_skyserve_goes_to_zero_slowly_and_back_at_its_next_decision() -> None:
    stage = Stage(Sky(0.8, min_replicas=0), ready=1)
    stage.last(65, rate=0.8)
    assert stage.first(1800, wanted=0) > 1200
    assert stage.last(20, rate=8) > 0


# All of them


@pytest.mark.parametrize("name", PEERS)
def test_a_lane_does_not_see_its_neighbours(name: str) -> None:
    """Three lanes with loads of their own over two hours, each obeyed, say what three runs with a lane each do."""
    random = np.random.default_rng(7)
    swing = 1 + 0.9 * np.sin(np.arange(1440)[:, None] / 200 + np.array([0.0, 2.0, 4.0]))
    loads = swing * random.gamma(20.0, 4.0, (1440, 3)) * (random.random((1440, 3)) < 0.99)
    loads[500:900, 1] = 0.0
    targets = [30.0, 40.0, 60.0] if name == "static" else [0.5, 0.7, 0.9]
    kind = PEERS[name].policy

    def wants(policy: Peer, lanes: slice) -> list[list[float]]:
        stage, found = Stage(policy, ready=4), []
        for row in loads:
            want = stage.tick(load=row[lanes], rate=row[lanes] / 10)
            if want is not None:
                stage.starting = np.maximum(want - stage.ready, 0.0) if stage.now_s % 180 else np.zeros(policy.lanes)
                stage.ready = want - stage.starting
                found.append(want.tolist())
        return found

    together = wants(kind(targets, min_replicas=0, max_replicas=40), slice(0, 3))
    alone = [wants(kind(targets[i], min_replicas=0, max_replicas=40), slice(i, i + 1)) for i in range(3)]
    assert together == [[lane[0] for lane in row] for row in zip(*alone, strict=True)]
    assert name == "static" or len({row[0] for row in together}) > 3, "the trace moves nothing, so it shows nothing"


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(PEERS)),
    st.lists(st.tuples(st.floats(0, 3000), st.floats(0, 300), st.integers(0, 20), st.integers(0, 20)), max_size=80),
    st.integers(0, 3),
)
def test_what_is_wanted_is_whole_and_within_the_bounds(
    name: str, ticks: list[tuple[float, float, int, int]], low: int
) -> None:
    policy = PEERS[name].policy([PEERS[name].default] * 2, min_replicas=low, max_replicas=12)
    stage = Stage(policy)
    for load, rate, ready, starting in ticks:
        stage.ready[:], stage.starting[:] = ready, starting
        want = stage.tick(load, rate)
        if want is not None:
            assert want.shape == (2,)
            assert (want == np.rint(want)).all()
            assert ((want >= low) & (want <= 12)).all()


@pytest.mark.parametrize("name", PEERS)
def test_what_a_policy_returns_and_remembers_is_its_own(name: str) -> None:
    """Writing into an answer, or into a copy of the state, changes neither what is seen nor the next answer."""
    one, other = (Stage(PEERS[name].policy(PEERS[name].default), ready=3) for _ in range(2))
    for load in (30, 90, 10, 200) * 60:
        want, expected = one.tick(load, load / 10), other.tick(load, load / 10)
        one.state = {key: value.copy() for key, value in one.state.items()}
        if want is not None and expected is not None:
            assert want.tolist() == expected.tolist()
            want[:] = 999
        assert one.ready[0] == 3


def test_every_peer_has_its_names_its_default_and_its_grid() -> None:
    assert list(PEERS) == list(DEFAULT_U)
    made = peers([n + end for n in PEERS for end in ("", "-tuned")])
    assert [p.name for p in made.values()] == list(made)
    assert made["hpa"].lanes == 1
    assert made["hpa-tuned"].u.tolist() == list(GRID)
    assert made["wva-tuned"].u.tolist() == [0.5, 0.6, 0.7, 0.8, 0.85, 0.95]


def test_given_targets_replace_the_default() -> None:
    made = peers(["ray", "hpa-tuned"], {"ray": [0.4, 0.4, 0.9], "hpa-tuned": 0.6}, max_replicas=7)
    assert made["ray"].u.tolist() == [0.4, 0.4, 0.9]
    assert made["hpa-tuned"].lanes == 1
    assert Stage(made["hpa-tuned"], ready=7).last(5, load=500) == 7


def test_what_no_peer_can_be_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no peer is called 'kpa'; there are static, hpa"):
        peers(["kpa"])
    with pytest.raises(ValueError, match="over 0 a lane"):
        Hpa([0.5, 0.0])
    with pytest.raises(ValueError, match="is no range"):
        Hpa(0.5, min_replicas=5, max_replicas=4)
    with pytest.raises(ValueError, match="the threshold to scale up is over"):
        Wva(0.1)


@given(st.integers(1, 12), st.lists(st.floats(0, 100), min_size=1, max_size=30), st.integers(1, 12))
def test_the_mean_of_a_window_is_that_of_its_last_notes(size: int, values: list[float], ticks: int) -> None:
    state: State = {}
    ring(state, "x", size * TICK_S, TICK_S, 1)
    for value in values:
        note(state, "x", np.array([value]))
    expected = np.mean(values[-min(size, ticks, len(values)) :])
    assert mean_window(state, "x", ticks * TICK_S, TICK_S)[0] == pytest.approx(expected)
