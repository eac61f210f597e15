"""Own replicas over the link: one multiplexed connection a replica and gateway, so that one read carries a whole
engine step.

Frames of one read are grouped by stream: each client gets one write a read. A stream is granted credit as its client
drains, so one slow client never stalls the others. When the connection breaks its streams fail, those that had
answered nothing may go elsewhere, and it is opened again with a short, growing pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

from neaptide import link
from neaptide.clock import mono_s
from neaptide.gateway.route import Target
from neaptide.gateway.upstream import Failure, Sink
from neaptide.link import (
    ABORT,
    BODY,
    CREDIT,
    CREDIT_BYTES,
    END,
    HEADERS,
    HELLO,
    LOAD,
    OPEN,
    TALLY,
    TOKEN,
    EndHeader,
    FrameReader,
    Hello,
    LinkError,
    LoadReport,
    OpenHeader,
    frame,
)
from neaptide.table import ReplicaRow

log = logging.getLogger("neaptide.gateway")

RECONNECT_S = (0.05, 0.1, 0.25, 0.5, 1.0)
HELLO_S = 5.0
PART_BYTES = 512 << 10  # of a body, a frame
GRANT_BYTES = CREDIT_BYTES // 2  # credit goes back in portions of this size
WRITE_HIGH = 4 << 20  # unsent bytes towards a replica past which it gets no more requests
FORGET_S = 30.0  # an aborted stream whose replica never answered

_decode_end = msgspec.json.Decoder(EndHeader).decode
_decode_load = msgspec.json.Decoder(LoadReport).decode
_decode_headers = msgspec.json.Decoder(list[tuple[str, str]]).decode


class Stream:
    """One request on the link. Is the Handle of its request."""

    __slots__ = ("_client", "aborted_s", "answered", "batch", "id", "ids", "owed", "paused", "sink")

    def __init__(self, client: LinkClient, number: int, sink: Sink) -> None:
        self._client = client
        self.id = number
        self.sink = sink
        self.answered = False  # a frame of it has come
        self.owed = 0  # bytes of credit used and not yet granted again
        self.paused = False
        self.aborted_s = 0.0
        self.batch: bytes | None = None  # what this read brought ...
        self.ids = b""  # ... and of which tokens

    def abort(self) -> None:
        if not self.aborted_s:
            self.aborted_s = mono_s()
            self._client.write(frame(self.id, ABORT))

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        self.grant()

    def grant(self) -> None:
        if self.owed:
            self._client.write(frame(self.id, CREDIT, link.pack_credit(self.owed)))
            self.owed = 0


class LinkClient:
    """The connection to one own replica, kept up until `close`. `on_room` is called when the replica may have become
    able to take more."""

    def __init__(
        self,
        row: ReplicaRow,
        target: Target,
        hello: Hello,
        loop: asyncio.AbstractEventLoop,
        on_room: Callable[[], None],
    ) -> None:
        self.row, self.target = row, target
        self._path = row.endpoint.removeprefix("link:")
        self.hello = hello
        self._loop = loop
        self._on_room = on_room
        self._streams: dict[int, Stream] = {}
        self._numbers = 0
        self._wire: Wire | None = None
        self._closing = False
        self._task = loop.create_task(self._keep_up())

    # --- towards the replica

    def send(self, sink: Sink) -> None:
        self._numbers += 1
        stream = Stream(self, self._numbers, sink)
        sink.handle = stream
        wire = self._wire
        if wire is None:  # it broke between the choice and here
            failure = Failure("replica_unreached", "lost its connection", retryable=True)
            self._loop.call_soon(sink.on_failure, failure)
            return
        self._streams[stream.id] = stream
        call, asked, body = sink.call, sink.asked, sink.body
        if sink.ids:
            body = bytes(sink.ids) + body
        header = OpenHeader(
            request_id=call.id,
            route=call.route,
            body_bytes=len(body),
            stream=asked.stream,
            include_usage=bool(asked.include_usage),
            model=sink.model if self.row.members else "",
            tenant=sink.key.tenant,
            deadline_in_s=sink.deadline_s - sink.sent_s if sink.deadline_s != float("inf") else None,
            created_s=int(call.wall_s),
            resumed=len(sink.ids) // 4,
            emitted_chars=None if sink.ids and asked.stream else 0,
        )
        wire.write(frame(stream.id, OPEN, link.pack_header(header, body[:PART_BYTES])))
        for start in range(PART_BYTES, len(body), PART_BYTES):
            wire.write(frame(stream.id, BODY, body[start : start + PART_BYTES]))

    def write(self, data: bytes) -> None:
        if self._wire is not None:
            self._wire.write(data)

    def close(self) -> None:
        """Its replica left the table: what runs may end, then the connection closes."""
        self._closing = True
        self.target.connected = False
        if not self._streams:
            self._end()

    def sweep(self, now: float) -> None:
        stale = [s.id for s in self._streams.values() if s.aborted_s and now - s.aborted_s > FORGET_S]
        for number in stale:
            del self._streams[number]

    def _end(self) -> None:
        self._task.cancel()
        if self._wire is not None:
            self._wire.close()

    async def _keep_up(self) -> None:
        failures = 0
        while not self._closing:
            wire = Wire(self)
            try:
                async with asyncio.timeout(HELLO_S):
                    await self._loop.create_unix_connection(_always(wire), link.short_path(self._path))
                    await wire.greeted
                failures = 0
                await wire.gone
            except (OSError, TimeoutError, LinkError) as e:
                if failures == 0:
                    log.info("replica %s cannot be reached: %s", self.row.id, e or type(e).__name__)
                wire.close()
                failures += 1
                self.target.failures = failures
            if not self._closing:
                await asyncio.sleep(RECONNECT_S[min(failures, len(RECONNECT_S) - 1)])

    # --- from the replica, called by its wire

    def up(self, wire: Wire, hello: Hello) -> None:
        """The replica's HELLO. LinkError when it is not the process that the table means."""
        row, ours = self.row, self.hello
        if hello.version != ours.version:
            raise LinkError(f"replica {row.id} speaks version {hello.version} of the link, this gateway {ours.version}")
        if hello.role != "replica" or (row.token and hello.token != row.token):
            raise LinkError(f"what answers at the socket of replica {row.id} is not a replica of this run")
        if row.epoch and hello.epoch != row.epoch:
            raise LinkError(f"replica {row.id} answers with epoch {hello.epoch}, the table says {row.epoch}")
        self._wire = wire
        self.target.resumes, self.target.replayable = hello.resumes, _replayable(hello)
        self.target.connected = not self._closing
        self.target.answered(mono_s())

    def lost(self, wire: Wire) -> None:
        if self._wire is not wire:
            return
        self._wire = None
        self.target.connected, self.target.report = False, None
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.sink.on_failure(Failure("replica_lost", "lost its connection", retryable=not stream.answered))

    def room(self, can_take: bool) -> None:
        """The wire's buffer filled up, or drained."""
        self.target.connected = can_take and not self._closing
        if can_take:
            self._on_room()

    def take(self, frames: list[link.Frame], now: float) -> None:
        """All frames of one read."""
        streams = self._streams
        touched: list[Stream] = []
        for number, kind, payload in frames:
            if kind == TOKEN:
                stream = streams.get(number)
                if stream is None:
                    continue
                tokens = payload[0] | payload[1] << 8 if len(payload) > 1 else 0
                start = 2 + 4 * tokens
                if len(payload) < start:
                    raise LinkError("a token frame shorter than its ids")
                if stream.batch is None:
                    stream.batch, stream.ids = payload[start:], payload[2:start]
                    touched.append(stream)
                else:
                    stream.batch += payload[start:]
                    stream.ids += payload[2:start]
                stream.owed += len(payload)
            else:
                self._take_other(number, kind, payload, now)
        for stream in touched:
            if stream.batch is not None:
                _deliver(stream, now)

    def _take_other(self, number: int, kind: int, payload: bytes, now: float) -> None:
        if kind == END:
            stream = self._streams.pop(number, None)
            if stream is not None:
                header, rest = link.split_header(payload)
                if stream.batch is not None:
                    _deliver(stream, now)
                stream.sink.on_link_end(_decode_end(header), rest, now)
                if self._closing and not self._streams:
                    self._end()
        elif kind == LOAD and number == 0:
            self.target.heard(_decode_load(payload))
            self._on_room()
        elif kind == HEADERS:
            stream = self._streams.get(number)
            if stream is not None:
                stream.sink.on_link_headers(_decode_headers(payload))
        elif kind != TALLY:  # we never ask; a late answer to somebody's question is no fault
            raise LinkError(f"a frame of type {kind} on stream {number}")


