"""Frames that almost are right, at all four ends of the link: the connection ends or the frame is passed over; nothing
is raised, memory is bounded, and the next peer is served."""

from __future__ import annotations

import asyncio
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide import link
from neaptide.control.lender import Lender
from neaptide.control.publish import Publisher
from neaptide.cost.leases import Lease
from neaptide.gateway.follow import Follower
from neaptide.gateway.till import Till
from neaptide.link import EndHeader, Hello, LoadReport, OpenHeader, frame, pack_header, pack_token
from neaptide.table import Ask, Gauges, Granted, Leases, Recalled, Returned, Table, Want, whole
from tests.gateway_kit import chat, event, post, table, until
from tests.replica_stage import Stage
from tests.test_fuzz_http import strictly
from tests.test_gateway_link import DONE, linked, opened
from tests.test_publish import TOKEN
from tests.test_publish import Follower as Listener

FUZZ = settings(derandomize=True, max_examples=20)
encode = msgspec.json.encode
DEEP = b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}"
ODD = st.sampled_from(
    [b"", b"{", b"[]", b"null", b'"x"', DEEP, b"\xff" * 9, b"\x00" * 9, b'{"slots":-1}', b'{"slots":1e99}', b"[1,{}]",
     b'["x",1e999,-1]', b'{"a":"\\ud800"}', b"\xff\xff{}", b"\x02\x00{}", b'["b",-5,0]', b"9" * 400]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, good: Sequence[bytes]) -> bytes:
    """A few frames, most of them good; then a bit of one is changed, or it is cut, or its payload is odd."""
    frames = draw(st.lists(st.sampled_from(good), min_size=1, max_size=4))
    at = draw(st.integers(0, len(frames) - 1))
    victim = frames[at]
    how = draw(st.sampled_from(["flip", "cut", "odd", "type", "length"]))
    place = draw(st.integers(0, len(victim) - 1))
    if how == "flip":
        victim = victim[:place] + bytes([victim[place] ^ draw(st.integers(1, 255))]) + victim[place + 1 :]
    elif how == "cut":
        victim = victim[:place]
    elif how == "odd":
        victim = frame(int.from_bytes(victim[4:8], "little"), victim[8], draw(ODD))
    elif how == "type":
        victim = victim[:8] + bytes([draw(st.integers(0, 255))]) + victim[9:]
    else:
        victim = draw(st.integers(0, 1 << 21)).to_bytes(4, "little") + victim[4:]
    frames[at] = victim
    return b"".join(frames)


# --- what a replica may send a gateway

OF_REPLICA = [
    frame(1, link.TOKEN, pack_token((1, 2), event("a"))),
    frame(1, link.HEADERS, b'[["warning","x"]]'),
    frame(1, link.END, pack_header(EndHeader(finish="stop", output_tokens=2), DONE)),
    frame(1, link.END, pack_header(EndHeader(status=429, finish="error", error="busy", retryable=True), b"{}")),
    frame(0, link.LOAD, encode(LoadReport(running=1, slots=100))),
    frame(0, link.TALLY, b"{}"),
]


@FUZZ
@given(st.lists(damaged(OF_REPLICA), min_size=3, max_size=3), st.booleans())
def test_a_gateway_outlives_what_a_replica_may_send(sent: list[bytes], stream: bool) -> None:
    async def main() -> None:
        async with linked() as (running, (replica,)):
            for data in sent:
                client = await running.connect()
                await client.send(post(chat(stream=stream)))
                await opened(replica, len(replica.requests) + 1)
                replica.requests[-1].wire.transport.write(data)
                replica.requests[-1].wire.transport.close()
                reading = asyncio.create_task(client.answer())
                done, _ = await asyncio.wait([reading], timeout=0.02)
                if done:
                    assert reading.exception() is None
                    assert reading.result().status != 500
                reading.cancel()
                client.close()
                await until(lambda: running.door.lanes["m"].targets[0].report is not None and not running.door.live)
            ask = asyncio.create_task(running.ask(post(chat())))
            count = len(replica.requests)
            (await opened(replica, count + 1)).end(b"{}", finish="stop")
            assert (await ask).status == 200

    strictly(main)


@pytest.mark.parametrize(
    "fields",
    [{"prompt_tokens": -1}, {"output_tokens": 2**40}, {"status": 0}, {"status": 1000}, {"content_type": "a\r\nb: c"}],
)
def test_an_end_out_of_bounds_is_a_broken_protocol(fields: dict[str, Any]) -> None:
    async def main() -> None:
        async with linked() as (running, (replica,)):
            ask = asyncio.create_task(running.ask(post(chat())))
            request = await opened(replica)
            request.end(b"{}", finish="stop", **fields)
            await until(lambda: request.wire.lost)
            (await opened(replica, 2)).end(b"{}", finish="stop")
            assert (await ask).status == 200

    strictly(main)


# --- what a gateway may send a replica

