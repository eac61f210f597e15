"""Identical requests are one question: told again, and asked together. Over real connections."""

from __future__ import annotations

import asyncio
import json
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from functools import partial
from typing import Any

import msgspec
import pytest

from neaptide.clock import mono_s
from neaptide.gateway.exchange import Exchange
from neaptide.table import Caching, Timeouts
from tests.gateway_kit import (
    AUTH,
    COMPLETION,
    EVENT_HEAD,
    Answer,
    Asked,
    Client,
    FakeReplica,
    Running,
    answer_bytes,
    chat,
    chunk,
    event,
    key_row,
    post,
    reply_by_body,
    reply_json,
    reply_stream,
    run,
    serving,
    until,
)
from tests.test_gateway_link import DONE, linked, opened

CACHE = {"cache": Caching(ttl_s=60, price=0.25)}
SURE: dict[str, Any] = {"temperature": 0}


def said(answer: Answer) -> str:
    return answer.headers.get("x-neaptide-cache", "")


def holding(release: asyncio.Event) -> Any:
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        await release.wait()
        await reply_by_body(replica, reader, writer, asked)

    return behave


def more(running: Running, before: set[Exchange]) -> bool:
    return bool(running.door.live - before)


async def asks(running: Running, count: int, extra: bytes = AUTH, **fields: Any) -> list[Client]:
    """So many clients that have asked the same, in this order."""
    clients = []
    for _ in range(count):
        before = set(running.door.live)
        client = await running.connect()
        await client.send(post(chat(**SURE, **fields), extra=extra))
        await until(partial(more, running, before))
        clients.append(client)
    return clients


def events(body: bytes) -> list[dict[str, Any]]:
    lines = [line for line in body.split(b"\n\n") if line.startswith(b"data: {")]
    return [json.loads(line[6:]) for line in lines]


# ------------------------------------------------------------------------------------------------ told again


def test_an_identical_request_is_answered_without_a_replica_and_marked() -> None:
    async def main() -> None:
        async with serving(reply_json, deployment=CACHE) as (running, (replica,)):
            first = await running.ask(post(chat(**SURE)))
            other = await running.ask(post({"user": "somebody", "temperature": 0, **chat()}))
            assert (said(first), said(other), other.headers["age"]) == ("miss", "hit", "0")
            assert len(replica.asked) == len(running.journal.begins) == 1
            assert {**other.json, "id": "chatcmpl-1"} == first.json == json.loads(COMPLETION)
            assert other.json["id"] == "chatcmpl-" + running.row.request_id
            made, told = running.journal.rows
            assert (made.cache, made.price_millis, len(made.attempts)) == ("", 1000, 1)
            assert (told.cache, told.price_millis, told.attempts) == ("hit", 250, ())
            assert (told.prompt_tokens, told.output_tokens, told.finish, told.status) == (7, 2, "stop", 200)
            page = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body
            assert b'neaptide_cache_answers_total{model_name="m",how="hit"} 1\n' in page
            assert b'neaptide_arrivals_total{model_name="m"} 1\n' in page

    run(main())


@pytest.mark.parametrize("first", [True, False, None])
def test_a_stream_is_told_again_with_usage_for_those_who_ask(first: bool | None) -> None:
    async def main() -> None:
        async with serving(reply_stream, deployment=CACHE) as (running, (replica,)):
            told = []
            for usage in (first, True, None):
                options = {} if usage is None else {"stream_options": {"include_usage": usage}}
                answer = await running.ask(post(chat(stream=True, **SURE, **options)))
                assert answer.body.endswith(b"data: [DONE]\n\n")
                assert answer.headers["content-type"].startswith("text/event-stream")
                told.append((said(answer), events(answer.body)))
            assert [how for how, _ in told] == ["miss", "hit", "hit"]
            assert len(replica.asked) == 1
            assert [row["choices"] for row in told[1][1][:4]] == [row["choices"] for row in told[0][1][:4]]
            assert told[1][1][4]["usage"]["completion_tokens"] == 3
            assert len(told[2][1]) == 4
            assert len({row["id"] for row in told[1][1]}) == 1
            assert running.row.output_tokens == 3

    run(main())


def test_a_whole_answer_and_a_stream_are_two() -> None:
    async def main() -> None:
        async with serving(reply_by_body, deployment=CACHE) as (running, (replica,)):
            for stream in (True, False, True, False):
                await running.ask(post(chat(stream=stream, **SURE)))
            assert [a.json["stream"] for a in replica.asked] == [True, False]

    run(main())


