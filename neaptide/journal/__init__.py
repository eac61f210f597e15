"""The journal: one Usage a request, whatever happens. A gateway writes it, the ledger's intake reads it, and nothing
else passes between the two. docs/decisions/0003-journal.md holds the format and its reasons."""

from __future__ import annotations

from neaptide.journal.disk import release_space
from neaptide.journal.reader import Gap, Located, Scan, scan, segments, writer_alive
from neaptide.journal.record import MAX_RECORD, CorruptRecord, decode, encode
from neaptide.journal.writer import Journal

__all__ = [
    "MAX_RECORD",
    "CorruptRecord",
    "Gap",
    "Journal",
    "Located",
    "Scan",
    "decode",
    "encode",
    "release_space",
    "scan",
    "segments",
    "writer_alive",
]