def _replayable(hello: Hello) -> frozenset[str]:
    """The sampling features that an answer begun elsewhere may depend on."""
    told = (hello.describe or {}).get("replayable")
    return frozenset(msgspec.json.decode(told, type=list[str])) if told is not None else frozenset()


def _deliver(stream: Stream, now: float) -> None:
    data, stream.batch = stream.batch or b"", None
    stream.answered = True
    stream.sink.on_tokens(data, stream.ids, now)
    if stream.owed >= GRANT_BYTES and not stream.paused:
        stream.grant()


def _always(wire: Wire) -> Callable[[], Wire]:
    return lambda: wire


class Wire(asyncio.Protocol):
    """One connection's bytes."""

    def __init__(self, client: LinkClient) -> None:
        self._client = client
        self._frames = FrameReader()
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's own class does not inherit it
        transport.set_write_buffer_limits(high=WRITE_HIGH)
        transport.write(frame(0, HELLO, msgspec.json.encode(self._client.hello)))

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        now = mono_s()
        try:
            frames = self._frames.feed(data)
            if not self._greeted:
                if not frames:
                    return
                frames = self._greet(frames)
            self._client.take(frames, now)
        except (LinkError, ValueError) as e:
            log.warning("replica %s broke the link's protocol: %s", self._client.row.id, e)
            if not self.greeted.done():
                self.greeted.set_exception(e if isinstance(e, LinkError) else LinkError(str(e)))
            self.close()

    def _greet(self, frames: list[link.Frame]) -> list[link.Frame]:
        first = frames[0]
        if first.type != HELLO or first.stream != 0:
            raise LinkError(f"the first frame is of type {first.type}, not HELLO")
        self._client.up(self, msgspec.json.decode(first.payload, type=Hello))
        self._greeted = True
        if not self.greeted.done():
            self.greeted.set_result(None)
        return frames[1:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self.greeted.done():
            self.greeted.set_exception(LinkError("the connection closed before the hello"))
        if not self.gone.done():
            self.gone.set_result(None)
        self._client.lost(self)

    def pause_writing(self) -> None:
        self._client.room(False)

    def resume_writing(self) -> None:
        self._client.room(True)