def test_one_tenants_answers_are_not_anothers_but_its_keys_share_them() -> None:
    async def main() -> None:
        keys = [key_row("sk-a", tenant="one"), key_row("sk-b", tenant="one"), key_row("sk-c", tenant="two")]
        async with serving(reply_json, deployment=CACHE, keys=keys) as (running, (replica,)):
            how = [
                said(await running.ask(post(chat(**SURE), extra=b"Authorization: Bearer sk-%c\r\n" % key)))
                for key in b"abc"
            ]
            assert how == ["miss", "hit", "miss"]
            assert len(replica.asked) == 2

    run(main())


def test_a_client_may_want_it_or_not_and_must_say_so_plainly() -> None:
    async def main() -> None:
        async with serving(reply_json, deployment=CACHE) as (running, (replica,)):
            yes, no = (AUTH + b"x-neaptide-cache: %b\r\n" % word for word in (b"yes", b"No"))
            for _ in range(2):
                assert said(await running.ask(post(chat()))) == ""
                assert said(await running.ask(post(chat(**SURE), extra=no))) == ""
            assert len(replica.asked) == 4
            assert [said(await running.ask(post(chat(temperature=1), extra=yes))) for _ in "ab"] == ["miss", "hit"]
            refused = await running.ask(post(chat(), extra=AUTH + b"x-neaptide-cache: perhaps\r\n"))
            assert (refused.status, refused.code) == (400, "invalid_cache")

    run(main())


def test_without_a_word_of_it_in_the_configuration_nothing_is_kept() -> None:
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            for _ in range(2):
                assert said(await running.ask(post(chat(**SURE)))) == ""
            assert len(replica.asked) == 2

    run(main())


