"""What lies between an exchange and a replica, whichever protocol the replica speaks.

The exchange hands an Order to its target's Upstream and gets a Handle. The upstream then calls the Sink: for HTTP
`on_head`, `on_body`..., `on_end`; for the link `on_tokens`..., `on_link_end`; or at any moment `on_failure`, once,
after which it calls nothing more. After `abort` an HTTP upstream is silent; a link upstream still tells the end,
because only the replica knows what it had generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from neaptide.errors import RequestError
from neaptide.link import EndHeader
from neaptide.table import Timeouts

PASSED_HEADERS = frozenset((b"warning", b"cache-control", b"retry-after"))  # go to the client
HEADERS_READ = PASSED_HEADERS | {b"content-type", b"content-length"}  # all that a sink asks a head for


class Order(msgspec.Struct, gc=False):
    """One request as a replica is to get it."""

    request_id: str
    route: str  # chat.completions | completions | tokenize
    body: bytes
    stream: bool
    include_usage: bool  # the client asked for the usage chunk itself
    tenant: str
    traceparent: bytes
    tracestate: bytes
    deadline_in_s: float | None
    timeouts: Timeouts


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

    handle: Handle | None

    def on_head(self, status: int, headers: Mapping[bytes, bytes]) -> bool:
        """The replica's head. False: this answer is not wanted (another replica will be tried); say nothing more."""

    def on_body(self, data: bytes, now: float) -> None:
        """Body bytes of one read, the answer not yet complete."""

    def on_chunks(self, data: bytes, now: float) -> bool:
        """Body bytes that are whole HTTP chunks, framing included. False: not taken, bring the bare bytes."""

    def on_end(self, data: bytes, now: float) -> None:
        """The answer is complete; `data` are its last bytes, perhaps none."""

    def on_tokens(self, data: bytes, tokens: int, now: float) -> None:
        """Ready event bytes of one read, and how many tokens they carry."""

    def on_link_headers(self, headers: list[tuple[str, str]]) -> None:
        """Header lines for the answer, before its first token."""

    def on_link_end(self, end: EndHeader, data: bytes, now: float) -> None: ...

    def on_failure(self, failure: Failure) -> None: ...


class Upstream(Protocol):
    def send(self, order: Order, sink: Sink) -> None:
        """Start; sets `sink.handle`. Never calls the sink before it returns, except to set the handle."""

    def close(self) -> None:
        """The replica left the table: close what idles, let what runs finish."""

    def sweep(self, now: float) -> None:
        """Now and then: let go of what idled too long."""
