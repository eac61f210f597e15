"""shadow: what others would have cost on the same arrivals, kept small and by the day."""

from __future__ import annotations

import msgspec
import pytest

from neaptide.control.shadow import DAYS_KEPT, NAMES, REAL, Days, Shadow, Shadows
from neaptide.types import Deployment, Load, Revision, Scale, Traits

TRAITS = Traits(slots=10.0, service_s=10.0, cold_start_s=30.0, learnt="measured")  # 1 request/s a replica
MODEL = Deployment(model="m", stable=Revision(id="r1", model="m", source=""), scale=Scale(min=1, max=20))
NOON_S = 1_760_000_000.0 // 86400 * 86400 + 43200


def run(shadow: Shadow, seconds: int, arrivals: int, start_s: float = NOON_S, late: int = 0, present: int = 2) -> float:
    for _second in range(seconds):
        start_s += 1.0
        shadow.step(Load(tick_s=1.0, age_s=0.1, arrivals=arrivals, late=late), TRAITS, present, start_s)
    return start_s


def test_a_steady_load_costs_each_policy_about_what_it_needs() -> None:
    shadow = Shadow(MODEL, TRAITS, 4, {})
    now_s = run(shadow, 3600, 4)
    shadow.days.clear()
    run(shadow, 3600, 4, now_s)
    (rows,) = shadow.days.values()
    for name in NAMES:
        day = rows[name]
        assert day.arrivals == pytest.approx(4 * 3600, rel=0.01), name
        assert 3.9 <= day.replica_s / 3600 <= 11.0, (name, day)  # 4 are needed; Ray's default target is 0.4
    assert rows["ray"].replica_s > rows["hpa"].replica_s


def test_what_really_ran_is_kept_beside_them() -> None:
    shadow = Shadow(MODEL, TRAITS, 2, {})
    run(shadow, 100, 3, late=1, present=5)
    (rows,) = shadow.days.values()
    assert rows[REAL].replica_s == pytest.approx(500)
    assert (rows[REAL].arrivals, rows[REAL].late) == (300, 100)


def test_a_surge_makes_late_ones_for_those_who_must_start_replicas_first() -> None:
    shadow = Shadow(MODEL, TRAITS, 1, {})
    now_s = run(shadow, 600, 1)
    run(shadow, 120, 12, now_s)
    (rows,) = shadow.days.values()
    assert all(rows[name].late > 0 for name in NAMES)
    assert all(rows[name].late <= rows[name].arrivals for name in NAMES)


def test_days_are_cut_at_midnight_utc_and_only_the_last_ones_are_kept() -> None:
    shadow = Shadow(MODEL, TRAITS, 1, {})
    for day in range(DAYS_KEPT + 5):
        run(shadow, 6, 1, NOON_S + 86400 * day)
    assert len(shadow.days) == DAYS_KEPT
    assert min(shadow.days) > "2025"


def test_traits_that_moved_much_make_another_world_and_the_counts_go_on() -> None:
    shadow = Shadow(MODEL, TRAITS, 4, {})
    now_s = run(shadow, 600, 4)
    slower = msgspec.structs.replace(TRAITS, service_s=20.0)
    for _ in range(1800):
        now_s += 1.0
        shadow.step(Load(tick_s=1.0, age_s=0.1, arrivals=4), slower, 4, now_s)
    (rows,) = shadow.days.values()
    assert rows["wva"].arrivals == pytest.approx(4 * 2400, rel=0.01)
    assert rows["wva"].replica_s / 2400 > 5.5  # 8 are needed once the service takes twice as long


def test_a_service_shorter_than_its_tick_keeps_its_capacity() -> None:
    quick = Traits(slots=1.0, service_s=0.25, cold_start_s=1.0)  # 4 requests/s
    shadow, now_s = Shadow(MODEL, quick, 2, {}), NOON_S
    for _ in range(1200):
        now_s += 1.0
        shadow.step(Load(tick_s=1.0, age_s=0.1, arrivals=8), quick, 2, now_s)
    (rows,) = shadow.days.values()
    assert 1.9 <= rows["dynamo"].replica_s / 1200 <= 3.5
    assert rows["dynamo"].late / rows["dynamo"].arrivals < 0.05


def test_what_was_kept_goes_on_and_is_json_of_a_bounded_size() -> None:
    shadows, now_s = Shadows(Days()), NOON_S
    for _ in range(50):
        now_s += 1.0
        shadows.step(MODEL, Load(tick_s=1.0, age_s=0.1, arrivals=1), TRAITS, 1, now_s)
    raw = msgspec.json.encode(shadows.days())
    assert len(raw) < 2000
    again = Shadows(msgspec.json.decode(raw, type=Days))
    again.step(MODEL, Load(tick_s=1.0, age_s=0.1, arrivals=1), TRAITS, 1, now_s + 1)
    (rows,) = again.days().models["m"].values()
    assert rows[REAL].arrivals == 51


def test_the_same_story_gives_the_same_days() -> None:
    one, other = (Shadow(MODEL, TRAITS, 1, {}) for _ in range(2))
    for shadow in (one, other):
        run(shadow, 300, 7)
    assert one.days == other.days
