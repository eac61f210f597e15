"""The replica's end of the link: frames in, frames out, one write a connection and engine step.

A connection is a gateway (or control, which asks for tallies). It starts with HELLO; anything else, or a wrong token,
closes it. When it is lost its requests are aborted.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import struct
from collections.abc import Sequence
from typing import cast

import msgspec

from neaptide import link
from neaptide.clock import mono_s
from neaptide.engine import refusals
from neaptide.engine.log import Log
from neaptide.engine.pool import Pool
from neaptide.engine.requests import Job
from neaptide.engine.service import READY
from neaptide.errors import RequestError
from neaptide.link import EndHeader, Frame, Hello, LinkError, LoadReport, OpenHeader
from neaptide.wire import chunks

LOAD_EVERY_S = 0.05
HELLO_S = 10.0  # for a peer to say hello
MAX_STREAMS = 8192  # open at once on one connection
MAX_WRITE_BUFFER = 64 << 20  # credits bound what streams may have unread; past this the peer is not reading at all
TALLY_ROWS = 4000  # a frame's worth; a longer question gets several answers

_hello = msgspec.json.Decoder(Hello)
_open = msgspec.json.Decoder(OpenHeader)
_ids = msgspec.json.Decoder(list[str])
_encode = msgspec.json.Encoder().encode
_ONE = struct.Struct("<IIBHI")  # frame header, count 1, the id: nearly every TOKEN frame


class LinkStream:
    """One request's Sink."""

    __slots__ = ("_connection", "body", "credit", "job", "missing", "number", "opened", "reserved")

    def __init__(self, connection: LinkConnection, number: int, opened: OpenHeader) -> None:
        self._connection, self.number, self.opened = connection, number, opened
        self.credit = link.CREDIT_BYTES
        self.missing = opened.body_bytes  # of the body, still to come
        self.reserved = False  # the body counts against the service's bytes
        self.body: list[bytes] = []
        self.job: Job | None = None

    def headers(self, pairs: list[tuple[str, str]]) -> None:
        self._connection.out.append(link.frame(self.number, link.HEADERS, _encode(pairs)))

    def token(self, ids: Sequence[int], data: bytes) -> None:
        size = 2 + 4 * len(ids) + len(data)
        self.credit -= size
        if len(ids) == 1:
            self._connection.out.append(_ONE.pack(size, self.number, link.TOKEN, 1, ids[0]))
            self._connection.out.append(data)
        else:
            self._connection.out.append(link.frame(self.number, link.TOKEN, link.pack_token(tuple(ids), data)))

    def end(self, header: EndHeader, last: bytes) -> None:
        self._connection.streams.pop(self.number, None)
        self.job = None  # it holds us: no cycle is left for the collector
        self._connection.out.append(link.frame(self.number, link.END, link.pack_header(header, last)))


