"""HTTP as clients may send it: malformed, smuggled, slow, huge, pipelined. The gateway answers or closes; it never
crashes, never says 500, and never takes one request's bytes for another's."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neaptide.table import Limits, Slow, Table
from tests.gateway_kit import (
    AUTH,
    COMPLETION,
    Asked,
    FakeReplica,
    Running,
    chat,
    chunk,
    gateway,
    key_row,
    post,
    reply_by_body,
    reply_json,
    run,
    serving,
    table,
    until,
)

HOST = b"Host: x\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + AUTH


async def raw(running: Running, data: bytes) -> bytes:
    """All that the gateway says to `data`, until it closes or the client half-closes."""
    client = await running.connect()
    await client.send(data)
    try:
        async with asyncio.timeout(5):
            return await client.reader.read()
    finally:
        client.close()


REFUSED = [
    (b"nonsense\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    (b"GET /x\r\n\r\n", 505),
    (b"GET /x HTTP/2.0\r\nHost: x\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\nHost: x\n\n", 400),  # bare line feeds
    (b"GET / HTTP/1.1\r\nHost: x\rA: b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n: b\r\n\r\n", 400),
    (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 0x2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: identity\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n+2\r\n{}\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1_0\r\n{}\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n", 400),
    (POST + b"Expect: 200-maybe\r\nContent-Length: 2\r\n\r\n{}", 417),
    (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"A%d: b\r\n" % i for i in range(150)) + b"\r\n", 431),
    (POST + b"Content-Length: 100000000\r\n\r\n", 413),
]


@pytest.mark.parametrize(("sent", "status"), REFUSED)
def test_what_is_not_plain_http_is_refused_and_the_connection_ends(sent: bytes, status: int):
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            said = await raw(running, sent + GET)
            assert said.startswith(b"HTTP/1.1 %d " % status)
            assert said.count(b"HTTP/1.1 ") == 1  # what follows is nobody's request
            assert b"connection: close" in said
            assert b"x-neaptide-request-id: " in said
            assert not replica.asked
            assert not running.journal.rows or status == 413

    run(main())


def test_small_refusals_keep_the_connection():
    async def main() -> None:
        async with serving(reply_json) as (running, _):
            client = await running.connect()
            for request, status in [
                (post(chat(), extra=b""), 401),
                (post(b"{"), 400),
                (post(chat(model="x")), 404),
                (post(chat(), "/nope"), 404),
                (b"PUT /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 405),
                (post(chat()), 200),
            ]:
                await client.send(request)
                answer = await client.answer()
                assert answer.status == status
                assert "connection" not in answer.headers

    run(main())


def test_wrong_methods_name_the_right_ones():
    async def main() -> None:
        async with gateway(table([])) as running:
            answer = await running.ask(b"DELETE /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, answer.headers["allow"]) == (405, "POST")
            answer = await running.ask(b"POST /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")

    run(main())


@pytest.mark.parametrize("path", [b"/health", b"/version", b"/metrics", b"/v1/models"])
def test_head_is_get_without_the_body(path: bytes):
    async def main() -> None:
        async with gateway(table([])) as running:
            client = await running.connect()
            await client.send(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n")
            got = await client.answer()
            await client.send(b"HEAD " + path + b" HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n")
            head = await client.answer(bodiless=True)
            assert (head.status, head.headers["content-type"]) == (got.status, got.headers["content-type"])
            assert int(head.headers["content-length"]) > 0
            await client.send(GET)
            assert (await client.answer()).status == 200  # nothing of a body lay between

    run(main())


def test_models_need_a_key_and_the_small_pages_need_none():
    async def main() -> None:
        async with gateway(table([])) as running:
            assert (await running.ask(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")).status == 401
            for path in (b"/health", b"/health/ready", b"/version", b"/metrics"):
                assert (await running.ask(b"GET " + path + b"?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200
            assert (await running.ask(b"GET http://x/version HTTP/1.1\r\nHost: x\r\n\r\n")).json == {"version": "test"}

    run(main())


def test_expect_100_continue_is_answered_before_the_body_or_refused_instead_of_it():
    async def main() -> None:
        body = COMPLETION
        async with serving(reply_json) as (running, (replica,)):
            client = await running.connect()
            sent = b'{"model":"m"}'
            await client.send(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(sent))
            assert (await client.head())[0] == 100
            await client.send(sent)
            assert (await client.answer()).body == body
            refused = await running.connect()
            await refused.send(POST.replace(AUTH, b"") + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            answer = await refused.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")
            assert len(replica.asked) == 1

    run(main())


def test_chunked_bodies_are_joined_and_trailers_dropped():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            client = await running.connect()
            parts = [b'{"model"', b':"m",', b'"messages":[]}']
            body = b"".join(chunk(p) for p in parts) + b"0\r\nAuthorization: Bearer other\r\n\r\n"
            for byte in POST + b"Transfer-Encoding: chunked\r\n\r\n" + body:
                client.writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await client.answer()).status == 200
            assert replica.asked[0].body == b"".join(parts)
            assert "transfer-encoding" not in replica.asked[0].headers

    run(main())


def test_pipelined_requests_are_answered_one_after_the_other():
    async def main() -> None:
        order = []

        async def slow_first(
            replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
        ) -> None:
            assert replica.running == 1
            order.append(asked.json["user"])
            await asyncio.sleep(0.02 if order == ["0"] else 0)
            await reply_json(replica, reader, writer, asked)

        async with serving(slow_first) as (running, _):
            client = await running.connect()
            requests = [post(chat(user=str(i))) for i in range(5)]
            await client.send(b"".join([*requests, GET, post(b"{"), requests[0]]))
            answers = [await client.answer() for _ in range(8)]
            assert [a.status for a in answers] == [200] * 6 + [400, 200]
            assert answers[5].json == {"status": "ready"}
            assert order == ["0", "1", "2", "3", "4", "0"]

    run(main())


def test_a_client_that_pipelines_without_end_is_read_no_further():
    async def main() -> None:
        async with gateway(table([])) as running:
            client = await running.connect()
            await client.send(post(chat()))  # waits for a replica
            await until(lambda: running.door.live)
            flood = GET * 20_000
            client.writer.write(flood)
            (connection,) = running.server.connections
            await until(lambda: not connection._reading)
            assert len(connection._held) < 1 << 20

    run(main())


def test_an_offer_to_upgrade_is_declined_by_answering():
    async def main() -> None:
        async with serving(reply_json) as (running, (replica,)):
            client = await running.connect()
            offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
            for _ in range(2):
                await client.send(post(chat(), extra=AUTH + offer))
                assert (await client.answer()).status == 200
            assert [a.json for a in replica.asked] == [chat()] * 2
            assert running.server.body_bytes == 0

    run(main())


def test_a_body_over_the_limit_is_refused_with_bounded_memory():
    async def main() -> None:
        async with serving(reply_json, limits=Limits(body_bytes=1 << 20)) as (running, (replica,)):
            most = 0
            for start in (b"Content-Length: 100000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
                client = await running.connect()
                await client.send(POST + start)
                piece = b"x" * 65536
                framed = chunk(piece) if b"chunked" in start else piece
                reading = asyncio.create_task(client.answer())
                try:
                    for _ in range(100_000_000 // 65536):
                        client.writer.write(framed)
                        await client.writer.drain()
                        most = max(most, running.server.body_bytes)
                except ConnectionError:
                    pass  # it stopped listening
                answer = await reading
                assert (answer.status, answer.code) == (413, "body_too_large")
                assert running.row.error == "body_too_large"
            assert most <= (1 << 20) + (1 << 18)
            assert running.server.body_bytes == 0
            assert not replica.asked

    run(main())


def test_bodies_of_all_connections_together_are_bounded():
    async def main() -> None:
        async with gateway(table([], limits=Limits(inflight_bytes=100_000))) as running:
            first = await running.connect()
            await first.send(post(chat(pad="x" * 60_000)))
            await until(lambda: running.door.live)
            answer = await running.ask(post(chat(pad="x" * 60_000)))
            assert (answer.status, answer.code) == (429, "inflight_bytes")
            first.close()
            await until(lambda: running.server.body_bytes == 0)

    run(main())


# --- time


def test_a_head_or_body_that_trickles_is_408():
    async def main() -> None:
        async with gateway(table([], limits=Limits(header_s=0.1, body_s=0.1))) as running:
            said = await raw(running, b"GET /health HTTP/1.1\r\nHos")
            assert said.startswith(b"HTTP/1.1 408 ")
            assert b"head_timeout" in said
            said = await raw(running, POST + b"Content-Length: 5\r\n\r\n{")
            assert b"body_timeout" in said

    run(main())


def test_a_connection_that_says_nothing_is_closed_without_an_answer():
    async def main() -> None:
        async with gateway(table([], limits=Limits(header_s=0.1, keep_alive_s=0.1))) as running:
            assert await raw(running, b"") == b""
            client = await running.connect()
            await client.send(GET)
            assert (await client.answer()).status == 200
            assert await client.closed()
            await until(lambda: not running.server.connections)

    run(main())


def test_connection_close_and_http_1_0_end_after_the_answer():
    async def main() -> None:
        async with gateway(table([])) as running:
            for request in (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), GET.replace(b"1.1", b"1.0")):
                said = await raw(running, request)
                assert b"connection: close" in said
                assert said.endswith(b'{"status":"ready"}')

    run(main())


def test_a_draining_server_finishes_what_runs_and_closes_the_rest():
    async def main() -> None:
        release = asyncio.Event()

        async def hold(
            replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
        ) -> None:
            await release.wait()
            await reply_json(replica, reader, writer, asked)

        async with serving(hold) as (running, _):
            idle, busy = await running.connect(), await running.connect()
            await idle.send(GET)
            await idle.answer()
            await busy.send(post(chat()))
            await until(lambda: running.door.live)
            running.server.drain()
            assert await idle.closed()
            release.set()
            answer = await busy.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await busy.closed()

    run(main())


# --- many


def test_a_thousand_idle_connections_do_not_slow_the_next():
    async def main() -> None:
        async with serving(reply_json) as (running, _):
            clients = [await running.connect() for _ in range(1000)]
            await until(lambda: len(running.server.connections) == 1000)
            assert (await running.ask(post(chat()))).status == 200
            for client in clients:
                client.close()
            await until(lambda: not running.server.connections)

    run(main())


def test_connections_past_the_cap_are_turned_away():
    async def main() -> None:
        async with gateway(table([], limits=Limits(connections=2))) as running:
            first = [await running.connect() for _ in range(2)]
            await until(lambda: len(running.server.connections) == 2)
            answer = await running.ask(GET)
            assert (answer.status, answer.code) == (429, "connections")
            first[0].close()
            await until(lambda: len(running.server.connections) == 1)
            assert (await running.ask(GET)).status == 200

    run(main())


# --- anything at all

PIECES = st.sampled_from(
    [
        b"GET ", b"POST ", b"/v1/chat/completions", b"/health", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: x\r\n",
        b"\r\n", b"\r\n\r\n", b"\n", b"\r", b": ", b"Content-Length: ", b"5", b"0", b"-1",
        b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip",
        b"Expect: 100-continue\r\n", b"Connection: upgrade\r\nUpgrade: x\r\n",
        b"Connection: close\r\n", b"Content-Encoding: gzip\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b'{"model":"m"}',
        b"\x00", b"\xff", b" ", b"\t", AUTH, GET, post(b"{}"), post(chat(model="x")), POST,
    ]
)  # fmt: skip
STREAMS = st.lists(PIECES | st.binary(max_size=12), min_size=1, max_size=14).map(b"".join)


async def converse(running: Running, sent: bytes, cuts: list[int]) -> list[bytes]:
    """The status lines that answer `sent`, cut at `cuts`, once the gateway is done with it."""
    client = await running.connect()
    edges = sorted({min(c, len(sent)) for c in cuts} | {0, len(sent)})
    for a, b in itertools.pairwise(edges):
        client.writer.write(sent[a:b])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    client.writer.write_eof()
    try:
        said = await client.reader.read()
    except ConnectionError:
        said = b""
    client.close()
    return [line for line in said.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STREAMS, min_size=12, max_size=12), st.randoms(use_true_random=False))
def test_arbitrary_bytes_are_answered_alike_however_they_are_cut_and_never_with_500(
    streams: list[bytes], rng: random.Random
):
    async def main() -> None:
        nobody = Table(slow=Slow(keys=(key_row(),)))  # no model: every answer comes at once
        async with gateway(nobody) as running:
            for sent in streams:
                whole = await converse(running, sent, [])
                cut = await converse(running, sent, [rng.randrange(len(sent) + 1) for _ in range(6)])
                assert whole == cut
                assert not any(b" 500 " in line for line in whole)
            assert (await running.ask(GET)).status == 200
            await until(lambda: not running.server.connections)
            assert running.server.body_bytes == 0

    run(main())


def test_streams_and_wholes_share_a_connection():
    async def main() -> None:
        async with serving(reply_by_body) as (running, _):
            client = await running.connect()
            for stream in (True, False, True, False):
                await client.send(post(chat(stream=stream)))
                answer = await client.answer()
                assert answer.body.endswith(b"[DONE]\n\n") is stream
            assert len(running.server.connections) == 1

    run(main())
