"""The audit log's lines: each holds the hash of the one before, so that one which is changed or taken out shows. Pure.

The hash is SHA-256 over the line as it stands in the file, without its newline. It is not keyed: a copy of the log can
be checked wherever it lies, and keeping the last hash elsewhere proves all that is before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec

from neaptide.control.port import Answer, Ask

START = "0" * 64  # what the first line follows
DROPPED, MENDED, LOST = "dropped", "mended", "lost"  # actions of the log itself; see AuditLog
Outcome = Literal["done", "refused", "failed", "unknown"]


class Note(NamedTuple):
    """What a change was about, in short and without secrets."""

    object: str = ""
    before: str = ""
    after: str = ""


class AuditRow(Answer, frozen=True):
    """One line: who did what, and how it ended."""

    n: int = 0  # from 1, without gaps
    prev: str = ""  # hash of the line before
    at_wall_s: float = 0.0
    request: str = ""  # its id, as the answer's x-neaptide-request-id
    who: str = ""  # id of the token; "" = none
    name: str = ""
    role: str = ""
    via: str = ""  # token | link
    peer: str = ""  # address
    action: str = ""
    object: str = ""
    before: str = ""
    after: str = ""
    outcome: Outcome = "done"
    status: int = 0  # HTTP; 0 = not known
    code: str = ""  # of the error
    skipped: int = 0  # refusals since the line before that were too many to write down


class AuditQuery(Ask, frozen=True):
    """Which lines; half-open in time."""

    before: int | None = None  # lines with a smaller number; None: from the newest on
    since_s: float | None = None  # wall seconds
    until_s: float | None = None
    action: str | None = None
    who: str | None = None  # id of a token
    limit: int = 100  # lines, 1 to 1,000

    def asks_for(self, row: AuditRow) -> bool:
        in_time = self.since_s is None or row.at_wall_s >= self.since_s
        in_time = in_time and (self.until_s is None or row.at_wall_s < self.until_s)
        behind = self.before is None or row.n < self.before
        return in_time and behind and self.action in (None, row.action) and self.who in (None, row.who)


class AuditPage(Answer, frozen=True):
    rows: tuple[AuditRow, ...]  # newest first


class Head(msgspec.Struct, frozen=True):
    """The last line that was written."""

    n: int = 0
    hash: str = START


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found; `problem` is "" for a log that is whole."""

    lines: int
    first: int
    last: int
    head: str  # hash of the last line
    problem: str = ""


def hashed(line: bytes) -> str:
    """Of a line without its newline."""
    return hashlib.sha256(line).hexdigest()


def sealed(row: AuditRow, head: Head) -> tuple[bytes, Head]:
    """The line that follows `head`, with its newline, and the head after it."""
    line = msgspec.json.encode(msgspec.structs.replace(row, n=head.n + 1, prev=head.hash))
    return line + b"\n", Head(head.n + 1, hashed(line))


def parsed(line: bytes) -> AuditRow | None:
    """None for what is no line of ours."""
    try:
        return msgspec.json.decode(line, type=AuditRow)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def check(lines: Iterable[bytes], heads: Iterable[Head] = ()) -> Verdict:
    """Whether lines (oldest first, without newlines) follow each other, begin where they may, and hold every one of
    `heads`. Stops at the first that does not."""
    first, at, count = Head(), Head(), 0
    told: set[Head] = set()  # what lines say was dropped
    wanted = {head.n: head.hash for head in heads if head.n}
    for raw in lines:
        row = parsed(raw)
        if count == 0 and row is not None:
            first = at = Head(row.n - 1, row.prev)
        wrong = _wrong(row, at)
        if wrong or row is None:
            return Verdict(lines=count, first=first.n + 1, last=at.n, head=at.hash, problem=wrong)
        at, count = Head(row.n, hashed(raw)), count + 1
        if wanted.pop(row.n, at.hash) != at.hash:
            wrong = f"line {row.n} is not the one that was written"
            return Verdict(lines=count, first=first.n + 1, last=at.n, head=at.hash, problem=wrong)
        if row.action == DROPPED and row.before.isdigit():
            told.add(Head(int(row.before), row.after))
    problem = _missing(first, at, told, wanted)
    return Verdict(lines=count, first=first.n + bool(count), last=at.n, head=at.hash, problem=problem)


def _wrong(row: AuditRow | None, at: Head) -> str:
    """What is wrong with the line after `at`."""
    if row is None:
        return f"what stands after line {at.n} is no line of the log"
    if row.n != at.n + 1:
        return f"line {at.n + 1} is missing: line {row.n} stands there"
    if row.prev != at.hash:
        return f"line {at.n} was changed, or line {row.n}: they do not follow each other"
    if row.action == LOST:
        return f"line {row.n} says that lines before it were gone when the log was opened"
    return ""


def _missing(first: Head, at: Head, told: set[Head], wanted: dict[int, str]) -> str:
    """What is wrong with a log whose lines follow each other."""
    if first != Head() and first not in told:
        return f"lines 1 to {first.n} are gone, and no line says that they were dropped"
    late = [n for n in wanted if n > at.n]
    if late:
        return f"lines {at.n + 1} to {max(late)} are gone"
    unseen = [n for n in wanted if n > first.n]
    return f"line {unseen[0]} is missing" if unseen else ""
