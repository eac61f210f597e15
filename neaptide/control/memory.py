"""What a policy remembers, as bytes: named arrays in MessagePack. decide takes a copy and so stays a function."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from neaptide.control.policy import State
from neaptide.types import Reason

VERSION = 1


class Array(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One model's. Times are the policy's: wall seconds that never go back."""

    policy: str  # whose arrays these are, and of what shape; another one's are of no use
    version: int = VERSION
    next_s: float = -math.inf  # when it decides again
    wanted: int | None = None  # what it wanted last
    reasons: tuple[Reason, ...] = ()  # ... and why
    expected: float = math.nan  # requests/s a cold start from then, where it forecasts
    busy_s: float = -math.inf  # when something came, waited or ran last
    usual: float = 0.0  # replicas that it has wanted on average outside of the calendar's events
    usual_s: float = 0.0  # seconds that this is a mean of
    arrays: dict[str, Array] = {}


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decode = msgspec.msgpack.Decoder(Memory).decode


def pack(memory: Memory, state: State | None = None) -> bytes:
    """`memory`, with `state` for its arrays where one is given."""
    if state is not None:
        arrays = {k: Array(v.dtype.str, v.shape, np.ascontiguousarray(v).tobytes()) for k, v in state.items()}
        memory = msgspec.structs.replace(memory, arrays=arrays)
    return _encode(memory)


def unpack(raw: bytes | None, policy: str) -> Memory | None:
    """What `policy` remembered; None for nothing, for another's or another version's, or bytes that are neither."""
    if raw is None:
        return None
    try:
        memory = _decode(raw)
    except msgspec.MsgspecError:
        return None
    return memory if (memory.policy, memory.version) == (policy, VERSION) else None


def state_of(memory: Memory) -> State:
    """A copy that may be changed. ValueError when an array's bytes do not fit its shape."""
    return {k: np.frombuffer(a.data, dtype=a.dtype).reshape(a.shape).copy() for k, a in memory.arrays.items()}


def fits(memory: Memory, start: State) -> bool:
    """Whether these arrays are of a policy that begins with `start`: an older release's may have others."""
    if not memory.arrays:
        return True
    known = {k: (a.dtype, a.shape) for k, a in memory.arrays.items()}
    return all(known.get(k) == (v.dtype.str, v.shape) for k, v in start.items())
