"""size: how many replicas a model should have, and what stands above its policy."""

from __future__ import annotations

import datetime

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.control.decide import decide
from neaptide.control.memory import Memory, pack, state_of, unpack
from neaptide.control.reasons import LANGUAGES, phrase, sentence
from neaptide.control.size import Case, Fleet, Sized, key_of, policy_of, size
from neaptide.types import (
    Carry,
    Choice,
    Deployment,
    Event,
    Load,
    Override,
    PolicyName,
    Replica,
    Revision,
    Rule,
    Scale,
    Snapshot,
    Traits,
)

TRAITS = Traits(slots=4.0, service_s=2.0, cold_start_s=10.0, learnt="measured")  # 2 requests/s a replica
PEER_NAMES = ["hpa", "keda", "knative", "ray", "aibrix", "wva", "dynamo", "dynamo-kalman", "skyserve"]


def load(waiting: int = 0, running: int = 0, arrivals: int = 0, tick_s: float = 1.0, age_s: float = 0.1) -> Load:
    return Load(tick_s=tick_s, age_s=age_s, waiting=waiting, running=running, arrivals=arrivals)


class Story:
    """One model followed beat by beat; what is wanted is there at the next beat."""

    def __init__(self, scale: Scale, ready: int = 0, now_s: float = 1_760_000_000.0) -> None:
        self.deployment = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=scale)
        self.now_s, self.ready, self.raw, self.last = now_s, ready, None, None
        self.sized: Sized

    def tick(self, now: Load | None, n: int = 1, override: Override | None = None) -> int:
        for _ in range(n):
            self.now_s += 1.0
            case = Case(self.deployment, Fleet(self.ready, 0), now, TRAITS, self.now_s, override, self.last)
            self.sized = size(case, self.raw)
            self.raw, self.last = self.sized.memory, self.sized.wanted
            self.ready = self.sized.wanted
        return self.ready

    @property
    def why(self) -> str:
        return phrase(self.sized.asked.why)


def test_fixed_keeps_min() -> None:
    story = Story(Scale(min=2, max=5, policy="fixed"), ready=2)
    assert story.tick(load(waiting=50, running=8, arrivals=20), 60) == 2


@pytest.mark.parametrize("name", PEER_NAMES)
def test_every_peer_scales_up_under_load_and_never_beyond_max(name: PolicyName) -> None:
    story = Story(Scale(min=1, max=6, policy=name), ready=1)
    story.tick(load(waiting=4, running=16, arrivals=9), 900)
    assert 4 <= story.ready <= 6
    story.tick(load(waiting=400, running=24, arrivals=50), 900)
    assert story.ready == 6


@pytest.mark.parametrize("name", PEER_NAMES)
def test_every_peer_goes_to_zero_where_it_may_and_is_back_at_once(name: PolicyName) -> None:
    story = Story(Scale(min=0, max=3, policy=name), ready=1)
    story.tick(load(running=3, arrivals=1), 5)
    assert story.ready >= 1
    story.tick(load(), 1600)
    assert story.ready == 0
    assert story.tick(load(waiting=1, arrivals=1)) >= 1


@pytest.mark.parametrize("name", ["fixed", *PEER_NAMES])
def test_nothing_goes_to_zero_while_something_waits_or_runs(name: PolicyName) -> None:
    story = Story(Scale(min=0, max=3, policy=name), ready=1)
    for _ in range(400):
        assert story.tick(load(running=1)) >= 1


def test_a_request_at_zero_is_a_launch_even_between_two_beats() -> None:
    story = Story(Scale(min=0, max=3, policy="hpa"))
    assert story.tick(load()) == 0
    assert story.tick(load(waiting=2, tick_s=0.2)) == 1
    assert "2 requests waiting" in story.why


def test_at_zero_one_idle_start_is_kept_for_as_long_as_a_start_is_worth() -> None:
    story = Story(Scale(min=0, max=3, policy="fixed"), ready=0)
    story.tick(load(waiting=1))
    assert story.tick(load(), 10) == 1
    assert "goes to 0 after 10.0 s" in story.why
    assert story.tick(load(), 2) == 0


def test_between_beats_the_policy_is_not_asked_and_its_memory_stays() -> None:
    story = Story(Scale(min=1, max=9, policy="knative"), ready=1)
    story.tick(load(running=20, waiting=20), 30)
    before, count = unpack(story.raw, "knative"), story.ready
    assert count > 1
    story.tick(load(tick_s=0.3), 100)
    assert story.ready == count
    assert unpack(story.raw, "knative").arrays == before.arrays


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (None, "no gateway has told"),
        (load(age_s=7.25), "7.2 s old"),
        (load(tick_s=600.0), "600 s passed"),
    ],
)
def test_stale_signals_hold_the_count_that_was_decided(now: Load | None, said: str) -> None:
    story = Story(Scale(min=1, max=9, policy="knative"), ready=1)
    story.tick(load(running=20, waiting=20), 30)
    count = story.ready
    story.ready = 1  # what was decided is not there yet
    assert story.tick(now) == count
    assert said in story.why
    assert story.tick(now, 300) == count