async def filtered(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.write(answer_bytes(COMPLETION.replace(b'"stop"', b'"content_filter"')))


async def refusing(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.write(answer_bytes(COMPLETION, status=400))


async def endless(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.write(EVENT_HEAD + chunk(event("a")) + chunk(event(None, "stop")) + b"0\r\n\r\n")


async def huge(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.write(answer_bytes(COMPLETION.replace(b'"hi"', b'"%b"' % (b"h" * 70_000))))


@pytest.mark.parametrize("behave", [filtered, refusing, endless, huge])
def test_an_answer_that_is_not_whole_or_too_large_is_not_kept_and_all_who_wait_ask_themselves(behave: Any) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def first(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            await release.wait()
            await behave(replica, reader, writer, asked)

        deployment = {"cache": Caching(ttl_s=60, memory_mib=1)}
        async with serving(first, deployment=deployment) as (running, (replica,)):
            clients = await asks(running, 3, stream=behave is endless)
            await until(lambda: len(replica.asked) == 1)
            release.set()
            answers = [await client.answer() for client in clients]
            assert {a.status for a in answers} == {400 if behave is refusing else 200}
            assert len(replica.asked) == 3
            cache = running.door.lanes["m"].cache
            assert cache is not None
            assert (len(cache), cache.held_bytes, cache.flights) == (0, 0, {})

    run(main())


async def long(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.write(answer_bytes(COMPLETION.replace(b'"hi"', b'"%b"' % (b"h" * 12_000))))


def test_a_flood_of_different_requests_stays_within_the_memory() -> None:
    async def main() -> None:
        deployment = {"cache": Caching(ttl_s=60, memory_mib=1)}
        async with serving(long, deployment=deployment) as (running, (replica,)):
            client, cache = await running.connect(), running.door.lanes["m"].cache
            assert cache is not None
            for seed in range(120):
                await client.send(post(chat(**SURE, seed=seed)))
                await client.answer()
                assert cache.held_bytes <= 1 << 20
            assert 70 < len(cache) < 90
            for seed, how in ((119, "hit"), (0, "miss")):
                assert said(await running.ask(post(chat(**SURE, seed=seed)))) == how
            assert len(replica.asked) == 121

    run(main())


# ------------------------------------------------------------------------------------------------ asked together


async def listening(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    """Says nothing, and notices when the gateway hangs up."""
    if not await reader.read(1):
        raise ConnectionResetError


@pytest.mark.parametrize("stream", [False, True])
def test_identical_requests_in_flight_are_one_call(stream: bool) -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE, replica={"max_running": 1}) as (running, (replica,)):
            clients = await asks(running, 8, stream=stream)
            assert running.door.lanes["m"].line.waiting == 0
            release.set()
            answers = [await client.answer() for client in clients]
            assert [said(a) for a in answers] == ["miss"] + ["shared"] * 7
            assert len(replica.asked) == 1
            ids = {events(a.body)[0]["id"] if stream else a.json["id"] for a in answers}
            assert len(ids) == 8
            assert [r.cache for r in running.journal.rows] == [""] + ["shared"] * 7
            assert not running.door.live

    run(main())


def test_a_leader_whose_client_leaves_goes_on_for_the_others() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE) as (running, (replica,)):
            leader, follower = await asks(running, 2)
            await until(lambda: replica.running == 1)
            leader.close()
            await until(lambda: len(running.server.connections) == 1)
            (late,) = await asks(running, 1)
            release.set()
            assert (await follower.answer()).json["usage"] == (await late.answer()).json["usage"]
            assert (len(replica.asked), replica.gone) == (1, 0)
            rows = running.journal.rows
            assert [(r.outcome, r.cache, r.output_tokens) for r in rows] == [
                ("aborted", "", 2),  # who asked pays for it
                ("ok", "shared", 2),
                ("ok", "shared", 2),
            ]

    run(main())


def test_when_all_have_left_the_replica_is_told() -> None:
    async def main() -> None:
        async with serving(listening, deployment=CACHE) as (running, (replica,)):
            for client in await asks(running, 3):
                await until(lambda: replica.asked)
                client.close()
            await until(lambda: len(running.journal.rows) == 3)
            await until(lambda: replica.gone == 1)
            cache = running.door.lanes["m"].cache
            assert cache is not None
            assert (cache.flights, cache.held_bytes, running.door.live) == ({}, 0, set())
            assert {r.outcome for r in running.journal.rows} == {"aborted"}

    run(main())


def test_a_call_that_goes_on_for_others_ends_when_its_answer_grows_too_large_for_them() -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def first_grows(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            await release.wait()
            if len(replica.asked) > 1:
                await reply_stream(replica, reader, writer, asked)
                return
            writer.write(EVENT_HEAD + chunk(event("a" * 20_000)))
            await listening(replica, reader, writer, asked)

        deployment = {"cache": Caching(ttl_s=60, memory_mib=1)}
        async with serving(first_grows, deployment=deployment) as (running, (replica,)):
            leader, follower = await asks(running, 2, stream=True)
            await until(lambda: replica.running == 1)
            leader.close()
            await until(lambda: len(running.server.connections) == 1)
            release.set()
            assert len(events((await follower.answer()).body)) == 4
            await until(lambda: replica.gone == 1)
            assert [r.outcome for r in running.journal.rows] == ["aborted", "ok"]
            assert not running.door.live

    run(main())


@pytest.mark.parametrize("alone", [False, True])
def test_when_the_replica_breaks_off_one_of_the_others_asks_and_the_rest_still_wait(alone: bool) -> None:
    async def main() -> None:
        release = asyncio.Event()

        async def once(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            await release.wait()
            if len(replica.asked) > 1:
                await reply_stream(replica, reader, writer, asked)
                return
            writer.write(EVENT_HEAD + chunk(event("a")))
            await writer.drain()
            writer.close()

        async with serving(once, deployment=CACHE) as (running, (replica,)):
            leader, *others = await asks(running, 4, stream=True)
            await until(lambda: replica.running == 1)
            if alone:
                leader.close()
                await until(lambda: len(running.server.connections) == 3)
            release.set()
            answers = [await client.answer() for client in others]
            assert [said(a) for a in answers] == ["miss", "shared", "shared"]
            assert all(len(events(a.body)) == 4 for a in answers)
            assert len(replica.asked) == 2
            if not alone:
                assert b'"replica_broke_off"' in (await leader.answer()).body
            first = running.journal.rows[0]
            assert first.outcome == ("aborted" if alone else "error")

    run(main())


def test_a_waiting_leader_that_leaves_is_followed_by_the_next_in_the_line() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE, replica={"max_running": 1}) as (running, (replica,)):
            (busy,) = await asks(running, 1, seed=1)
            leader, follower = await asks(running, 2)
            assert running.door.lanes["m"].line.waiting == 1
            leader.close()
            await until(lambda: len(running.door.live) == 2)
            assert running.door.lanes["m"].line.waiting == 1
            release.set()
            assert [said(await client.answer()) for client in (busy, follower)] == ["miss", "miss"]
            assert len(replica.asked) == 2

    run(main())


def test_those_who_follow_one_that_waits_in_vain_do_not_begin_to_wait_anew() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE, replica={"max_running": 1}) as (running, _):
            await asks(running, 1, seed=1)
            clients = await asks(running, 10)
            running.door.sweep(mono_s() + 61.0)
            assert running.door.lanes["m"].line.waiting == 0
            answers = [await client.answer() for client in clients]
            assert {(a.status, a.code) for a in answers} == {(429, "wait_expired")}
            assert all("retry-after" in a.headers for a in answers)
            release.set()

    run(main())


def test_who_has_a_higher_class_does_not_wait_behind_a_lower_one() -> None:
    async def main() -> None:
        release = asyncio.Event()
        keys = [key_row(priority="high")]
        options: dict[str, Any] = {"deployment": CACHE, "replica": {"max_running": 1}, "keys": keys}
        async with serving(holding(release), **options) as (running, _):
            (busy,) = await asks(running, 1, seed=1)
            (low,) = await asks(running, 1, AUTH + b"x-neaptide-priority: low\r\n")
            high, also = await asks(running, 2, AUTH + b"x-neaptide-priority: high\r\n")
            release.set()
            answers = [await client.answer() for client in (busy, high, also, low)]
            assert [said(a) for a in answers] == ["miss", "miss", "shared", "miss"]
            order = [(r.priority, r.cache) for r in running.journal.rows]
            assert order == [("normal", ""), ("high", ""), ("high", "shared"), ("low", "")]

    run(main())


def test_a_follower_keeps_its_own_deadline() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE) as (running, (replica,)):
            (leader,) = await asks(running, 1)
            (hasty,) = await asks(running, 1, AUTH + b"x-neaptide-deadline-ms: 60000\r\n")
            running.door.sweep(mono_s() + 61.0)
            answer = await hasty.answer()
            assert (answer.status, answer.code) == (504, "deadline_exceeded")
            release.set()
            assert (await leader.answer()).status == 200
            assert len(replica.asked) == 1

    run(main())


def test_a_leader_that_runs_into_a_time_limit_leaves_the_others_their_chance() -> None:
    async def main() -> None:
        async def second(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            await (listening if len(replica.asked) == 1 else reply_json)(replica, reader, writer, asked)

        async with serving(second, deployment=CACHE) as (running, (replica,)):
            clients = await asks(running, 3)
            await until(lambda: replica.running == 1)
            running.door.sweep(mono_s() + Timeouts().first_byte_s + 1.0)
            answers = [await client.answer() for client in clients]
            assert [a.status for a in answers] == [504, 200, 200]
            assert [said(a) for a in answers[1:]] == ["miss", "shared"]

    run(main())


def test_a_follower_that_hears_heartbeats_is_told_in_a_comment() -> None:
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), deployment=CACHE) as (running, _):
            leader, follower = await asks(running, 2, stream=True)
            (waiting,) = [e for e in running.door.live if e.target is None]
            waiting.beat(0.0)
            status, headers = await follower.head()
            assert (status, "x-neaptide-cache" in headers) == (200, False)
            release.set()
            body = await follower.answer_rest()
            assert b": x-neaptide-cache: shared\n\n" in body
            assert len(events(body)) == 4
            assert (await leader.answer()).status == 200

    run(main())


# ------------------------------------------------------------------------------------------------ own replicas


def test_an_answer_that_came_over_a_link_is_told_again_with_usage_of_its_counts() -> None:
    async def main() -> None:
        async with linked(deployment=CACHE) as (running, (replica,)):
            (client,) = await asks(running, 1, stream=True)
            request = await opened(replica)
            request.token(event("a"))
            request.token(event("b"))
            request.end(event(None, "stop") + DONE, finish="stop", prompt_tokens=7, cached_tokens=4, output_tokens=2)
            assert len(events((await client.answer()).body)) == 3
            again = await running.ask(post(chat(stream=True, **SURE, stream_options={"include_usage": True})))
            assert said(again) == "hit"
            told = events(again.body)
            assert [row["choices"][0]["delta"] for row in told[:-1]] == [{"content": "a"}, {"content": "b"}, {}]
            assert told[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
            assert len(replica.requests) == 1

    run(main())


def test_an_aborted_or_failed_answer_of_a_link_is_not_kept() -> None:
    async def main() -> None:
        async with linked(deployment=CACHE) as (running, (replica,)):
            for count, fields in ((1, {"finish": "abort"}), (2, {"finish": "error", "error": "engine_error"})):
                (client,) = await asks(running, 1)
                request = await opened(replica, count)
                request.end(COMPLETION, **fields)
                await client.answer()
            cache = running.door.lanes["m"].cache
            assert cache is not None
            assert len(cache) == 0

    run(main())


def test_the_answer_of_a_new_revision_is_another() -> None:
    async def main() -> None:
        async with serving(reply_json, deployment=CACHE) as (running, (replica,)):
            await running.ask(post(chat(**SURE)))
            table = running.door.table
            (row,) = table.slow.deployments
            slow = msgspec.structs.replace(table.slow, deployments=(msgspec.structs.replace(row, revision="next"),))
            running.install(msgspec.structs.replace(table, slow=slow))
            for _ in range(2):  # the replica is still of the old one: its answers are not kept as the new one's
                assert said(await running.ask(post(chat(**SURE)))) == "miss"
            assert len(replica.asked) == 3

    run(main())
