"""What passes between a replica's I/O process and its engine process, over a socketpair.

    u32 length | MessagePack of one message                      little endian

The engine reads all that has come between two steps (and blocks while idle), steps, and writes one Stepped for the
whole step: a message a step, not one a token. Either side ends at EOF of the other.
"""

from __future__ import annotations

import struct

import msgspec

from neaptide.engine.protocol import Capacity, Description, Emission, Sampling

MAX_MESSAGE = 64 << 20
_LEN = struct.Struct("<I")


class Member(msgspec.Struct, tag=20, array_like=True, gc=False):
    """Of an engine process with several models, both ways: the messages that follow are those of model `index`, in the
    spec's order, until the next Member. It begins with the first."""

    index: int


class Add(msgspec.Struct, tag=1, array_like=True, gc=False):
    id: int
    prompt_ids: list[int]
    generated_ids: list[int]
    emitted_chars: int
    sampling: Sampling


class Abort(msgspec.Struct, tag=2, array_like=True, gc=False):
    id: int


class Close(msgspec.Struct, tag=3, array_like=True, gc=False):
    """Finish nothing, free everything, exit 0."""


class Ready(msgspec.Struct, tag=10, array_like=True):
    """Sent once, after load and warm-up. `stages`: seconds of each start-up stage, in order."""

    description: Description
    stages: dict[str, float]


class Stepped(msgspec.Struct, tag=11, array_like=True):
    """One engine step. `step_s` is the step's wall time; `batch` the requests that were in it."""

    emissions: list[Emission]
    capacity: Capacity
    step_s: float = 0.0
    batch: int = 0


class Failed(msgspec.Struct, tag=12, array_like=True):
    """The engine cannot go on (or could not start); the process exits after it. Fields of a NeaptideError."""

    code: str
    what: str
    why: str = ""
    fix: str = ""


ToEngine = Add | Abort | Close | Member
FromEngine = Ready | Stepped | Failed | Member

_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)


def pack(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return _LEN.pack(len(body)) + body


class MessageReader:
    """Bytes in, whole message bodies out. ValueError past MAX_MESSAGE."""

    __slots__ = ("_buf",)

    def __init__(self) -> None:
        self._buf = b""

    def feed(self, data: bytes) -> list[bytes]:
        buf = self._buf + data if self._buf else data
        out, pos, size = [], 0, len(buf)
        while size - pos >= 4:
            (n,) = _LEN.unpack_from(buf, pos)
            if n > MAX_MESSAGE:
                raise ValueError(f"a message of {n} bytes exceeds {MAX_MESSAGE}")
            if pos + 4 + n > size:
                break
            out.append(buf[pos + 4 : pos + 4 + n])
            pos += 4 + n
        self._buf = buf[pos:] if pos else buf
        return out
