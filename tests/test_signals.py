"""signals: the gateways' gauges become one Load a model, whatever gateways and control do meanwhile."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.control.signals import FORGET_S, Heard, read
from neaptide.control.traits import Told
from neaptide.gateway.metrics import ModelMetrics
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Usage


def word(now_s: float, gateway: str = "gateway-0", **counts: float) -> Gauges:
    return Gauges(gateway=gateway, mono_s=now_s, fast=1, slow=1, models={"m": ModelGauge(**counts)})


def taken(*words: Gauges) -> Heard:
    """What is remembered after these words, one a second."""
    heard = Heard()
    for w in words:
        _, heard = read([w], heard, w.mono_s)
    return heard


def test_a_load_has_what_came_since_the_last_one_was_taken() -> None:
    heard = taken(word(10.0, arrivals=100, done=90, tokens=1000))
    loads, _ = read([word(11.0, arrivals=107, done=95, tokens=1080, waiting=2, running=5)], heard, 11.1)
    load = loads["m"]
    assert (load.arrivals, load.done, load.tokens, load.waiting, load.running) == (7, 5, 80, 2, 5)
    assert load.tick_s == pytest.approx(1.1)
    assert load.age_s == pytest.approx(0.1)


def test_a_control_that_starts_late_does_not_take_a_gateways_past_for_this_tick() -> None:
    loads, heard = read([word(10.0, arrivals=5000, waiting=3)], Heard(), 10.0)
    assert (loads["m"].arrivals, loads["m"].waiting, loads["m"].tick_s) == (0, 3, 0.0)
    assert read([word(11.0, arrivals=5002)], heard, 11.0)[0]["m"].arrivals == 2


def test_reading_without_taking_keeps_the_counts_for_the_next_tick() -> None:
    heard = taken(word(10.0, arrivals=1))
    early, _ = read([word(10.2, arrivals=3)], heard, 10.2)
    late, _ = read([word(11.0, arrivals=9)], heard, 11.0)
    assert (early["m"].arrivals, late["m"].arrivals) == (2, 8)


def test_a_gateway_that_started_anew_counts_from_zero() -> None:
    heard = taken(word(10.0, arrivals=500, done=480))
    loads, _ = read([word(11.0, arrivals=4, done=1)], heard, 11.0)
    assert (loads["m"].arrivals, loads["m"].done) == (4, 1)


def test_a_single_counter_that_falls_is_not_a_restart() -> None:
    heard = taken(word(10.0, arrivals=500, done=480, tokens=900))
    assert read([word(11.0, arrivals=501, done=480, tokens=300)], heard, 11.0)[0]["m"].tokens == 0


def test_several_gateways_add_up_and_the_longest_wait_counts() -> None:
    both = [word(10.0, "gateway-0", arrivals=10), word(10.0, "gateway-1", arrivals=20)]
    _, heard = read(both, Heard(), 10.0)
    now = [
        word(11.0, "gateway-0", arrivals=13, waiting=1, oldest_wait_s=0.5),
        word(10.5, "gateway-1", arrivals=24, waiting=2, oldest_wait_s=2.5),
    ]
    load = read(now, heard, 11.0)[0]["m"]
    assert (load.arrivals, load.waiting, load.oldest_wait_s, load.age_s) == (7, 3, 2.5, 0.5)


def test_the_age_is_that_of_the_oldest_word_and_a_gateway_that_left_is_forgotten_after_a_while() -> None:
    both = [word(10.0, "gateway-0"), word(10.0, "gateway-1")]
    _, heard = read(both, Heard(), 10.0)
    loads, heard = read([word(20.0, "gateway-0")], heard, 20.0)
    assert loads["m"].age_s == 10.0
    loads, heard = read([word(10.0 + FORGET_S + 1)], heard, 10.0 + FORGET_S + 1)
    assert loads["m"].age_s == 0.0
    assert set(heard.gateways) == {"gateway-0"}


def test_what_came_while_a_gateway_was_cut_off_is_counted_when_it_is_back() -> None:
    heard = taken(word(10.0, arrivals=100))
    loads, heard = read([], heard, 11.0)
    assert loads == {}
    assert read([word(13.0, arrivals=130)], heard, 13.0)[0]["m"].arrivals == 30


def test_nobody_told_is_nan_and_not_zero() -> None:
    heard = taken(word(10.0))
    load = read([word(11.0, done=3, firsts=2, ttft_sum_s=0.5)], heard, 11.0)[0]["m"]
    assert load.ttft_s == 0.25
    assert math.isnan(load.tpot_s)
    assert math.isnan(load.kv_usage)
    assert math.isnan(load.service_s)
    assert read([word(11.0)], heard, 11.0, {"m": Told(kv_usage=0.7)})[0]["m"].kv_usage == 0.7


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=30))
def test_no_request_is_counted_twice_or_lost_but_those_a_restart_hid(steps: list[tuple[int, bool]]) -> None:
    # Given a gateway that restarts now and then, when its words are taken one a second, then the Loads sum up to what
    # arrived, less what a restart hides: a counter that has already passed where it was is taken for one that grew.
    heard, counter, come, seen, hidden = taken(word(0.0)), 0, 0, 0, 0
    for second, (arrivals, restart) in enumerate(steps, 1):
        before = counter
        counter = arrivals if restart else counter + arrivals
        hidden += before if restart and counter >= before else 0
        come += arrivals
        loads, heard = read([word(float(second), arrivals=counter)], heard, float(second))
        seen += loads["m"].arrivals
    assert seen == come - hidden


def row(**fields: object) -> Usage:
    return Usage(request_id="r", **fields)


def test_late_is_what_we_made_wait_or_failed_and_not_what_the_client_did() -> None:
    counted = ModelMetrics()
    counted.slo_ttft_s = 1.0
    on_time = [
        row(ttft_s=0.9, duration_s=9.0),
        row(queued_s=0.5, duration_s=5.0),  # not streamed: what is known is how long it waited
        row(outcome="refused", status=400),
        row(outcome="aborted", duration_s=0.2),
        row(outcome="aborted", ttft_s=0.5, duration_s=30.0),
    ]
    late = [
        row(ttft_s=1.1, duration_s=2.0),
        row(queued_s=3.0, duration_s=5.0),
        row(outcome="refused", status=429),
        row(outcome="error", status=502),
        row(outcome="timeout", status=504),
        row(outcome="aborted", duration_s=20.0),
    ]
    for usage in on_time:
        counted.count(usage)
    assert counted.late == 0
    for usage in late:
        counted.count(usage)
    assert counted.late == len(late)
    assert (counted.served, counted.errors, counted.done) == (4, 2, 11)
    assert counted.held_s == pytest.approx(9.0 + 4.5 + 2.0 + 2.0)
