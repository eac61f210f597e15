"""Reading a journal: from any offset, beside a writer that goes on, through whatever a crash has left.

In the segment that is being written the reader stops at the first thing that is not a whole good record: it may be
half way to the disk cache. In a finished segment it passes over damage to the next good line and reports the gap:
after a power loss pages may be missing in front of pages that were written.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import NamedTuple

from neaptide.journal.record import MAX_RECORD, CorruptRecord, decode
from neaptide.types import Begin, Usage

SEGMENT = re.compile(r"(\d{8})\.log")
LOCK_NAME = "writer.lock"
READ_BYTES = 512 * 1024  # memory of one scan; a record never straddles more than one of its edges


class Located(NamedTuple):
    """A record and the byte range of its line in the segment."""

    start: int
    end: int
    value: Begin | Usage


class Gap(NamedTuple):
    """Bytes of a finished segment that are no record, and why: what was lost is named, not swallowed."""

    start: int
    end: int
    reason: str


class Scan(NamedTuple):
    """What one scan found. Go on at `offset`; `done` says that the (finished) segment holds nothing more."""

    records: list[Located]
    offset: int
    gaps: list[Gap]
    done: bool


def segment_path(directory: Path, segment: int) -> Path:
    return directory / f"{segment:08d}.log"


def segments(directory: Path) -> list[int]:
    """Numbers of the segments there are, ascending; empty where there is no such directory."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(m.group(1)) for m in map(SEGMENT.fullmatch, names) if m)


def writer_alive(directory: Path) -> bool:
    """Whether a process holds the journal open for writing: its lock goes with it, however it ends."""
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def scan(directory: Path, segment: int, offset: int, *, finished: bool, limit: int = 1000) -> Scan:
    """At most `limit` records of one segment from `offset` on, reading at most READ_BYTES.

    `finished`: the writer has gone on to a later segment or is dead. FileNotFoundError where the segment is gone.
    """
    with open(segment_path(directory, segment), "rb", buffering=0) as file:
        data = os.pread(file.fileno(), READ_BYTES, offset)
        at_end = offset + len(data) >= os.fstat(file.fileno()).st_size
    records: list[Located] = []
    gaps: list[Gap] = []
    at = 0
    while at < len(data) and len(records) < limit:
        line_end = data.find(b"\n", at) + 1
        value = _whole(data[at:line_end])
        if isinstance(value, str):
            if not finished:
                break
            resumed = _resume(data, at, at_end)
            if resumed == at:
                break
            if resumed < len(data) or data[at:resumed].strip(b"\0"):  # not merely the unwritten rest
                gaps.append(Gap(offset + at, offset + resumed, value))
            at = resumed
            continue
        records.append(Located(offset + at, offset + line_end, value))
        at = line_end
    return Scan(records, offset + at, gaps, finished and at_end and at == len(data))


def _whole(line: bytes) -> Begin | Usage | str:
    """The record, or why there is none."""
    if not line:
        return "no newline ends it"
    try:
        return decode(line)
    except CorruptRecord as e:
        return str(e)


def _resume(data: bytes, at: int, at_end: bool) -> int:
    """Where reading goes on after what is no record at `at`; `at` itself when more must be read to tell.

    NULs are passed over first, then one line; a run of more than MAX_RECORD bytes without newline is no line of ours.
    """
    if data[at] == 0:
        resumed = len(data) - len(data[at:].lstrip(b"\0"))
        return at if resumed == len(data) and at and not at_end else resumed
    nul, newline = data.find(b"\0", at), data.find(b"\n", at)
    ends = [e for e in (nul, newline + 1 if newline >= 0 else -1) if e >= 0]
    if ends:
        return min(ends)
    if at_end or len(data) - at > MAX_RECORD:
        return len(data)
    return at
