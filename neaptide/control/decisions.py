"""The decision journal: a line on a changed plan, a changed reason, or each 60 s; enough to replay decide as a test."""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from pathlib import Path

import msgspec

from neaptide.control.port import Decision
from neaptide.types import Carry, Plan, Snapshot

EVERY_S = 60.0
KEEP_BYTES = 8 << 20
KEEP_ROWS = 500


class Line(msgspec.Struct, kw_only=True):
    """decide(snapshot, carry) == (plan, carry_after): what the replay checks."""

    wall_s: float
    snapshot: Snapshot
    carry: Carry
    plan: Plan
    carry_after: Carry


class DecisionJournal:
    """Appends to `path`, set aside once past KEEP_BYTES; `recent` are the last KEEP_ROWS for people, newest first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_key: tuple[object, ...] | None = None
        self._last_s = float("-inf")
        self.recent: deque[Decision] = deque(maxlen=KEEP_ROWS)

    def note(self, line: Line) -> bool:
        """Whether it was worth a line."""
        plan = line.plan
        key = (plan.launches, plan.drains, tuple(re.sub(r"\d+\.\d+", "#", r) for r in plan.reasons))
        if key == self._last_key and line.snapshot.now_s - self._last_s < EVERY_S:
            return False
        if key == self._last_key and not plan.reasons:
            self._last_s = line.snapshot.now_s
        self._last_key, self._last_s = key, line.snapshot.now_s
        self.recent.appendleft(
            Decision(
                wall_s=line.wall_s,
                reasons=plan.reasons or ("hold: every deployment has what it should",),
                launches=tuple(x.replica for x in plan.launches),
                drains=plan.drains,
            )
        )
        self._append(msgspec.json.encode(line) + b"\n")
        return True

    def _append(self, line: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_size + len(line) > KEEP_BYTES:
                self._path.replace(self._path.with_suffix(".jsonl.1"))
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)


def read(path: Path) -> list[Line]:
    """The lines of a decision journal; a torn last line is left out."""
    out = []
    for raw in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            out.append(msgspec.json.decode(raw, type=Line))
    return out