def test_without_any_word_what_is_there_stays_and_min_is_started() -> None:
    assert Story(Scale(min=1, max=9), ready=3).tick(None) == 3
    assert Story(Scale(min=2, max=9), ready=0).tick(None) == 2


def test_an_override_stands_above_the_policy_and_under_the_bounds() -> None:
    story = Story(Scale(min=1, max=4, policy="hpa"), ready=1)
    four = Override(count=4, until_wall_s=1e12, by="ann")
    assert story.tick(load(), 3, four) == 4
    assert (story.sized.asked.clamp, story.sized.asked.policy) == ("override", 1)
    assert story.why == "set to 4 by ann"
    assert story.tick(load(), 1, Override(count=9, until_wall_s=1e12)) == 4
    assert story.sized.asked.clamp == "max"
    assert story.why.endswith("but max is 4")


def test_an_override_of_zero_is_zero_whatever_waits() -> None:
    story = Story(Scale(min=0, max=4, policy="hpa"), ready=1)
    assert story.tick(load(waiting=5), 3, Override(count=0, until_wall_s=1e12)) == 0


def test_an_override_holds_without_signals() -> None:
    assert Story(Scale(min=1, max=4), ready=1).tick(None, 1, Override(count=3, until_wall_s=1e12)) == 3


def test_the_budget_bounds_max_bounds_and_min_stands_above_both() -> None:
    def ask(**more: object) -> Sized:
        story = Story(Scale(policy="knative", **more), ready=2)
        story.tick(load(running=80, waiting=80), 80)
        return story.sized

    rich = ask(min=1, max=8, price_per_hour=3.2, budget_per_hour=16.0)
    assert (rich.wanted, rich.asked.clamp) == (5, "budget")
    assert "the budget of 16 an hour pays for 5" in phrase(rich.asked.why)
    assert ask(min=1, max=4, price_per_hour=3.2, budget_per_hour=16.0).wanted == 4
    poor = ask(min=2, max=4, price_per_hour=3.2, budget_per_hour=3.2)
    assert (poor.wanted, poor.asked.clamp) == (2, "min")
    assert ask(min=1, max=4, price_per_hour=3.2).wanted == 4


def when(now_s: float) -> str:
    return datetime.datetime.fromtimestamp(now_s, datetime.UTC).isoformat()


def test_the_calendar_has_its_factor_of_the_usual_there_before_the_event_begins() -> None:
    now_s = 1_760_000_000.0
    sale = Event(start=when(now_s + 1000), end=when(now_s + 2000), factor=3, name="sale")
    story = Story(Scale(min=1, max=20, policy="knative", calendar=(sale,)), ready=2, now_s=now_s)
    story.tick(load(running=5, arrivals=2), 900)
    usual = story.ready
    story.tick(load(running=5, arrivals=2), 30)  # 70 s ahead: two cold starts and a minute are 80
    assert story.ready == 3 * usual
    assert "the calendar expects 3 times the usual" in story.why
    assert "(sale)" in story.why
    story.tick(load(running=5, arrivals=2), 1200)
    assert story.ready == usual


def test_of_events_that_overlap_the_largest_counts_and_fewer_expected_take_nothing_away() -> None:
    now_s = 1_760_000_000.0
    span = {"start": when(now_s + 900), "end": when(now_s + 2000)}
    both = (Event(**span, factor=3), Event(**span, factor=1.5))
    story = Story(Scale(min=1, max=20, policy="knative", calendar=both), ready=2, now_s=now_s)
    story.tick(load(running=5), 950)
    assert story.ready == 6
    story = Story(Scale(min=1, max=20, policy="knative", calendar=(Event(**span, factor=0.1),)), ready=2, now_s=now_s)
    story.tick(load(running=5), 950)
    assert story.ready == 2


def test_slo_has_there_what_it_expects_and_says_between_which_rates_the_count_stays() -> None:
    story = Story(Scale(min=1, max=20), ready=1)
    story.tick(load(running=24, arrivals=12), 900)  # 2 requests/s a replica
    assert 6 <= story.ready <= 9
    assert story.sized.asked.expected == pytest.approx(12, rel=0.05)
    assert "12.0 requests/s expected in 10 s at 0.99 (12.0 now); one more over" in story.why
    busy = story.ready
    story.tick(load(running=4, arrivals=2), 900)
    assert story.ready < busy
    assert story.tick(load(), 7200) == 1


