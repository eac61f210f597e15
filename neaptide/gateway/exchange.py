"""One inference request from admission to its row: what the client has been told, what the replica has said.

    WAITING -> SENT -> (OPEN) -> DONE        OPEN: bytes of the answer are out, so no other replica may be tried
                  \\-> LEAVING -> DONE        the client left; a link's replica still tells its token counts

The per-token path is `on_body` (HTTP) and `on_tokens` (link): one clock reading, a few counters, one write; no parsing.
Whatever ends an answer is held until the row is written: `_settle` gives it to the journal's `then`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from neaptide.clock import mono_s
from neaptide.errors import RequestError
from neaptide.gateway import answer, sse
from neaptide.gateway.call import Call
from neaptide.gateway.queue import Ticket
from neaptide.gateway.record import Timing
from neaptide.gateway.route import Target
from neaptide.gateway.sse import Counts, HideUsage
from neaptide.gateway.upstream import PASSED_HEADERS, Failure, Handle, replica_error
from neaptide.link import STALL_S, EndHeader
from neaptide.table import KeyRow
from neaptide.types import Attempt, Outcome, Priority, Usage
from neaptide.wire.peek import Peek

if TYPE_CHECKING:
    from neaptide.gateway.connection import Connection
    from neaptide.gateway.door import Door
    from neaptide.gateway.lane import Lane

WAITING, SENT, OPEN, LEAVING, DONE = range(5)
ATTEMPTS_AT_MOST = 3
LEAVING_S = 5.0  # how long a link's replica has to tell what an aborted request cost
WHOLE_ANSWER = 64 << 10  # a longer answer that does not stream is passed on as it comes
RETRY_STATUS = frozenset((502, 503))
TOKEN_END = b"null}]}\n\n"  # how an event ends that carries neither a finish reason nor usage
TOKEN_CHUNK_END = TOKEN_END + b"\r\n"
READS_KEPT = 6  # last reads of a stream in which usage and finish reason are looked for
_DONE = (answer.DONE, b"data: [DONE]\r\n\r\n", b"data:[DONE]\n\n")


class Exchange:
    """Ours, mutable, one a request; the Sink of its upstream."""

    __slots__ = (
        "_body_bytes",
        "_broken",
        "_content_type",
        "_counts",
        "_declared",
        "_end",
        "_finish",
        "_held",
        "_hide",
        "_last",
        "_length",
        "_opened",
        "_parts",
        "_passed",
        "_plain",
        "_prompt_bytes",
        "_recent",
        "_sse",
        "_status",
        "_timing",
        "asked",
        "begun",
        "call",
        "connection",
        "deadline_s",
        "door",
        "error",
        "handle",
        "key",
        "lane",
        "outcome",
        "paused_s",
        "priority",
        "sent_s",
        "state",
        "state_s",
        "target",
        "ticket",
        "tried",
        "waited_s",
    )

    def __init__(
        self,
        door: Door,
        connection: Connection,
        call: Call,
        key: KeyRow,
        lane: Lane,
        asked: Peek,
        priority: Priority,
        deadline_s: float,
    ) -> None:
        self.door, self.connection, self.call, self.key, self.lane = door, connection, call, key, lane
        self.asked, self.priority, self.deadline_s = asked, priority, deadline_s
        self.state = WAITING
        self.state_s = call.arrived_s
        self.handle: Handle | None = None
        self.target: Target | None = None
        self.ticket: Ticket[Exchange] | None = None
        self.tried: list[str] = []
        self.begun = False  # a begin record is written
        self.sent_s = self.waited_s = self.paused_s = 0.0
        self.outcome: Outcome = "ok"
        self.error = ""
        self._prompt_bytes = call.size
        self._timing = Timing()
        self._hide: HideUsage | None = None
        self._end: EndHeader | None = None
        self._counts: Counts | None = None
        self._finish = ""
        self._last = b""
        self._opened = self._broken = False
        self._plain = False  # a stream at an event's end: nothing held back, nothing partly hidden
        self._forget_answer()

    def _forget_answer(self) -> None:
        self._status = 200
        self._content_type = answer.JSON
        self._passed = b""
        self._sse = False
        self._length: int | None = None  # of a body passed on in pieces; None: chunked
        self._declared: bytes | None = None
        self._parts: list[bytes] = []
        self._body_bytes = 0
        self._held = b""
        self._recent: deque[bytes] | None = None

    def sent(self, target: Target, now: float, hide_usage: bool) -> None:
        """It was given to `target`."""
        self.target, self.sent_s, self.state, self.state_s = target, now, SENT, now
        if self.tried:
            self._forget_answer()
        else:
            self.waited_s = now - self.call.arrived_s
        self.tried.append(target.row.id)
        if hide_usage:
            self._hide = HideUsage()

    # --- the replica's side: HTTP

    def on_head(self, status: int, headers: Mapping[bytes, bytes]) -> bool:
        if self.target is not None:
            self.target.answered()
        if status in RETRY_STATUS and self.may_retry():
            self.on_failure(Failure(f"replica_{status}", f"answered {status}", retryable=True))
            return False
        if status in (401, 403):
            self.on_failure(Failure("replica_unauthorised", f"refused the key it was sent ({status})"))
            return False
        self._status = status
        self._content_type = headers.get(b"content-type", answer.JSON)
        self._sse = self._content_type.startswith(b"text/event-stream")
        if self._sse:
            self._recent = deque(maxlen=READS_KEPT)
        else:
            self._declared = headers.get(b"content-length")
        if not PASSED_HEADERS.isdisjoint(headers):
            self._passed = b"".join(b"%b: %b\r\n" % (k, v) for k, v in headers.items() if k in PASSED_HEADERS)
        return True

    def on_chunks(self, data: bytes, now: float) -> bool:
        if not self._plain or not data.endswith(TOKEN_CHUNK_END):
            return False
        if self._hide is not None and (b'"usage"' in data or data.count(b"\r\n") > 2):
            return False  # of several chunks, a border could stand in the middle of what is to be hidden
        self._timing.mark(now, data.count(b"data:"))
        self.connection.write(data)
        return True

    def on_body(self, data: bytes, now: float) -> None:
        if self._plain and data.endswith(TOKEN_END) and (self._hide is None or b'"usage"' not in data):
            self._timing.mark(now, data.count(b"data:"))  # the common read: whole events, nothing to look for
            self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
            return
        if self.state > OPEN:
            return
        self.state_s = now
        if self._sse:
            self._pass_events(data, now)
            self._plain = (
                self.state == OPEN
                and self.call.http11
                and not self._held
                and (self._hide is None or not self._hide.held)
                and sse.ends_event(data)
            )
            return
        self._parts.append(data)
        self._body_bytes += len(data)
        if self.state == OPEN or self._body_bytes > WHOLE_ANSWER:
            self._recent = deque((data[-sse.TAIL_BYTES :],))
            self._length = int(self._declared) if self._declared is not None else None
            self._open(self._length)
            self._write(b"".join(self._parts))
            self._parts = []

    def on_end(self, data: bytes, now: float) -> None:
        if self.state > OPEN:
            return
        if self._sse:
            self._end_events(data, now)
            return
        if self._parts:
            self._parts.append(data)
        body = b"".join(self._parts) if self._parts else data
        tail = body if len(body) <= sse.TAIL_BYTES else body[-sse.TAIL_BYTES :]
        if self._recent:
            tail = b"".join(self._recent) + tail
        self._counts, self._finish = sse.usage(tail), sse.finish(tail)
        if self.state != OPEN:
            body = self._head(len(body)) + body
        elif self._length is None:
            body = self._framed(body, last=True)
        self._settle(body, now)

    def _pass_events(self, data: bytes, now: float) -> None:
        self._timing.mark(now, data.count(b"data:"))
        if self._recent is not None:
            self._recent.append(data[-sse.TAIL_BYTES :])
        if self._hide is not None:
            data = self._hide.feed(data)
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(_DONE):  # the end of the answer: it waits for the row
            cut = data.rfind(b"data:")
            data, self._held = data[:cut], data[cut:]
        if data:
            if self.state != OPEN:
                self._open(None)
            self._write(data)

    def _end_events(self, data: bytes, now: float) -> None:
        if data:
            self._timing.mark(now, data.count(b"data:"))
            if self._recent is not None:
                self._recent.append(data[-sse.TAIL_BYTES :])
        if self._hide is not None:
            data = self._hide.feed(data) + self._hide.rest()
        tail = b"".join(self._recent or ())
        self._counts, self._finish = sse.usage(tail), sse.finish(tail)
        last = self._framed(self._held + data, last=True)
        self._settle(last if self.state == OPEN else self._head(None) + last, now)

    # --- the replica's side: the link

    def on_tokens(self, data: bytes, tokens: int, now: float) -> None:
        if self.state > OPEN:
            return
        self.state_s = now
        self._timing.mark(now, tokens)
        if data:
            if self.state != OPEN:
                self._sse, self._content_type = True, answer.EVENTS
                self._open(None)
            self._write(data)

    def on_link_headers(self, headers: list[tuple[str, str]]) -> None:
        for name, value in headers:
            if name.lower().encode() in PASSED_HEADERS and value.isascii() and value.isprintable():
                self._passed += f"{name.lower()}: {value}\r\n".encode()

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None:
        if self.state == DONE:
            return
        self._end = end
        self._finish = end.finish
        self._counts = Counts(end.prompt_tokens, end.cached_tokens, end.reasoning_tokens, end.output_tokens)
        if self.state == LEAVING:
            self._settle(b"", now)
            return
        if end.retryable and self.may_retry():
            self.on_failure(Failure(end.error or "replica_busy", "could not start the request", retryable=True))
            return
        self._status = end.status
        failed = end.status >= 400 or end.finish in ("error", "abort")
        if self.state == OPEN:
            if failed:
                self.fail(replica_error(end), now)
            else:
                self._settle(self._framed(data, last=True), now)
        elif failed and end.status < 400:
            self.fail(replica_error(end), now)
        elif self.asked.stream and not failed:
            self._content_type = answer.EVENTS
            self._settle(self._head(None) + self._framed(data, last=True), now)
        else:
            self._content_type = end.content_type.encode("latin-1", "replace")
            self.error = end.error[:64]
            self._settle(self._head(len(data)) + data, now)

    # --- what goes wrong

    def may_retry(self) -> bool:
        """Nothing is out, the client is there, and attempts are left."""
        return self.state == SENT and len(self.tried) < ATTEMPTS_AT_MOST

    def on_failure(self, failure: Failure) -> None:
        now = mono_s()
        if self.state == LEAVING:
            self._settle(b"", now)
        if self.state >= LEAVING:
            return
        if failure.unreachable and self.target is not None:
            self.target.failed(now)
        if failure.retryable and self.may_retry():
            self.handle = None
            self.door.again(self, now)
            return
        message = f"The replica {failure.message}."
        self.fail(RequestError(502, message, slug=failure.slug, kind="api_error"), now)

    def fail(self, error: RequestError, now: float, outcome: Outcome = "error") -> None:
        """End with `error`: an answer where none has begun, else an error event, else a broken connection."""
        if self.state == DONE:
            return
        self._abort_upstream()
        self.outcome, self.error = outcome, error.slug or "error"
        if self.state != OPEN:
            self._status = error.status
            lines = answer.error_lines(error)
            body = answer.error_body(error)
            self._content_type, self._passed = answer.JSON, lines
            self._settle(self._head(len(body)) + body, now)
        elif self._sse:
            event = answer.error_event(error, self._at_boundary())
            self._settle(self._framed(event, last=True), now)
        else:
            self._broken = True
            self._settle(b"", now)

    def client_left(self, now: float) -> None:
        """The connection is gone: stop the replica at once."""
        if self.state == WAITING:
            self.outcome, self.error = "aborted", "client_left"
            self._settle(b"", now)
        elif self.state < LEAVING:
            self.outcome, self.error = "aborted", "client_left"
            self._plain = False
            self._abort_upstream()
            if self.target is not None and self.target.link:
                self.state, self.state_s = LEAVING, now
            else:
                tail = b"".join(self._recent or ())
                self._counts = sse.usage(tail) if tail else None
                self._settle(b"", now)

    @property
    def tokens(self) -> int:
        """Generated so far, as far as the gateway can tell."""
        return self._timing.tokens

    def check(self, now: float) -> None:
        """Called by the sweep: is anything overdue?"""
        timeouts = self.lane.row.timeouts
        if self.state == WAITING:
            return
        if self.state == LEAVING:
            if now - self.state_s > LEAVING_S:
                self._settle(b"", now)
        elif now >= self.deadline_s:
            self._late("deadline_exceeded", "its deadline passed", now)
        elif now - self.sent_s > timeouts.total_s:
            self._late("total_timeout", f"it took longer than {timeouts.total_s:g} s", now)
        elif self.paused_s:
            if now - self.paused_s > STALL_S:  # the client reads nothing: it holds a slot for nothing
                self.connection.abort()
        elif self.state_s == self.sent_s:
            if now - self.sent_s > timeouts.first_byte_s:
                self._late("first_byte_timeout", f"the replica said nothing for {timeouts.first_byte_s:g} s", now)
        elif now - max(self.state_s, self._timing.last_s) > timeouts.idle_s:
            self._late("idle_timeout", f"the replica fell silent for {timeouts.idle_s:g} s", now)

    def _late(self, slug: str, why: str, now: float) -> None:
        self.fail(RequestError(504, f"The request was stopped: {why}.", slug=slug), now, "timeout")

    def _abort_upstream(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.abort()

    # --- the client's side

    def pause(self, now: float) -> None:
        """The client's buffer is full."""
        self.paused_s = now
        if self.handle is not None:
            self.handle.pause_reading()

    def resume(self, now: float) -> None:
        self.paused_s = 0.0
        self.state_s = now if self.state == OPEN else self.state_s
        if self.handle is not None:
            self.handle.resume_reading()

    def _head(self, length: int | None) -> bytes:
        call = self.call
        if length is None and not call.http11:
            length, call.close = -1, True
        lines = self.connection.lines(call)
        if self._passed:
            lines = self._passed + lines
        return answer.head(self._status, self._content_type, length, lines, self.connection.closes(call))

    def _open(self, length: int | None) -> None:
        if self.state == SENT:
            self.state, self._opened = OPEN, True
            self.connection.write(self._head(length))

    def _write(self, data: bytes) -> None:
        if self._length is None and self.call.http11:
            self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self.connection.write(data)
        if self._sse:
            self._last = data

    def _framed(self, data: bytes, last: bool) -> bytes:
        if not self.call.http11 or self._length is not None:
            return data
        return (answer.chunk(data) if data else b"") + (answer.LAST_CHUNK if last else b"")

    def _at_boundary(self) -> bool:
        return not self._last or sse.ends_event(self._last)

    # --- the end

    def _settle(self, last: bytes, now: float) -> None:
        """The row, then `last` to the client."""
        self.state = DONE
        self._plain = False
        self.handle = None
        self._last = last
        if self.outcome == "ok" and self._status >= 400:
            self.outcome = "refused" if self._status < 500 else "error"
            self.error = self.error or f"replica_{self._status}"
        self.door.settle(self, self._row(now), now)

    def say_last(self) -> None:
        """The row is written: the answer may end."""
        if self.outcome == "aborted":
            return
        if self._broken:
            self.connection.abort()  # bytes of a body are missing: only a broken connection says so
        else:
            self.connection.end(self.call, self._last)

    def _row(self, now: float) -> Usage:
        call, asked, timing, key = self.call, self.asked, self._timing, self.key
        counts = self._counts or Counts(output=timing.tokens)
        end = self._end
        lane = self.lane.row
        *earlier, last = self.tried or ("",)
        waited_s = self.waited_s if last else now - call.arrived_s
        # Two steps of at most 15 keywords: CPython passes more through a dict, which made this 0.95 us instead of 0.4.
        row = Usage(
            request_id=call.id,
            client_id=call.client_id.decode("ascii") if call.client_id else "",
            tenant=key.tenant,
            project=key.project,
            key=key.id,
            model=lane.model,
            revision=self.target.row.revision if self.target is not None else lane.revision,
            priority=self.priority,
            route=call.route,
            stream=asked.stream,
            prompt_bytes=self._prompt_bytes,
            max_tokens=asked.max_tokens if asked.max_tokens is not None else lane.max_tokens_default,
            started_wall_s=call.wall_s,
            arrived_mono_s=call.arrived_s,
        )
        row = replace(
            row,
            prompt_tokens=counts.prompt,
            cached_tokens=counts.cached,
            reasoning_tokens=counts.reasoning,
            output_tokens=counts.output,
            queued_s=waited_s + end.queued_s if end else waited_s,
            ttft_s=timing.first_s - call.arrived_s if timing.first_s else 0.0,
            tpot_s=timing.tpot_s(counts.output) if timing.first_s else 0.0,
            itl_max_s=timing.itl_max_s,
            duration_s=now - call.arrived_s,
            outcome=self.outcome,
            status=0 if self.outcome == "aborted" and not self._opened else self._status,
            finish=self._finish,
            error=self.error,
            attempts=(*map(Attempt, earlier), Attempt(last, counts.output)) if last else (),
        )
        return replace(row, engine_s=end.engine_s, kv_token_s=end.kv_token_s) if end else row
