"""One inference request from admission to its row: what the client has been told, what the replica has said.

    WAITING -> SENT -> (OPEN) -> DONE        OPEN: words of the answer are out, so another replica can only go on
                  \\-> LEAVING -> DONE        the client left; a link's replica still tells its token counts

A stream that waits long (a model at zero starts a replica) gets its head and a comment now and then (overdue.py), so
that no proxy takes it for dead; whatever goes wrong from then on is an error event.

The per-token path is `on_body` (HTTP) and `on_tokens` (link): one clock reading, a few counters, one write; no parsing.
Whatever ends an answer is held until the row is written: `_settle` gives it to the journal's `then`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from msgspec.structs import replace

from neaptide.clock import mono_s
from neaptide.errors import RequestError
from neaptide.gateway import answer, record, resume, retries, sse
from neaptide.gateway.affinity import CONVERSATION, blocks_of, conversation_of
from neaptide.gateway.call import Call
from neaptide.gateway.queue import Ticket
from neaptide.gateway.quota import Permit
from neaptide.gateway.record import Timing
from neaptide.gateway.route import Target
from neaptide.gateway.shares import Account
from neaptide.gateway.sse import Counts, HideUsage
from neaptide.gateway.transcript import Transcript
from neaptide.gateway.upstream import PASSED_HEADERS, AnswerHead, Failure, Handle, replica_error
from neaptide.link import EndHeader
from neaptide.table import KeyRow, Timeouts
from neaptide.types import Outcome, Priority
from neaptide.wire.peek import Peek

if TYPE_CHECKING:
    from neaptide.gateway.connection import Connection
    from neaptide.gateway.door import Door
    from neaptide.gateway.lane import Lane
    from neaptide.gateway.till import Bill

WAITING, SENT, OPEN, LEAVING, DONE = range(5)
ATTEMPTS_AT_MOST = 3
HEARTBEAT = b": waiting for a replica\n\n"
WHOLE_ANSWER = 64 << 10  # a longer answer that does not stream is passed on as it comes
RETRY_STATUS = frozenset((502, 503))
CROWDED = frozenset((429, 503))
TOKEN_END = b"null}]}\n\n"  # how an event ends that carries neither a finish reason nor usage
TOKEN_CHUNK_END = TOKEN_END + b"\r\n"
READS_KEPT = 6  # last reads of a stream in which usage and finish reason are looked for
PLAIN = AnswerHead()
NOBODY = Account("", 1.0)
NO_IDS = bytearray()  # never changed
RANKS: dict[Priority, int] = {"high": 0, "normal": 1, "low": 2}
_DONE = (answer.DONE, b"data: [DONE]\r\n\r\n", b"data:[DONE]\n\n")


class Exchange:
    """Ours, mutable, one a request; the Sink of its upstream."""

    __slots__ = (
        "_broken", "_held", "_hide", "_last", "_length", "_plain", "_recent", "account", "answer", "asked",
        "attempts", "barren", "begun", "bill", "body", "call", "charged", "connection", "counts", "deadline_s", "door",
        "end", "error", "finish", "handle", "ids", "key", "lane", "lost_s", "made", "marks", "opened", "outcome",
        "paused_s", "permit", "pinned", "priority", "prompt_bytes", "rank", "resumes", "revision", "says", "sent_s",
        "state", "state_s", "target", "ticket", "timing", "transcript", "tried", "waited_s", "wanted",
    )  # fmt: skip

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
        self.asked, self.deadline_s = asked, deadline_s
        self.priority, self.rank = priority, RANKS[priority]
        self.account, self.charged = NOBODY, 0  # its tenant's; how many of its tokens were charged
        self.permit: Permit | None = None  # of a key with limits
        self.body = call.body  # as its replica is to get it
        self.prompt_bytes = call.size
        self.state, self.state_s = WAITING, call.arrived_s
        self.handle: Handle | None = None
        self.target: Target | None = None
        self.ticket: Ticket[Exchange] | None = None
        self.bill: Bill | None = None  # where its key has budgets
        self.tried: tuple[str, ...] = ()
        self.made: tuple[int, ...] = ()  # tokens of each of these but the last one
        self.ids = NO_IDS  # of the tokens that came over links
        self.transcript: Transcript | None = None  # of what came from replicas that bring text
        self.resumes = self.attempts = 0  # and times that it was sent since
        self.barren = False  # the replica before this one died of it without a token, or might have
        self.lost_s = 0.0  # when its last replica was lost; 0: none was
        self.revision = ""  # of the replica that has begun
        self.pinned = self.wanted = ""  # the revision that its client names; the one that it was given by shares
        self.begun = self.opened = False  # a begin record is written; the answer's head is out
        self.sent_s = self.waited_s = self.paused_s = 0.0
        self.outcome: Outcome = "ok"
        self.error = self.finish = ""
        self.marks: dict[str, str | int] | None = None  # fields of its row that are seldom set
        self.says = b""  # header lines of ours
        self.timing = Timing()
        self.counts: Counts | None = None
        self.end: EndHeader | None = None  # what a link's replica told at the end
        self.answer = PLAIN
        self._hide: HideUsage | None = None
        self._last = self._held = b""
        self._broken = self._plain = False  # plain: a stream at an event's end, nothing held back or partly hidden
        self._length: int | None = None  # of a body passed on in pieces; None: chunked
        self._recent: deque[bytes] | None = None

    @property
    def timeouts(self) -> Timeouts:
        return self.lane.row.timeouts

    @property
    def model(self) -> str:
        return self.lane.row.model

    def sent(self, target: Target, now: float, body: bytes, hide_usage: bool) -> None:
        """It is given to `target`, with `body`."""
        self.target, self.body = target, body
        self.state, self.state_s, self.sent_s = SENT, now, now
        if self.tried:  # forget what another replica answered, but for its tokens
            self.answer, self._recent, self._held = PLAIN, None, b""
            self.counts, self.end, self.finish = None, None, ""
            if self.ids and not self.brought and not self.barren and self.attempts:
                self.tried = self.tried[:-1]  # it took nothing
            else:
                self.made += (self.brought,)
        else:
            self.waited_s = now - self.call.arrived_s
        if not target.row.resumes:
            self.transcript = None  # what it says is not followed
        self.attempts += 1
        self.tried += (target.row.id,)
        self.revision = target.row.revision_of(self.model)
        if hide_usage:
            self._hide = HideUsage()

    # --- the replica's side: HTTP

    def on_head(self, head: AnswerHead) -> bool:
        status, target = head.status, self.target
        if target is not None and (target.failures or target.breaker.opened):
            target.answered(mono_s(), status, self.sent_s)
        if status != 200:
            if status in CROWDED and target is not None and target.limiter is not None:
                target.limiter.refused(target.in_flight)
            if status in RETRY_STATUS and self.may_retry():
                self.on_failure(Failure(f"replica_{status}", f"answered {status}", retryable=True))
                return False
            if status in (401, 403):
                self.on_failure(Failure("replica_unauthorised", f"refused the key it was sent ({status})"))
                return False
        self.answer = head
        if head.events:
            self._recent = deque(maxlen=READS_KEPT)
        return True

    def on_chunks(self, data: bytes, now: float) -> bool:
        if not self._plain or not data.endswith(TOKEN_CHUNK_END):
            return False
        if self._hide is not None and (b'"usage"' in data or data.count(b"\r\n") > 2):
            return False  # of several chunks, a border could stand in the middle of what is to be hidden
        self.timing.mark(now, data.count(b"data:"))
        self.connection.write(data)
        return True

    def on_body(self, data: bytes, now: float) -> None:
        if self._plain and data.endswith(TOKEN_END) and (self._hide is None or b'"usage"' not in data):
            self.timing.mark(now, data.count(b"data:"))  # the common read: whole events, nothing to look for
            self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
            return
        if self.state > OPEN:
            return
        self.state_s = now
        if self.answer.events:
            self._pass_events(data, now)
            self._plain = (
                self.state == OPEN
                and self.call.http11
                and not self._held
                and (self._hide is None or not self._hide.held)
                and sse.ends_event(data)
            )
            return
        self._held += data
        if self.opened and self.state != OPEN:
            if len(self._held) > WHOLE_ANSWER:
                self.on_failure(Failure("replica_no_stream", "did not stream"))
        elif self.state == OPEN or len(self._held) > WHOLE_ANSWER:
            self._recent = deque((data[-sse.TAIL_BYTES :],))
            self._length = self.answer.length
            self._open(self._length)
            self._write(self._held)
            self._held = b""

    def on_end(self, data: bytes, now: float) -> None:
        if self.state > OPEN:
            return
        if self.answer.events:
            self._end_events(data, now)
        elif self.state == OPEN:
            tail = b"".join(self._recent or ()) + data[-sse.TAIL_BYTES :]
            self.counts, self.finish = sse.usage(tail), sse.finish(tail)
            self._settle(self._framed(data, last=True), now)
        elif self.opened:  # no stream came after all: what it says instead becomes an event
            self._settle(self._framed(sse.as_event(self._held + data), last=True), now)
        else:
            body = self._held + data
            self.counts, self.finish = sse.of_answer(body)
            self._settle(self._head(len(body)) + body, now)

    def _pass_events(self, data: bytes, now: float) -> None:
        self.timing.mark(now, data.count(b"data:"))
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
            self.timing.mark(now, data.count(b"data:"))
            if self._recent is not None:
                self._recent.append(data[-sse.TAIL_BYTES :])
        if self._hide is not None:
            data = self._hide.feed(data) + self._hide.rest()
        tail = b"".join(self._recent or ())
        self.counts, self.finish = sse.usage(tail), sse.finish(tail)
        last = self._framed(self._held + data, last=True)
        self._settle(last if self.state == OPEN else self._head(None) + last, now)

    # --- the replica's side: the link

    def on_tokens(self, data: bytes, ids: bytes, now: float) -> None:
        if self.state > OPEN:
            return
        self.state_s = now
        self.timing.mark(now, len(ids) // 4)
        if self.ids:
            self.ids += ids
        else:
            self.ids = bytearray(ids)
        if data:
            if self.state != OPEN:
                self._say(200, answer.EVENTS, events=True)
                self._open(None)
            self._write(data)

    def on_link_headers(self, headers: list[tuple[str, str]]) -> None:
        for name, value in headers:
            if name.lower().encode() in PASSED_HEADERS and value.isascii() and value.isprintable():
                passed = self.answer.passed + f"{name.lower()}: {value}\r\n".encode()
                self.answer = replace(self.answer, passed=passed)

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None:
        if self.state == DONE:
            return
        self.end = end
        self.finish = end.finish
        output = sum(self.made) + end.output_tokens
        self.counts = Counts(end.prompt_tokens, end.cached_tokens, end.reasoning_tokens, output)
        if self.state == LEAVING:
            self._settle(b"", now)
            return
        if end.retryable and (self.may_retry() or (self.ids and self.state == SENT)):
            self.on_failure(Failure(end.error or "replica_busy", "could not start the request", retryable=True))
            return
        failed = end.status >= 400 or end.finish in ("error", "abort")
        if failed and self._go_on(end.error, now):
            return
        if self.state == OPEN:
            self.answer = replace(self.answer, status=end.status)
            if failed:
                self.fail(replica_error(end), now)
            else:
                self._settle(self._framed(data, last=True), now)
        elif failed and (end.status < 400 or (self.ids and (self.opened or self.resumes))):
            self.answer = replace(self.answer, status=max(end.status, 200))
            self.fail(replica_error(end), now)
        elif self.asked.stream and not failed:
            self._say(end.status, answer.EVENTS)
            self._settle(self._head(None) + self._framed(data, last=True), now)
        else:
            self.error = end.error[:64]
            if self.opened:
                self._settle(self._framed(sse.as_event(data), last=True), now)
                return
            self._say(end.status, end.content_type.encode("latin-1", "replace"))
            self._settle(self._head(len(data)) + data, now)

    # --- what goes wrong

    def may_retry(self) -> bool:
        """Nothing is out of this attempt, the client is there, and attempts are left."""
        return self.state == SENT and self.attempts < ATTEMPTS_AT_MOST

    @property
    def brought(self) -> int:
        """Tokens of the replica that has it now, or had it last."""
        told = self.transcript.tokens if self.transcript is not None else 0
        return (len(self.ids) // 4 or told) - sum(self.made)

    def _go_on(self, slug: str, now: float) -> bool:
        """Elsewhere, from what has come; whether that is possible."""
        if not resume.possible(self, slug):
            return False
        self.resumes, self.attempts, self.lost_s = self.resumes + 1, 0, now
        self.barren, self._plain = not self.brought, False
        self.handle = self.counts = self.end = None  # what it computed and nobody got is nobody's
        if slug == "engine_died" and self.target is not None:
            self.target.draining, self.target.report = True, None  # until it reports again, of another engine
        self.door.resume(self, now)
        return True

    def on_failure(self, failure: Failure) -> None:
        now = mono_s()
        if self.state == LEAVING:
            self._settle(b"", now)
        if self.state >= LEAVING:
            return
        if failure.unreachable and self.target is not None:
            self.target.failed(now, self.sent_s)
        full, died = failure.slug == "replica_full", bool(self.ids) and failure.slug == "replica_lost"
        if failure.retryable and not died and (self.may_retry() or (full and self.ids)):
            if full or self.lane.may_retry(now):
                self.handle = None
                self.door.again(self, now, full)
                return
            failure = retries.denied(failure)
        if self._go_on(failure.slug, now):
            return
        message = f"The replica {failure.message}."
        self.fail(RequestError(502, message, slug=failure.slug, kind="api_error"), now)

    def fail(self, error: RequestError, now: float, outcome: Outcome = "error") -> None:
        """End with `error`: an answer where none has begun, else an error event, else a broken connection."""
        if self.state == DONE:
            return
        self._abort_upstream()
        if outcome == "refused" and (self.ids or self.resumes):
            outcome = "error"  # it had begun
        self.outcome, self.error = outcome, error.slug or "error"
        if self.state != OPEN and not self.opened:
            self.answer = AnswerHead(error.status, passed=answer.error_lines(error))
            body = answer.error_body(error)
            self._settle(self._head(len(body)) + body, now)
        elif self.answer.events or self.state != OPEN:
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
            self.body = b""
            self._abort_upstream()
            if self.target is not None and self.target.link:
                self.state, self.state_s = LEAVING, now
            else:
                tail = b"".join(self._recent or ())
                self.counts = sse.usage(tail) if tail else None
                self._settle(b"", now)

    @property
    def tokens(self) -> int:
        """Generated so far, as far as the gateway can tell."""
        return self.timing.tokens

    def blocks(self) -> list[int]:
        """Of the beginning of its prompt, or of the conversation that its client names."""
        named, seed = self.call.headers.get(CONVERSATION), self.lane.seed
        return conversation_of(named, seed) if named else blocks_of(self.call.body, seed)

    def charge(self, tokens: int) -> None:
        """Its tenant has had so many of it by now."""
        if tokens > self.charged:
            self.account.charge(tokens - self.charged, self.rank)
            self.charged = tokens

    def beat(self, now: float) -> None:
        """It still waits for a replica: keep the client's connection alive."""
        if not self.opened:
            self._say(200, answer.EVENTS, events=True)
            self.connection.write(self._head(None))
        self.state_s = now
        self.connection.write(self._framed(HEARTBEAT, last=False))

    def left(self, now: float) -> None:
        """Its client is gone, and its replica has not told what it cost."""
        self._settle(b"", now)

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
        """Nothing where a heartbeat took it out already."""
        if self.opened:
            return b""
        self.opened = True
        call = self.call
        if length is None and not call.http11:
            length, call.close = -1, True
        head = self.answer
        lines = self.says + head.passed if self.permit is None else self.says + head.passed + self.permit.lines
        return self.connection.head(call, head.status, head.content_type, length, lines)

    def _say(self, status: int, content_type: bytes, *, events: bool = False) -> None:
        """The head of a link's answer; the lines that its replica sent before stay."""
        self.answer = AnswerHead(status, content_type, self.answer.passed, None, events)

    def _open(self, length: int | None) -> None:
        if self.state == SENT:
            self.state = OPEN
            self.connection.write(self._head(length))

    def _write(self, data: bytes) -> None:
        if self._length is None and self.call.http11:
            self.connection.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self.connection.write(data)
        if self.answer.events:
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
        status = self.answer.status
        if status >= 400 and self.outcome == "ok":
            self.outcome = "refused" if status < 500 else "error"
            self.error = self.error or f"replica_{status}"
        self.door.settle(self, record.usage(self, now), now)

    def say_last(self) -> None:
        """The row is written: the answer may end."""
        if self.outcome == "aborted":
            return
        if self._broken:
            self.connection.abort()  # bytes of a body are missing: only a broken connection says so
        else:
            self.connection.end(self.call, self._last)
