"""The live page's numbers: exact sums from gauges, missing where nobody told, bounded memory, decisions as flags."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.control.port import UsageRow
from neaptide.control.reasons import reason
from neaptide.dashboard.feed import BEHIND, Feed
from neaptide.dashboard.flags import KEPT, Flags, model_of
from neaptide.dashboard.history import ALL, MINUTES, SECONDS, History
from neaptide.dashboard.live import FIELDS, Fleet, Tick, Window, joined, quantile, rounded, row, ticks, together, window
from neaptide.dashboard.live import shown as spoken
from neaptide.errors import StorageError
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Attempt, Choice, Launch, Plan, Slo, Usage
from tests.dashboard_kit import FakeSource, look


def gauges(gateway: str = "gateway-0", **counters: float) -> Gauges:
    return Gauges(gateway=gateway, mono_s=0.0, fast=1, slow=1, models={"m": ModelGauge(**counters)})  # type: ignore[arg-type]


def shown(tick: Tick) -> dict[str, float]:
    return dict(zip(FIELDS, row(tick)))


# ----------------------------------------------------------------------------------------------------------- ticks


def test_counters_become_what_happened_since_the_last_look() -> None:
    _, before = ticks({}, [gauges(arrivals=10, done=8)], 1.0)
    told, _ = ticks(before, [gauges(arrivals=14, done=11)], 2.0)
    assert (told["m"].arrivals, told["m"].done) == (4, 3)
    assert shown(told["m"])["arrivals_per_s"] == 2.0


def test_the_first_look_at_a_gateway_tells_levels_and_no_counts() -> None:
    told, _ = ticks({}, [gauges(arrivals=10, waiting=3)], 1.0)
    assert math.isnan(told["m"].arrivals)
    assert told["m"].waiting == 3


def test_a_gateway_that_restarts_counts_from_nothing() -> None:
    _, before = ticks({}, [gauges(arrivals=100)], 1.0)
    told, _ = ticks(before, [gauges(arrivals=2)], 1.0)
    assert told["m"].arrivals == 2


def test_several_gateways_add_up_and_the_oldest_wait_is_the_oldest() -> None:
    _, before = ticks({}, [gauges("a", arrivals=1), gauges("b", arrivals=1)], 1.0)
    now = [gauges("a", arrivals=3, waiting=1, oldest_wait_s=0.5), gauges("b", arrivals=6, waiting=2, oldest_wait_s=2.0)]
    told, _ = ticks(before, now, 1.0)
    assert (told["m"].arrivals, told["m"].waiting, told["m"].oldest_wait_s) == (7, 3, 2.0)


def test_what_nobody_told_is_missing_and_never_nothing() -> None:
    numbers = shown(Tick(span_s=1.0))
    counted = {"ready", "starting"}  # of replicas, which control knows itself
    assert {name for name, v in numbers.items() if not math.isnan(v)} == counted
    assert spoken(map(rounded, [math.nan, math.inf, 0.0, 1 / 3])) == [None, None, 0.0, 0.3333]


def test_no_requests_is_no_quantile_no_mean_and_no_share() -> None:
    numbers = shown(Tick(span_s=1.0, arrivals=0, done=0, late=0, firsts=0, ttft_sum_s=0.0))
    assert numbers["requests_per_s"] == 0
    assert numbers["good_per_s"] == 0
    assert math.isnan(numbers["share_in_slo"])
    assert math.isnan(numbers["ttft_s"])


def test_money_is_known_where_there_is_a_price() -> None:
    fleet = Fleet(ready=2, billed=2, price_per_hour=1.5)
    numbers = shown(Tick(span_s=10.0, tokens=1000, fleet=fleet, replica_cost=2 * 1.5 * 10 / 3600))
    assert numbers["cost_per_hour"] == pytest.approx(3.0)
    assert numbers["cost_per_mtok"] == pytest.approx(3.0 / (100 * 3600 / 1e6))


def test_replicas_of_others_cost_what_their_tokens_cost() -> None:
    spent = Window(rows=1, span_s=60.0, spend_per_hour=7.0)
    assert shown(Tick(span_s=1.0, fleet=Fleet(remote=True), window=spent))["cost_per_hour"] == 7.0
    own = shown(Tick(span_s=1.0, fleet=Fleet(remote=False), window=spent))
    assert math.isnan(own["cost_per_hour"])  # a list price is what customers pay, not what it costs
    assert own["token_spend_per_hour"] == 7.0


def test_late_answers_are_counted_by_the_gateways_where_they_tell_them() -> None:
    counted = Tick(span_s=1.0, done=10, late=4, window=Window(rows=1, span_s=60.0, share_in_slo=1.0))
    assert shown(counted)["share_in_slo"] == pytest.approx(0.6)
    assert shown(counted)["good_per_s"] == pytest.approx(6.0)
    counted.late = math.nan
    assert shown(counted)["share_in_slo"] == 1.0


COUNTS = st.integers(0, 1000)


@given(st.lists(st.tuples(COUNTS, COUNTS, st.floats(0.1, 10.0)), min_size=1, max_size=30), st.integers(1, 30))
def test_sums_are_the_same_however_the_ticks_are_joined(parts: list[tuple[int, int, float]], cut: int) -> None:
    all_of = [Tick(span_s=s, arrivals=a, tokens=t) for a, t, s in parts]
    pieces = [joined(all_of[i : i + cut]) for i in range(0, len(all_of), cut)]
    one, other = joined(all_of), joined(pieces)
    assert one.arrivals == other.arrivals == sum(a for a, _, _ in parts)
    assert one.tokens == other.tokens
    assert one.span_s == pytest.approx(other.span_s)


def test_all_models_together_are_missing_a_limit_when_one_has_none() -> None:
    limited, free = Fleet(ready=1, slots=8.0, capacity_per_s=4.0), Fleet(ready=1)
    both = together({"a": Tick(span_s=1.0, arrivals=2, fleet=limited), "b": Tick(span_s=1.0, fleet=free)}, None)
    assert both.arrivals == 2
    assert both.fleet.ready == 2
    assert math.isnan(both.fleet.slots)


# --------------------------------------------------------------------------------------------------- ledger windows


def usage(ttft_s: float, tpot_s: float = 0.01, outcome: str = "ok", ago_s: float = 1.0, model: str = "m") -> Usage:
    return Usage(
        request_id="r", model=model, ttft_s=ttft_s, tpot_s=tpot_s, outcome=outcome, status=200,  # type: ignore[arg-type]
        started_wall_s=1000.0 - ago_s, attempts=(Attempt(replica="m-0"),),
    )  # fmt: skip


def test_the_ledgers_rows_give_quantiles_share_and_spend() -> None:
    rows = [(usage(0.1 * n), 1_000_000_000) for n in range(1, 21)]
    told = window(rows, {"m": Slo(ttft_s=1.0)}, 1000.0, cut=False)
    assert told is not None
    assert told.ttft_p50_s == pytest.approx(1.0)
    assert told.ttft_p95_s == pytest.approx(1.9)
    assert told.share_in_slo == pytest.approx(0.5)
    assert told.spend_per_hour == pytest.approx(20 * 60)


def test_a_cut_window_covers_only_the_time_it_has_rows_of() -> None:
    rows = [(usage(0.1, ago_s=1.0), 1_000_000_000), (usage(0.1, ago_s=6.0), 1_000_000_000)]
    told = window(rows, {}, 1000.0, cut=True)
    assert told is not None
    assert told.span_s == pytest.approx(6.0)
    assert told.spend_per_hour == pytest.approx(2 / 6 * 3600)


def test_failures_miss_the_slo_and_those_who_left_do_not_count() -> None:
    rows = [(usage(0.1), None), (usage(0.1, outcome="error"), None), (usage(0.1, outcome="aborted"), None)]
    told = window(rows, {}, 1000.0, cut=False)
    assert told is not None
    assert told.share_in_slo == pytest.approx(0.5)
    assert math.isnan(told.spend_per_hour)
    assert window([], {}, 1000.0, cut=False) is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_one_of_the_values_with_enough_below_it(values: list[float], q: float) -> None:
    found = quantile(sorted(values), q)
    assert found in values
    assert sum(v <= found for v in values) >= q * len(values) - 1e-9


# ---------------------------------------------------------------------------------------------------------- history


def test_memory_is_bounded_and_a_day_is_kept_by_the_minute() -> None:
    history = History()
    for second in range(2 * SECONDS):
        history.note(1_760_000_040.0 + second, {"m": Tick(span_s=1.0, arrivals=2.0)}, None)
    seconds, minutes = history.columns("15m"), history.columns("24h")
    assert len(seconds["t"]) == SECONDS
    assert len(minutes["t"]) == 2 * SECONDS // 60 - 1  # the minute that still runs is not among them
    assert [t % 60 for t in minutes["t"]] == [0.0] * len(minutes["t"])
    assert set(minutes["models"]["m"][FIELDS.index("arrivals_per_s")]) == {2.0}
    assert MINUTES == 24 * 60


def test_a_model_that_comes_later_is_missing_before() -> None:
    history = History()
    history.note(0.0, {"a": Tick(span_s=1.0, arrivals=1.0)}, None)
    history.note(1.0, {"a": Tick(span_s=1.0, arrivals=1.0), "b": Tick(span_s=1.0, arrivals=1.0)}, None)
    told = history.columns("15m")["models"]
    assert told["b"][FIELDS.index("arrivals_per_s")] == [None, 1.0]
    assert set(told) == {"a", "b", ALL}


def test_costs_now_are_those_of_the_replicas_now() -> None:
    history = History()
    for second, cost in enumerate([0.0] * 30 + [3600.0]):
        history.note(float(second), {"m": Tick(span_s=1.0, replica_cost=cost / 3600)}, None)
    place = FIELDS.index("cost_per_hour")
    assert history.newest()["minute"]["m"][place] == pytest.approx(3600.0)


# ------------------------------------------------------------------------------------------------------------ flags


def choice(**told: object) -> Choice:
    fields: dict[str, object] = {"model": "m", "action": "hold", "before": 1, "after": 1, "sentence": "m: 1 stays"}
    return Choice(**{**fields, **told})  # type: ignore[arg-type]


def test_a_hold_is_told_when_its_reason_changes_and_not_each_second() -> None:
    flags = Flags()
    assert len(flags.note(1.0, Plan(choices=(choice(sentence="m: 1 stays: 0.31 of 0.8"),)))) == 1
    assert flags.note(2.0, Plan(choices=(choice(sentence="m: 1 stays: 0.32 of 0.8"),))) == []
    assert len(flags.note(3.0, Plan(choices=(choice(sentence="m: 1 stays: nobody tells"),)))) == 1


def test_each_start_and_stop_is_a_flag_of_its_own_with_its_replicas() -> None:
    flags = Flags()
    start = choice(action="launch", after=2, cost_per_hour=6.4, cost_change_per_hour=3.2)
    launched = Plan(choices=(start,), launches=(Launch(deployment="m", replica="m-1", epoch=0),))
    for second in (1.0, 2.0):
        (flag,) = flags.note(second, launched)
        assert (flag.action, flag.replicas, flag.cost_change_per_hour) == ("launch", ("m-1",), 3.2)
    stop = choice(action="drain", before=2)
    for plan in (
        Plan(choices=(stop,), drains=("m-1", "other-0")),
        Plan(choices=(stop,), parks=("m-1", "other-0")),
        Plan(choices=(start,), wakes=("m-1", "other-0")),
    ):
        (flag,) = flags.note(3.0, plan)
        assert flag.replicas == ("m-1",)
    assert flags.recent[2].cost_per_hour is None


def test_plans_without_choices_are_read_by_their_reasons() -> None:
    plan = Plan(
        launches=(Launch(deployment="m", replica="m-0", epoch=0),),
        drains=("old-3",),
        why=(
            reason("start", of="m", ids="m-0", there=0, want=1, revision="r"),
            reason("gone", of="old-3", model="old"),
            reason("pause", of="n", missing=1, wait_s=0.5, deaths=1),
        ),
    )
    flags = Flags().note(1.0, plan)
    told = {f.model: (f.action, f.replicas) for f in flags}
    assert told == {"m": ("launch", ("m-0",)), "old": ("drain", ("old-3",)), "n": ("hold", ())}
    assert flags[1].sentences == {
        "en": ("old-3: drain, old is no longer configured",),
        "zh": ("old-3：退出：old 已不在配置中",),
    }


def test_flags_are_bounded_and_numbered() -> None:
    flags = Flags()
    for n in range(KEPT + 10):
        flags.note(float(n), Plan(choices=(choice(sentence=f"m: {'ab'[n % 2]}"),)))
    assert len(flags.recent) == KEPT
    assert [f.id for f in flags.recent] == list(range(11, KEPT + 11))
    assert model_of("my-model-12") == "my-model"


# ------------------------------------------------------------------------------------------------------------- feed


def test_a_ledger_that_is_away_takes_its_numbers_along_and_no_others() -> None:
    class Away(FakeSource):
        async def newest(self, since_wall_s: float, limit: int) -> tuple[UsageRow, ...]:
            raise StorageError("the ledger is away")

    async def walk() -> dict[str, float | None]:
        feed = Feed(Away())
        await feed.beat(look(0, done=0))
        await feed.beat(look(1, done=5))
        return dict(zip(FIELDS, feed.history.newest()["now"]["m"]))

    told = asyncio.run(walk())
    assert told["requests_per_s"] == pytest.approx(2.5)
    assert told["ttft_p95_s"] is None


def test_a_page_that_lags_is_sent_away_to_come_back() -> None:
    async def walk() -> list[bytes]:
        feed = Feed(FakeSource())
        stream = feed.listen(-math.inf)
        await anext(stream)
        for second in range(BEHIND + 3):
            await feed.beat(look(second))
        assert feed.pages == 0
        return [told async for told in stream]

    assert len(asyncio.run(walk())) < BEHIND


def test_a_defect_in_one_second_does_not_end_the_next(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeSource):
        looks = 0

        def look(self):  # type: ignore[no-untyped-def]
            self.looks += 1
            raise ValueError("a defect")

    async def walk() -> int:
        source = Broken()
        task = asyncio.create_task(Feed(source).run())
        while source.looks < 2:
            await asyncio.sleep(0.05)
        task.cancel()
        return source.looks

    assert asyncio.run(walk()) >= 2
    assert "could not take" in caplog.text


def test_what_the_page_is_sent_is_json_without_nan() -> None:
    feed = Feed(FakeSource())
    asyncio.run(feed.beat(look(0)))
    told = msgspec.json.decode(feed.snapshot())
    assert set(told["now"]) == {"m", ALL}
    assert len(told["now"]["m"]) == len(FIELDS)
    assert b"NaN" not in feed.snapshot()