class LinkConnection(asyncio.Protocol):
    """`out` gathers frames until `flush`."""

    def __init__(self, server: LinkServer) -> None:
        self._server, self._service = server, server.service
        self._reader = link.FrameReader()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_stream = 0
        self._heard_hello = self._said_hello = False
        self._load: LoadReport | None = None
        self.streams: dict[int, LinkStream] = {}
        self.out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._server.connections.add(self)
        self._timer = asyncio.get_running_loop().call_later(HELLO_S, self._close, "no HELLO came")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        for stream in list(self.streams.values()):
            self._forget(stream)
        self.streams.clear()
        self.out.clear()
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
        except (LinkError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            self._close(f"{type(e).__name__}: {e}")
            return
        self._server.flush()

    def greet(self) -> None:
        """Answer the peer's HELLO, once the engine can be described."""
        service = self._service
        if not self._heard_hello or self._said_hello or service.description is None:
            return
        self._said_hello = True
        spec = service.spec
        hello = Hello(
            token=spec.token,
            role="replica",
            name=spec.id,
            epoch=spec.epoch,
            pid=os.getpid(),
            describe=msgspec.json.decode(_encode(service.description), type=dict[str, msgspec.Raw]),
            resumes=True,
        )
        self._load = service.load()
        self.out.append(link.frame(0, link.HELLO, _encode(hello)))
        self.out.append(link.frame(0, link.LOAD, _encode(self._load)))

    def flush(self, load: LoadReport | None = None) -> None:
        """One write of what has gathered, `load` ahead of it when it is news to this peer."""
        if load is not None and self._said_hello and is_news(load, self._load):
            self._load = load
            self.out.append(link.frame(0, link.LOAD, _encode(load)))
        if not self.out or self._transport is None:
            return
        self._transport.write(b"".join(self.out))
        self.out.clear()
        if self._transport.get_write_buffer_size() > MAX_WRITE_BUFFER:
            self._close("the peer does not read")

    def unsent(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def _take(self, frame: Frame) -> None:
        kind = frame.type
        if not self._heard_hello:
            self._take_hello(frame)
        elif kind == link.CREDIT:
            self._take_credit(frame)
        elif kind == link.OPEN:
            self._take_open(frame)
        elif kind == link.BODY:
            stream = self.streams.get(frame.stream)
            if stream is not None:
                self._take_body(stream, frame.payload)
        elif kind == link.ABORT:
            stream = self.streams.get(frame.stream)
            if stream is not None:
                self._take_abort(stream)
        elif kind == link.TALLY:
            self._take_tally(frame.payload)
        elif kind != link.DRAIN:
            raise LinkError(f"a frame of type {kind} is not the gateway's to send")

    def _take_hello(self, frame: Frame) -> None:
        if frame.type != link.HELLO or frame.stream != 0:
            raise LinkError("the first frame must be HELLO")
        hello = _hello.decode(frame.payload)
        if hello.version != link.VERSION:
            raise LinkError(f"link version {hello.version}, ours is {link.VERSION}")
        if not hmac.compare_digest(hello.token.encode(), self._service.spec.token.encode()):
            raise LinkError("wrong boot token")
        self._heard_hello = True
        if self._timer is not None:
            self._timer.cancel()
        self.greet()

    def _take_open(self, frame: Frame) -> None:
        if not self._said_hello:
            raise LinkError("OPEN before the replica's HELLO")
        if frame.stream <= self._last_stream:
            raise LinkError(f"stream {frame.stream} was used before")
        self._last_stream = frame.stream
        head, first = link.split_header(frame.payload)
        opened = _open.decode(head)
        if not 0 <= 4 * opened.resumed <= opened.body_bytes:
            raise LinkError(f"{opened.resumed} ids in {opened.body_bytes} bytes of body")
        stream = LinkStream(self, frame.stream, opened)
        self.streams[frame.stream] = stream
        refusal = self._refusal() or self._service.held.reserve(stream.missing)
        if refusal is not None:
            stream.end(_refused(refusal), chunks.error_body(refusal))
            return
        stream.reserved = True
        self._take_body(stream, first)

    def _refusal(self) -> RequestError | None:
        if len(self.streams) > MAX_STREAMS:
            return refusals.full("Too many open streams on this connection.")
        return None

    def _take_body(self, stream: LinkStream, part: bytes) -> None:
        if len(part) > stream.missing:
            raise LinkError(f"stream {stream.number} has more body than its body_bytes")
        stream.missing -= len(part)
        if part:
            stream.body.append(part)
        if stream.missing == 0 and stream.job is None:
            body, stream.body, stream.reserved = b"".join(stream.body), [], False
            if stream.opened.resumed:
                body = self._take_ids(stream.opened, body)
            job = self._service.open(stream.opened, body, stream)
            if stream.number in self.streams:  # it may have ended already
                stream.job = job

    def _take_ids(self, opened: OpenHeader, body: bytes) -> bytes:
        """The ids that stand before a resumed request's body; the body alone."""
        size = 4 * opened.resumed
        opened.generated_ids = list(struct.unpack_from(f"<{opened.resumed}I", body))
        self._service.held.release(size)
        return body[size:]

    def _take_credit(self, frame: Frame) -> None:
        stream = self.streams.get(frame.stream)
        if stream is None:  # its END crossed the credit
            return
        stream.credit += link.split_credit(frame.payload)
        if stream.job is not None:
            self._service.credit_came(stream.job)

    def _take_abort(self, stream: LinkStream) -> None:
        if stream.job is not None:
            self._service.abort(stream.job)
        else:
            self._forget(stream)
            stream.end(EndHeader(finish="abort"), b"")

    def _take_tally(self, payload: bytes) -> None:
        ids = _ids.decode(payload)
        for start in range(0, max(len(ids), 1), TALLY_ROWS):
            rows = self._service.tally.rows(ids[start : start + TALLY_ROWS])
            self.out.append(link.frame(0, link.TALLY, _encode(rows)))

    def _forget(self, stream: LinkStream) -> None:
        if stream.reserved:
            self._service.held.release(stream.opened.body_bytes)
            stream.reserved = False
        if stream.job is not None:
            self._service.abort(stream.job)

    def _close(self, why: str) -> None:
        if self._transport is None:
            return
        self._server.log.info("link closed", why=why)
        self._transport.abort()


def is_news(now: LoadReport, told: LoadReport | None) -> bool:
    """Whether a peer that was told `told` must hear `now`; the measured values change at every step, a little."""
    if told is None or abs(now.kv_usage - told.kv_usage) > 0.02 or abs(now.step_s - told.step_s) > 0.25 * told.step_s:
        return True
    return msgspec.structs.replace(now, kv_usage=told.kv_usage, step_s=told.step_s) != told


class LinkServer:
    def __init__(self, service: Pool, log: Log) -> None:
        self.service, self.log = service, log
        self.connections: set[LinkConnection] = set()
        self._load_s = 0.0
        self._load_timer: asyncio.TimerHandle | None = None
        service.flushers.append(self.flush)

    def protocol(self) -> LinkConnection:
        return LinkConnection(self)

    def greet(self) -> None:
        """The engine has told what it is: answer those who have been waiting for our HELLO."""
        for connection in self.connections:
            connection.greet()
        self.flush()

    def flush(self) -> None:
        """One write a connection; a load report with it when one is due, else soon."""
        load = None
        if self.connections:
            now = mono_s()
            if now - self._load_s >= LOAD_EVERY_S or self.service.state != READY:
                self._load_s, load = now, self.service.load()
            elif self._load_timer is None:
                self._load_timer = asyncio.get_running_loop().call_later(LOAD_EVERY_S, self._late_load)
        for connection in list(self.connections):
            connection.flush(load)

    async def sent(self, timeout_s: float) -> None:
        """Wait until the peers have taken what was written, at most `timeout_s`."""
        until = mono_s() + timeout_s
        # Transports tell nobody of their emptied buffer.
        while any(connection.unsent() for connection in self.connections) and mono_s() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _late_load(self) -> None:
        self._load_timer = None
        self.flush()


def _refused(error: RequestError) -> EndHeader:
    return EndHeader(
        status=error.status, finish="error", error=error.slug or "refused", retryable=refusals.retryable(error)
    )
