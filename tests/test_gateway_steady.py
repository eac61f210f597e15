"""When replicas fail or are slow: what is sent again, which replica is left out, and how many requests one gets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.crowd import QUEUES, SHAPES, SLOW, Fixed, Shape, World, asked, slower
from neaptide.clock import mono_s
from neaptide.gateway.breaker import BAD, GOOD, LAST, LEAST, NEITHER, OPEN_S, WINDOW_S, Breaker, result
from neaptide.gateway.concurrency import CUT, START, STEP_S, WORST, Goals, Limiter
from neaptide.gateway.retries import CAP, Retries
from neaptide.gateway.route import Target, choose
from neaptide.table import ReplicaRow
from neaptide.types import Usage
from tests.gateway_kit import (
    COMPLETION,
    EVENT_HEAD,
    Asked,
    Behaviour,
    FakeReplica,
    answer_bytes,
    chat,
    chunk,
    event,
    post,
    reply_json,
    run,
    serving,
)
from tests.test_gateway_http import always

BROKEN = always(answer_bytes(b'{"error":{"message":"out of order"}}', 500))
BUSY = always(answer_bytes(b"busy", 503))

# ------------------------------------------------------------------------------------------------ retries


def test_retries_are_a_tenth_of_the_requests_once_the_bucket_is_empty() -> None:
    retries = Retries()
    while retries.take(0.0, 1, 0):
        pass
    assert sum(retries.take(0.0, 1 + n, 0) for n in range(1, 1001)) in (99, 100, 101)


def test_a_lone_request_may_be_sent_again_and_calm_saves_up_no_more_than_the_cap() -> None:
    retries = Retries()
    assert retries.take(0.0, 1, 1)
    assert sum(retries.take(1e6, 10**6, 1) for _ in range(100)) == CAP


def test_all_requests_of_a_replica_that_dies_may_go_elsewhere_once() -> None:
    retries = Retries()
    assert sum(retries.take(0.0, 64, 64) for _ in range(128)) == 64


def test_a_lane_of_few_requests_earns_retries_by_the_second() -> None:
    retries = Retries()
    while retries.take(0.0, 0, 0):
        pass
    assert not retries.take(5.0, 0, 0)
    assert retries.take(10.0, 0, 0)


def test_where_all_replicas_fail_retries_stop_at_the_budget_and_the_client_is_told() -> None:
    async def main() -> None:
        async with serving(BUSY, BUSY) as (running, replicas):
            began_s, count = mono_s(), 60
            answers = [await running.ask(post(chat())) for _ in range(count)]
            sent = sum(len(r.asked) for r in replicas)
            assert count + CAP <= sent <= count + CAP + 0.1 * count + 0.1 * (mono_s() - began_s) + 1
            assert {a.status for a in answers} <= {502, 503}
            denied = [a for a in answers if a.status == 502]
            assert denied[-1].code == "replica_503"
            assert "at most 10% of requests" in denied[-1].json["error"]["message"]
            assert running.door.lanes["m"].metrics.denied == len(denied)

    run(main())


# ------------------------------------------------------------------------------------------------ the breaker


def opened(now: float) -> Breaker:
    breaker = Breaker()
    for _ in range(LEAST):
        breaker.ended(BAD, now, now)
    return breaker


def test_a_breaker_opens_when_more_than_half_of_the_last_results_are_bad_and_not_before_there_are_enough() -> None:
    breaker = Breaker()
    for at in range(LEAST - 1):
        breaker.ended(BAD, at, at)
        assert not breaker.opened
    breaker = Breaker()
    for at in range(LAST):  # every third one
        for told in (BAD, GOOD, GOOD):
            breaker.ended(told, at, at)
    assert not breaker.opened
    for _ in range(LAST // 2 + 1):
        breaker.ended(BAD, LAST, LAST)
    assert breaker.opened


def test_bad_results_far_apart_open_nothing() -> None:
    breaker = Breaker()
    for at in range(50):
        breaker.ended(BAD, 0.0, at * (WINDOW_S + 1))
    assert not breaker.opened


def test_an_open_breaker_lets_one_probe_through_whose_result_decides() -> None:
    breaker = opened(10.0)
    assert not breaker.lets(10.0 + OPEN_S[0] - 0.01)
    at = 10.0 + OPEN_S[0]
    assert breaker.lets(at)
    breaker.probing = True  # as Target.take does
    assert not breaker.lets(at)
    breaker.ended(GOOD, 9.0, at)  # sent before it opened
    assert breaker.opened
    assert not breaker.lets(at)
    breaker.ended(BAD, at, at)
    assert breaker.opened
    assert not breaker.lets(at + OPEN_S[1] - 0.01)
    assert breaker.lets(at + OPEN_S[1])
    breaker.ended(GOOD, at + OPEN_S[1], at + OPEN_S[1])
    assert not breaker.opened


def test_a_probe_whose_client_leaves_makes_way_for_another() -> None:
    breaker = opened(0.0)
    breaker.probing = True
    breaker.ended(NEITHER, OPEN_S[0], OPEN_S[0])
    assert breaker.opened
    assert breaker.lets(OPEN_S[0])


@pytest.mark.parametrize(
    ("outcome", "error", "told"),
    [
        ("ok", "", GOOD),
        ("refused", "replica_400", NEITHER),
        ("aborted", "client_left", NEITHER),
        ("timeout", "deadline_exceeded", NEITHER),
        ("timeout", "total_timeout", NEITHER),
        ("timeout", "first_byte_timeout", BAD),
        ("timeout", "idle_timeout", BAD),
        ("error", "replica_500", BAD),
        ("error", "replica_broke_off", BAD),
        ("error", "replica_full", NEITHER),
    ],
)
def test_what_is_the_requests_own_fault_never_counts(outcome: str, error: str, told: int) -> None:
    assert result(Usage(request_id="r", outcome=outcome, error=error)) == told  # type: ignore[arg-type]


def targets(count: int) -> list[Target]:
    return [Target(ReplicaRow(id=f"r{i}", model="m", endpoint="http://x")) for i in range(count)]


def test_where_every_replica_answers_with_errors_all_are_used_as_if_none_did() -> None:
    one, two = targets(2)
    one.breaker.open(0.0)
    assert {choose([one, two], 0.1, turn) for turn in range(2)} == {two}
    two.breaker.open(0.0)
    one.take()
    assert choose([one, two], 0.1) is two
    two.failed(0.1)
    assert choose([one, two], 0.2) is one  # the other cannot even be reached
    one.draining = True
    assert choose([one, two], 0.2) is None


def test_many_connections_that_fail_at_once_are_one_failure() -> None:
    (one,) = targets(1)
    for _ in range(50):
        one.failed(10.0, sent_s=9.9)
    assert one.failures == 1
    assert not one.can_take(10.2)
    assert one.can_take(10.25)
    one.take()
    assert not one.can_take(10.25)  # one probe
    one.reached(10.26)
    assert one.can_take(10.26)  # that had its connection: the others need not wait for its answer
    one.failed(10.27, sent_s=10.26)
    assert (one.failures, one.can_take(10.27 + 0.49)) == (2, False)


def test_a_replica_that_answers_500_is_left_out_while_the_others_serve_and_comes_back() -> None:
    async def main() -> None:
        async with serving(BROKEN, reply_json) as (running, replicas):
            target = running.door.targets["r0"]
            breaker = target.breaker
            statuses = []
            while not target.erring:
                statuses.append((await running.ask(post(chat()))).status)
                assert len(statuses) < 100
            assert statuses.count(500) == LEAST
            assert running.door.gauges(0.0, 0).erring == ("r0",)
            breaker.until_s += 1000.0
            seen = len(replicas[0].asked)
            assert {(await running.ask(post(chat()))).status for _ in range(10)} == {200}
            assert len(replicas[0].asked) == seen
            text = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body.decode()
            assert 'neaptide_replica_erring{model_name="m",replica="r0"} 1' in text
            replicas[0].behave = reply_json
            breaker.until_s = 0.0
            while running.door.gauges(0.0, 0).erring:
                assert (await running.ask(post(chat()))).status == 200
            assert len(replicas[0].asked) == seen + 1

    run(main())


def test_a_replica_that_answers_400_is_not_left_out() -> None:
    async def main() -> None:
        async with serving(always(answer_bytes(b"{}", 400)), reply_json) as (running, replicas):
            statuses = [(await running.ask(post(chat()))).status for _ in range(40)]
            assert statuses.count(400) == len(replicas[0].asked) == 20

    run(main())


def test_all_replicas_out_of_order_are_still_asked() -> None:
    async def main() -> None:
        async with serving(BROKEN, BROKEN) as (running, replicas):
            assert {(await running.ask(post(chat()))).status for _ in range(30)} == {500}
            assert sum(len(r.asked) for r in replicas) == 30

    run(main())


# ------------------------------------------------------------------------------------------------ concurrency

BEST = {SHAPES[0].name: (41, 25.0), SHAPES[1].name: (22, 47.0), SHAPES[2].name: (33, 34.0)}  # limit; 5 x capacity
LONG_S = 60.0


def served(shape: Shape, *limits: Fixed | Limiter, load: float = 1.0, seconds: float = LONG_S, seed: int = 7) -> World:
    """`load`: as a part of 5 times what the replica can do."""
    return World(shape, asked(shape, load * BEST[shape.name][1], seconds, seed), limits).run(seconds)


@pytest.mark.parametrize(("shape", "share"), list(zip(SHAPES, (0.75, 0.75, 0.65))))
def test_in_a_flood_most_of_what_the_best_fixed_limit_serves_is_served_within_the_goals(
    shape: Shape, share: float
) -> None:
    """How much: bench/concurrency.py. Without a limit it is a tenth or so."""
    best = served(shape, Fixed(BEST[shape.name][0])).good(0.0, LONG_S)
    assert served(shape, Limiter(shape.goals)).good(0.0, LONG_S) >= share * best


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_at_half_load_hardly_anybody_waits_for_the_limit(shape: Shape) -> None:
    world = served(shape, Limiter(shape.goals), load=0.1)
    assert world.gates[0].waited <= 0.02 * len(world.book.prompt)
    assert sum(f == f for f in world.book.first_s) > 20


def test_a_replica_that_becomes_slow_gets_less_and_then_more_again() -> None:
    world = World(SLOW, asked(SLOW, 25.0, 150.0, 3), [Limiter(SLOW.goals)]).run(40.0)
    before = world.gates[0].limit.limit
    world.engine.become(slower(SLOW, 2.0).traits)
    world.run(90.0)
    during = world.gates[0].limit.limit
    world.engine.become(SLOW.traits)
    world.run(150.0)
    assert during < 0.5 * before
    assert world.gates[0].limit.limit > 0.5 * before
    assert min(limit for _, limit in world.gates[0].limits) >= 1.0


def test_two_gateways_share_a_replica_and_each_learns_its_own_limit() -> None:
    both = served(QUEUES, Limiter(QUEUES.goals), Limiter(QUEUES.goals))
    without = served(QUEUES, Fixed(math.inf), Fixed(math.inf)).good(0.0, LONG_S)
    assert both.good(0.0, LONG_S) > 1.5 * without
    assert min(gate.limit.limit for gate in both.gates) >= 4
    assert sum(gate.limit.limit for gate in both.gates) < 64


def looks(limiter: Limiter, ttft_s: float, in_flight: int, begin_s: float, count: int) -> float:
    """So many steps in which all first tokens come after `ttft_s`; the time after them."""
    now = begin_s
    for _ in range(count):
        for _ in range(in_flight):
            limiter.delayed(ttft_s, now)
        now += STEP_S
        limiter.look(now, min(in_flight, int(limiter.limit)))
    return now


def test_the_limit_grows_while_it_binds_and_answers_come_in_time_and_falls_when_they_are_late() -> None:
    limiter = Limiter(Goals(1.0, 0.1))
    now = looks(limiter, 0.2, START // 2, 0.0, 20)
    assert limiter.limit == START
    now = looks(limiter, 0.2, 500, now, 12)
    grown = limiter.limit
    assert grown > 3 * START
    looks(limiter, 3.0, 500, now, 1)
    assert limiter.limit == pytest.approx(WORST * int(grown) * (1 - CUT))


def test_a_replica_that_is_slow_with_one_request_is_not_bound_for_it() -> None:
    """A goal of 1 s, and 3 s whatever is in flight."""
    limiter = Limiter(Goals(1.0, 0.1))
    now = looks(limiter, 3.0, 1, 0.0, 20)
    looks(limiter, 3.2, 100, now, 20)
    assert limiter.limit > 2 * START


def test_a_replica_that_refuses_gets_less() -> None:
    limiter = Limiter(Goals(1.0, 0.1))
    limiter.refused(10)
    assert limiter.limit == pytest.approx(10 * (1 - CUT))
    limiter.refused(10)  # those that were on their way
    assert limiter.limit == pytest.approx(10 * (1 - CUT))


told = st.tuples(st.floats(0.0, 100.0), st.integers(0, 300), st.floats(0.0, 50.0), st.integers(0, 2000), st.booleans())


@given(st.lists(told, max_size=60))
def test_whatever_is_told_one_request_may_always_go(steps: list[tuple[float, int, float, int, bool]]) -> None:
    limiter, now = Limiter(Goals(1.0, 0.1)), 0.0
    for ttft_s, count, spent_s, tokens, refused in steps:
        for _ in range(count):
            limiter.delayed(ttft_s, now)
        limiter.paced(spent_s, tokens)
        limiter.answered(ttft_s, tokens, now)
        limiter.ended()
        if refused:
            limiter.refused(count)
        now += 0.3
        limiter.look(now, count)
        assert limiter.limit >= 1.0
        assert limiter.limit < math.inf


def queueing(slots: int, service_s: float) -> Behaviour:
    """Like a server with a line of its own: all are accepted, `slots` are served at a time."""
    free = asyncio.Semaphore(slots)

    async def behave(
        replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
    ) -> None:
        async with free:
            await asyncio.sleep(service_s)
            writer.write(EVENT_HEAD + b"".join(chunk(piece) for piece in _answer()) + b"0\r\n\r\n")
            await writer.drain()

    return behave


def _answer() -> Iterator[bytes]:
    yield from (event("a"), event("b"), event(None, "stop"), b"data: [DONE]\n\n")


def test_a_flood_is_answered_with_200_and_429_and_the_line_is_the_gateways() -> None:
    """80 clients that come again at once, before a replica that serves four; 30 may wait."""
    deployment = {"adaptive": True, "slo_ttft_s": 0.25, "max_waiting": 30}

    async def main() -> None:
        async with serving(queueing(4, 0.05), deployment=deployment) as (running, (replica,)):
            statuses: list[int] = []
            limiter = running.door.targets["r0"].limiter
            assert limiter is not None
            most = 0

            async def visit() -> None:
                nonlocal most
                while not (limiter.limit < START and 429 in statuses and statuses[-1] == 200):
                    statuses.append((await running.ask(post(chat(stream=True)))).status)
                    most = max(most, replica.running)
                    if statuses[-1] == 429:
                        await asyncio.sleep(0.02)

            await asyncio.gather(*(visit() for _ in range(80)))
            assert set(statuses) == {200, 429}
            assert most < 80
            text = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body.decode()
            assert f'neaptide_replica_limit{{model_name="m",replica="r0"}} {int(limiter.limit)}' in text

    run(main())


def test_concurrency_that_is_fixed_is_left_at_what_was_configured() -> None:
    async def main() -> None:
        async with serving(reply_json, replica={"max_running": 3}) as (running, _):
            target = running.door.targets["r0"]
            assert (target.limiter, target.most) == (None, 3)
            assert (await running.ask(post(chat()))).body == COMPLETION

    run(main())
