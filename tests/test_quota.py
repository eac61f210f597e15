"""Limits in virtual time: what a minute may hold, when there is room again, and that nothing stays counted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from neaptide.gateway import quota
from neaptide.gateway.quota import FLIGHT, REQUESTS, ROW, SEATS, SUM, TOKENS, Bounds, Bucket, Permit, Refusal
from neaptide.table import Quota

KEY, TENANT = 0, ROW  # where their rows are


def cells(rows: int = 2) -> quota.Cells:
    return memoryview(bytearray(8 * ROW * rows)).cast("q")


def bucket(at: int = KEY, **limits: int) -> Bucket:
    return Bucket(Quota("tenant" if at else "key", **limits), at + 1, at)


def admit(held: quota.Cells, *buckets: Bucket, now: float, prompt: int = 1) -> Permit | Refusal:
    return quota.admit(held, Bounds(buckets), 0, 1, prompt, now)


def refused(found: Permit | Refusal) -> Refusal:
    assert isinstance(found, Refusal)
    return found


def admitted(found: Permit | Refusal) -> Permit:
    assert isinstance(found, Permit)
    return found


gaps = st.one_of(st.just(0.0), st.floats(0.0, 3.0), st.floats(0.0, 90.0))


@given(st.integers(1, 12), st.lists(gaps, max_size=80))
def test_no_minute_holds_more_requests_than_rpm(rpm: int, pauses: list[float]) -> None:
    held, came, now = cells(), [], 1000.0
    for pause in pauses:
        now += pause
        if isinstance(admit(held, bucket(rpm=rpm), now=now), Permit):
            came.append(now)
    assert all(sum(end - 60 < t <= end for t in came) <= rpm for end in came)


@given(st.integers(1, 12), st.lists(gaps, max_size=80))
def test_who_waits_as_told_is_let_in_and_no_second_sooner(rpm: int, pauses: list[float]) -> None:
    held, now = cells(), 1000.0
    for pause in pauses:
        now += pause
        found = admit(held, bucket(rpm=rpm), now=now)
        if isinstance(found, Refusal):
            assert 0 < found.wait_s <= quota.SECONDS
            refused(admit(held, bucket(rpm=rpm), now=now + found.wait_s - 1.001))
            now += math.ceil(found.wait_s)
            admitted(admit(held, bucket(rpm=rpm), now=now))


@given(st.lists(gaps, max_size=60))
def test_a_client_that_never_stops_asking_gets_its_rpm_each_61_seconds(pauses: list[float]) -> None:
    held, now, came = cells(), 1000.0, 0
    for pause in pauses:  # whatever it did before
        admit(held, bucket(rpm=5), now=(now := now + pause))
    for tick in range(3 * 610):
        came += isinstance(admit(held, bucket(rpm=5), now=now + tick / 10), Permit)
    assert came >= 2 * 5


def test_a_refusal_counts_in_no_row() -> None:
    held = cells()
    both = bucket(KEY, rpm=9, tpm=900, concurrency=9), bucket(TENANT, rpm=1)
    admitted(admit(held, *both, now=10.0))
    before = held.tobytes()
    found = refused(admit(held, *both, now=10.0))
    assert (found.of, found.limit, found.value) == ("tenant", "rpm", 1)
    assert held.tobytes() == before


def test_of_several_limits_without_room_the_one_that_lasts_longest_is_named() -> None:
    held = cells()
    both = bucket(KEY, rpm=1, concurrency=1), bucket(TENANT, tpm=100)
    admitted(admit(held, *both, now=10.0, prompt=100))
    assert refused(admit(held, *both, now=12.0, prompt=1)).wait_s == 59.0
    assert refused(admit(held, *both, now=70.9, prompt=1)).wait_s == pytest.approx(1.0)  # in flight, by then
    assert refused(admit(held, *both, now=71.0, prompt=1)).limit == "concurrency"


def test_a_prompt_counts_as_its_bytes_until_its_replica_has_counted_it() -> None:
    held, limits = cells(), bucket(tpm=1000)
    permit = admitted(admit(held, limits, now=10.0, prompt=900))
    assert refused(admit(held, limits, now=20.0, prompt=200)).wait_s == 51.0
    quota.settle(held, permit, 0, 90, 10, 30.0)
    assert held[TOKENS + SUM] == 100
    admitted(admit(held, limits, now=30.0, prompt=900))


def test_a_prompt_beyond_the_whole_limit_is_let_in_where_nothing_else_counts() -> None:
    held, limits = cells(), bucket(tpm=1000)
    permit = admitted(admit(held, limits, now=10.0, prompt=50_000))
    assert refused(admit(held, limits, now=10.0, prompt=1)).limit == "tpm"
    quota.settle(held, permit, 0, 12_000, 5, 11.0)
    assert held[TOKENS + SUM] == 12_005
    assert refused(admit(held, limits, now=11.0)).wait_s == 61.0  # what was more than its bound came just now
    admitted(admit(held, limits, now=72.0))


def test_answers_count_as_they_come_and_a_long_one_is_not_counted_twice() -> None:
    held, limits = cells(), bucket(tpm=100)
    permit = admitted(admit(held, limits, now=0.0, prompt=10))
    for now in range(1, 120):
        quota.produced(held, permit, now, float(now))
        assert held[TOKENS + SUM] == min(now, 61) + (10 if now < 61 else 0)
    quota.settle(held, permit, 0, 10, 119, 119.0)
    assert held[TOKENS + SUM] == 61


def test_a_correction_of_what_has_left_the_window_takes_nothing_from_others() -> None:
    held, limits = cells(), bucket(tpm=1000)
    old = admitted(admit(held, limits, now=10.0, prompt=900))
    admitted(admit(held, limits, now=71.0, prompt=500))  # the same cell, a minute and a second later
    quota.settle(held, old, 0, 1, 0, 71.5)
    assert held[TOKENS + SUM] == 500


def test_what_was_given_back_was_never_there() -> None:
    held, limits = cells(), bucket(rpm=1, tpm=100, concurrency=1)
    permit = admitted(admit(held, limits, now=10.0, prompt=100))
    quota.give_back(held, permit, 0, 12.0)
    assert (held[REQUESTS + SUM], held[TOKENS + SUM], held[FLIGHT]) == (0, 0, 0)
    admitted(admit(held, limits, now=12.0, prompt=100))


def test_a_gateway_whose_clock_reading_is_old_counts_where_the_others_are() -> None:
    held, limits = cells(), bucket(rpm=2)
    admitted(admit(held, limits, now=100.0))
    admitted(admit(held, limits, now=70.0))
    refused(admit(held, limits, now=160.9))
    assert held[REQUESTS + SUM] == 2
    admitted(admit(held, limits, now=161.0))


def test_a_write_that_was_cut_off_is_mended_within_a_second() -> None:
    held, limits = cells(), bucket(rpm=3)
    admitted(admit(held, limits, now=10.0))
    held[REQUESTS + SUM] = 999
    refused(admit(held, limits, now=10.9))
    admitted(admit(held, limits, now=11.0))


def test_seats_are_summed() -> None:
    held, limits = cells(), bucket(concurrency=3)
    for seat in (0, 2, 5):
        admitted(quota.admit(held, Bounds((limits,)), seat, 6, 0, 10.0))
    assert refused(quota.admit(held, Bounds((limits,)), 1, 6, 0, 10.0)).limit == "concurrency"
    assert quota.in_flight(held, KEY + FLIGHT, 6) == 3


def test_a_row_is_idle_when_nothing_of_it_counts_any_more() -> None:
    held = cells()
    assert quota.is_idle(held, KEY, 1000.0)
    permit = admitted(admit(held, bucket(rpm=5, tpm=50, concurrency=5), now=1000.0))
    assert not quota.is_idle(held, KEY, 2000.0)  # in flight
    quota.settle(held, permit, 0, 1, 1, 1030.0)
    assert not quota.is_idle(held, KEY, 1090.0)
    assert quota.is_idle(held, KEY, 1092.0)
    quota.clear(held, KEY, 77)
    assert held[:ROW].tolist() == [77] + [0] * (ROW - 1)


def test_what_is_left_and_when_all_is() -> None:
    held, limits = cells(), bucket(rpm=3)
    assert quota.left(held, REQUESTS, 3, 10.0) == (3, 0.0)
    admit(held, limits, now=10.25)
    admit(held, limits, now=12.5)
    assert quota.left(held, REQUESTS, 3, 13.5) == (1, 59.5)
    assert quota.left(held, REQUESTS, 1, 13.5) == (0, 59.5)  # a limit that was lowered


class Requests(RuleBasedStateMachine):
    """Keys of one tenant, in two gateways, whatever becomes of their requests."""

    RPM, TPM, CONCURRENCY = 6, 500, 4

    def __init__(self) -> None:
        super().__init__()
        self.held, self.now = cells(3), 5000.0
        self.tenant = Bucket(Quota("tenant", self.RPM, self.TPM, self.CONCURRENCY), 9, 2 * ROW)
        self.running: list[tuple[Permit, int, int]] = []  # with its key and seat
        self.came: list[tuple[float, int]] = []  # (when, key) of those that count

    @rule(pause=gaps)
    def wait(self, pause: float) -> None:
        self.now += pause

    @rule(key=st.integers(0, 1), seat=st.integers(0, 1), prompt=st.integers(0, 300))
    def ask(self, key: int, seat: int, prompt: int) -> None:
        own = Bucket(Quota("key", self.RPM - 2, None, self.CONCURRENCY - 1), key, key * ROW)
        found = quota.admit(self.held, Bounds((own, self.tenant)), seat, 2, prompt, self.now)
        if isinstance(found, Permit):
            self.running.append((found, key, seat))
            self.came.append((self.now, key))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.integers(0, 50))
    def produce(self, data: st.DataObject, more: int) -> None:
        permit, _, _ = data.draw(st.sampled_from(self.running))
        quota.produced(self.held, permit, permit.output + more, self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), prompt=st.integers(0, 400), more=st.integers(-20, 50))
    def end(self, data: st.DataObject, prompt: int, more: int) -> None:
        permit, _, seat = ended = data.draw(st.sampled_from(self.running))
        self.running.remove(ended)
        quota.settle(self.held, permit, seat, prompt, max(0, permit.output + more), self.now)

    @rule(seat=st.integers(0, 1))
    def kill(self, seat: int) -> None:
        """A gateway: its column is emptied."""
        for at in range(0, 3 * ROW, ROW):
            self.held[at + FLIGHT + seat] = 0
        self.running = [r for r in self.running if r[2] != seat]

    @invariant()
    def what_is_in_flight_is_what_runs(self) -> None:
        for key in (0, 1):
            assert quota.in_flight(self.held, key * ROW + FLIGHT, 2) == sum(k == key for _, k, _ in self.running)
        assert quota.in_flight(self.held, 2 * ROW + FLIGHT, 2) == len(self.running) <= self.CONCURRENCY
        assert all(self.held[at + FLIGHT + seat] >= 0 for at in (0, ROW, 2 * ROW) for seat in range(SEATS))

    @invariant()
    def no_minute_holds_too_many(self) -> None:
        lately = [key for when, key in self.came if when > self.now - 60]
        assert len(lately) <= self.RPM
        assert all(lately.count(key) <= self.RPM - 2 for key in (0, 1))

    @invariant()
    def sums_are_those_of_their_seconds(self) -> None:
        for at in (REQUESTS, ROW + REQUESTS, 2 * ROW + REQUESTS, 2 * ROW + TOKENS):
            seconds = self.held[at + quota.FIRST : at + quota.WINDOW].tolist()
            assert sum(seconds) == self.held[at + SUM]
            assert min(seconds) >= 0


Requests.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRequests = Requests.TestCase
