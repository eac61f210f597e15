"""Between an exchange and somebody else's replica, where another could go on with the stream if this one were lost.

Only whole events pass, so that no client holds half of one when a replica dies, and what passes is kept. A replica that
goes on with an answer is brought into line with the one that began it. Only replicas of which the operator says that
they resume are read through here: for all others nothing of this runs.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from neaptide.clock import mono_s
from neaptide.gateway import answer, sse
from neaptide.gateway.call import Call
from neaptide.gateway.seam import Seam
from neaptide.gateway.transcript import DONE, Transcript
from neaptide.gateway.upstream import AnswerHead, Failure, Handle, Sink
from neaptide.link import EndHeader
from neaptide.table import KeyRow, Timeouts
from neaptide.wire.peek import Peek

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange

ROUTES = ("chat.completions", "completions")
_FAULT = re.compile(rb'^data:[^\n]*"error"[^\n]*', re.MULTILINE)


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _Fault(msgspec.Struct):
    error: _Error


_decode_fault = msgspec.json.Decoder(_Fault).decode


def between(exchange: Exchange) -> Sink:
    """What the upstream of a replica that resumes talks to."""
    if not exchange.asked.stream or exchange.call.route not in ROUTES:
        return exchange
    if exchange.transcript is None:
        exchange.transcript = Transcript()
    return Relay(exchange, exchange.transcript)


class Relay:
    """One dispatch of `exchange`; its Sink towards the upstream."""

    __slots__ = (
        "_chat", "_exchange", "_held", "_seam", "_through", "_transcript", "asked", "body", "call", "deadline_s",
        "ids", "key", "sent_s",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, transcript: Transcript) -> None:
        self._exchange, self._transcript = exchange, transcript
        self.call: Call = exchange.call
        self.asked: Peek = exchange.asked
        self.key: KeyRow = exchange.key
        self.body, self.ids = exchange.body, exchange.ids
        self.sent_s, self.deadline_s = exchange.sent_s, exchange.deadline_s
        self._chat = exchange.call.route == "chat.completions"
        self._seam = Seam(transcript, self._chat) if transcript.named else None  # None: it begins the answer
        self._held = b""  # the beginning of an event
        self._through = False  # no stream of events after all

    @property
    def handle(self) -> Handle | None:
        return self._exchange.handle

    @handle.setter
    def handle(self, handle: Handle | None) -> None:
        self._exchange.handle = handle

    @property
    def timeouts(self) -> Timeouts:
        return self._exchange.timeouts

    @property
    def model(self) -> str:
        return self._exchange.model

    # --- what the replica says

    def on_head(self, head: AnswerHead) -> bool:
        streams = head.status == 200 and head.events
        if streams or self._seam is None:
            wanted = self._exchange.on_head(head)
            if wanted and not streams:
                self._through = True
                self._transcript.give_up()
            return wanted
        said = f"replica_{head.status}" if head.status != 200 else "replica_no_stream"
        message = f"did not go on with the answer of another (status {head.status})"
        self._exchange.on_failure(Failure(said, message, retryable=True))
        return False

    def on_chunks(self, data: bytes, now: float) -> bool:
        if self._seam is not None or self._held or data.count(b"\r\n") > 2 or b'"error"' in data:
            return False
        if not self._exchange.on_chunks(data, now):
            return False
        self._transcript.keep(data)
        return True

    def on_body(self, data: bytes, now: float) -> None:
        if self._through:
            self._exchange.on_body(data, now)
            return
        data, fault = _before_fault(self._whole(data))
        data = self._kept(data)
        if data:
            self._exchange.on_body(data, now)
        else:
            self._exchange.state_s = now  # it is not silent
        if fault is not None:
            handle = self._exchange.handle
            self.on_failure(fault)
            if handle is not None:
                handle.abort()

    def on_end(self, data: bytes, now: float) -> None:
        if self._through:
            self._exchange.on_end(data, now)
            return
        data, fault = _before_fault(self._whole(data))
        data = self._kept(data)
        if fault is None and DONE not in self._held and not self._transcript.ended():
            fault = Failure("replica_broke_off", "ended its stream before its answer")
        if fault is None:
            self._exchange.on_end(data + self._held, now)
            return
        if data:
            self._exchange.on_body(data, now)
        self.handle = None  # its connection is another's already
        self.on_failure(fault)

    def on_failure(self, failure: Failure) -> None:
        """Where all of the answer is out, or as much as was asked for, it needs no other replica."""
        exchange, transcript = self._exchange, self._transcript
        transcript.fold()
        most = self.asked.max_tokens
        if self._through or not transcript.usable or not transcript.named:
            exchange.on_failure(failure)
        elif transcript.finished:
            self._complete(b"" if transcript.done else answer.DONE)
        elif most is not None and transcript.tokens >= most:
            self._complete(transcript.ending(self._chat) + answer.DONE)
        else:
            exchange.timing.tokens = transcript.tokens
            exchange.on_failure(failure)

    def on_tokens(self, data: bytes, ids: bytes, now: float) -> None:
        self._exchange.on_tokens(data, ids, now)

    def on_link_headers(self, headers: list[tuple[str, str]]) -> None:
        self._exchange.on_link_headers(headers)

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None:
        self._exchange.on_link_end(end, data, now)

    # --- what becomes of it

    def _whole(self, data: bytes) -> bytes:
        """The events that are complete by now."""
        if self._held:
            data, self._held = self._held + data, b""
        if sse.ends_event(data):
            return data
        cut = sse.last_boundary(data)
        if len(data) - cut > sse.EVENT_BYTES:  # not an event stream that we understand: pass it on
            self._transcript.give_up()
            return data
        self._held = data[cut:]
        return data[:cut]

    def _kept(self, data: bytes) -> bytes:
        """As the client is told it."""
        if data and self._seam is not None:
            data = self._seam.adapt(data)
        if data:
            self._transcript.keep(data)
        return data

    def _complete(self, last: bytes) -> None:
        """The client has, but for `last`, all that there is; no replica has counted it."""
        exchange, now = self._exchange, mono_s()
        if last:
            exchange.on_body(last, now)
        exchange.timing.tokens = self._transcript.tokens
        exchange.on_end(b"", now)


def _before_fault(data: bytes) -> tuple[bytes, Failure | None]:
    """Whole events up to one by which the replica says that it failed (vLLM does when its engine dies); the failure."""
    if b'"error"' not in data:
        return data, None
    for found in _FAULT.finditer(data):
        try:
            error = _decode_fault(found[0][5:].strip()).error
        except ValueError:
            continue
        if isinstance(error.code, int) and error.code >= 500:
            why = f"failed while answering ({error.message[:200]})"
            return data[: sse.last_boundary(data[: found.start()])], Failure("replica_broke_off", why)
    return data, None
