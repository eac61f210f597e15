"""The long tail: the closed form is the event-by-event simulation, the bound is a bound, pools lose nobody."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.control import tail
from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import DAY_S, Floats, Rates
from neaptide.simulate.tail import COLD_START_S, TailQuestion, compare_tail, gap_quantile, traffic
from neaptide.simulate.tail_arrivals import small
from neaptide.simulate.tail_bound import bound, cheapest
from neaptide.simulate.tail_levels import Level, Paid, Shop, levels, serve
from neaptide.simulate.world import changed, read_world
from tests.cli_run import cli

SHOP = Shop(slots=2, cold_start_s=120.0)
TO_S = 4000.0
# Quarters of a second are exact in doubles, and equal times and edges do happen.
TIMES = st.lists(st.integers(0, 4 * 3900).map(lambda n: n / 4), max_size=60).map(lambda t: np.array(sorted(t)))
BURSTS = st.lists(st.tuples(st.integers(0, 3600), st.integers(1, 12)), max_size=6).map(
    lambda pairs: np.sort(np.array([t + k / 2 for t, n in pairs for k in range(n)], dtype=np.float64))
)
KEEPS = st.sampled_from([0.0, 5.0, 60.0, 90.0, 300.0, 1000.0])


def event_by_event(level: Level, keep_s: float, shop: Shop, from_s: float, to_s: float) -> Paid:
    """The same level in quarters of a second, with a state and a clock."""
    served, calls = set(level.served.tolist()), set(level.calls.tolist())
    counts = {t: int((level.served == t).sum()) for t in served}
    paid = late = starts = waiting = 0
    launched: float | None = None
    busy_until = 0.0
    for quarter in range(round(4 * (to_s + keep_s + 2000))):
        now = quarter / 4
        if launched is not None and now > launched + shop.cold_start_s and now > busy_until + keep_s:
            launched = None
        if now in calls and launched is None:
            launched, busy_until, waiting = now, now + shop.service_s, 0
            starts += from_s <= now < to_s
        if now in calls:
            busy_until = max(busy_until, now + shop.service_s)
        if launched is not None:
            ready = launched + shop.cold_start_s
            came = counts.get(now, 0)
            if now < ready:
                late += came * (now + shop.slack_s < ready) * (from_s <= now < to_s)
                waiting += came
            if now == ready:
                busy_until = max(busy_until, ready + shop.service_s * -(-waiting // shop.slots))
            paid += from_s <= now < to_s and not (now >= ready and now >= busy_until + keep_s)
    return Paid(paid / 4, int(late), int(starts), int(((level.served >= from_s) & (level.served < to_s)).sum()))


@settings(max_examples=40, deadline=None)
@given(TIMES | BURSTS, KEEPS, st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 500.0]))
def test_the_closed_form_is_the_simulation_event_by_event(
    t_s: Floats, keep_s: float, headroom: float, from_s: float
) -> None:
    for level in levels(t_s, SHOP, [headroom])[headroom]:
        assert serve(level, keep_s, SHOP, from_s, TO_S) == event_by_event(level, keep_s, SHOP, from_s, TO_S)


@given(TIMES | BURSTS, st.sampled_from([0.0, 0.3, 0.6]))
def test_each_request_is_served_by_one_level_that_it_calls_for(t_s: Floats, headroom: float) -> None:
    found = levels(t_s, SHOP, [headroom])[headroom]
    assert np.array_equal(np.sort(np.concatenate([t_s[:0], *(level.served for level in found)])), t_s)
    for level in found:
        assert np.isin(level.served, level.calls).all()
        # No level ever runs more than its slots.
        ahead = level.served[SHOP.slots :] - level.served[: -SHOP.slots or None][: len(level.served[SHOP.slots :])]
        assert (ahead >= SHOP.service_s).all()


def by_trial(t_s: Floats, shop: Shop, price: float, from_s: float, to_s: float) -> float:
    """Each choice of the requests in time, each choice of the pauses over which the replica is held."""
    best = np.inf
    for taken in product((False, True), repeat=len(t_s)):
        kept = t_s[np.array(taken, dtype=bool)]
        cost = price * (len(t_s) - len(kept)) if len(kept) < len(t_s) else 0.0
        last = from_s
        for nth, t in enumerate(kept):
            tail_s = min(shop.service_s, to_s - last) if nth else 0.0
            cost += min(t - last, tail_s + shop.cold_start_s - shop.slack_s)
            last = t
        best = min(best, cost + (min(shop.service_s, to_s - last) if len(kept) else 0.0))
    return float(best)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 999), max_size=8, unique=True), st.sampled_from([0.5, 20.0, 60.0, 500.0, np.inf]))
def test_the_bound_of_one_level_is_the_best_of_all_schedules(times: list[int], price: float) -> None:
    t_s = np.array(sorted(times), dtype=np.float64)
    if len(t_s):
        assert cheapest(t_s, SHOP, price, 0.0, 1000.0) == pytest.approx(by_trial(t_s, SHOP, price, 0.0, 1000.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(TIMES | BURSTS, min_size=1, max_size=4), KEEPS, st.sampled_from([0.0, 0.5]))
def test_no_rule_that_keeps_the_goal_costs_less_than_the_bound(
    models: list[Floats], keep_s: float, headroom: float
) -> None:
    found = [level for t_s in models for level in levels(t_s, SHOP, [headroom])[headroom]]
    paid = [serve(level, keep_s, SHOP, 500.0, TO_S) for level in found]
    late = sum(p.late for p in paid)
    least = bound([level.served for level in found], SHOP, late, 500.0, TO_S)
    hours = sum(p.replica_s for p in paid) / 3600
    assert least.replica_hours <= hours + 1e-9
    assert least.replica_hours <= least.replica_hours_no_budget + 1e-9
    assert late or least.replica_hours_no_budget <= hours + 1e-9


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31))
def test_each_model_is_in_one_pool_of_at_most_so_many(models: int, most: int, seed: int) -> None:
    busy = np.random.default_rng(seed).random((models, 20)) < 0.4
    found = tail.pools(busy, most)
    assert sorted(model for pool in found for model in pool) == list(range(models))
    assert max(map(len, found)) <= most
    assert len(found) == -(-models // most)


def test_models_that_are_busy_together_share_a_replica() -> None:
    day = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]], dtype=bool)
    assert tail.pools(day, 2) == ((0, 2), (1, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(TIMES | BURSTS, min_size=1, max_size=4), KEEPS)
def test_a_pool_loses_no_request(models: list[Floats], keep_s: float) -> None:
    found = traffic([models], SHOP)
    served = [level.served for level in found.at[0.0][0]]
    assert np.array_equal(np.sort(np.concatenate([*models, models[0][:0]])), np.sort(np.concatenate([[], *served])))
    for headroom in found.at:
        paid = [found.paid(0, keep_s, 0.0, TO_S), found.further(headroom, keep_s, 0.0, TO_S)]
        assert sum(p.requests for p in paid) == sum(map(len, models))


def test_a_pool_always_on_costs_one_replica_whatever_is_in_it() -> None:
    models = [np.arange(at, 3000.0, 50.0) for at in (0.0, 7.0, 20.0)]
    found = traffic([models], Shop(slots=50)).paid(0, np.inf, 0.0, TO_S)
    assert found == Paid(TO_S, 0, 0, 180)


def test_the_price_spends_seconds_where_they_help_most_requests() -> None:
    # Given one model whose pauses cost 10 s a late request and one at 100 s, and half of the late allowed.
    cost_s, late = [np.array([0.0, 100.0]), np.array([0.0, 1000.0])], [np.array([10.0, 0.0]), np.array([10.0, 0.0])]
    chosen = tail.choose(cost_s, late, 10.0)
    assert chosen.options.tolist() == [1, 0]
    assert chosen.late == 10.0
    assert 10.0 <= chosen.price_s <= 100.0
    assert tail.choose(cost_s, late, 0.0).options.tolist() == [1, 1]
    assert tail.choose(cost_s, late, 20.0).options.tolist() == [0, 0]


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_what_is_allowed_is_kept_wherever_it_can_be(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    late = [np.sort(random.integers(0, 50, 5))[::-1].astype(float) for _ in range(6)]
    cost_s = [np.sort(random.random(5)) * 1000 for _ in range(6)]
    least, most = sum(n[-1] for n in late), sum(n[0] for n in late)
    allowed = least + share * (most - least)
    assert tail.choose(cost_s, late, allowed).late <= allowed


def test_the_gap_quantile_follows_the_pauses() -> None:
    # A model asked for each ten minutes is kept for longer than that; one asked for each second is not.
    seldom, often = 600.0 * np.arange(500.0), np.concatenate([np.arange(200_000.0), [200_050.0]])
    kept = [gap_quantile(levels(t_s, Shop(slots=100))[0.0][0], 0.99) for t_s in (seldom, often)]
    assert kept[0][-1] > 550.0
    assert kept[1][0] == 10.0


# ------------------------------------------------------------------------------------------------ a whole comparison


def trace(days: int = 3) -> Rates:
    """Four small clients and a large one, in ten-minute windows; the third comes first on the last day."""
    windows = np.arange(days * 144)
    day = (windows % 144) < 72
    clients = np.stack([
        0.2 * day, 0.3 * day, np.where(windows >= (days - 1) * 144 + 30, 0.5, 0.0), 0.01 + 0.0 * windows,
        5.0 + 0.0 * windows,
    ])  # fmt: skip
    names = tuple("abcde")
    return Rates(series="s", window_s=600.0, start_s=0.0, rates=clients.sum(0), clients=clients, client_names=names)


QUESTION = TailQuestion(first_day=2, last_day=2, tune=(0, 1), seeds=(0, 1), capacity_rps=6.0)


def test_a_comparison_tells_the_same_each_time_and_keeps_every_request() -> None:
    world = changed(read_world(), cold_start_s=COLD_START_S)
    one, other = (compare_tail(trace(), world, QUESTION) for _ in range(2))
    assert one.rows == other.rows
    assert one.bounds == other.bounds
    assert [model.name for model in one.models] == ["a", "b", "c", "d"]
    came = [[p.requests for p in row.paid] for row in one.rows]
    assert all(requests == came[0] for requests in came)
    for row in one.rows:
        if row.attainment >= 0.99 and not row.pooled:
            assert row.hours >= one.bound_hours
    always = next(row for row in one.rows if row.name == "always on" and not row.pooled)
    assert always.attainment == 1.0
    assert always.hours == pytest.approx(4 * 24)


def test_one_client_is_drawn_alike_whoever_stands_beside_it() -> None:
    rates = trace()
    alone = Rates(
        series="s", window_s=600.0, start_s=0.0, rates=rates.rates, clients=np.asarray(rates.clients)[1:3],
        client_names=("b", "c"),
    )  # fmt: skip
    beside = {model.name: model.requests(7, 0.0, DAY_S) for model in small(rates, 0.5, (0, 1))}
    assert np.array_equal(beside["b"], small(alone, 0.5, (0, 1))[0].requests(7, 0.0, DAY_S))
    assert not np.array_equal(beside["b"], small(alone, 0.5, (0, 1))[0].requests(8, 0.0, DAY_S))


def test_what_has_no_small_models_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no client is under 0\.001"):
        small(trace(), 0.001, (2, 2))
    with pytest.raises(ConfigError, match="no clients"):
        small(Rates(series="s", window_s=600.0, start_s=0.0, rates=np.ones(144)), 0.5, (0, 0))


def test_the_command_line_tells_table_and_json(tmp_path: Path) -> None:
    rates = trace(2)
    file = tmp_path / "clients.csv"
    rows = [
        f"{600 * window},{name},{rps:g}"
        for name, client in zip(rates.client_names, np.asarray(rates.clients), strict=True)
        for window, rps in enumerate(client.tolist())
    ]
    file.write_text("\n".join(["t_s,client,rate_rps", *rows]) + "\n")
    asked = ("simulate", "--arrivals", str(file), "--tune", "0", "--tail", "--capacity", "6", "--pool", "2")
    told = json.loads(cli(*asked, "--json").stdout)
    assert told["world"]["cold_start_s"] == COLD_START_S
    assert told["bound"]["replica_hours"] <= told["bound"]["replica_hours_no_budget"]
    assert sorted(name for pool in told["models"]["pools"] for name in pool) == told["models"]["names"]
    own = [row for row in told["policies"] if row["name"] == "neaptide"]
    assert {row["models_a_replica"] for row in own} == {1, 2}
    shown = cli(*asked)
    assert shown.returncode == 0, shown.stderr
    assert "knative" in shown.stdout
    assert "clairvoyant scale to zero" in shown.stdout
    refused = cli(*asked, "--policy", "hpa")
    assert refused.returncode != 0
    assert "leave out --policy" in refused.stderr
