"""thresholds: an operator's rules do what they say, when they say it."""

from __future__ import annotations

import math

import numpy as np

from neaptide.control.policy import State
from neaptide.control.reasons import phrase
from neaptide.control.thresholds import SeenLive, Thresholds
from neaptide.types import Load, Rule


class Story:
    """A policy followed tick by tick; replicas are there as soon as they are wanted."""

    def __init__(self, *rules: Rule, low: int = 1, high: int = 10) -> None:
        self.policy = Thresholds(rules, min_replicas=low, max_replicas=high)
        self.state: State = self.policy.start()
        self.now_s, self.count = 0.0, float(low)

    def tick(self, n: int = 1, arrivals: float = 0.0, in_flight: float = 0.0, **load: float) -> float:
        for _ in range(n):
            self.now_s += 1.0
            seen = SeenLive(
                now_s=self.now_s, tick_s=1.0, arrivals=np.array([arrivals]), in_flight=np.array([in_flight]),
                waiting=np.array([load.get("waiting", 0.0)]), ready=np.array([self.count]), starting=np.zeros(1),
                capacity_rps=1.0, slots=4.0, cold_start_s=5.0, load=Load(tick_s=1.0, age_s=0.0, **load),
            )  # fmt: skip
            self.policy.observe(seen, self.state)
            self.count = float(self.policy.want(seen, self.state)[0])
        return self.count


UP = Rule(signal="in_flight", above=4, per_replica=True, for_s=3, add=2, cooldown_s=5)
DOWN = Rule(signal="in_flight", below=1, per_replica=True, for_s=4, add=-1, cooldown_s=10)


def test_a_rule_acts_once_its_signal_was_over_the_bound_for_long_enough() -> None:
    story = Story(UP)
    assert story.tick(3, in_flight=5) == 1
    assert story.tick(in_flight=5) == 3


def test_a_break_starts_the_clock_anew() -> None:
    story = Story(UP)
    story.tick(3, in_flight=5)
    story.tick(in_flight=4)
    assert story.tick(3, in_flight=5) == 1


def test_after_it_acted_the_count_is_left_alone_for_the_cooldown() -> None:
    story = Story(UP)
    story.tick(4, in_flight=50)
    assert story.tick(4, in_flight=50) == 3
    assert story.tick(2, in_flight=50) == 5


def test_what_starting_replicas_will_take_does_not_count_as_waiting() -> None:
    policy = Thresholds((Rule(signal="waiting", above=3, add=1, cooldown_s=1),), max_replicas=10)
    state = policy.start()

    def wanted(now_s: float, waiting: float, starting: float) -> float:
        seen = SeenLive(
            now_s=now_s, tick_s=1.0, arrivals=np.zeros(1), in_flight=np.zeros(1), waiting=np.array([waiting]),
            ready=np.ones(1), starting=np.array([starting]), capacity_rps=1.0, slots=4.0, cold_start_s=60.0,
        )  # fmt: skip
        policy.observe(seen, state)
        return float(policy.want(seen, state)[0])

    assert wanted(1.0, 6, 0) == 2
    assert [wanted(now_s, 6, 1) for now_s in (3.0, 30.0, 50.0)] == [2, 2, 2]
    assert wanted(51.0, 8, 1) == 3


def test_a_removal_does_not_hold_back_an_addition_but_an_addition_holds_back_a_removal() -> None:
    story = Story(UP, DOWN)
    story.tick(8, in_flight=50)
    assert story.count == 3
    assert story.tick(4, in_flight=0) == 3
    story.tick(3, in_flight=0)
    assert story.count == 2
    assert story.tick(4, in_flight=50) == 4


def test_bounds_are_kept_and_nothing_winds_up_beyond_them() -> None:
    story = Story(Rule(signal="waiting", above=0, add=5, cooldown_s=0), DOWN, low=1, high=6)
    assert story.tick(20, in_flight=60, waiting=9) == 6
    story.tick(5)
    assert story.count == 5


def test_adding_wins_over_removing_and_the_largest_addition_wins() -> None:
    small, large = (Rule(signal="waiting", above=0, add=n, cooldown_s=0) for n in (1, 3))
    remove = Rule(signal="in_flight", below=100, add=-1, cooldown_s=0)
    assert Story(remove, small, large).tick(waiting=1) == 4


def test_a_signal_that_nobody_tells_meets_no_rule() -> None:
    story = Story(Rule(signal="ttft_s", above=1.0, cooldown_s=0), Rule(signal="kv_usage", below=0.5, add=-1))
    story.count = 2.0
    assert story.tick(10, ttft_s=math.nan) == 2
    assert story.tick(ttft_s=1.5) == 3


def test_a_latency_holds_through_seconds_in_which_nothing_ended_but_not_for_long() -> None:
    story = Story(Rule(signal="ttft_s", above=1.0, for_s=5, cooldown_s=0))
    story.tick(ttft_s=2.0)
    story.tick(3, ttft_s=math.nan)
    assert story.tick(2, ttft_s=2.0) == 2
    story.tick(ttft_s=2.0)
    story.tick(11, ttft_s=math.nan)  # once more after 5 s, then nobody knows any more
    assert story.tick(20, ttft_s=math.nan) == 3


def test_a_rule_on_gpu_use_acts_once_gpus_were_busy_for_long_enough_and_not_while_nobody_tells() -> None:
    busy = Rule(signal="gpu_usage", above=0.85, for_s=30, add=2, cooldown_s=60)
    idle = Rule(signal="gpu_usage", below=0.2, for_s=300, add=-1)
    story = Story(busy, idle)
    assert story.tick(30, gpu_usage=0.9) == 1
    assert story.tick(gpu_usage=0.9) == 3
    story.tick(40, gpu_usage=math.nan)
    assert story.tick(300, gpu_usage=math.nan) == 3  # an exporter that is away is no idle GPU
    story.tick(300, gpu_usage=0.1)
    assert story.tick(gpu_usage=0.1) == 2


def test_the_rate_is_a_mean_of_ten_seconds() -> None:
    story = Story(Rule(signal="arrivals_per_s", above=5, cooldown_s=0))
    story.tick(9)
    assert story.tick(arrivals=40) == 1
    assert story.tick(arrivals=40) == 2


def test_a_replica_that_dies_is_missing_and_not_one_fewer() -> None:
    story = Story(UP)
    story.tick(4, in_flight=50)
    story.count = 2.0
    assert story.tick(in_flight=8) == 3


def test_to_zero_when_it_may() -> None:
    story = Story(Rule(signal="in_flight", below=0.5, for_s=2, add=-1, cooldown_s=0), low=0)
    story.count = 1.0
    assert story.tick(3) == 0


def test_it_tells_what_would_have_to_happen() -> None:
    story = Story(UP, Rule(signal="ttft_s", above=1.0))
    story.tick(in_flight=2)
    seen = SeenLive(
        now_s=2.0, tick_s=1.0, arrivals=np.zeros(1), in_flight=np.zeros(1), waiting=np.zeros(1), ready=np.ones(1),
        starting=np.zeros(1), capacity_rps=1.0, slots=4.0, cold_start_s=5.0,
    )  # fmt: skip
    said = phrase(story.policy.explain(seen, story.state))
    assert "adds 2 once in_flight a replica is over 4 for 3 s (2.00 now)" in said
    assert "ttft_s is over 1 (not told)" in said
