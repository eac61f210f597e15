"""One record is one line of at most MAX_RECORD bytes:

    crc32 of what follows the first space, 8 hex digits | space | B or E | space | JSON of Begin or Usage | newline

JSON never holds a raw newline or NUL, so a reader finds its place again after damage, and the preallocated rest of a
segment (NUL) cannot be taken for a record.
"""

from __future__ import annotations

import math
from zlib import crc32

import msgspec

from neaptide.types import Attempt, Begin, Paid, Usage

MAX_RECORD = 4096  # bytes; what the journal keeps free for the end record of each running request
HEAD_BYTES = 11  # crc, space, kind, space

# What bounded() leaves a field: bytes of its JSON text. Our own request ids (26 characters) are never cut, so an end
# always finds its begin. Their sum, the numbers (24 bytes each), the field names and the head stay under MAX_RECORD;
# tests/test_journal_record.py holds the worst case against it.
FIELD_BYTES = {
    "request_id": 64,
    "client_id": 192,
    "tenant": 128,
    "project": 128,
    "key": 64,
    "model": 192,
    "revision": 192,
    "replica": 128,
    "route": 32,
    "finish": 32,
    "error": 192,
    "degraded": 64,
    "cache": 16,
}
MAX_ATTEMPTS = 6
MAX_ATTEMPTS_PAID = 2  # where a row has payments too, which are money: a key is under at most MAX_PAID budgets
MAX_PAID = 8
PAID_BYTES = 104  # of a budget's name, which control keeps shorter
INT_LIMIT = 2**63 - 1

_json = msgspec.json.Encoder()
_begin = msgspec.json.Decoder(Begin)
_usage = msgspec.json.Decoder(Usage)


class CorruptRecord(ValueError):
    """A line that is not a whole, undamaged record; the text says what is wrong with it."""


def encode(record: Begin | Usage) -> bytes:
    """The record's line. Whatever stands in the fields it comes out, at most MAX_RECORD bytes long and decodable:
    over-long text is cut, integers are clamped to int64, NaN and infinities become 0 (JSON has none of the three)."""
    kind = b"E " if type(record) is Usage else b"B "
    try:
        body = kind + _json.encode(record)
        plain = len(body) < MAX_RECORD - HEAD_BYTES and _seconds(record) * 0.0 == 0.0
    except (OverflowError, UnicodeEncodeError):
        plain = False
    if not plain:
        body = kind + _json.encode(bounded(record))
    return b"%08x %b\n" % (crc32(body), body)


def decode(line: bytes) -> Begin | Usage:
    """The record of a line with or without its newline; CorruptRecord otherwise. Unknown fields are passed over, so
    that an older control reads a newer gateway's journal."""
    line = line.rstrip(b"\n")
    head, body = line[:8], line[9:]
    if line[8:9] != b" " or head != b"%08x" % crc32(body):
        raise CorruptRecord("its checksum does not match")
    try:
        if body[:2] == b"E ":
            return _usage.decode(body[2:])
        if body[:2] == b"B ":
            return _begin.decode(body[2:])
    except ValueError as e:
        raise CorruptRecord(str(e)) from e
    raise CorruptRecord(f"the kind {body[:2]!r} is not known")


def bounded(record: Begin | Usage) -> Begin | Usage:
    """`record` with every field inside its bound. Slow; for the rare record that does not fit as it is."""
    changes: dict[str, object] = {}
    for name in record.__struct_fields__:
        value = getattr(record, name)
        if isinstance(value, str) and name in FIELD_BYTES:
            changes[name] = _cut(value, FIELD_BYTES[name])
        elif isinstance(value, float):
            changes[name] = value if math.isfinite(value) else 0.0
        elif isinstance(value, int) and not isinstance(value, bool):
            changes[name] = max(-INT_LIMIT, min(INT_LIMIT, value))
    if isinstance(record, Usage):
        most = MAX_ATTEMPTS_PAID if record.paid else MAX_ATTEMPTS
        last = record.attempts[-most:]  # the last are the ones that answered
        changes["attempts"] = tuple(
            Attempt(_cut(a.replica, FIELD_BYTES["replica"]), max(0, min(INT_LIMIT, a.tokens))) for a in last
        )
        changes["paid"] = tuple(
            Paid(_cut(budget, PAID_BYTES), max(0, min(INT_LIMIT, reserved)), max(0, min(INT_LIMIT, cost)))
            for budget, reserved, cost in record.paid[:MAX_PAID]
        )
    return msgspec.structs.replace(record, **changes)


def _seconds(record: Begin | Usage) -> float:
    """The sum of its floats: finite only if all are. msgspec would write the others as null; looking for that in the
    text costs 0.25 us, this 0.1."""
    seconds = record.started_wall_s + record.arrived_mono_s
    if type(record) is Usage:
        seconds += record.queued_s + record.ttft_s + record.tpot_s + record.itl_max_s + record.engine_s
        seconds += record.kv_token_s + record.duration_s
    return seconds


def _cut(text: str, limit: int) -> str:
    """The longest of a few prefixes whose JSON text fits `limit` bytes; a character can take six."""
    text = text[:limit].encode("utf-8", "replace").decode()
    while len(_json.encode(text)) > limit + 2:  # its quotes
        text = text[: len(text) * 7 // 8]
    return text
