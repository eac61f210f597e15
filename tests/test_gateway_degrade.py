"""Under pressure: which steps are in force when, and what each does to a request, seen by its client."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide import config
from neaptide.clock import mono_s
from neaptide.errors import ConfigError
from neaptide.gateway.degrade import CALM_S, LEAVE, NONE, Level, Measures, level, measures, wait_s
from neaptide.gateway.queue import Line
from neaptide.table import Caching, Degrade, DeploymentRow, Fast, ReplicaRow
from neaptide.wire.peek import peek, splice
from tests.gateway_kit import (
    AUTH,
    Answer,
    FakeReplica,
    Running,
    chat,
    gateway,
    key_row,
    post,
    reply_by_body,
    run,
    table,
)
from tests.test_gateway_cache import SURE, asks, holding, said

STEPS = (
    Degrade(wait_s=1, max_tokens=16),
    Degrade(wait_s=2, model="small"),
    Degrade(wait_s=4, stale_s=600),
    Degrade(wait_s=8, refuse="low"),
)
ALL = Measures(16, "small", 600, True)


# ------------------------------------------------------------------------------------------------ in virtual time


def test_steps_come_into_force_in_their_order_as_the_wait_grows_and_each_keeps_those_before_it() -> None:
    now, held, seen = 0.0, Level(), []
    for wait in (0.0, 1.0, 1.1, 2.5, 5.0, 9.0, math.inf):
        held = level(STEPS, held, wait, now)
        seen.append(held.steps)
        now += 0.1
    assert seen == [0, 0, 1, 2, 3, 4, 4]
    assert [measures(STEPS[:n]) for n in (0, 1, 4)] == [NONE, Measures(max_tokens=16), ALL]


def test_they_go_one_after_another_once_the_wait_has_been_short_for_a_while() -> None:
    held = level(STEPS, Level(), 9.0, 100.0)
    now = 100.0
    for left in (3, 2, 1, 0):
        assert level(STEPS, held, 0.0, now + CALM_S * 0.9) == held
        now += CALM_S
        held = level(STEPS, held, 0.0, now)
        assert held.steps == left
    assert level(STEPS, Level(4, 0.0), 0.0, 3600.0).steps == 0  # nobody came for an hour


def test_a_wait_about_a_steps_own_does_not_make_it_come_and_go() -> None:
    held, now, seen = Level(), 0.0, set()
    for i in range(400):
        held = level(STEPS, held, 1.3 if i % 2 else 0.7, now)
        seen.add(held.steps)
        now += 0.5
    assert seen == {0, 1}
    assert held.steps == 1


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), max_size=40))
def test_no_step_is_missing_that_the_wait_asks_for_and_none_goes_before_its_time(points: list[Any]) -> None:
    held, now, high_s = Level(), 0.0, 0.0
    for wait, passed in points:
        now += passed
        before, held = held, level(STEPS, held, wait, now)
        assert held.steps >= sum(wait > step.wait_s for step in STEPS)
        if held.steps < before.steps:
            assert wait < LEAVE * STEPS[before.steps - 1].wait_s
            assert now - high_s >= CALM_S
        if held.steps != before.steps or wait >= LEAVE * STEPS[max(0, held.steps - 1)].wait_s:
            high_s = now


def test_the_wait_is_what_the_line_needs_to_empty_and_endless_where_it_is_full() -> None:
    line: Line[Any] = Line(10, 60.0)
    assert wait_s(line, 0.0) == 0.0
    for i in range(6):
        line.enter(i, 0.0)
    assert wait_s(line, 3.0) == 3.0  # nobody has left: as long as the first has waited
    line.first(1.0)
    line.first(2.0)
    assert wait_s(line, 3.0) == pytest.approx(max(3.0, 4 * (3.0 - 1.0) / 2))
    for i in range(6):
        line.enter(i, 3.0)
    assert wait_s(line, 3.0) == math.inf


@pytest.mark.parametrize(
    ("fields", "capped"),
    [
        ({}, {"max_tokens": 9}),
        ({"max_tokens": 50}, {"max_tokens": 9}),
        ({"max_completion_tokens": 50, "max_tokens": 3}, {"max_completion_tokens": 9, "max_tokens": 3}),
        ({"max_completion_tokens": None}, {"max_completion_tokens": None, "max_tokens": 9}),
    ],
)
def test_the_most_tokens_are_set_under_the_name_that_counts(fields: dict[str, Any], capped: dict[str, Any]) -> None:
    body = splice(msgspec.json.encode(chat(**fields)), max_tokens=9, model="n")
    assert msgspec.json.decode(body) == {**chat(**fields), **capped, "model": "n"}
    assert peek(body).max_tokens == 9


@pytest.mark.parametrize(
    "steps",
    [
        "[{wait_s: 1}]",
        "[{wait_s: 1, max_tokens: 5, refuse: low}]",
        "[{wait_s: 0, max_tokens: 5}]",
        "[{wait_s: 1, max_tokens: 0}]",
        "[{wait_s: 2, max_tokens: 5}, {wait_s: 1, refuse: low}]",
        "[{wait_s: 1, refuse: low}, {wait_s: 2, max_tokens: 5}]",
        "[{wait_s: 1, max_tokens: 5}, {wait_s: 2, max_tokens: 3}]",
        "[{wait_s: 1, model: guide}]",
        "[{wait_s: 1, model: nobody}]",
        "[{wait_s: 1, stale_s: 60}]",
        "[{wait_s: 1, refuse: high}]",
    ],
)
def test_steps_that_make_no_sense_are_refused_by_name(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.guide\.degrade"):
        config.parse(f"models: {{guide: {{degrade: {steps}}}}}", "the test")


def test_the_steps_of_a_file_are_those_in_force() -> None:
    text = """
      models:
        guide:
          cache: {ttl_s: 60}
          degrade:
            - {wait_s: 1, max_tokens: 16}
            - {wait_s: 2, model: small}
            - {wait_s: 4, stale_s: 600}
            - {wait_s: 8, refuse: low}
        small: {engine: echo}
    """
    assert config.parse(text, "the test").models["guide"].degrade == STEPS


# ------------------------------------------------------------------------------------------------ seen by clients


@contextlib.asynccontextmanager
async def pressed(
    *steps: Degrade, keys: Any = None, cache: Caching | None = None
) -> AsyncIterator[tuple[Running, FakeReplica, FakeReplica, asyncio.Event]]:
    """Two models, of which `m` has one slot; it is taken and somebody waits, so that all its steps are in force."""
    release = asyncio.Event()
    big, small = await FakeReplica(holding(release)).start(), await FakeReplica(reply_by_body).start()
    held = table([], deployment={"degrade": steps, "cache": cache or Caching(ttl_s=60)}, keys=keys)
    rows = [
        ReplicaRow(id=name, model=name, endpoint=f"http://127.0.0.1:{r.port}/v1", max_running=most)
        for name, r, most in (("m", big, 1), ("small", small, None))
    ]
    deployments = (*held.slow.deployments, DeploymentRow(model="small"))
    held = msgspec.structs.replace(
        held, fast=Fast(replicas=tuple(rows)), slow=msgspec.structs.replace(held.slow, deployments=deployments)
    )
    try:
        async with gateway(held) as running:
            yield running, big, small, release
    finally:
        for replica in (big, small):
            await replica.stop()


async def press(running: Running) -> None:
    """One request at the replica, one in the line that has waited for longer than any step allows."""
    for seed in (1, 2):
        await asks(running, 1, AUTH + b"x-neaptide-degrade: no\r\n", seed=seed)
    lane = running.door.lanes["m"]
    assert lane.relief is not None
    assert lane.line.waiting == 1
    lane.relief.now(lane.line, mono_s() + 100.0)


async def ask(running: Running, extra: bytes = AUTH, **fields: Any) -> Answer:
    return await running.ask(post(chat(**fields), extra=extra))


def test_answers_are_shortened_and_it_shows() -> None:
    async def main() -> None:
        async with pressed(STEPS[0]) as (running, big, _, release):
            release.set()
            assert "x-neaptide-degraded" not in (await ask(running)).headers
            release.clear()
            await press(running)
            clients = [await running.connect() for _ in range(3)]
            for client, most in zip(clients, (100, 7, 0)):
                await client.send(post(chat(max_tokens=most)))
            release.set()
            answers = [await client.answer() for client in clients]
            assert [a.headers.get("x-neaptide-degraded") for a in answers] == ["max_tokens=16", None, None]
            assert sorted(a.json["max_tokens"] for a in big.asked[-3:]) == [0, 7, 16]
            rows = {r.max_tokens: r.degraded for r in running.journal.rows}
            assert (rows[16], rows[7]) == ("max_tokens=16", "")
            page = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body
            assert b'neaptide_degraded_total{model_name="m",how="max_tokens"} 1\n' in page

    run(main())


def test_requests_go_to_the_smaller_model_and_are_its_in_the_books() -> None:
    async def main() -> None:
        async with pressed(*STEPS[:2]) as (running, big, small, release):
            await press(running)
            answer = await ask(running, model="gpt-4o-mini")
            assert answer.headers["x-neaptide-degraded"] == "max_tokens=16, model=small"
            assert (small.asked[0].json["model"], small.asked[0].json["max_tokens"]) == ("small", 16)
            assert (running.row.model, running.row.degraded) == ("small", "max_tokens=16, model=small")
            assert running.door.lanes["m"].metrics.arrivals == 3  # what it would be asked for, were there room
            assert len(big.asked) == 1
            release.set()

    run(main())


def test_a_key_that_may_not_use_the_smaller_model_is_not_sent_there() -> None:
    async def main() -> None:
        async with pressed(STEPS[1], keys=[key_row(models=("m",))]) as (running, _, small, release):
            await press(running)
            client = await running.connect()
            await client.send(post(chat()))
            release.set()
            assert "x-neaptide-degraded" not in (await client.answer()).headers
            assert not small.asked

    run(main())


def test_a_smaller_model_without_a_replica_is_no_relief() -> None:
    async def main() -> None:
        async with pressed(STEPS[1]) as (running, _, small, release):
            await press(running)
            fast = running.door.table.fast
            rows = tuple(r for r in fast.replicas if r.id == "m")
            running.install(msgspec.structs.replace(running.door.table, fast=Fast(replicas=rows)))
            client = await running.connect()
            await client.send(post(chat()))
            release.set()
            assert "x-neaptide-degraded" not in (await client.answer()).headers
            assert not small.asked

    run(main())


def test_an_answer_that_is_too_old_otherwise_is_told_under_pressure() -> None:
    async def main() -> None:
        async with pressed(STEPS[2], cache=Caching(ttl_s=1e-9, price=0.5)) as (running, big, _, release):
            release.set()
            assert said(await ask(running, **SURE)) == said(await ask(running, **SURE)) == "miss"
            release.clear()
            await press(running)
            answer = await ask(running, **SURE)
            assert (said(answer), answer.headers["x-neaptide-degraded"]) == ("stale", "cache=0")
            row = running.row
            assert (row.cache, row.degraded, row.price_millis) == ("stale", "cache=0", 500)
            assert len(big.asked) == 3
            release.set()

    run(main())


def test_the_lowest_class_is_refused_and_the_others_are_not() -> None:
    async def main() -> None:
        async with pressed(STEPS[3]) as (running, _, _, release):
            await press(running)
            low = await ask(running, AUTH + b"x-neaptide-priority: low\r\n")
            assert (low.status, low.code, low.headers["x-neaptide-degraded"]) == (429, "class_refused", "refuse=low")
            assert "retry-after" in low.headers
            assert (running.row.outcome, running.row.degraded) == ("refused", "refuse=low")
            client = await running.connect()
            await client.send(post(chat()))
            release.set()
            assert (await client.answer()).status == 200

    run(main())


def test_who_does_not_want_less_waits() -> None:
    async def main() -> None:
        async with pressed(*STEPS) as (running, big, small, release):
            await press(running)
            client = await running.connect()
            no = AUTH + b"x-neaptide-degrade: no\r\nx-neaptide-priority: low\r\n"
            await client.send(post(chat(max_tokens=100), extra=no))
            release.set()
            answer = await client.answer()
            assert (answer.status, "x-neaptide-degraded" in answer.headers) == (200, False)
            assert (big.asked[-1].json["max_tokens"], small.asked) == (100, [])
            refused = await ask(running, AUTH + b"x-neaptide-degrade: maybe\r\n")
            assert (refused.status, refused.code) == (400, "invalid_degrade")

    run(main())


def test_a_shortened_answer_is_kept_as_what_it_is() -> None:
    async def main() -> None:
        async with pressed(*STEPS[:2]) as (running, _, small, release):
            smalls = DeploymentRow(model="small", cache=Caching(ttl_s=60))
            slow = running.door.table.slow
            slow = msgspec.structs.replace(slow, deployments=(slow.deployments[0], smalls))
            running.install(msgspec.structs.replace(running.door.table, slow=slow))
            await press(running)
            answers = [await ask(running, **SURE) for _ in range(2)]
            assert [said(a) for a in answers] == ["miss", "hit"]
            assert {a.headers["x-neaptide-degraded"] for a in answers} == {"max_tokens=16, model=small"}
            assert len(small.asked) == 1
            cache = running.door.lanes["m"].cache
            assert cache is not None
            assert len(cache) == 0
            direct = await ask(running, model="small", **SURE)
            assert (said(direct), "x-neaptide-degraded" in direct.headers) == ("miss", False)
            release.set()

    run(main())