BODY = b'{"prompt":"hello","max_tokens":3}'
OF_GATEWAY = [
    frame(1, link.OPEN, pack_header(OpenHeader(request_id="a", route="completions", body_bytes=len(BODY)), BODY)),
    frame(2, link.OPEN, pack_header(OpenHeader(request_id="b", route="completions", body_bytes=99), BODY)),
    frame(2, link.BODY, BODY),
    frame(3, link.OPEN, pack_header(OpenHeader(request_id="c", route="x", body_bytes=12, resumed=2), bytes(12))),
    frame(1, link.CREDIT, link.pack_credit(5)),
    frame(1, link.ABORT),
    frame(0, link.TALLY, b'["a"]'),
    frame(0, link.DRAIN),
]


@settings(derandomize=True, max_examples=60)
@given(st.lists(damaged(OF_GATEWAY), min_size=1, max_size=3), st.booleans())
def test_a_replica_outlives_what_a_gateway_may_send(sent: list[bytes], greets: bool) -> None:
    async def main() -> None:
        stage = Stage(8)
        stage.connect()
        _, wire = stage.gateways[0]
        stage.connect()
        wire.write = lambda data: None  # type: ignore[method-assign]
        hostile = stage.gateways[0][0]
        if not greets:
            hostile = stage.server.protocol()
            hostile.connection_made(wire)  # type: ignore[arg-type]
        for data in sent:
            if not wire.aborted:
                hostile.data_received(data)
        hostile.connection_lost(None)
        stage.open(1, 1, stream=False, stop=False)
        stage.step(3)
        assert stage.engine.busy()
        stage.check()

    strictly(main)


def test_empty_parts_of_a_body_take_no_memory() -> None:
    async def main() -> None:
        stage = Stage(1)
        stage.connect()
        connection, _ = stage.gateways[0]
        connection.data_received(OF_GATEWAY[1])
        flood = frame(2, link.BODY) * 5_000
        tracemalloc.start()
        for _ in range(4):
            connection.data_received(flood)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown < 20_000  # a pointer a frame would be 160,000
        connection.connection_lost(None)

    strictly(main)


# --- what a gateway may send control

TO_CONTROL = [
    frame(0, link.HELLO, encode(Hello(token=TOKEN, role="gateway", name="g", epoch=1))),
    frame(0, link.GAUGES, encode(Gauges(gateway="g", mono_s=1.0, fast=1, slow=1))),
    frame(0, link.FETCH, b'{"fast":0,"slow":0}'),
    frame(0, link.LEASES, encode(Leases(1, {}))),
    frame(0, link.ASK, encode(Ask(1, {"b": Want(5, 5)}))),
    frame(0, link.RETURN, encode(Returned("b", 5, 1))),
]


@FUZZ
@given(st.lists(damaged(TO_CONTROL), min_size=3, max_size=3), st.booleans())
def test_control_outlives_what_a_gateway_may_send(sent: list[bytes], greets: bool) -> None:
    async def store(leases: Sequence[Lease]) -> None:
        return None

    async def main() -> None:
        lender = Lender(store)
        lender.open((), (), 1e9)
        publisher = Publisher(TOKEN, lambda g: None, lender)
        with tempfile.TemporaryDirectory(prefix="np") as directory:
            path = Path(directory, "c.sock")
            await publisher.listen(path)
            publisher.replace(table([]).fast, table([]).slow)
            for data in [*sent, frame(0, link.HELLO, encode(Hello(token="é", role="gateway")))]:
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write((TO_CONTROL[0] if greets else b"") + data)
                writer.write_eof()
                async with asyncio.timeout(5):
                    while await reader.read(1 << 16):
                        pass
                writer.close()
            good = Listener()
            await good.connect(path)
            await good.follow()
            good.writer.close()
            await publisher.close()

    strictly(main)


# --- what control may send a gateway

TO_GATEWAY = [
    frame(0, link.TABLE, encode(whole(table([])))),
    frame(0, link.GRANT, encode(Granted(1, {"b": 5}, ()))),
    frame(0, link.RECALL, encode(Recalled("b", 1))),
]
GREETING = frame(0, link.HELLO, encode(Hello(token="boot", role="control")))


@settings(derandomize=True, max_examples=8)
@given(st.lists(damaged(TO_GATEWAY), min_size=3, max_size=3))
def test_a_gateway_outlives_what_control_may_send(sent: list[bytes]) -> None:
    async def main() -> None:
        left, held = [*sent, TO_GATEWAY[0]], list[Table]()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GREETING + left[0])
            if len(left) > 1:
                del left[0]
                writer.write_eof()
            while await reader.read(1 << 16):
                pass
            writer.close()

        with tempfile.TemporaryDirectory(prefix="np") as directory:
            path = Path(directory, "c.sock")
            server = await asyncio.start_unix_server(serve, path)
            gauges = Gauges(gateway="g", mono_s=0.0, fast=0, slow=0)
            hello = Hello(token="boot", role="gateway", name="g")
            till = Till(lambda exchange, now: None)
            follower = Follower(str(path), Path(directory, "t"), hello, held.append, lambda: gauges, till)
            follower.start()
            await until(lambda: len(left) == 1 and held and held[-1].slow == table([]).slow)
            await follower.close()
            server.close()

    strictly(main)
