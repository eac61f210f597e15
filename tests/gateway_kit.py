"""A gateway in the test's own loop, replicas that do as they are told, and a client that sees raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop

from neaptide.clock import mono_s
from neaptide.gateway.admit import digest
from neaptide.gateway.door import Door
from neaptide.gateway.route import Target
from neaptide.gateway.routes import Routes
from neaptide.gateway.secure import Secure
from neaptide.gateway.server import Server
from neaptide.gateway.upstream import Upstream
from neaptide.gateway.upstream_http import HttpPool
from neaptide.gateway.upstream_link import LinkClient
from neaptide.link import Hello
from neaptide.table import Cors, DeploymentRow, Fast, KeyRow, Limits, ReplicaRow, Slow, Table
from neaptide.types import Begin, Usage

PEPPER = "ab" * 32
KEY = "sk-test"
AUTH = b"Authorization: Bearer sk-test\r\n"


def run(main: Coroutine[Any, Any, None], uv: bool = True) -> None:
    """One test's coroutine, bounded; on uvloop as in production, where the gateway runs in the test's own loop."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uv else asyncio.new_event_loop) as runner:
        runner.run(bounded())


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition; fails when it does not come true."""
    end_s = mono_s() + timeout_s
    while not condition():
        assert mono_s() < end_s, f"never came true: {condition}"
        await asyncio.sleep(0.005)


class MemoryJournal:
    """What the door asks of a journal, in memory; `full` names a full disk."""

    def __init__(self) -> None:
        self.begins: list[Begin] = []
        self.rows: list[Usage] = []
        self.full: str | None = None
        self.order: list[str] = []

    def begin(self, begin: Begin) -> None:
        self.begins.append(begin)

    def end(self, usage: Usage, then: Callable[[], None] | None) -> None:
        asyncio.get_running_loop().call_soon(self._write, usage, then)

    def _write(self, usage: Usage, then: Callable[[], None] | None) -> None:
        self.rows.append(usage)
        if then is not None:
            then()

    def refusal(self) -> str | None:
        return self.full


@dataclass
class Asked:
    """A request as a replica saw it."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Behaviour = Callable[["FakeReplica", asyncio.StreamReader, asyncio.StreamWriter, Asked], Awaitable[None]]


@dataclass
class FakeReplica:
    """An HTTP server that records what it is asked and answers by `behave`."""

    behave: Behaviour
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    gone: int = 0  # connections that the gateway closed
    port: int = 0
    running: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self, tls: ssl.SSLContext | None = None) -> FakeReplica:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=1 << 20, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while (asked := await read_request(reader)) is not None:
                self.asked.append(asked)
                self.running += 1
                try:
                    await self.behave(self, reader, writer, asked)
                finally:
                    self.running -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.gone += 1
            self._tasks.discard(task)
            writer.transport.abort()


async def read_request(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    start, *lines = head.strip().split("\r\n")
    headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(start.split()[1], headers, body)


def answer_bytes(body: bytes, status: int = 200, extra: str = "", content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


COMPLETION = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }
).encode()
EVENT_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nSet-Cookie: a=b\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: str | None, finish: str | None = None, usage: dict[str, Any] | None = None) -> bytes:
    choices = (
        []
        if usage is not None and content is None
        else [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish}]
    )
    row = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, "usage": usage}
    return b"data: " + json.dumps(row).encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


async def reply_json(
    replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
) -> None:
    writer.write(answer_bytes(COMPLETION))
    await writer.drain()


async def reply_stream(
    replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
) -> None:
    """Three tokens, the finish chunk, usage if asked for, [DONE]; each its own write."""
    writer.write(EVENT_HEAD)
    pieces = [event("a"), event("b"), event("c"), event(None, "stop")]
    if (asked.json.get("stream_options") or {}).get("include_usage"):
        pieces.append(event(None, None, USAGE))
    for piece in [*pieces, b"data: [DONE]\n\n"]:
        writer.write(chunk(piece))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")


async def reply_by_body(
    replica: FakeReplica, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: Asked
) -> None:
    await (reply_stream if asked.json.get("stream") else reply_json)(replica, reader, writer, asked)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        return self.json["error"]["code"]


