"""The gateway before anybody's replicas, over real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError, NotFoundError

from neaptide.errors import RequestError
from neaptide.gateway.exchange import OPEN
from neaptide.table import Cors, DeploymentRow, Fast, ReplicaRow, Slow, Table, Timeouts
from tests.gateway_kit import (
    AUTH,
    COMPLETION,
    EVENT_HEAD,
    KEY,
    Asked,
    FakeReplica,
    answer_bytes,
    chat,
    chunk,
    event,
    gateway,
    key_row,
    post,
    reply_by_body,
    reply_json,
    reply_stream,
    run,
    serving,
    table,
    until,
)

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


def always(data: bytes, close: bool = False):
    """A replica that answers every request with these bytes."""

    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()
            await writer.wait_closed()

    return behave


async def silent(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    """Takes the request and never answers."""
    await reader.read(1)


async def slam(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
    writer.transport.abort()


# --- answers


def test_an_answer_comes_back_whole_with_its_ids_and_its_row():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            answer = await running.ask(post(chat(max_tokens=9), extra=AUTH + b"X-Request-Id: mine-1\r\n"))
            assert (answer.status, answer.body) == (200, COMPLETION)
            assert answer.headers["x-request-id"] == "mine-1"
            assert "set-cookie" not in answer.headers
            row = running.row
            assert answer.headers["x-neaptide-request-id"] == row.request_id
            assert (row.outcome, row.status, row.finish, row.client_id) == ("ok", 200, "stop", "mine-1")
            assert (row.prompt_tokens, row.cached_tokens, row.output_tokens, row.max_tokens) == (7, 3, 2, 9)
            assert (row.model, row.key, row.route) == ("m", "id-test", "chat.completions")
            assert row.prompt_bytes == len(replica.asked[0].body)
            assert [a.replica for a in row.attempts] == ["r0"]
            assert [b.request_id for b in running.journal.begins] == [row.request_id]

    run(main())


def test_the_row_is_written_before_the_answer_ends():
    async def main() -> None:
        async with serving(reply_by_body) as (running, _):
            for stream in (False, True):
                client = await running.connect()
                await client.send(post(chat(stream=stream)))
                await client.answer()
                assert len(running.journal.rows) == 1 + stream

    run(main())


@pytest.mark.parametrize("asks", [True, False])
def test_the_usage_chunk_reaches_only_who_asked_for_it(asks: bool):
    async def main() -> None:
        async with serving(reply_stream) as (running, (replica,)):
            options = {"stream_options": {"include_usage": True}} if asks else {}
            answer = await running.ask(post(chat(stream=True, **options)))
            assert replica.asked[0].json["stream_options"] == {"include_usage": True}
            assert (b'"completion_tokens"' in answer.body) is asks
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert answer.headers["content-type"].startswith("text/event-stream")
            row = running.row
            assert (row.prompt_tokens, row.output_tokens, row.finish, row.stream) == (7, 3, "stop", True)
            assert 0 < row.ttft_s <= row.duration_s
            assert row.itl_max_s >= 0

    run(main())


def test_the_sdk_streams_and_completes():
    async def main() -> None:
        async with serving(reply_by_body) as (running, _):
            client = AsyncOpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key=KEY, max_retries=0)
            messages: Any = [{"role": "user", "content": "hello"}]
            whole = await client.chat.completions.create(model="m", messages=messages)
            assert whole.choices[0].message.content == "hi"
            stream = await client.chat.completions.create(model="gpt-4o-mini", messages=messages, stream=True)
            assert [c.choices[0].delta.content async for c in stream] == ["a", "b", "c", None]
            assert [m.id async for m in client.models.list()] == ["m", "gpt-4o-mini"]
            assert (await client.models.retrieve("gpt-4o-mini")).id == "gpt-4o-mini"
            with pytest.raises(NotFoundError):
                await client.chat.completions.create(model="nope", messages=messages)
            with pytest.raises(AuthenticationError):
                await client.with_options(api_key="wrong").models.list()
            await client.close()

    run(main())


def test_a_replica_gets_its_own_key_and_name_and_nothing_private_of_the_client():
    async def main() -> None:
        options = {"replica": {"token": "replica-key", "remote_model": "remote-id"}}
        async with serving(reply_json, **options) as (running, (replica,)):
            trace = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"
            extra = b"Cookie: c=1\r\nX-Api-Key: secret\r\nTraceparent: " + trace + b"\r\nTracestate: v=1\r\n"
            answer = await running.ask(post(chat(), extra=AUTH + extra))
            (asked,) = replica.asked
            assert asked.path == "/v1/chat/completions"
            assert asked.json == chat(model="remote-id")
            assert asked.headers["authorization"] == "Bearer replica-key"
            assert asked.headers["traceparent"].startswith("00-" + "a" * 32)
            assert asked.headers["traceparent"].encode() != trace
            assert answer.headers["traceparent"].encode() == trace
            assert asked.headers.keys() == {
                *("host", "user-agent", "content-type", "authorization", "accept", "x-request-id"),
                *("traceparent", "tracestate", "content-length"),
            }

    run(main())


def test_an_alias_is_sent_under_the_deployments_name():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            await running.ask(post(chat(model="gpt-4o-mini")))
            assert replica.asked[0].json["model"] == "m"
            assert running.row.model == "m"

    run(main())


def test_tokenize_stands_beside_v1_and_completions_under_it():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            await running.ask(post({"model": "m", "prompt": "x"}, "/tokenize"))
            await running.ask(post({"model": "m", "prompt": "x"}, "/v1/completions"))
            assert [a.path for a in replica.asked] == ["/tokenize", "/v1/completions"]

    run(main())


def test_connections_to_replicas_are_kept():
    async def main() -> None:
        async with serving(reply_by_body) as (running, (replica,)):
            for stream in (False, True) * 5:
                await running.ask(post(chat(stream=stream)))
            assert len(replica.asked) == 10
            assert replica.connections == 1

    run(main())


def test_a_replicas_refusal_passes_with_its_body():
    async def main() -> None:
        body = b'{"error":{"message":"too long","code":"context_length_exceeded"}}'
        async with serving(always(answer_bytes(body, 400))) as (running, _):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.body) == (400, body)
            assert (running.row.outcome, running.row.error) == ("refused", "replica_400")

    run(main())


def test_a_long_answer_that_does_not_stream_passes_in_pieces():
    async def main() -> None:
        body = b'{"x":"' + b"y" * 3_000_000 + b'","usage":{"prompt_tokens":4,"completion_tokens":5}}'
        async with serving(always(answer_bytes(body))) as (running, _):
            answer = await running.ask(post(chat()))
            assert answer.body == body
            assert (running.row.prompt_tokens, running.row.output_tokens) == (4, 5)

    run(main())


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_ends_with_its_connection_is_whole(version: str):
    async def main() -> None:
        raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + COMPLETION
        async with serving(always(raw, close=True)) as (running, _):
            answer = await running.ask(post(chat(), version=version))
            assert answer.body == COMPLETION

    run(main())


def test_http_1_0_gets_a_stream_without_chunks():
    async def main() -> None:
        async with serving(reply_stream) as (running, _):
            answer = await running.ask(post(chat(stream=True), version="1.0"))
            assert "transfer-encoding" not in answer.headers
            assert answer.body.endswith(b"data: [DONE]\n\n")
            assert answer.body.startswith(b"data: {")

    run(main())


def test_a_kept_connection_may_change_its_mind_about_everything():
    async def main() -> None:
        async def counts(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            n = len(replica.asked)
            writer.write(answer_bytes(b'{"n":%d}' % n, extra=f"Warning: w{n // 4}\r\n"))

        async with serving(counts, keys=[key_row(), key_row("sk-two", tenant="t2")]) as (running, (replica,)):
            client = await running.connect()
            two = b"Authorization: Bearer sk-two\r\n"
            requests = [
                (post(chat(user="1")), 200),
                (post(chat(user="22")), 200),  # the same head but for its length
                (post(chat(user="3"), extra=two), 200),
                (post(chat(user="4" * 5000)), 200),
                (post(chat(user="5"), "/v1/completions"), 200),
                (post(chat(user="6")), 200),
                (post(b'{"model":"m"'), 400),
                (post(chat(user="7")), 200),
            ]
            for n, (request, status) in enumerate(requests, 1):
                cut = len(request) - 3 if n == 6 else len(request)
                await client.send(request[:cut])
                await client.send(request[cut:])
                answer = await client.answer()
                assert answer.status == status
                if status == 200:
                    assert answer.json == {"n": len(replica.asked)}
                    assert answer.headers["warning"] == f"w{len(replica.asked) // 4}"
            assert [a.json["user"][0] for a in replica.asked] == list("1234567")
            assert [a.path for a in replica.asked].count("/v1/completions") == 1
            assert [r.tenant for r in running.journal.rows].count("t2") == 1
            running.install(table([], keys=[key_row("sk-two")]))
            await client.send(post(chat()))
            assert (await client.answer()).status == 401  # the table changed under a known head
            assert running.server.body_bytes == 0

    run(main())


def test_calls_with_one_head_have_their_own_ids_bodies_and_rows():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            client = await running.connect()
            trace = AUTH + b"traceparent: 00-%b-%b-01\r\nx-request-id: mine\r\n" % (b"a" * 32, b"b" * 16)
            sizes, answers = (1, 30, 2, 30), []
            for size in sizes:
                await client.send(post(chat(user="u" * size), extra=trace))
                answers.append((await client.answer()).headers)
            rows = running.journal.rows
            assert [len(a.json["user"]) for a in replica.asked] == list(sizes)
            assert [r.prompt_bytes for r in rows] == [len(json.dumps(chat(user="u" * size))) for size in sizes]
            assert [h["x-neaptide-request-id"] for h in answers] == [r.request_id for r in rows]
            assert len({r.request_id for r in rows}) == len({a.headers["traceparent"] for a in replica.asked}) == 4
            assert {r.client_id for r in rows} == {h["x-request-id"] for h in answers} == {"mine"}
            assert {a.headers["traceparent"][3:35] for a in replica.asked} == {"a" * 32}
            assert all(a.arrived_mono_s < b.arrived_mono_s for a, b in itertools.pairwise(rows))

    run(main())


# --- refusals


def test_refusals_are_openai_shaped_and_leave_rows_once_the_key_is_known():
    async def main() -> None:
        async with serving(reply_json, keys=[key_row(), key_row("sk-bound", models=("other",))]) as (running, _):
            bound = b"Authorization: Bearer sk-bound\r\n"
            cases = [
                (post(b"{"), 400, "invalid_json"),
                (post({"messages": []}), 400, "missing_parameter"),
                (post(chat(model="nope")), 404, "model_not_found"),
                (post(chat(), extra=bound), 403, "model_not_allowed"),
                (post(chat(), extra=AUTH + b"X-Neaptide-Priority: urgent\r\n"), 400, "invalid_priority"),
                (post(chat(), extra=AUTH + b"Content-Encoding: gzip\r\n"), 415, "content_encoding"),
            ]
            for request, status, code in cases:
                answer = await running.ask(request)
                assert (answer.status, answer.code) == (status, code)
                assert set(answer.json["error"]) == {"message", "type", "param", "code"}
                assert answer.headers["x-request-id"] == answer.headers["x-neaptide-request-id"]
                assert (running.row.outcome, running.row.error, running.row.status) == ("refused", code, status)
                body = request.partition(b"\r\n\r\n")[2]
                assert running.row.prompt_bytes == (0 if status == 415 else len(body))  # refused by its head: not read
            assert len(running.journal.rows) == len(cases)
            answer = await running.ask(post(chat(), extra=b""))
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert len(running.journal.rows) == len(cases)  # a flood without keys must cost no disk

    run(main())


def test_a_full_disk_is_507_and_what_runs_goes_on():
    async def main() -> None:
        async with serving(reply_json) as (running, _):
            running.journal.full = "/data has 0 bytes free"
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (507, "disk_full")
            assert "/data" in answer.json["error"]["message"]
            running.journal.full = None
            assert (await running.ask(post(chat()))).status == 200

    run(main())


# --- retries


def test_a_replica_that_refuses_connections_is_passed_over():
    async def main() -> None:
        alive = await FakeReplica(reply_json).start()
        gone = await FakeReplica(reply_json).start()
        await gone.stop()
        async with gateway(table([f"http://127.0.0.1:{p}/v1" for p in (gone.port, alive.port)])) as running:
            answers = [await running.ask(post(chat())) for _ in range(6)]
            assert {a.status for a in answers} == {200}
            tried = [[a.replica for a in row.attempts] for row in running.journal.rows]
            assert ["r0", "r1"] in tried
            assert tried.count(["r1"]) >= 4  # left out for a while
        await alive.stop()

    run(main())


@pytest.mark.parametrize("bad", [slam, always(answer_bytes(b"busy", 503)), always(answer_bytes(b"", 502))])
def test_a_failure_before_the_first_byte_is_tried_elsewhere(bad: Any):
    async def main() -> None:
        async with serving(bad, reply_by_body) as (running, replicas):
            for stream in (False, True):
                for _ in range(3):
                    answer = await running.ask(post(chat(stream=stream)))
                    assert answer.status == 200
            assert replicas[0].asked
            assert len(running.journal.rows) == 6

    run(main())


def test_after_three_attempts_the_failure_is_the_answer():
    async def main() -> None:
        async with serving(*[always(answer_bytes(b'{"e":1}', 503))] * 4) as (running, replicas):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.body) == (503, b'{"e":1}')
            assert sum(len(r.asked) for r in replicas) == 3
            assert len({a.replica for a in running.row.attempts}) == 3
        async with serving(slam) as (running, (_replica,)):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (502, "replica_reset")
            assert (running.row.outcome, len(running.row.attempts)) == ("error", 3)

    run(main())


def test_a_stale_kept_connection_is_replaced_without_counting_as_an_attempt():
    async def main() -> None:
        async def once(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            if len(replica.asked) == 2:  # the second request on the kept connection
                writer.transport.abort()
            else:
                await reply_json(replica, reader, writer, asked)

        async with serving(once) as (running, (replica,)):
            for _ in range(2):
                assert (await running.ask(post(chat()))).status == 200
            assert replica.connections == 2
            assert len(running.row.attempts) == 1

    run(main())


def test_a_replica_that_refuses_our_key_is_not_the_clients_fault():
    async def main() -> None:
        async with serving(always(answer_bytes(b'{"error":"key sk-replica"}', 401))) as (running, _):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (502, "replica_unauthorised")
            assert b"sk-replica" not in answer.body

    run(main())


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000,
    ],
)
def test_an_answer_that_is_not_strict_http_is_502(raw: bytes):
    async def main() -> None:
        async with serving(always(raw)) as (running, _):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (502, "replica_bad_answer")

    run(main())


def test_bytes_that_nobody_asked_for_never_become_an_answer():
    async def main() -> None:
        async def extra(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            n = str(len(replica.asked)).encode()
            writer.write(answer_bytes(b'{"n":' + n + b"}") + answer_bytes(b'{"poison":1}'))
            await writer.drain()

        async with serving(extra) as (running, _):
            answers = [(await running.ask(post(chat()))).json for _ in range(3)]
            assert answers == [{"n": 1}, {"n": 2}, {"n": 3}]

    run(main())


# --- streams that break


def test_a_stream_that_breaks_ends_with_an_error_event_and_no_done():
    async def main() -> None:
        async def breaks(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")) + chunk(b'data: {"half'))
            await writer.drain()
            writer.close()

        async with serving(breaks) as (running, _):
            client = await running.connect()
            await client.send(post(chat(stream=True, stream_options={"include_usage": True})))
            answer = await client.answer()
            *_, last = answer.body.strip().split(b"\n\n")
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "replica_broke_off"
            assert b"[DONE]" not in answer.body
            assert (running.row.outcome, running.row.error) == ("error", "replica_broke_off")

    run(main())


def test_a_whole_answer_that_breaks_after_its_first_byte_breaks_the_connection():
    async def main() -> None:
        raw = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 500_000
        async with serving(always(raw, close=True)) as (running, _):
            client = await running.connect()
            await client.send(post(chat()))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await client.answer()
            assert running.row.outcome == "error"

    run(main())


def test_the_last_events_wait_for_the_row():
    async def main() -> None:
        hold = asyncio.Event()

        async def done_first(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")) + chunk(b"data: [DONE]\n\n"))
            await writer.drain()
            await hold.wait()
            writer.write(b"0\r\n\r\n")

        async with serving(done_first) as (running, _):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            await client.head()
            assert await client.chunk() == event("a")
            assert not running.journal.rows
            hold.set()
            assert await client.chunk() == b"data: [DONE]\n\n"
            assert running.journal.rows

    run(main())


# --- clients that leave or lag


@pytest.mark.parametrize("stream", [True, False])
def test_when_the_client_leaves_the_replica_is_stopped_at_once(stream: bool):
    async def main() -> None:
        async def endless(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            if asked.json["stream"]:
                writer.write(EVENT_HEAD + chunk(event("a") + event("b")))
            await reader.read(1)

        async with serving(endless) as (running, (replica,)):
            client = await running.connect()
            await client.send(post(chat(stream=stream)))
            await until(lambda: replica.asked)
            if stream:
                await client.head()
                await client.chunk()
            client.close()
            await until(lambda: replica.gone == 1 and running.journal.rows)
            assert running.row.outcome == "aborted"
            assert running.row.output_tokens == (2 if stream else 0)
            assert not running.door.live
            assert running.door.lanes["m"].targets[0].in_flight == 0

    run(main())


def test_a_slow_reader_stops_the_replica_and_memory_stays_bounded():
    async def main() -> None:
        sent = 0

        async def flood(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            nonlocal sent
            writer.write(EVENT_HEAD)
            writer.transport.set_write_buffer_limits(high=1 << 16)
            piece = chunk(event("x" * 60_000))
            for _ in range(400):
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
            writer.write(b"0\r\n\r\n")

        async with serving(flood) as (running, _):
            client = await running.connect()
            client.reader._limit = 1 << 16  # type: ignore[attr-defined]
            await client.send(post(chat(stream=True)))
            await until(lambda: running.door.live and all(x.paused_s for x in running.door.live))
            await until_still(lambda: sent)
            assert sent < 20_000_000
            (connection,) = running.server.connections
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 1 << 20
            answer = await client.answer()
            assert len(answer.body) > 24_000_000
            assert running.row.outcome == "ok"

    run(main())


async def until_still(read: Any) -> None:
    """Wait until a number no longer changes over a tenth of a second."""
    before = -1
    while before != read():
        before = read()
        await asyncio.sleep(0.1)


# --- waiting


def holding(release: asyncio.Event):
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        await release.wait()
        await reply_json(replica, reader, writer, asked)

    return behave


def test_a_replica_gets_no_more_than_it_can_run_and_the_rest_wait_in_order():
    async def main() -> None:
        release = asyncio.Event()
        async with serving(holding(release), replica={"max_running": 2}) as (running, (replica,)):
            asks = []
            for i in range(6):
                asks.append(asyncio.create_task(running.ask(post(chat(user=str(i))))))
                await until(lambda i=i: len(running.door.live) == i + 1)
            assert replica.running == 2
            assert len(running.door.lanes["m"].line) == 4
            release.set()
            assert {(await a).status for a in asks} == {200}
            assert [a.json["user"] for a in replica.asked[2:]] == ["2", "3", "4", "5"]
            assert running.row.queued_s > 0

    run(main())


def test_a_full_line_is_429_with_retry_after():
    async def main() -> None:
        release = asyncio.Event()
        options = {"replica": {"max_running": 1}, "deployment": {"max_waiting": 1}}
        async with serving(holding(release), **options) as (running, _):
            asks = [asyncio.create_task(running.ask(post(chat()))) for _ in range(2)]
            await until(lambda: len(running.door.live) == 2)
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
            assert running.row.outcome == "refused"
            release.set()
            assert [(await a).status for a in asks] == [200, 200]

    run(main())


@pytest.mark.parametrize(
    ("extra", "code"), [(b"", "wait_expired"), (b"X-Neaptide-Deadline-Ms: 50\r\n", "deadline_passed")]
)
def test_waiting_too_long_is_429_with_the_reason(extra: bytes, code: str):
    async def main() -> None:
        async with gateway(table([], deployment={"max_wait_s": 0.2})) as running:
            answer = await running.ask(post(chat(), extra=AUTH + extra))
            assert (answer.status, answer.code) == (429, code)
            assert int(answer.headers["retry-after"]) >= 1
            assert (running.row.outcome, running.row.attempts) == ("refused", ())

    run(main())


def test_without_a_replica_a_request_waits_for_one():
    async def main() -> None:
        replica = await FakeReplica(reply_json).start()
        async with gateway(table([])) as running:
            starved = []
            running.door.on_starving = lambda: starved.append(True)
            ask = asyncio.create_task(running.ask(post(chat())))
            await until(lambda: starved)
            running.install(table([f"http://127.0.0.1:{replica.port}/v1"]))
            assert (await ask).status == 200
        await replica.stop()

    run(main())


def test_a_deployment_that_cannot_start_is_503_with_the_reason():
    async def main() -> None:
        async with gateway(table([])) as running:
            ask = asyncio.create_task(running.ask(post(chat())))
            await until(lambda: running.door.live)
            running.install(table([], deployment={"failing": "no such file: model.xml"}))
            for answer in (await ask, await running.ask(post(chat()))):
                assert (answer.status, answer.code) == (503, "replica_failing")
                assert "model.xml" in answer.json["error"]["message"]
                assert "retry-after" in answer.headers

    run(main())


def test_who_leaves_while_waiting_frees_the_place():
    async def main() -> None:
        async with gateway(table([])) as running:
            client = await running.connect()
            await client.send(post(chat()))
            await until(lambda: len(running.door.lanes["m"].line) == 1)
            client.close()
            await until(lambda: len(running.door.lanes["m"].line) == 0 and running.journal.rows)
            assert running.row.outcome == "aborted"

    run(main())


# --- time


@pytest.mark.parametrize(
    ("timeouts", "code"),
    [
        (Timeouts(first_byte_s=0.1), "first_byte_timeout"),
        (Timeouts(total_s=0.1), "total_timeout"),
    ],
)
def test_a_silent_replica_is_504(timeouts: Timeouts, code: str):
    async def main() -> None:
        async with serving(silent, deployment={"timeouts": timeouts}) as (running, (replica,)):
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (504, code)
            assert (running.row.outcome, running.row.status) == ("timeout", 504)
            await until(lambda: replica.gone == 1)

    run(main())


def test_a_deadline_that_passes_in_service_is_504():
    async def main() -> None:
        async with serving(silent) as (running, _):
            for extra in (b"X-Neaptide-Deadline-Ms: 80\r\n", b"X-Stainless-Read-Timeout: 0.08\r\n"):
                answer = await running.ask(post(chat(), extra=AUTH + extra))
                assert (answer.status, answer.code) == (504, "deadline_exceeded")

    run(main())


def test_a_stream_that_falls_silent_ends_with_an_error_event():
    async def main() -> None:
        async def stalls(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")))
            await reader.read(1)

        async with serving(stalls, deployment={"timeouts": Timeouts(idle_s=0.1)}) as (running, _):
            answer = await running.ask(post(chat(stream=True)))
            assert b'"idle_timeout"' in answer.body
            assert running.row.outcome == "timeout"

    run(main())


def test_a_replica_that_accepts_no_connection_in_time_is_retried_then_502():
    async def main() -> None:
        import socket

        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(0)
        port = sock.getsockname()[1]
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:  # fill the backlog, so that a further connection hangs
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        deployment = {"timeouts": Timeouts(connect_s=0.1)}
        async with gateway(table([f"http://127.0.0.1:{port}/v1"], deployment=deployment)) as running:
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.code) == (502, "replica_connect_timeout")
        for s in (*fillers, sock):
            s.close()

    run(main())


# --- the table


def test_the_table_changes_without_breaking_a_stream():
    async def main() -> None:
        release = asyncio.Event()

        async def slowly(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            writer.write(EVENT_HEAD + chunk(event("a")))
            await release.wait()
            writer.write(chunk(event("b") + b"data: [DONE]\n\n") + b"0\r\n\r\n")

        async with serving(slowly) as (running, _):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            await until(lambda: any(x.state == OPEN for x in running.door.live))
            other = DeploymentRow(model="n")
            row = ReplicaRow(id="x", model="n", endpoint="http://127.0.0.1:1/v1")
            slow = Slow(version=2, deployments=(other,), keys=(key_row("sk-new"),))
            running.install(Table(fast=Fast(version=2, replicas=(row,)), slow=slow))
            release.set()
            assert (await client.answer()).body.endswith(b"data: [DONE]\n\n")
            assert (await running.ask(post(chat()))).status == 401
            await until(lambda: not running.door.live)

    run(main())


def test_a_draining_replica_gets_nothing_new():
    async def main() -> None:
        async with serving(reply_json, reply_json) as (running, replicas):
            held = running.door.table
            rows = tuple(
                ReplicaRow(id=r.id, model="m", endpoint=r.endpoint, state="draining" if r.id == "r0" else "ready")
                for r in held.fast.replicas
            )
            running.install(Table(fast=Fast(version=2, replicas=rows), slow=held.slow))
            for _ in range(4):
                await running.ask(post(chat()))
            assert (len(replicas[0].asked), len(replicas[1].asked)) == (0, 4)

    run(main())


def test_before_a_table_is_held_nothing_is_ready():
    async def main() -> None:
        async with gateway(None) as running:
            get = b"GET /health%b HTTP/1.1\r\nHost: x\r\n\r\n"
            assert (await running.ask(get % b"")).status == 200
            assert (await running.ask(get % b"/ready")).status == 503
            answer = await running.ask(post(chat()))
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            running.install(table([]))
            assert (await running.ask(get % b"/ready")).status == 200

    run(main())


def test_when_the_process_ends_streams_are_told():
    async def main() -> None:
        async with serving(silent) as (running, _):
            client = await running.connect()
            await client.send(post(chat(stream=True)))
            await until(lambda: running.door.live)
            running.server.drain()
            running.door.end_all(RequestError(503, "The server is stopping.", slug="stopping"), 0.0)
            answer = await client.answer()
            assert (answer.status, answer.code, answer.headers["connection"]) == (503, "stopping", "close")
            assert await client.closed()

    run(main())


# --- what is counted


def test_the_scrape_shows_arrivals_errors_tokens_and_times():
    async def main() -> None:
        async with serving(reply_by_body) as (running, _):
            await running.ask(post(chat()))
            await running.ask(post(chat(stream=True)))
            await running.ask(post(chat(), extra=b""))
            text = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")).body.decode()
            for line in (
                'neaptide_arrivals_total{model_name="m"} 2',
                'neaptide_requests_total{model_name="m",code="200"} 2',
                'neaptide_refused_total{reason="missing_api_key"} 1',
                'vllm:generation_tokens_total{model_name="m"} 5',
                'vllm:num_requests_running{model_name="m"} 0',
                'vllm:num_requests_waiting{model_name="m"} 0',
                'vllm:time_to_first_token_seconds_count{model_name="m"} 1',
                'vllm:e2e_request_latency_seconds_count{model_name="m"} 2',
                'vllm:request_queue_time_seconds_count{model_name="m"} 2',
                'neaptide_replica_up{model_name="m",replica="r0"} 1',
            ):
                assert line in text.splitlines()
            gauge = running.door.gauges(0.0, 3).models["m"]
            assert (gauge.arrivals, gauge.done, gauge.running, gauge.waiting) == (2, 2, 0, 0)
            assert gauge.tokens >= 3

    run(main())


def test_cors_is_off_until_an_origin_is_named():
    async def main() -> None:
        preflight = (
            b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: https://a.test\r\n"
            b"Access-Control-Request-Method: POST\r\n\r\n"
        )
        origin = b"Origin: https://a.test\r\n"
        async with serving(reply_json) as (running, _):
            assert (await running.ask(preflight)).status == 405
            assert "access-control-allow-origin" not in (await running.ask(post(chat(), extra=AUTH + origin))).headers
        async with serving(reply_json, cors=Cors(origins=("https://a.test",))) as (running, _):
            answer = await running.ask(preflight)
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "https://a.test")
            answer = await running.ask(post(chat(), extra=AUTH + origin))
            assert answer.headers["access-control-allow-origin"] == "https://a.test"
            answer = await running.ask(post(chat(), extra=AUTH + b"Origin: https://evil.test\r\n"))
            assert "access-control-allow-origin" not in answer.headers

    run(main())
