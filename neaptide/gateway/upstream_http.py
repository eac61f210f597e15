"""Anybody's replica over HTTP/1.1: a keep-alive pool of strict response readers.

One Connection carries one request at a time. httptools (llhttp) reads the answer: bad chunk sizes, both lengths at
once, folded headers are errors. A connection that says anything unasked is closed, so that no answer can be taken for
another's.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from neaptide import __version__
from neaptide.clock import mono_s
from neaptide.errors import ConfigError
from neaptide.gateway.repeat import MISSES_AT_MOST, Repeat, learn, whole_chunks
from neaptide.gateway.route import Target
from neaptide.gateway.upstream import AnswerHead, Failure, Sink, read_head
from neaptide.table import ReplicaRow
from neaptide.tls.trust import SYSTEM, Trust, Why, why_untrusted

log = logging.getLogger("neaptide.gateway")

HEAD_AT_MOST = 64 << 10
IDLE_AT_MOST = 1024  # connections kept for reuse
IDLE_S = 60.0  # how long one is kept
QUIET_S = 60.0  # between two log lines about a replica's TLS
WHOLE_WRITE = 64 << 10  # smaller requests go out as one piece
ROUTES = {"chat.completions": "/chat/completions", "completions": "/completions", "tokenize": "/tokenize"}


class HttpPool:
    """The connections to one replica."""

    def __init__(
        self, row: ReplicaRow, target: Target, loop: asyncio.AbstractEventLoop, trust: Trust | None = None
    ) -> None:
        url = urlsplit(row.endpoint)
        self.name = row.id
        self.target = target
        self._loop = loop
        self._host = url.hostname or "127.0.0.1"
        self._tls = (row.tls or SYSTEM) if url.scheme == "https" else None
        self._trust = trust or Trust()
        self._server_name = (self._tls.server_name or self._host) if self._tls else None
        self._port = url.port or (443 if self._tls else 80)
        self._quiet_until_s = 0.0
        self._idle: list[Connection] = []
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._heads = _request_heads(row, url.netloc.rpartition("@")[2], url.path.rstrip("/"))

    def send(self, sink: Sink) -> None:
        """On the warmest idle connection (last in, first out), else on a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                connection.start(sink)
                return
        self.send_fresh(sink)

    def send_fresh(self, sink: Sink) -> None:
        connection = Connection(self)
        connection.sink = sink
        sink.handle = connection
        task = self._loop.create_task(self._connect(connection, sink.timeouts.connect_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        self._closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.drop()

    def sweep(self, now: float) -> None:
        """Close connections idle for too long."""
        if self._idle and now - self._idle[0].idle_since_s > IDLE_S:
            stale = [c for c in self._idle if now - c.idle_since_s > IDLE_S]
            self._idle = [c for c in self._idle if now - c.idle_since_s <= IDLE_S]
            for connection in stale:
                connection.drop()

    def request_head(self, sink: Sink) -> bytes:
        call = sink.call
        return b"%b%bx-request-id: %b\r\ntraceparent: %b\r\ncontent-length: %d\r\n\r\n" % (
            self._heads[call.route, sink.asked.stream],
            b"tracestate: %b\r\n" % call.tracestate if call.tracestate else b"",
            call.id.encode(),
            call.traceparent,
            len(sink.body),
        )

    def put_back(self, connection: Connection, now: float) -> None:
        if self._closed or len(self._idle) >= IDLE_AT_MOST:
            connection.drop()
        else:
            connection.idle_since_s = now
            self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        if connection in self._idle:
            self._idle.remove(connection)

    async def _connect(self, connection: Connection, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._loop.create_connection(
                    lambda: connection,
                    self._host,
                    self._port,
                    ssl=self._trust.context(self._tls) if self._tls else None,
                    server_hostname=self._server_name,
                )
        except TimeoutError:
            connection.fail("replica_connect_timeout", f"did not accept a connection within {timeout_s:g} s")
        except ConfigError as e:
            why = Why("cannot be asked: our files for its TLS are not in order", f"{e.what}: {e.fix}")
            connection.fail("replica_tls", self.untrusted(why))
        except ssl.SSLError as e:
            connection.fail("replica_tls", self.untrusted(why_untrusted(e)))
        except OSError as e:
            connection.fail("replica_unreachable", f"refused the connection ({e.strerror or e})")

    def untrusted(self, why: Why) -> str:
        """What the client is told; where and what to do is the operator's to know, and logged."""
        now = mono_s()
        if now >= self._quiet_until_s:
            self._quiet_until_s = now + QUIET_S
            log.warning("the replica %s at %s %s: %s", self.name, self._host, why.reason, why.fix)
        return why.reason


class Connection(asyncio.Protocol):
    """One connection, one request at a time. Is the Handle of its request."""

    __slots__ = (
        "_begun",
        "_between",
        "_complete",
        "_dry",
        "_head",
        "_head_seen",
        "_headers",
        "_headers_done",
        "_known",
        "_misses",
        "_parser",
        "_parts",
        "_paused",
        "_pool",
        "_reusable",
        "_transport",
        "_until_eof",
        "_unwanted",
        "idle_since_s",
        "sink",
        "uses",
    )

    def __init__(self, pool: HttpPool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self.sink: Sink | None = None
        self.uses = 0
        self.idle_since_s = 0.0
        self._paused = False
        self._between = False  # the parser stands between two chunks
        self._misses = 0
        self._head: AnswerHead | None = None
        self._known: tuple[Repeat, AnswerHead] | None = None  # the last head that came whole, and what it meant
        self._reset()

    def _reset(self) -> None:
        self._parts: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._begun = self._headers_done = self._complete = False
        self._until_eof = self._reusable = self._unwanted = False
        self._head_seen = self._dry = 0

    # --- its life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class does not inherit it
        self._pool.target.reached(mono_s())
        if self.sink is None:  # aborted while it connected
            self._pool.put_back(self, mono_s())
        else:
            self.start(self.sink)

    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, sink: Sink) -> None:
        transport: Any = self._transport
        self.sink = sink
        sink.handle = self
        self.uses += 1
        self._head_seen = 0
        self._headers_done = self._between = False
        head, body = self._pool.request_head(sink), sink.body
        if len(body) <= WHOLE_WRITE:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def abort(self) -> None:
        """The request is unwanted: a server notices a closed connection at once, and nothing else."""
        self.sink = None
        if self._transport is not None:
            self._transport.abort()

    def drop(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def pause_reading(self) -> None:
        if not self._paused and self.usable() and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and self.usable() and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        sink = self.sink
        self.sink = self._parser = None  # the parser holds us
        if sink is None:
            self._pool.forget(self)
            return
        if self._head_seen and self._until_eof and exc is None:
            sink.on_end(b"", mono_s())
        elif self._head_seen:
            sink.on_failure(Failure("replica_broke_off", f"broke off its answer ({exc or 'connection closed'})"))
        elif self.uses > 1:  # a stale keep-alive connection: nothing was read, nothing came
            self._pool.send_fresh(sink)
        elif isinstance(exc, ssl.SSLError):  # in TLS 1.3 what it thinks of our certificate comes after the handshake
            sink.on_failure(Failure("replica_tls", self._pool.untrusted(why_untrusted(exc)), True, True))
        else:
            sink.on_failure(Failure("replica_reset", "closed the connection without an answer", True, True))

    def fail(self, slug: str, message: str) -> None:
        """It never connected."""
        sink, self.sink = self.sink, None
        if sink is not None:
            sink.on_failure(Failure(slug, message, retryable=True, unreachable=True))

    # --- the answer

    def data_received(self, data: bytes) -> None:
        sink = self.sink
        if self._between and sink is not None and whole_chunks(data) and sink.on_chunks(data, mono_s()):
            return  # the parser need not see whole chunks: 1 of 16 us a paced token
        if sink is None:  # unasked
            if self._transport is not None:
                self._transport.abort()
            return
        if not self._headers_done and self._begin_answer(data, sink):
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self._bad(sink, f"sent invalid HTTP ({e})")
            return
        if self._between:
            self._between = data.endswith(b"\r\n")  # else a part of the next size line has been read
        parts = self._parts
        self._dry = 0 if parts else self._dry + len(data)
        if self._dry > HEAD_AT_MOST and self._headers_done:
            self._bad(sink, f"sent trailers or size lines of more than {HEAD_AT_MOST} bytes")
            return
        if self._complete or self._unwanted or not self._headers_done:
            self._after_read(data, sink)
        elif parts:
            self._parts = []
            sink.on_body(parts[0] if len(parts) == 1 else b"".join(parts), mono_s())

    def _begin_answer(self, data: bytes, sink: Sink) -> bool:
        """The first bytes of an answer. True: its head is known and it came whole, so it is already passed on."""
        if not self._head_seen:
            if self._known is not None:
                repeat, head = self._known
                body = repeat.body(data)
                if body is not None:
                    self._head_seen, self._misses = len(data), 0
                    if sink.on_head(head):
                        self._reusable = True
                        self._finish(sink, body)
                    else:
                        self._quit()
                    return True
            self._reset()
        self._head_seen += len(data)
        return False

    def _after_read(self, data: bytes, sink: Sink) -> None:
        """A read that did not merely bring more of a body."""
        if self._unwanted:
            self._quit()
        elif not self._headers_done:
            if self._head_seen > HEAD_AT_MOST:
                self._bad(sink, f"sent a head of more than {HEAD_AT_MOST} bytes")
        else:
            parts, self._parts = self._parts, []
            if self._reusable and self._misses < MISSES_AT_MOST and self._head_seen == len(data):
                self._learn(data)
            self._finish(sink, b"".join(parts) if len(parts) != 1 else parts[0])

    def _learn(self, data: bytes) -> None:
        """Remember the head of a plain answer that came whole in one read."""
        self._misses += 1
        head = self._head
        if head is not None and head.status == 200 and b"content-length" in self._headers:
            repeat = learn(data)
            self._known = (repeat, msgspec.structs.replace(head, length=None)) if repeat is not None else None

    def _finish(self, sink: Sink, last: bytes) -> None:
        self.sink = None
        if self._paused:
            self.resume_reading()
        now = mono_s()
        if self._reusable:
            self._pool.put_back(self, now)
        else:
            self.drop()
        sink.on_end(last, now)

    def _bad(self, sink: Sink, message: str) -> None:
        self._quit()
        sink.on_failure(Failure("replica_bad_answer", message))

    def _quit(self) -> None:
        self.sink = None
        if self._transport is not None:
            self._transport.abort()

    # --- httptools

    def on_message_begin(self) -> None:
        if self._begun and self._complete:
            self._reusable = False  # something unasked follows: never read another answer from here
        self._begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headers_done:  # else a trailer
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._complete or self.sink is None:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._headers = {}
            return
        self._headers_done = True
        headers = self._headers
        self._until_eof = b"content-length" not in headers and b"transfer-encoding" not in headers
        self._reusable = not self._until_eof and bool(self._parser.should_keep_alive())
        self._head = head = read_head(status, headers)
        self._unwanted = not self.sink.on_head(head)

    def on_body(self, data: bytes) -> None:
        if not self._complete:
            self._parts.append(data)

    def on_chunk_header(self) -> None:
        self._between = False

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_message_complete(self) -> None:
        if self._headers_done:
            self._complete = True
        else:
            self._begun = False  # an interim answer (1xx)


def _request_heads(row: ReplicaRow, host: str, base: str) -> dict[tuple[str, bool], bytes]:
    """By route and whether it streams, the request line and the headers that never change. /tokenize stands beside
    /v1, not under it."""
    lines = f"host: {host}\r\nuser-agent: neaptide/{__version__}\r\ncontent-type: application/json\r\n"
    if row.token:
        lines += f"authorization: Bearer {row.token}\r\n"
    heads = {}
    for route, path in ROUTES.items():
        root = base.removesuffix("/v1") if route == "tokenize" else base
        for stream, accept in ((False, "application/json"), (True, "text/event-stream")):
            heads[route, stream] = f"POST {root}{path} HTTP/1.1\r\n{lines}accept: {accept}\r\n".encode()
    return heads
