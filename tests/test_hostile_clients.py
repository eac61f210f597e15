"""Clients that are slow, silent or deaf: what each may cost is bounded in time and in memory, and others are served."""

from __future__ import annotations

import asyncio
import gc
import resource
import socket
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from pathlib import Path
from typing import Any

import pytest

from neaptide.clock import mono_s
from neaptide.gateway.connection import GOODBYE_S, WRITE_HIGH, Connection
from neaptide.link import STALL_S
from neaptide.table import Limits
from tests.gateway_kit import (
    AUTH,
    EVENT_HEAD,
    Asked,
    Client,
    FakeReplica,
    Running,
    chat,
    chunk,
    event,
    gateway,
    post,
    reply_json,
    serving,
    table,
    until,
)
from tests.test_fuzz_http import strictly

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
IDLE = 2000
IDLE_BYTES = 24_000  # of this process an idle connection may take, the client's bare socket included


async def trickle(client: Client, data: bytes, times: int) -> bytes:
    """Send `data` again and again, a byte at a time, until the gateway has said something; what it said."""
    reading = asyncio.create_task(client.reader.readuntil(b"\r\n"))
    try:
        for byte in data * times:
            if reading.done():
                break
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.001)
        else:
            pytest.fail("it was listened to for too long")
        return await reading
    finally:
        reading.cancel()
        client.close()


SLOW = [
    pytest.param(b"GET /health HTTP/1.1\r\n", b"X-A: b\r\n", id="a head"),
    pytest.param(post(b"")[:-2].replace(b"Length: 0", b"Length: 90000") + b"\r\n", b" ", id="a body"),
    pytest.param(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + AUTH + b"\r\n",
        b"1\r\n \r\n",
        id="a body in chunks",
    ),
    pytest.param(
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n", id="trailers"
    ),
]


@pytest.mark.parametrize(("start", "more"), SLOW)
def test_a_byte_at_a_time_does_not_make_the_time_longer(start: bytes, more: bytes) -> None:
    async def main() -> None:
        limits = Limits(header_s=0.1, body_s=0.1, header_bytes=1 << 20)
        async with gateway(table([], limits=limits)) as running:
            client = await running.connect()
            await client.send(start)
            assert (await trickle(client, more, 20_000)).startswith(b"HTTP/1.1 408 ")
            await until(lambda: not running.server.connections)
            assert running.server.body_bytes == 0

    strictly(main)


def test_a_client_that_half_closes_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with gateway(table([])) as running:
            for sent in (b"", GET[:20], post(chat())[:-10], post(chat())):
                client = await running.connect()
                await client.send(sent)
                client.writer.write_eof()
                assert await client.closed()
            await until(lambda: not running.server.connections and not running.door.live)
            assert running.server.body_bytes == 0

    strictly(main)


def test_a_client_that_asks_and_never_reads_is_let_go() -> None:
    async def behave(replica: FakeReplica, reader: Reader, writer: Writer, asked: Asked) -> None:
        writer.write(EVENT_HEAD)
        while not writer.is_closing():
            writer.write(chunk(event("x" * 8000)))
            await writer.drain()

    async def main() -> None:
        async with serving(behave) as (running, (replica,)):
            client = await running.connect()
            still(client)
            await client.send(post(chat(stream=True)))
            await until(lambda: any(x.paused_s for x in running.door.live))
            assert held(running) < 16 * WRITE_HIGH
            running.door.sweep(mono_s() + STALL_S + 1)
            await until(lambda: running.journal.rows)
            assert running.row.outcome in ("error", "aborted")
            await until(lambda: replica.gone)
            running.server.sweep(mono_s() + GOODBYE_S + 1)
            await until(lambda: not running.server.connections)

    strictly(main)


def test_a_client_that_pipelines_and_never_reads_is_not_answered_without_end() -> None:
    async def main() -> None:
        async with gateway(table([])) as running:
            client = await running.connect()
            still(client)
            (connection,) = running.server.connections
            assert connection._transport is not None
            connection._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            batch, sent = GET * 30, 0
            while not connection._full:
                assert sent < 2000, "15 MB of answers wait for nobody"
                client.writer.write(batch)
                sent += 1
                for _ in range(3):
                    await asyncio.sleep(0)
            client.writer.write(GET * 2)
            await until(lambda: connection._held or connection._ahead)
            assert held(running) < 1 << 20
            transport: Any = client.writer.transport
            transport.resume_reading()
            for _ in range(30 * sent + 2):  # once it reads it is answered
                assert (await client.answer()).status == 200

    strictly(main)


def still(client: Client) -> None:
    """It does not read from now on."""
    transport: Any = client.writer.transport
    transport.pause_reading()
    sock: Any = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)


def held(running: Running) -> int:
    """Bytes that wait for clients to read them, or for their turn."""
    found = 0
    for connection in running.server.connections:
        transport = connection._transport
        found += len(connection._held) + (transport.get_write_buffer_size() if transport is not None else 0)
    return found


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def connect(sock: socket.socket, port: int) -> None:
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))


def test_two_thousand_idle_connections_take_little_memory_and_give_it_back() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * IDLE + 100:
        pytest.skip(f"NOT RUN: {soft} open files are allowed, {2 * IDLE + 100} are needed (ulimit -n)")

    async def main() -> None:
        async with serving(reply_json, limits=Limits(header_s=60)) as (running, _):
            assert (await running.ask(post(chat()))).status == 200
            gc.collect()
            before = resident()
            socks = [socket.socket() for _ in range(IDLE)]
            for sock in socks:
                await connect(sock, running.port)
            await until(lambda: len(running.server.connections) == IDLE)
            assert (resident() - before) / IDLE < IDLE_BYTES
            assert (await running.ask(post(chat()))).status == 200
            for sock in socks:
                sock.close()
            await until(lambda: not running.server.connections)
            assert sum(type(it) is Connection for it in gc.get_objects()) < IDLE // 100

    strictly(main)
