"""Bytes of answers: heads, JSON errors, the error event of a broken stream. No state but the cached Date line."""

from __future__ import annotations

import math
from email.utils import formatdate
from http import HTTPStatus

import msgspec

from neaptide.errors import RequestError
from neaptide.gateway.throttle import LimitError

STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class DateLine:
    """`date: ...` refreshed by the sweep, not by every answer (formatdate costs 4 us)."""

    __slots__ = ("_second", "line")

    def __init__(self, wall_s: float) -> None:
        self._second = -1
        self.line = b""
        self.refresh(wall_s)

    def refresh(self, wall_s: float) -> None:
        if int(wall_s) != self._second:
            self._second = int(wall_s)
            self.line = b"date: %b\r\n" % formatdate(self._second, usegmt=True).encode()


def head(status: int, content_type: bytes, length: int | None, lines: bytes, close: bool) -> bytes:
    """Status line to blank line. `length` None: chunked (or, with `close` on HTTP/1.0, until the connection ends:
    the caller then passes -1). `lines` are whole header lines."""
    if status == 200 and length is not None and length >= 0 and not close:  # the common one, in one step
        return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n" % (content_type, length, lines)
    if length is None:
        framing = b"transfer-encoding: chunked\r\n"
    elif length < 0:
        framing = b""
    else:
        framing = b"content-length: %d\r\n" % length
    start = STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status
    end = b"connection: close\r\n\r\n" if close else b"\r\n"
    return b"%bcontent-type: %b\r\n%b%b%b" % (start, content_type, framing, lines, end)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def error_body(error: RequestError) -> bytes:
    return _encode(error.body())


def error_lines(error: RequestError, allow: bytes = b"") -> bytes:
    """Header lines that belong to an error: Retry-After (whole seconds, at least 1), Allow, WWW-Authenticate, limits
    that were reached."""
    lines = b""
    if error.retry_after_s is not None:
        lines += b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s))
    if error.status == 401:
        lines += b"www-authenticate: Bearer\r\n"
    if isinstance(error, LimitError):
        lines += error.lines
    if allow:
        lines += b"allow: %b\r\n" % allow
    return lines


def error_event(error: RequestError, boundary: bool) -> bytes:
    """The event that tells a client that its stream broke. `boundary`: the bytes before it ended an event."""
    return b"%bdata: %b\n\n" % (b"" if boundary else b"\n\n", error_body(error))