def test_slo_goes_to_zero_where_it_may_and_is_back_at_once() -> None:
    story = Story(Scale(min=0, max=3), ready=1)
    story.tick(load(running=3, arrivals=1), 60)
    assert story.tick(load(), 4000) == 0
    assert story.tick(load(waiting=1, arrivals=1)) >= 1


def test_slo_expects_the_calendars_traffic() -> None:
    now_s = 1_760_000_000.0
    sale = Event(start=when(now_s + 1000), end=when(now_s + 2000), factor=3)
    story = Story(Scale(min=1, max=30, calendar=(sale,)), ready=2, now_s=now_s)
    story.tick(load(running=8, arrivals=4), 900)
    usual = story.ready
    story.tick(load(running=8, arrivals=4), 97)  # the event is a cold start, 10 s, ahead
    assert story.ready >= 2 * usual


def test_a_policy_acts_as_often_as_it_publishes_and_at_once_the_first_time() -> None:
    story = Story(Scale(min=1, max=9, policy="hpa"), ready=1)
    assert story.tick(load(running=8)) == 3  # 8 in flight at 0.8 of 4 slots each
    assert story.tick(load(running=24), 14) == 3
    assert story.tick(load(running=24)) > 3


def test_a_long_tick_counts_as_its_rate() -> None:
    calm, slow = (Story(Scale(min=1, max=9, policy="skyserve"), ready=1) for _ in range(2))
    calm.tick(load(arrivals=4), 400)
    slow.tick(load(arrivals=8, tick_s=2.0), 400)
    assert calm.ready == slow.ready == 3


def test_memory_is_another_policys_only_when_it_is_not_named_so() -> None:
    raw = pack(Memory(policy="hpa", wanted=3), {"a": np.arange(6.0).reshape(2, 3)})
    memory = unpack(raw, "hpa")
    assert memory is not None
    assert np.array_equal(state_of(memory)["a"], np.arange(6.0).reshape(2, 3))
    assert unpack(raw, "knative") is None
    assert unpack(b"\x00nonsense", "hpa") is None
    assert unpack(pack(msgspec.structs.replace(memory, version=99)), "hpa") is None
    rules = (Rule(signal="waiting", above=1),)
    assert key_of(Scale(min=0, max=2, policy="thresholds", rules=rules)) == "thresholds:1"


def test_a_changed_policy_starts_from_nothing() -> None:
    story = Story(Scale(min=1, max=9, policy="knative"), ready=1)
    story.tick(load(running=20), 30)
    story.deployment = msgspec.structs.replace(story.deployment, scale=Scale(min=1, max=9, policy="hpa"))
    story.tick(load(running=20))
    assert unpack(story.raw, "hpa") is not None


def test_equal_bounds_have_no_policy() -> None:
    assert policy_of(Scale(min=2, max=2, policy="hpa"), 0.99) is None


scales = st.builds(
    lambda low, more, name: Scale(min=low, max=low + more, policy=name, price_per_hour=1.5),
    st.integers(0, 3),
    st.integers(0, 4),
    st.sampled_from(["slo", "fixed", *PEER_NAMES]),
)
ticks = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.sampled_from([0.2, 1.0, 1.1, 500.0]), st.floats(0, 9)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60)
@given(scales, ticks, st.integers(0, 4))
def test_decide_is_a_function_and_changes_nothing_it_is_given(scale: Scale, story: list, ready: int) -> None:
    deployment = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=scale)
    carry, count = Carry(), ready
    for second, (waiting, arrivals, tick_s, age_s) in enumerate(story):
        fleet = tuple(
            Replica(id=f"m-{i}", deployment="m", revision="r1", state="ready", endpoint="") for i in range(count)
        )
        loads = {"m": load(waiting, min(waiting, 4 * count), arrivals, tick_s, age_s)}
        snapshot = Snapshot(
            now_s=100.0 + second, now_wall_s=1e9 + second, deployments=(deployment,), replicas=fleet, loads=loads,
            traits={"m": TRAITS}, currency="CNY",
        )  # fmt: skip
        before = msgspec.msgpack.encode((snapshot, carry))
        plan, after = decide(snapshot, carry)
        assert decide(snapshot, carry) == (plan, after)
        assert msgspec.msgpack.encode((snapshot, carry)) == before
        if scale.max > scale.min:
            assert scale.min <= after.wanted["m"] <= scale.max
            (choice,) = plan.choices
            assert choice.sentence.startswith("m: ")
            kept = msgspec.json.decode(msgspec.json.encode(choice), type=Choice)
            assert choice.sentence == sentence(choice) == sentence(kept)
            assert all(sentence(choice, language) for language in LANGUAGES)
            assert (choice.after - choice.before) * 1.5 == choice.cost_change_per_hour
        else:
            assert after == Carry() or after.failures
        count = count + len(plan.launches) - len(plan.drains)
        assert scale.min <= count <= scale.max
        carry = after
