"""What lies between an exchange and a replica, whichever protocol the replica speaks.

The exchange gives itself to its target's Upstream, as a Sink, and gets a Handle. The upstream reads from it what the
replica is to get, then calls it: for HTTP `on_head`, `on_body`..., `on_end`; for the link `on_tokens`...,
`on_link_end`; or at any moment `on_failure`, once, after which it calls nothing more. After `abort` an HTTP upstream is
silent; a link upstream still tells the end, because only the replica knows what it had generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from neaptide.errors import RequestError
from neaptide.gateway.call import Call
from neaptide.link import EndHeader
from neaptide.table import KeyRow, Timeouts
from neaptide.wire.peek import Peek

PASSED_HEADERS = frozenset((b"warning", b"cache-control", b"retry-after"))  # go to the client


class AnswerHead(msgspec.Struct, frozen=True, gc=False):
    """What counts of the head of an answer. One may stand for all answers with the same head."""

    status: int = 200
    content_type: bytes = b"application/json"
    passed: bytes = b""  # whole header lines for the client
    length: int | None = None  # as the replica declared it; None for events
    events: bool = False  # an event stream


def read_head(status: int, headers: Mapping[bytes, bytes]) -> AnswerHead:
    """Of a replica's HTTP answer; names in lower case."""
    content_type = headers.get(b"content-type", b"application/json")
    events = content_type.startswith(b"text/event-stream")
    length = None if events else headers.get(b"content-length")
    passed = b"".join(b"%b: %b\r\n" % (k, v) for k, v in headers.items() if k in PASSED_HEADERS)
    return AnswerHead(status, content_type, passed, None if length is None else int(length), events)


class Failure(msgspec.Struct, frozen=True, gc=False):
    """Why a replica gave no (whole) answer. `retryable`: nothing came back, another replica may try.
    `unreachable`: leave this replica out for a while."""

    slug: str
    message: str
    retryable: bool = False
    unreachable: bool = False


def replica_error(end: EndHeader) -> RequestError:
    """What a client is told of a link's END that says failure."""
    return RequestError(
        502, f"The replica failed while answering ({end.error or end.finish}).", slug=end.error[:64] or "replica_error"
    )


class Handle(Protocol):
    def abort(self) -> None:
        """Stop the request at the replica now."""

    def pause_reading(self) -> None:
        """The client is slow: take no more from the replica."""

    def resume_reading(self) -> None: ...


class Sink(Protocol):
    """What an exchange is to its upstream. `now` is one reading of the clock a read."""

    call: Call
    asked: Peek
    key: KeyRow
    body: bytes  # as this replica is to get it
    sent_s: float
    deadline_s: float  # infinite: none
    handle: Handle | None
    ids: bytearray  # of the tokens that other replicas of this request have delivered; a u32 each

    @property
    def timeouts(self) -> Timeouts: ...

    @property
    def model(self) -> str:
        """The deployment's name, whatever alias the client used."""

    def on_head(self, head: AnswerHead) -> bool:
        """The replica's head. False: this answer is not wanted (another replica will be tried); say nothing more."""

    def on_body(self, data: bytes, now: float) -> None:
        """Body bytes of one read, the answer not yet complete."""

    def on_chunks(self, data: bytes, now: float) -> bool:
        """Body bytes that are whole HTTP chunks, framing included. False: not taken, bring the bare bytes."""

    def on_end(self, data: bytes, now: float) -> None:
        """The answer is complete; `data` are its last bytes, perhaps none."""

    def on_tokens(self, data: bytes, ids: bytes, now: float) -> None:
        """Ready event bytes of one read, and the ids of the tokens that they carry, a u32 each."""

    def on_link_headers(self, headers: list[tuple[str, str]]) -> None:
        """Header lines for the answer, before its first token."""

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None: ...

    def on_failure(self, failure: Failure) -> None: ...


class Upstream(Protocol):
    def send(self, sink: Sink) -> None:
        """Start; sets `sink.handle`. Never calls the sink before it returns, except to set the handle."""

    def close(self) -> None:
        """The replica left the table: close what idles, let what runs finish."""

    def sweep(self, now: float) -> None:
        """Now and then: let go of what idled too long."""