class Client:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = raw.strip().split("\r\n")
        return int(start.split()[1]), {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines)}

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self, bodiless: bool = False) -> Answer:
        status, headers = await self.head()
        body = b""
        if bodiless or status in (100, 204):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            body = await self.answer_rest()
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return Answer(status, headers, body)

    async def answer_rest(self) -> bytes:
        """The remaining chunks of a body."""
        body = b""
        while piece := await self.chunk():
            body += piece
        return body

    async def closed(self) -> bool:
        """True when the gateway ended the connection."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.transport.abort()


def post(
    body: bytes | dict[str, Any], path: str = "/v1/chat/completions", extra: bytes = AUTH, version: str = "1.1"
) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: test\r\nContent-Length: {len(raw)}\r\n".encode()
    return head + extra + b"\r\n" + raw


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}


class Running:
    """A serving gateway."""

    def __init__(self, door: Door, server: Server, journal: MemoryJournal, port: int) -> None:
        self.door, self.server, self.journal, self.port = door, server, journal, port
        self.clients: list[Client] = []

    async def connect(self, tls: ssl.SSLContext | None = None) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24, ssl=tls))
        self.clients.append(client)
        return client

    async def ask(self, request: bytes, tls: ssl.SSLContext | None = None) -> Answer:
        """One request on its own connection."""
        client = await self.connect(tls)
        await client.send(request)
        answer = await client.answer(request.startswith(b"HEAD"))
        client.close()
        return answer

    def install(self, table: Table) -> None:
        self.server.limits, self.server.cors = table.slow.limits, table.slow.cors
        self.door.install(table)

    @property
    def row(self) -> Usage:
        return self.journal.rows[-1]


def key_row(key: str = KEY, **fields: Any) -> KeyRow:
    return KeyRow(id="id-" + key.removeprefix("sk-"), digest=digest(key.encode(), bytes.fromhex(PEPPER)), **fields)


def table(
    endpoints: list[str] | None = None,
    *,
    deployment: dict[str, Any] | None = None,
    replica: dict[str, Any] | None = None,
    limits: Limits | None = None,
    cors: Cors | None = None,
    keys: list[KeyRow] | None = None,
) -> Table:
    rows = tuple(
        ReplicaRow(id=f"r{i}", model="m", endpoint=e, **(replica or {})) for i, e in enumerate(endpoints or [])
    )
    slow = Slow(
        version=1,
        deployments=(DeploymentRow(model="m", **{"aliases": ("gpt-4o-mini",), **(deployment or {})}),),
        keys=tuple(keys if keys is not None else [key_row()]),
        limits=limits or Limits(),
        cors=cors or Cors(),
    )
    return Table(fast=Fast(version=1, replicas=rows), slow=slow)


def connector(loop: asyncio.AbstractEventLoop) -> Callable[[ReplicaRow, Target, Callable[[], None]], Upstream]:
    hello = Hello(token="boot", role="gateway", name="g")

    def connect(row: ReplicaRow, target: Target, on_room: Callable[[], None]) -> Upstream:
        return LinkClient(row, target, hello, loop, on_room) if target.link else HttpPool(row, target, loop)

    return connect


@contextlib.asynccontextmanager
async def gateway(held: Table | None, secure: Secure | None = None) -> AsyncIterator[Running]:
    """Serve `held` on a free port; sweeps every 20 ms."""
    loop = asyncio.get_running_loop()
    journal = MemoryJournal()
    door = Door("g", PEPPER, journal, connector(loop))
    routes = Routes(door, "test")
    server = routes.server = Server(routes, Limits(), Cors())
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    routes.secure = secure
    listener = secure.listen(loop, sock, server) if secure else await loop.create_server(server, sock=sock)
    running = Running(door, server, journal, port)
    if held is not None:
        running.install(held)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(0.02)
            door.sweep(mono_s())
            server.sweep(mono_s())

    sweeper = loop.create_task(sweep())
    try:
        yield running
    finally:
        sweeper.cancel()
        listener.close()
        for client in running.clients:
            client.close()
        server.abort()
        door.install(Table())
        for _ in range(3):  # uvloop closes handles in the turns that follow
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(
    *behaviours: Behaviour, secure: Secure | None = None, **options: Any
) -> AsyncIterator[tuple[Running, list[FakeReplica]]]:
    """A gateway before one fake HTTP replica a behaviour."""
    replicas = [await FakeReplica(b).start() for b in behaviours]
    try:
        async with gateway(table([f"http://127.0.0.1:{r.port}/v1" for r in replicas], **options), secure) as running:
            yield running, replicas
    finally:
        for replica in replicas:
            await replica.stop()
