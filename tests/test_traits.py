"""traits: what one replica can do is learnt from what it does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.control.traits import ASSUMED, SEEN_EARLY_S, Learnt, Memory, Told, add, fit, learn, slots, traits
from neaptide.engine.report import Meters
from neaptide.types import Deployment, Load, Replica, ReplicaState, Revision, Steps

MODEL = Deployment(model="m", stable=Revision(id="r1", model="m", source=""))


def steps(base_s: float, each_s: float, batches: range, times: int = 20) -> Steps:
    """What an engine tells whose step takes base_s + each_s x batch."""
    meters = Meters()
    for _ in range(times):
        for batch in batches:
            meters.step(base_s + each_s * batch, batch)
    return meters.steps_told()


def replica(state: ReplicaState, started_s: float, id: str = "m-0", epoch: int = 1) -> Replica:
    return Replica(id=id, deployment="m", revision="r1", state=state, endpoint="", epoch=epoch, started_s=started_s)


def after(memory: Memory, now_s: float, *fleet: Replica, told: Told | None = None, **load: float) -> Memory:
    loads = {"m": Load(tick_s=1.0, age_s=0.0, **load)}
    return learn(memory, [MODEL], fleet, loads, {"m": told or Told()}, now_s)


def test_before_anything_is_known_sane_traits_are_assumed() -> None:
    assert traits(MODEL, Memory()) == ASSUMED


@given(st.floats(0.001, 0.05), st.floats(0.0002, 0.01))
def test_the_step_time_is_fitted_to_the_batch(base_s: float, each_s: float) -> None:
    line = fit(steps(base_s, each_s, range(1, 17)))
    assert line is not None
    assert line[0] == pytest.approx(base_s, rel=1e-3, abs=1e-6)
    assert line[1] == pytest.approx(each_s, rel=1e-3)


def test_slots_are_the_largest_batch_whose_step_stays_within_the_goal() -> None:
    learnt = Learnt(max_running=64, steps=steps(0.020, 0.002, range(1, 20)))
    assert slots(learnt, tpot_s=0.100) == 40
    assert slots(learnt, tpot_s=0.500) == 64
    assert slots(learnt, tpot_s=0.010) == 1


def test_steps_of_one_batch_size_or_of_a_flat_engine_leave_the_engines_own_limit() -> None:
    assert slots(Learnt(max_running=32, steps=steps(0.02, 0.01, range(4, 5))), 0.1) == 32
    assert slots(Learnt(max_running=32, steps=steps(0.09, 0.0, range(1, 9))), 0.1) == 32
    assert fit(steps(0.02, 0.01, range(1, 3), times=2)) is None


def test_the_steps_of_several_replicas_add_up() -> None:
    line = fit(add(steps(0.02, 0.002, range(1, 8)), steps(0.02, 0.002, range(8, 16))))
    assert line == pytest.approx((0.02, 0.002))


def test_the_service_time_follows_what_ended_lately() -> None:
    memory = after(Memory(), 1.0, served=4, service_s=3.0)
    assert traits(MODEL, memory).service_s == 3.0
    assert traits(MODEL, memory).learnt == "measured"
    for second in range(2000):
        memory = after(memory, 2.0 + second, served=4, service_s=6.0)
    assert traits(MODEL, memory).service_s == pytest.approx(6.0, rel=0.01)


def test_one_odd_request_does_not_move_the_service_time_of_hundreds() -> None:
    memory = after(Memory(), 1.0, served=500, service_s=2.0)
    assert traits(MODEL, after(memory, 2.0, served=1, service_s=60.0)).service_s < 2.5


def test_idle_time_takes_nothing_back() -> None:
    told = Told(slots=16, steps=steps(0.02, 0.01, range(1, 9)))
    memory = after(Memory(), 1.0, told=told, served=10, service_s=0.5)
    before = traits(MODEL, memory)
    for second in range(100):
        memory = after(memory, 2.0 + second)
    assert traits(MODEL, memory) == before
    assert before.slots == 8


def test_a_start_that_was_seen_is_measured_once_with_its_stages() -> None:
    memory = after(Memory(), 100.0, replica("starting", 100.0))
    told = Told(stages={"m-0": {"load_s": 20.0}})
    memory = after(memory, 130.0, replica("ready", 100.0), told=told)
    assert memory.models["m"].cold_start_s == 30.0
    assert memory.models["m"].stages == {"load_s": 20.0}
    memory = after(memory, 500.0, replica("ready", 100.0))
    assert (memory.models["m"].cold_start_s, memory.models["m"].starts) == (30.0, 1)


def test_later_starts_move_the_mean() -> None:
    memory = Memory()
    for epoch, took_s in enumerate((30.0, 10.0)):
        memory = after(memory, 100.0, replica("starting", 100.0, epoch=epoch))
        memory = after(memory, 100.0 + took_s, replica("ready", 100.0, epoch=epoch))
    assert memory.models["m"].cold_start_s == pytest.approx(24.0)
    assert memory.models["m"].starts == 2


def test_a_standby_that_wakes_has_not_just_started() -> None:
    memory = after(Memory(), 103.0, replica("standby", 100.0))
    memory = after(memory, 104.0, replica("ready", 100.0))
    assert memory.models["m"].starts == 0


def test_a_replica_adopted_from_another_control_tells_nothing_of_its_start() -> None:
    memory = after(Memory(), 100.0 + SEEN_EARLY_S + 1, replica("starting", 100.0))
    memory = after(memory, 4000.0, replica("ready", 100.0))
    assert memory.models["m"].starts == 0


def test_a_start_too_quick_to_be_seen_starting_is_measured_too() -> None:
    assert after(Memory(), 100.8, replica("ready", 100.0)).models["m"].cold_start_s == pytest.approx(0.8)


def test_what_is_remembered_stays_bounded_by_the_fleet() -> None:
    memory = Memory()
    for epoch in range(50):
        memory = after(memory, 100.0 + epoch, replica("starting", 100.0 + epoch, epoch=epoch))
    assert len(memory.watched) == 1
    assert learn(memory, [], [], {}, {}, 200.0) == Memory()
