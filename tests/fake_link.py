"""The replica's end of the link, played by a test."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from neaptide import link
from neaptide.link import EndHeader, FrameReader, Hello, LoadReport, OpenHeader


@dataclass
class Opened:
    """A request that the gateway opened."""

    wire: Wire
    stream: int
    header: OpenHeader
    body: bytes
    credit: int = link.CREDIT_BYTES
    aborted: bool = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def token(self, data: bytes, ids: tuple[int, ...] = (1,)) -> None:
        self.wire.send(self.stream, link.TOKEN, link.pack_token(ids, data))

    def end(self, data: bytes = b"", **fields: Any) -> None:
        self.wire.send(self.stream, link.END, link.pack_header(EndHeader(**fields), data))


class Wire(asyncio.Protocol):
    """One gateway's connection."""

    def __init__(self, replica: FakeLinkReplica) -> None:
        self.replica = replica
        self.frames = FrameReader()
        self.opened: dict[int, Opened] = {}
        self.batch: list[bytes] | None = None
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.replica.wires.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        data = link.frame(stream, kind, payload)
        if self.batch is not None:
            self.batch.append(data)
        else:
            self.transport.write(data)

    def flush(self) -> None:
        """What was gathered since `batch = []`, as one write: one engine step."""
        assert self.batch is not None
        data, self.batch = b"".join(self.batch), None
        self.transport.write(data)

    def load(self, **fields: Any) -> None:
        self.send(0, link.LOAD, msgspec.json.encode(LoadReport(**fields)))

    def data_received(self, data: bytes) -> None:
        for frame in self.frames.feed(data):
            self._take(frame)

    def _take(self, frame: link.Frame) -> None:
        if frame.type == link.HELLO:
            self.replica.hellos.append(msgspec.json.decode(frame.payload, type=Hello))
            self.replica.greet(self)
        elif frame.type == link.OPEN:
            header, body = link.split_header(frame.payload)
            self.opened[frame.stream] = Opened(self, frame.stream, msgspec.json.decode(header, type=OpenHeader), body)
            self._begin(frame.stream)
        elif frame.type == link.BODY:
            self.opened[frame.stream].body += frame.payload
            self._begin(frame.stream)
        elif frame.type == link.CREDIT:
            self.opened[frame.stream].credit += link.split_credit(frame.payload)
        elif frame.type == link.ABORT:
            self.opened[frame.stream].aborted = True

    def _begin(self, stream: int) -> None:
        opened = self.opened[stream]
        if len(opened.body) == opened.header.body_bytes:
            self.replica.requests.append(opened)


@dataclass
class FakeLinkReplica:
    path: Path
    slots: int = 100
    hello: Hello = field(default_factory=lambda: Hello(token="boot", role="replica", name="r0"))
    hellos: list[Hello] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
    requests: list[Opened] = field(default_factory=list)
    _server: asyncio.AbstractServer | None = None

    async def start(self) -> FakeLinkReplica:
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: Wire(self), self.path)
        return self

    def greet(self, wire: Wire) -> None:
        wire.send(0, link.HELLO, msgspec.json.encode(self.hello))
        wire.load(slots=self.slots)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        self.cut()
        await asyncio.sleep(0)

    def cut(self) -> None:
        """Break all connections."""
        for wire in self.wires:
            wire.transport.abort()
