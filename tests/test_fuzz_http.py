"""Bad input from clients: framing, bodies and headers that almost are right. Each ends in an answer or in a closed
connection, never in a 500, an exception or a hang; and the next connection is served."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.errors import RequestError
from neaptide.gateway.cache import identity
from neaptide.table import Caching, Degrade, Limits
from neaptide.wire.peek import answers, peek, replays, splice
from tests.gateway_kit import (
    AUTH,
    Running,
    chat,
    chunk,
    gateway,
    post,
    reply_by_body,
    reply_json,
    run,
    serving,
    table,
    until,
)

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + AUTH
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
FUZZ = settings(derandomize=True, max_examples=25)


def strictly(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it; whatever reaches the loop's exception handler fails the test."""
    found: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
        await main()

    run(watched())
    assert not found


# --- framing

VALID = [
    GET,
    post(chat(model="none")),
    post(chat(), extra=AUTH + b"Expect: 100-continue\r\n"),
    post(b"{}") + GET + post(chat(model="none")),
    CHUNKED + chunk(b'{"model":') + chunk(b'"none"}') + b"0\r\n\r\n" + GET,
    CHUNKED + chunk(b"{}") + b"0\r\nX-Trailer: a\r\n\r\n",
    HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
]
SPLINTERS = st.sampled_from(
    [
        b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b"\t", b":", b"\r\n ", b"\r\n\t folded", b";", b";a=b", b'"',
        b"Content-Length: 2\r\n", b"Content-Length: 3\r\n", b"Content-Length: -1\r\n", b"content-length: 2, 2\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"TE:\x0bchunked\r\n",
        b"Host: y\r\n", b"Host:\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Upgrade: websocket\r\n",
        b"X: y\r\n" * 120, b"X: " + b"y" * 40_000 + b"\r\n", b"0\r\n\r\n", b"F" * 17 + b"\r\n", b"-1\r\n", b"0x1\r\n",
        b"1;" + b"e" * 5000 + b"\r\n", b"HTTP/1.0", b"HTTP/3.0", b"GET ", b"CONNECT x:1 HTTP/1.1\r\n", GET, GET * 50,
    ]
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good request, or several, damaged at one to four places."""
    data = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 4))):
        edges = [i + 2 for i in range(len(data) - 1) if data[i : i + 2] == b"\r\n"]
        at = draw(st.sampled_from(edges)) if draw(st.booleans()) and edges else draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 8)))
        how = draw(st.sampled_from(["put", "cut", "twice", "replace"]))
        piece = draw(SPLINTERS | st.binary(max_size=6))
        data = {
            "put": data[:at] + piece + data[at:],
            "cut": data[:at] + data[to:],
            "twice": data[:to] + data[at:],
            "replace": data[:at] + piece + data[to:],
        }[how]
    return data


async def converse(running: Running, sent: bytes, cuts: list[int]) -> bytes:
    """All that is said to `sent`, cut at `cuts`; then the client has no more to say."""
    client = await running.connect()
    edges = sorted({min(c, len(sent)) for c in cuts} | {0, len(sent)})
    for a, b in itertools.pairwise(edges):
        client.writer.write(sent[a:b])
        await asyncio.sleep(0)
    client.writer.write_eof()
    try:
        async with asyncio.timeout(10):
            return await client.reader.read()
    except ConnectionError:
        return b""
    finally:
        client.close()


def statuses(said: bytes) -> list[int]:
    """Of the answers that `said` consists of, whole ones but for the last."""
    found = []
    while said:
        head, mark, rest = said.partition(b"\r\n\r\n")
        start, *lines = head.split(b"\r\n")
        version, status, _ = start.split(b" ", 2)
        assert (version, bool(mark)) == (b"HTTP/1.1", True)
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        found.append(int(status))
        said = rest[int(headers.get(b"content-length", b"0")) :]
    return found


@FUZZ
@given(st.lists(mutated(), min_size=8, max_size=8), st.randoms(use_true_random=False))
def test_a_damaged_request_is_answered_or_refused_and_harms_nobody(requests: list[bytes], rng: random.Random) -> None:
    async def main() -> None:
        async with gateway(table([], deployment={"max_wait_s": 0.05})) as running:
            for sent in requests:
                said = await converse(running, sent, [rng.randrange(len(sent) + 1) for _ in range(4)])
                assert 500 not in statuses(said), said
                assert (await running.ask(GET)).status == 200
            await until(lambda: not running.server.connections and not running.door.live)
            assert running.server.body_bytes == 0

    strictly(main)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"0\r\nX: ", id="a trailer"),
        pytest.param(b"1;", id="a size line"),
        pytest.param(b"0\r\n" + b"A: b\r\n" * 20_000, id="many trailers"),
    ],
)
def test_trailers_and_size_lines_without_an_end_are_cut_off(start: bytes) -> None:
    async def main() -> None:
        async with gateway(table([], limits=Limits(header_bytes=16_384))) as running:
            client = await running.connect()
            await client.send(b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + start)
            reading = asyncio.create_task(client.answer())
            for _ in range(4096):
                if reading.done():
                    break
                client.writer.write(b"x" * 4096)
                await client.writer.drain()
                await asyncio.sleep(0)
            else:
                pytest.fail("16 MiB were taken")
            assert (await reading).status == 431

    strictly(main)


def test_bodies_in_chunks_of_one_byte_are_no_flood_of_framing() -> None:
    async def main() -> None:
        async with serving(reply_json, limits=Limits(header_bytes=4096)) as (running, (replica,)):
            body = json.dumps(chat(pad="x" * 20_000)).encode()
            client = await running.connect()
            await client.send(CHUNKED + b"".join(b"0001;a=b\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            assert (await client.answer()).status == 200
            assert replica.asked[0].body == body

    strictly(main)


# --- bodies

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
READ = ["stream", "max_tokens", "max_completion_tokens", "stream_options", "temperature", "seed", "n", "best_of"]
READ += ["prompt", "messages", "response_format", "logprobs", "min_tokens", "user", "presence_penalty"]
RAW = [b'"\\ud800"', b'"\xff"', b"1e999", b"-0", b"1e-999", b"NaN", b"[" * 2000, b'{"a":' * 50 + b"1" + b"}" * 50]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    fields = {"model": "m", **draw(st.dictionaries(st.sampled_from(READ) | st.text(max_size=4), JSON, max_size=4))}
    data = json.dumps(fields).encode()
    if draw(st.booleans()):
        data = data[:-1] + b',"%b":%b}' % (draw(st.sampled_from(READ)).encode(), draw(st.sampled_from(RAW)))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return data


BUSY: dict[str, Any] = {
    "cache": Caching(ttl_s=60),
    "degrade": (Degrade(wait_s=-1.0, max_tokens=5),),
}


@settings(derandomize=True, max_examples=15)
@given(st.lists(bodies(), min_size=5, max_size=5))
def test_any_body_is_served_or_refused_through_the_whole_gateway(sent: list[bytes]) -> None:
    async def main() -> None:
        async with serving(reply_json, deployment={**BUSY, "aliases": ()}, replica={"remote_model": "z"}) as (
            running,
            _,
        ):
            client = await running.connect()
            for body in sent:
                await client.send(post(body))
                async with asyncio.timeout(10):
                    assert (await client.answer()).status in (200, 400, 404, 422)
            assert (await running.ask(post(chat()))).status == 200

    strictly(main)


@settings(derandomize=True, max_examples=100)
@given(bodies())
def test_what_peek_takes_nothing_after_it_chokes_on(body: bytes) -> None:
    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except RequestError as e:
            if e.status != 400:
                raise
            return None

    if attempt(lambda: peek(body)) is None:
        return
    assert attempt(lambda: peek(splice(body, model="z", include_usage=True, max_tokens=9))) is not None
    assert (attempt(lambda: answers(body)) or 1) >= 1
    assert isinstance(replays(body), frozenset)
    assert identity(body, ("s",), False, wanted=True) == identity(body, ("s",), False, wanted=True)


def test_a_body_at_the_edge_of_too_deep_is_served_or_refused_at_every_depth() -> None:
    async def main() -> None:
        seen = set()
        async with serving(reply_by_body, replica={"remote_model": "z"}) as (running, _):
            for depth in range(900, 1010):
                nest = b"[" * depth + b"]" * depth
                answer = await running.ask(post(b'{"model":"m","messages":[],"user":%b}' % nest))
                seen.add(answer.status)
            assert seen == {200, 400}

    strictly(main)


# --- headers of ours

OURS = ["priority", "deadline-ms", "conversation", "revision", "cache", "degrade", "request-id"]
VALUES = st.sampled_from(
    [b"", b"yes", b"no", b"high", b"-1", b"1e9", b"9" * 400, b"\xff\xfe", b"a" * 5000, b"%00", b"0"]
)
BYTES = st.binary(max_size=20).map(lambda value: value.translate(None, bytes([*range(32), 127])))


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(OURS), VALUES | BYTES), min_size=10, max_size=10), st.booleans())
def test_headers_of_ours_are_understood_or_refused(lines: list[tuple[str, bytes]], standard: bool) -> None:
    async def main() -> None:
        async with serving(reply_json, deployment=BUSY) as (running, _):
            client = await running.connect()
            for name, value in lines:
                prefix = b"x-" if standard and name == "request-id" else b"x-neaptide-"
                extra = AUTH + prefix + name.encode() + b": " + value + b"\r\ntraceparent: " + value + b"\r\n"
                await client.send(post(chat(), extra=extra))
                async with asyncio.timeout(10):
                    status = (await client.answer()).status
                assert status in (200, 400, 404, 409, 429, 504), (name, value)
            assert (await running.ask(post(chat()))).status == 200

    strictly(main)
