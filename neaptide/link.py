"""Frames between processes of ours: gateway and own replica, gateway and control.

    u32 payload length (<= 1 MiB) | u32 stream | u8 type | payload        little endian

Stream 0 is the connection itself; a gateway numbers its requests 1, 2, 3 ... per connection and never reuses one.
The gateway connects; the first frame on each side is HELLO, anything else closes the connection.

    type      from      payload
    HELLO     both      JSON Hello; the replica checks version and boot token before it answers with its own
    OPEN      gateway   u16 header length, JSON OpenHeader, then the first part of the HTTP body
    BODY      gateway   more of the body, until OpenHeader.body_bytes have come
    HEADERS   replica   JSON [[name, value], ...] to add to the HTTP answer; optional, before the first TOKEN
    TOKEN     replica   u16 n, n x u32 token ids, then ready `data: ...\\n\\n` bytes (empty for a non-streaming request)
    END       replica   u16 header length, JSON EndHeader, then the last bytes: for a stream the finish chunk, the usage
                        chunk if asked for, and `data: [DONE]`; else the whole HTTP body. Last frame of a stream.
    ABORT     gateway   empty; the replica frees the slot, answers END with finish "abort" and its own token counts
    CREDIT    gateway   u32 more bytes of TOKEN payload the gateway takes (a stream starts with CREDIT_BYTES)
    LOAD      replica   JSON LoadReport, stream 0, when it changes, at most every 50 ms
    TALLY     both      stream 0; gateway or control asks JSON [request_id, ...]; the replica answers JSON
                        {request_id: TallyRow} of what it knows, so that a dead gateway's requests can be closed
    DRAIN     gateway   reserved: control drains a replica by SIGTERM

HTTP status and framing are the gateway's. Past its credit the replica coalesces tokens of that stream; a stream without
credit for STALL_S is aborted. A frame over the limit, an unknown type or a bad header is a protocol error: the
connection closes and its streams end as errors.

The gateway-control channel uses the same frames with types >= 32 and JSON payloads (table.py names them).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

VERSION = 1
MAX_FRAME = 1 << 20
CREDIT_BYTES = 64 * 1024
STALL_S = 30.0

HELLO, OPEN, BODY, HEADERS, TOKEN, END, ABORT, CREDIT, LOAD, TALLY, DRAIN = range(11)
TABLE, GAUGES, WAKE, FETCH = 32, 33, 34, 35  # gateway <-> control, see table.py
LEASES, ASK, GRANT, RECALL, RETURN = range(36, 41)  # the same, of budgets

_HEAD = struct.Struct("<IIB")
HEAD_BYTES = _HEAD.size
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")


class LinkError(Exception):
    """The peer broke the protocol; the connection must be closed."""


class Hello(msgspec.Struct, kw_only=True):
    version: int = VERSION
    token: str = ""  # boot token, shared by the processes of one `up`
    role: str = ""  # gateway | control | replica
    name: str = ""  # replica id, gateway id
    epoch: int = 0
    pid: int = 0
    describe: dict[str, msgspec.Raw] | None = None  # replica: engine.protocol.Description as JSON
    resumes: bool = False  # replica: it takes ids before a body


class OpenHeader(msgspec.Struct, kw_only=True):
    request_id: str
    route: str  # chat.completions | completions | tokenize
    body_bytes: int  # and of the ids before it
    stream: bool = False
    include_usage: bool = False  # the client asked for the usage chunk
    model: str = ""  # the deployment's name, where the replica serves several
    tenant: str = ""  # for prefix_cache: tenant
    deadline_in_s: float | None = None
    created_s: int = 0  # when the client's request came, which each chunk tells; 0: now
    resumed: int = 0  # resume: so many tokens were delivered elsewhere; their ids, u32 each, stand before the body ...
    generated_ids: list[int] = []  # ... or here ...
    emitted_chars: int | None = 0  # ... and how many characters of their text the client has; None: all that shows


class EndHeader(msgspec.Struct, kw_only=True):
    status: int = 200
    finish: str = ""  # stop | length | abort | error
    error: str = ""  # slug when finish is "error" or status >= 400
    retryable: bool = False  # nothing was started: the gateway may try another replica
    content_type: str = "application/json"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the whole answer, what others made of it included
    output_tokens: int = 0
    queued_s: float = 0.0  # inside the replica, before its first step
    engine_s: float = 0.0
    kv_token_s: float = 0.0


class LoadReport(msgspec.Struct, kw_only=True):
    running: int = 0
    waiting: int = 0
    slots: int = 0  # requests it would take right now, lookahead included; 0 = full
    ahead: int = 0  # of these, how many would only wait in it
    free_kv_tokens: int = 0
    kv_usage: float = 0.0  # 0..1
    step_s: float = 0.0  # median of recent steps
    draining: bool = False
    rooms: dict[str, int] = {}  # `slots` of each model, where the replica serves several


class TallyRow(msgspec.Struct, kw_only=True):
    done: bool
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    engine_s: float = 0.0


class Frame(NamedTuple):
    stream: int
    type: int
    payload: bytes


def frame(stream: int, kind: int, payload: bytes = b"") -> bytes:
    if len(payload) > MAX_FRAME:
        raise LinkError(f"a frame of {len(payload)} bytes exceeds {MAX_FRAME}")
    return _HEAD.pack(len(payload), stream, kind) + payload


def pack_header(header: msgspec.Struct, body: bytes = b"") -> bytes:
    """u16 length, JSON, body: the payload of OPEN and END."""
    head = msgspec.json.encode(header)
    if len(head) > 0xFFFF:
        raise LinkError(f"a header of {len(head)} bytes exceeds 65535")
    return _U16.pack(len(head)) + head + body


def split_header(payload: bytes) -> tuple[bytes, bytes]:
    """(JSON header, the rest). LinkError when truncated."""
    if len(payload) < 2:
        raise LinkError("a header frame without its length")
    (n,) = _U16.unpack_from(payload)
    if len(payload) < 2 + n:
        raise LinkError("a header frame shorter than its header")
    return payload[2 : 2 + n], payload[2 + n :]


def pack_token(ids: list[int] | tuple[int, ...], data: bytes) -> bytes:
    return struct.pack(f"<H{len(ids)}I", len(ids), *ids) + data


def split_token(payload: bytes) -> tuple[tuple[int, ...], bytes]:
    """(token ids, ready SSE bytes). LinkError when truncated."""
    if len(payload) < 2:
        raise LinkError("a token frame without its count")
    (n,) = _U16.unpack_from(payload)
    end = 2 + 4 * n
    if len(payload) < end:
        raise LinkError("a token frame shorter than its ids")
    return struct.unpack_from(f"<{n}I", payload, 2), payload[end:]


def pack_credit(n: int) -> bytes:
    return _U32.pack(n)


def split_credit(payload: bytes) -> int:
    if len(payload) != 4:
        raise LinkError("a credit frame is four bytes")
    return int(_U32.unpack(payload)[0])


class FrameReader:
    """Bytes in, whole frames out; holds at most one frame of MAX_FRAME and what one read brought."""

    __slots__ = ("_buf",)

    def __init__(self) -> None:
        self._buf = b""

    def feed(self, data: bytes) -> list[Frame]:
        """The frames completed by `data`; LinkError on an oversized frame. Payloads are copies, safe to keep."""
        buf = self._buf + data if self._buf else data
        out: list[Frame] = []
        pos, size = 0, len(buf)
        while size - pos >= HEAD_BYTES:
            n, stream, kind = _HEAD.unpack_from(buf, pos)
            if n > MAX_FRAME:
                raise LinkError(f"a frame of {n} bytes exceeds {MAX_FRAME}")
            end = pos + HEAD_BYTES + n
            if end > size:
                break
            out.append(Frame(stream, kind, buf[pos + HEAD_BYTES : end]))
            pos = end
        self._buf = buf[pos:] if pos else buf
        return out


def short_path(path: Path | str) -> str:
    """A name for a Unix socket that fits sun_path (108 bytes): long paths go through an open descriptor of their
    directory, which stays open for the life of the process."""
    text = str(path)
    if len(text.encode()) < 100:
        return text
    parent, name = os.path.split(text)
    fd = _DIRS.get(parent)
    if fd is None:
        fd = _DIRS[parent] = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}"


_DIRS: dict[str, int] = {}


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Sockets bound inside are 0600 from their first moment."""
    old = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(old)
