"""Usage <-> rows of the ledger, and their sums by the hour. No row can be refused by the database: one bad record would
otherwise hold up a journal for ever."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from neaptide.cost.rate import MAX_TOKENS, MILLIS
from neaptide.types import Attempt, Paid, Usage

MAX_INT = 2**31 - 1  # statuses
MAX_BIG = 2**63 - 1
TEXTS = tuple(f.name for f in msgspec.structs.fields(Usage) if isinstance(f.default, str) or f.name == "request_id")
TOKENS = ("prompt_tokens", "cached_tokens", "reasoning_tokens", "output_tokens")
LIMITS = (
    (TOKENS, MAX_TOKENS),
    (("prompt_bytes", "max_tokens"), MAX_BIG),
    (("status",), MAX_INT),
    (("price_millis",), MILLIS),
)
HOUR_S = 3600
MAX_WALL_S = 253_402_300_800  # the year 10000
HOURLY_KEYS = ("hour", "tenant", "project", "key", "model", "outcome")
SUMS = ("requests", *TOKENS, "amount_nanos")
# Of the refused only these were asked of a model that is ours. Otherwise it is whatever the client wrote, and must not
# make a row of sums a name.
MODEL_KNOWN = (429, 503, 507)

_attempts = msgspec.json.Decoder(tuple[Attempt, ...])
_paid = msgspec.json.Decoder(tuple[Paid, ...])


def sound(usage: Usage) -> Usage:
    """`usage` with every value within what both databases hold; nearly always `usage` itself."""
    changes: dict[str, Any] = {}
    for name in TEXTS:
        if "\0" in getattr(usage, name):
            changes[name] = text(getattr(usage, name))
    for names, most in LIMITS:
        for name in names:
            if not 0 <= getattr(usage, name) <= most:
                changes[name] = max(0, min(most, getattr(usage, name)))
    return msgspec.structs.replace(usage, **changes) if changes else usage


def text(value: str) -> str:
    """PostgreSQL's text has no NUL."""
    return value.replace("\0", "\ufffd")


def usage_row(usage: Usage, price_version: int) -> dict[str, Any]:
    """The columns of a sound() Usage."""
    row = msgspec.structs.asdict(usage)
    row["attempts"] = msgspec.json.encode(usage.attempts).decode()
    row["paid"] = msgspec.json.encode(usage.paid).decode()
    row["price_version"] = price_version
    return row


def usage_of(row: Mapping[str, Any]) -> Usage:
    """The Usage of a row of the usage table."""
    fields = {name: row[name] for name in Usage.__struct_fields__ if name not in ("attempts", "paid")}
    return Usage(**fields, attempts=_attempts.decode(row["attempts"]), paid=_paid.decode(row["paid"]))


def hour_of(wall_s: float) -> int:
    """Whole hours since the epoch; 0 for a time that no calendar has."""
    return int(wall_s // HOUR_S) if 0 <= wall_s < MAX_WALL_S else 0


def hourly_rows(rows: Iterable[Mapping[str, Any]], amounts: Mapping[str, int]) -> list[dict[str, Any]]:
    """What `rows` add to the table hourly; `amounts` is nanos by request_id. Sorted, so that two writers lock them in
    one order."""
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        hidden = row["outcome"] == "refused" and row["status"] not in MODEL_KNOWN
        model = "" if hidden else row["model"]
        hour = hour_of(row["started_wall_s"])
        at = (hour, row["tenant"], row["project"], row["key"], model, row["outcome"])
        total = sums.get(at)
        if total is None:
            total = sums[at] = {**dict(zip(HOURLY_KEYS, at)), **dict.fromkeys(SUMS, 0)}
        total["requests"] += 1
        for name in TOKENS:
            total[name] += row[name]
        total["amount_nanos"] += amounts.get(row["request_id"], 0)
    return [sums[at] for at in sorted(sums)]
