"""Request ids and trace context.

A request id is 26 characters of Crockford base32 in time order: 10 for 48 bits of milliseconds, 4 for a counter within
the millisecond, 12 of randomness drawn anew each millisecond. Two ids of one process are ordered as they were made, a
clock that steps back included; two processes differ by 60 random bits.
"""

from __future__ import annotations

import random
import re
from binascii import hexlify

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]  # 10 bits a pair
_random = random.SystemRandom()
_NOT_ZERO = 1 << 64 | 1  # a trace of zeros and a span of zeros are invalid
_bits = random.Random(_random.getrandbits(128)).getrandbits  # ids need uniqueness, not secrecy
_TRACEPARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})")
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def base32(value: int, pairs: int) -> str:
    """The lowest `10 * pairs` bits of `value`, most significant first."""
    return "".join(_PAIRS[(value >> shift) & 1023] for shift in range(10 * pairs - 10, -10, -10))


class Ids:
    """Makes request ids; one a process."""

    __slots__ = ("_count", "_head", "_ms", "_tail")

    def __init__(self) -> None:
        self._ms = self._count = 0
        self._head = self._tail = ""

    def next(self, now_wall_s: float) -> str:
        ms = int(now_wall_s * 1000.0)
        if ms > self._ms or self._count >= 0xFFFFF:
            self._ms = max(ms, self._ms + 1)
            self._count = 0
            self._head, self._tail = base32(self._ms, 5), base32(_bits(60), 6)
        self._count = count = self._count + 1
        return f"{self._head}{_PAIRS[count >> 10]}{_PAIRS[count & 1023]}{self._tail}"


def client_id(value: bytes | None) -> bytes:
    """The client's x-request-id when it is 1 to 128 printable ASCII characters, else b""."""
    return value if value is not None and _CLIENT_ID.fullmatch(value) else b""


def hop(value: bytes | None) -> bytes:
    """The traceparent for the next hop: the trace of a valid W3C traceparent under a new span id, or a fresh,
    unsampled trace."""
    if value is not None and (found := _TRACEPARENT.fullmatch(value)):
        return b"00-%b-%016x-%b" % (found[1], _bits(64) or 1, found[2])
    fresh = hexlify((_bits(192) | _NOT_ZERO).to_bytes(24, "big"))
    return b"00-%b-%b-00" % (fresh[:32], fresh[32:])
