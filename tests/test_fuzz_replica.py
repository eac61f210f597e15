"""Replicas that send rubbish, over HTTP: the client gets a whole answer, an error event or a broken connection; the
gateway holds a bounded part of it, and serves the next request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.gateway import sse
from neaptide.table import Caching, Timeouts
from tests.gateway_kit import (
    COMPLETION,
    EVENT_HEAD,
    USAGE,
    Asked,
    Client,
    FakeReplica,
    answer_bytes,
    chat,
    chunk,
    event,
    post,
    reply_by_body,
    serving,
    table,
    until,
)
from tests.test_fuzz_http import strictly

FUZZ = settings(derandomize=True, max_examples=15)
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"
DEEP = b'{"a":' + b"[" * 2000 + b"]" * 2000
HUGE = b"9" * 400
EVENTS = [event("a"), event("b"), event(None, "stop"), event(None, None, USAGE), DONE]
STREAM = EVENT_HEAD + b"".join(map(chunk, EVENTS)) + END
TIMEOUTS = {"timeouts": Timeouts(first_byte_s=5, idle_s=5)}

SPLINTERS = st.sampled_from(
    [
        b"\r\n", b"\n", b"\n\n", b"\x00", b"\xff", b"data:", b"data: [DONE]", b": hm\n\n", b"event: x\n", b"id: 1\n\n",
        b'"usage":{', b'"finish_reason":"', b'{"error":{"code":500}}', b"null}]}\n\n", b"}", b"{", b"[" * 1500, b'"',
        b"0\r\n\r\n", b"ffffffff\r\n", b"-1\r\n", b"1\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
        b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 X\r\n\r\n", b"HTTP/1.1 999 X\r\n\r\n",
        HUGE, b"-" + HUGE, b"x" * 70_000, b"X: " + b"y" * 3000 + b"\r\n",
    ]
)  # fmt: skip
VALID = [
    STREAM,
    answer_bytes(COMPLETION),
    answer_bytes(COMPLETION, 503, "Retry-After: 1\r\n"),
    answer_bytes(COMPLETION, content_type="text/event-stream"),
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n" + COMPLETION,
    b"HTTP/1.1 100 Continue\r\n\r\n" + STREAM,
]


@st.composite
def rubbish(draw: st.DrawFn) -> bytes:
    """What a replica might have answered, damaged at one to four places, perhaps cut short."""
    data = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        piece = draw(SPLINTERS | st.binary(max_size=6))
        data = draw(
            st.sampled_from([data[:at] + piece + data[at:], data[:at] + data[to:], data[:at] + piece + data[to:]])
        )
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


async def outcome(client: Client, request: bytes) -> tuple[int, bytes] | None:
    """Status and body of a well-formed answer; None where the connection broke in the middle of one."""
    await client.send(request)
    async with asyncio.timeout(10):
        try:
            answer = await client.answer()
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
    return answer.status, answer.body


def writes(data: bytes, pieces: int, rng: random.Random) -> list[bytes]:
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(pieces))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@FUZZ
@given(
    st.lists(st.tuples(rubbish(), st.booleans()), min_size=6, max_size=6),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_rubbish_ends_in_an_answer_an_error_event_or_a_broken_connection(
    answers: list[tuple[bytes, bool]], resumes: bool, rng: random.Random
) -> None:
    async def main() -> None:
        said: list[bytes] = []

        async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
            if not said:
                await reply_by_body(replica, reader, writer, asked)
                return
            with contextlib.suppress(RuntimeError):  # of uvloop, where the gateway has hung up already
                for part in list(said):
                    writer.write(part)
                    await asyncio.sleep(0)
            raise ConnectionError  # it hangs up

        options: dict[str, Any] = {
            "deployment": {**TIMEOUTS, "max_wait_s": 0.1, "cache": Caching(ttl_s=60)},
            "replica": {"resumes": resumes},
        }
        async with serving(behave, **options) as (running, (replica,)):
            for number, (data, stream) in enumerate(answers):
                said[:] = writes(data, 3, rng)
                client = await running.connect()
                got = await outcome(client, post(chat(stream=stream, temperature=0, seed=number)))
                if got is not None:
                    assert got[0] != 500
                client.close()
                await until(lambda: not running.door.live)
                await until(lambda: running.door.lanes["m"].targets[0].in_flight == 0)
            said.clear()
            running.install(table([f"http://127.0.0.1:{replica.port}/v1"]))  # it is thought well of again
            got = await outcome(await running.connect(), post(chat(stream=True)))
            assert got is not None
            assert got[1].endswith(DONE)

    strictly(main)


WHOLE = [
    pytest.param(DEEP + b"}", id="nested"),
    pytest.param(b'{"choices":[{"finish_reason":"stop"}],"usage":{"completion_tokens":%b}}' % HUGE, id="huge count"),
    pytest.param(b'{"usage":{"prompt_tokens":-5,"completion_tokens":-%b}}' % HUGE, id="negative count"),
    pytest.param(b'{"usage":{"prompt_tokens":1e999}}', id="infinite count"),
]


@pytest.mark.parametrize("body", WHOLE)
def test_an_answer_that_cannot_be_read_is_passed_on_and_counted_within_bounds(body: bytes) -> None:
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(answer_bytes(body))

    async def main() -> None:
        async with serving(behave) as (running, _):
            client = await running.connect()
            assert await outcome(client, post(chat())) == (200, body)
            assert 0 <= running.row.output_tokens < 2**31
            assert 0 <= running.row.prompt_tokens < 2**31

    strictly(main)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(b"data: " + DEEP + b',"usage": {}}\n\n', id="nested usage"),
        pytest.param(b"data: " + DEEP + b',"error": {"code":500}}\n\n', id="nested error"),
        pytest.param(b'data: {"usage": {"completion_tokens":%b}}\n\n' % HUGE, id="huge count"),
        pytest.param(b'data: {"choices":[],"usage": {"completion_tokens":-%b}}\n\n' % HUGE, id="negative count"),
        pytest.param(b'data: {"choices":{"a":1},"usage":[]}\n\n', id="odd types"),
        pytest.param(b"data: " + b"x" * (3 << 20) + b"\n\n", id="a huge line"),
    ],
)
def test_an_event_that_cannot_be_read_does_not_end_the_stream(hostile: bytes, resumes: bool) -> None:
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(EVENT_HEAD)
        for piece in [event("a"), hostile, event(None, "stop"), DONE]:
            writer.write(chunk(piece))
            await writer.drain()
        writer.write(END)

    async def main() -> None:
        async with serving(behave, replica={"resumes": resumes}) as (running, _):
            client = await running.connect()
            got = await outcome(client, post(chat(stream=True)))
            assert got is not None
            assert got[1].startswith(event("a"))
            assert got[1].endswith(DONE)
            assert 0 <= running.row.output_tokens < 2**31
            assert await outcome(client, post(chat(stream=True))) is not None

    strictly(main)


def test_a_nested_answer_after_a_heartbeat_becomes_an_event() -> None:
    told = sse.as_event(DEEP + b"}")
    assert told.startswith(b'data: {"error":')
    assert json.loads(told[6:])["error"]["message"].startswith('{"a":[')


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "a head": (b"HTTP/1.1 200 OK\r\nX: ", b"y" * 8192),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 300),
    "a trailer": (EVENT_HEAD + chunk(event("a")) + b"0\r\nX: ", b"y" * 8192),
    "trailers": (EVENT_HEAD + chunk(event("a")) + b"0\r\n", b"A: b\r\n" * 1000),
    "a size line": (EVENT_HEAD + chunk(event("a")) + b"1;", b"e" * 8192),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_and_is_no_answer_is_cut_off(name: str) -> None:
    taken: list[int] = []
    start, more = ENDLESS[name]

    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        taken.append(0)
        writer.write(start)
        for _ in range(2000):
            writer.write(more)
            await writer.drain()
            taken[-1] += len(more)
            await asyncio.sleep(0)
        pytest.fail("16 MB were taken")

    async def main() -> None:
        async with serving(behave, deployment=TIMEOUTS) as (running, _):
            client = await running.connect()
            got = await outcome(client, post(chat(stream=True)))
            assert got is not None
            assert b"replica_bad_answer" in got[1]
            await until(lambda: not running.door.live)

    strictly(main)
    assert taken


def test_a_client_that_does_not_read_holds_the_replica_back() -> None:
    sent = [0]

    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(EVENT_HEAD)
        while True:
            writer.write(chunk(event("x" * 8000)))
            await writer.drain()
            sent[0] += 8000

    async def main() -> None:
        async with serving(behave) as (running, _):
            client = await running.connect()
            transport: Any = client.writer.transport
            client.reader._limit = 1 << 14  # type: ignore[attr-defined]
            transport.pause_reading()
            await client.send(post(chat(stream=True)))
            await until(lambda: any(x.paused_s for x in running.door.live))
            (connection,) = running.server.connections
            assert connection._transport is not None
            assert connection._transport.get_write_buffer_size() < 1 << 20
            client.close()
            await until(lambda: not running.door.live)

    strictly(main)
