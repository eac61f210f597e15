"""HTTP/1.1 for clients, on a raw asyncio Protocol.

Strict by construction: llhttp without leniencies refuses folded and malformed headers, both lengths at once and odd
chunk sizes; what it leaves open (duplicate Host, transfer codings, sizes, times, pipelining) is refused or bounded
here. A connection serves one request at a time; what a client sends ahead waits, and reading stops until its turn.
An answer given before the whole body came ends the connection, after the client has had a moment to read it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol, cast

import httptools

from neaptide.clock import mono_s
from neaptide.errors import RequestError
from neaptide.gateway import answer
from neaptide.gateway.call import Call
from neaptide.gateway.repeat import MISSES_AT_MOST, Repeat, learn
from neaptide.gateway.rules import ONCE, cors_lines, framing_error, not_body, too_large_body, too_large_head
from neaptide.table import Limits
from neaptide.tls.context import subject

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange
    from neaptide.gateway.server import Server

log = logging.getLogger("neaptide.gateway")

AHEAD_AT_MOST = 32  # pipelined requests of one read that are kept; the connection ends after them
SMALL_BODY = 64 << 10  # of a refused request: read and dropped, so that the connection can stay
LINGER_S = 2.0  # how long a refused client may go on sending before the connection ends
GOODBYE_S = 60.0  # and how long it has to read an answer that is still being written
LINGER_BYTES = 64 << 20
WRITE_HIGH = 64 << 10
UPGRADE = frozenset((b"connection", b"upgrade", b"http2-settings", b"expect"))
FOREVER = float("inf")


class Gate(Protocol):
    """What the server asks about a request, and gives it to."""

    def name(self, call: Call) -> None:
        """Give it ids."""

    def at_head(self, call: Call, limits: Limits) -> None:
        """Judge a head: sets path, route and key. RequestError when the request is refused."""

    def again(self, call: Call, body: bytes, now: float) -> bool:
        """Renew an admitted call for its next body; False when its head must be judged afresh."""

    def enter(self, connection: Connection, call: Call, now: float) -> None:
        """A whole request, to be answered."""

    def refuse(self, connection: Connection, call: Call, error: RequestError, now: float) -> None:
        """A request that its head, its size or its HTTP condemned, to be answered with `error`."""


class Connection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_ahead",
        "_ended",
        "_full",
        "_give_up_s",
        "_held",
        "_in_body",
        "_incoming",
        "_known",
        "_linger_bytes",
        "_misses",
        "_now",
        "_parser",
        "_reading",
        "_seen",
        "_server",
        "_serving",
        "_stepping",
        "_transport",
        "client",
        "due_s",
        "exchange",
        "peer",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._incoming: Call | None = None  # being read
        self._serving: Call | None = None  # being answered
        self._ahead: deque[Call] = deque()
        self._held = b""  # bytes read while serving
        self._seen = 0  # bytes of the unfinished head, then of what follows it
        self._in_body = self._ended = self._stepping = False
        self._full = False  # the client reads too slowly: nothing more is served until it has caught up
        self._reading = True
        self._linger_bytes = self._misses = 0
        self._known: tuple[Repeat, Call] | None = None  # the last head that came whole, and what it meant
        self._now = self._give_up_s = 0.0
        self.due_s = FOREVER
        self.exchange: Exchange | None = None
        self.peer = self.client = ""  # address; whom a client certificate names

    # --- its life

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = self._server
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's own class does not inherit it
        if len(server.connections) >= server.limits.connections:
            self._turn_away(RequestError(429, "Too many connections.", slug="connections", retry_after_s=1.0))
            return
        server.connections.add(self)
        transport.set_write_buffer_limits(high=WRITE_HIGH)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) and peer else ""
        if server.mutual:
            self.client = subject(transport.get_extra_info("peercert"))
        self.due_s = mono_s() + server.limits.header_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_left(mono_s())
        for call in (self._incoming, self._serving, *self._ahead):
            if call is not None:
                self._free(call)
        self._incoming = self._serving = None
        self._ahead.clear()
        self._held = b""
        self._parser = None  # it holds us: 4 KiB a closed connection waited for the collector otherwise

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle(self) -> None:
        if self._serving is None and self._incoming is None and self._transport is not None:
            self._transport.close()

    def overdue(self, now: float) -> None:
        """Head, body, idleness or the goodbye took too long."""
        transport = self._transport
        if transport is None:
            return
        if self._ended:
            if now < self._give_up_s and transport.get_write_buffer_size():
                self.due_s = now + LINGER_S
            else:
                transport.abort()
        elif self._ahead or (self._incoming is None and not self._seen):
            self._ended, self.due_s, self._give_up_s = True, now + LINGER_S, now + GOODBYE_S
            transport.close()
        else:
            what = "body" if self._in_body else "head"
            self._fatal(RequestError(408, f"The {what} of the request took too long.", slug=f"{what}_timeout"), now)

    # --- reading

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self._linger_bytes += len(data)
            if self._linger_bytes > LINGER_BYTES:
                self.abort()
        elif self._serving is not None or self._ahead:
            self._held += data
            self._pause()
        elif self._known is None or not self._same_again(data, *self._known):
            self._feed(data)

    def _same_again(self, data: bytes, head: Repeat, call: Call) -> bool:
        """Serve `data` if it is the head of `call` with another body; the parser then need not see it."""
        if self._incoming is not None or self._seen:
            return False
        body = head.body(data)
        if body is None:
            return False
        server, size = self._server, len(body)
        limits = server.limits
        if size > limits.body_bytes or server.body_bytes + size > limits.inflight_bytes:
            return False
        self._now = now = mono_s()
        if not server.gate.again(call, body, now):
            return False
        server.body_bytes += size
        self._misses = 0
        self._serving, self.due_s = call, FOREVER
        server.gate.enter(self, call, now)
        if not self._reading:
            self._step()
        return True

    def _learn(self, data: bytes, call: Call) -> None:
        """Remember the head of a call that came whole in one read."""
        self._misses += 1
        if call.route and call.refusal is None and call.http11 and not call.close and b"expect" not in call.headers:
            head = learn(data)
            self._known = (head, call) if head is not None else None

    def _feed(self, data: bytes) -> None:
        self._now = now = mono_s()
        fresh = self._incoming is None and not self._seen
        if not self._in_body and not self._seen:
            self.due_s = now + self._server.limits.header_s
        self._seen += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            self._ignore_upgrade(data[e.args[0] :])
        except httptools.HttpParserCallbackError as e:
            log.error("a request could not be read", exc_info=e.__context__ or e)
            self._fatal(RequestError(500, "The request could not be read.", slug="internal_error"), now)
        except httptools.HttpParserError as e:
            if not self._ended:  # what follows a refused request is nobody's
                self._fatal(RequestError(400, f"The request is not valid HTTP: {e}.", slug="bad_http"), now)
        else:
            limits, call = self._server.limits, self._incoming
            long = self._seen > limits.header_bytes and not self._ended
            if long and (not self._in_body or (call is not None and not_body(call, self._seen, limits))):
                self._fatal(too_large_head(limits), now)
        if self._serving is None and self._ahead:
            if fresh and self._misses < MISSES_AT_MOST and len(self._ahead) == 1 and self._incoming is None:
                self._learn(data, self._ahead[0])
            self._step()

    def _ignore_upgrade(self, rest: bytes) -> None:
        """A client may offer to upgrade (h2c, say); a server may decline by just answering. llhttp stops at such a
        head, so its body is read by a fresh parser that is given the same head without the offer."""
        if self._ended:
            return
        call = self._ahead.pop() if self._ahead else self._incoming
        if call is None or call.method == b"CONNECT":
            self._fatal(RequestError(400, "CONNECT is not served here.", slug="bad_http"), self._now)
            return
        self._free(call)
        lines = b"".join(b"%b: %b\r\n" % (k, v) for k, v in call.headers.items() if k not in UPGRADE)
        version = b"1.1" if call.http11 else b"1.0"
        self._incoming, self._in_body, self._seen = None, False, 0
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"%b %b HTTP/%b\r\n%b\r\n%b" % (call.method, call.target, version, lines, rest))

    # --- httptools

    def on_message_begin(self) -> None:
        self._incoming = Call(self._now)

    def on_url(self, url: bytes) -> None:
        if self._incoming is not None:
            self._incoming.target += url
            self._incoming.head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        call = self._incoming
        if call is None or self._in_body:  # a trailer: nothing of ours reads one
            return
        name = name.lower()
        headers = call.headers
        if name in headers and name in ONCE:
            call.refusal = call.refusal or RequestError(
                400, f"The header {name.decode('latin-1')} came twice.", slug="bad_http"
            )
        headers[name] = value
        call.head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        call = self._incoming
        if call is None or self._ended:
            return
        server = self._server
        limits = server.limits
        self._in_body, self._seen = True, 0
        self.due_s = self._now + limits.body_s
        call.method = self._parser.get_method()
        version = self._parser.get_http_version()
        call.http11 = version == "1.1"
        call.close = not call.http11 or not self._parser.should_keep_alive()
        server.gate.name(call)
        fatal = call.refusal or framing_error(call, version, limits)
        if fatal is not None:
            self._fatal(fatal, self._now)
            return
        try:
            server.gate.at_head(call, limits)
            self._check_room(call, limits)
        except RequestError as error:
            call.refusal = error
            length = call.headers.get(b"content-length", b"0" if b"transfer-encoding" not in call.headers else b"")
            if not length or int(length) > SMALL_BODY or b"expect" in call.headers:
                self._refuse_early(call, error)
            return
        if b"expect" in call.headers and self._transport is not None and call.http11:
            self._transport.write(answer.CONTINUE)

    def _check_room(self, call: Call, limits: Limits) -> None:
        length = int(call.headers.get(b"content-length", b"0"))
        if length > limits.body_bytes:
            raise too_large_body(limits)
        if self._server.body_bytes + length > limits.inflight_bytes:
            raise RequestError(429, "Too many request bytes are in flight.", slug="inflight_bytes", retry_after_s=1.0)

    def on_body(self, data: bytes) -> None:
        call = self._incoming
        if call is None or call.refusal is not None:
            return
        server = self._server
        size = len(data)
        if call.size + size > server.limits.body_bytes:
            self._refuse_early(call, too_large_body(server.limits))
            return
        call.parts.append(data)
        call.size += size
        server.body_bytes += size
        if server.body_bytes > server.limits.inflight_bytes:
            self._refuse_early(
                call,
                RequestError(429, "Too many request bytes are in flight.", slug="inflight_bytes", retry_after_s=1.0),
            )

    def on_message_complete(self) -> None:
        call, self._incoming = self._incoming, None
        self._in_body, self._seen = False, 0
        if call is None or self._ended:
            return
        parts = call.parts
        call.body = parts[0] if len(parts) == 1 else b"".join(parts)
        call.parts = []
        if len(self._ahead) >= AHEAD_AT_MOST:
            self._ahead[-1].close = True
            self._free(call)
        else:
            self._ahead.append(call)

    # --- serving

    def _step(self) -> None:
        """Serve what has been read, one after the other; then read on."""
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._serving is None and self._transport is not None and not (self._ended or self._full):
                if self._ahead:
                    self._serve(self._ahead.popleft())
                elif self._held:
                    held, self._held = self._held, b""
                    self._feed(held)
                    if self._serving is None and not self._ahead:
                        break
                else:
                    break
        finally:
            self._stepping = False
        if self._serving is None and not self._reading and not (self._ended or self._full):
            self._resume()

    def _serve(self, call: Call) -> None:
        self._serving = call
        self.due_s = FOREVER
        if call.refusal is not None:
            self._server.gate.refuse(self, call, call.refusal, self._now)
        else:
            self._server.gate.enter(self, call, self._now)

    def head(self, call: Call, status: int, content_type: bytes, length: int | None, lines: bytes = b"") -> bytes:
        """The head of any answer to `call`; `length` and `lines` as answer.head says."""
        server = self._server
        lines += server.date.line + call.id_lines()
        if server.cors.origins:
            lines += cors_lines(call, server.cors)
        return answer.head(status, content_type, length, lines, call.close or server.draining)

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def end(self, call: Call, data: bytes) -> None:
        """The last bytes of the answer to `call`; the connection is free for the next, or ends."""
        transport = self._transport
        if transport is None or self._serving is not call:
            return
        if data:
            transport.write(data)
        self._serving = self.exchange = None
        self._free(call)
        server = self._server
        if call.close or server.draining:
            self._say_goodbye(transport)
            return
        self.due_s = mono_s() + server.limits.keep_alive_s
        if self._ahead or self._held or not self._reading:
            self._step()

    def answer(self, call: Call, status: int, content_type: bytes, body: bytes, lines: bytes = b"") -> None:
        """A whole answer."""
        head = self.head(call, status, content_type, len(body), lines)
        self.end(call, head if call.method == b"HEAD" else head + body)

    def refuse(self, call: Call, error: RequestError) -> None:
        """An error as a whole answer."""
        body = answer.error_body(error)
        self._serving = call
        self.answer(call, error.status, answer.JSON, body, answer.error_lines(error, call.allow))

    def _refuse_early(self, call: Call, error: RequestError) -> None:
        """Answer before the body has come; then the connection cannot be kept."""
        call.refusal, call.close = error, True
        self._incoming = None
        self._free(call)
        if self._serving is None and not self._ahead:
            self._server.gate.refuse(self, call, error, self._now)
        else:
            self._ahead.append(call)
            call.parts = []

    def _fatal(self, error: RequestError, now: float) -> None:
        """What came cannot be understood, so nothing after it can: answer and end."""
        call, self._incoming = self._incoming or Call(now), None
        if not call.id:
            self._server.gate.name(call)
        self._free(call)
        call.close = True
        call.refusal, call.key = error, None
        if self._serving is None and not self._ahead:
            self._serving = call
            self._server.gate.refuse(self, call, error, now)
        else:
            self._ahead.append(call)

    def _turn_away(self, error: RequestError) -> None:
        """Refuse a connection before a request came; it is not one of ours, so it ends at once."""
        call = Call(mono_s())
        self._server.gate.name(call)
        self._serving, call.close = call, True
        self._server.gate.refuse(self, call, error, call.arrived_s)

    def _say_goodbye(self, transport: asyncio.Transport) -> None:
        """End after a moment in which the client can read the answer: closing with unread bytes would reset the
        connection and could take the answer with it."""
        now = mono_s()
        self._ended, self.due_s, self._give_up_s = True, now + LINGER_S, now + GOODBYE_S
        self._held = b""
        for call in self._ahead:
            self._free(call)
        self._ahead.clear()
        if not self._reading:
            self._resume()
        ours = self in self._server.connections
        if ours and transport.can_write_eof():
            transport.write_eof()
        elif not (ours and self._in_body):  # TLS cannot close by half: who still sends is left to read, or to time
            transport.close()

    def _free(self, call: Call) -> None:
        """Its body is no longer held."""
        self._server.body_bytes -= call.size
        call.size = 0
        call.body = b""
        if call.parts:
            call.parts = []

    # --- backpressure

    def _pause(self) -> None:
        if self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def _resume(self) -> None:
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    def pause_writing(self) -> None:
        self._full = True
        if self.exchange is not None:
            self.exchange.pause(mono_s())

    def resume_writing(self) -> None:
        self._full = False
        if self.exchange is not None:
            self.exchange.resume(mono_s())
        elif self._ahead or self._held:
            self._step()
        elif self._serving is None:
            self._resume()
