"""The decision journal: a line on a changed plan, a changed reason, or each 60 s; enough to replay decide as a test.

A policy's memory is some kilobytes, so it stands only in the lines that are worth replaying: those whose plan does
something, and one an hour. What it had become after is a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from neaptide.control.decide import decide
from neaptide.control.port import Decision
from neaptide.types import Carry, Choice, Plan, Snapshot

EVERY_S = 60.0
WHOLE_EVERY_S = 3600.0
KEEP_BYTES = 8 << 20
KEEP_ROWS = 500
KEEP_CHOICES = 200  # a model


class Line(msgspec.Struct, kw_only=True):
    """decide(snapshot, carry) == (plan, carry_after): what the replay checks, in the lines that are whole."""

    wall_s: float
    snapshot: Snapshot
    carry: Carry
    plan: Plan
    carry_after: Carry
    whole: bool = True


class Said(msgspec.Struct, frozen=True):
    """A choice and when it was made."""

    wall_s: float
    choice: Choice


class DecisionJournal:
    """Appends to `path`, set aside once past KEEP_BYTES; `recent` are the last KEEP_ROWS for people, newest first,
    `said` a model's last KEEP_CHOICES choices, newest first: each change of mind, and each minute."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_key: tuple[object, ...] | None = None
        self._last_s = self._whole_s = float("-inf")
        self.recent: deque[Decision] = deque(maxlen=KEEP_ROWS)
        self.said: dict[str, deque[Said]] = {}

    def note(self, line: Line) -> bool:
        """Whether it was worth a line."""
        plan, now_s = line.plan, line.snapshot.now_s
        self._note_choices(line)
        key = (plan.launches, plan.drains, plan.parks, plan.wakes, _reasons(plan), tuple(map(_mind, plan.choices)))
        if key == self._last_key and now_s - self._last_s < EVERY_S:
            return False
        self._last_key, self._last_s = key, now_s
        sentences = tuple(c.sentence for c in plan.choices)
        self.recent.appendleft(
            Decision(
                wall_s=line.wall_s,
                reasons=(*plan.reasons, *sentences) or ("hold: every deployment has what it should",),
                launches=tuple(x.replica for x in plan.launches),
                drains=plan.drains,
                parks=plan.parks,
                wakes=plan.wakes,
                choices=plan.choices,
            )
        )
        self._append(_encoded(self._cut(line)))
        return True

    def _note_choices(self, line: Line) -> None:
        for choice in line.plan.choices:
            said = self.said.setdefault(choice.model, deque(maxlen=KEEP_CHOICES))
            if not said or _mind(said[0].choice) != _mind(choice) or line.wall_s - said[0].wall_s >= EVERY_S:
                said.appendleft(Said(line.wall_s, choice))

    def _cut(self, line: Line) -> Line:
        """Without the policies' memory where the line is not worth replaying."""
        acts = any((line.plan.launches, line.plan.drains, line.plan.parks, line.plan.wakes))
        whole = acts or not line.carry.policies or line.snapshot.now_s - self._whole_s >= WHOLE_EVERY_S
        if whole:
            self._whole_s = line.snapshot.now_s
        carry = line.carry if whole else _without_memory(line.carry)
        return Line(
            wall_s=line.wall_s,
            snapshot=line.snapshot,
            carry=carry,
            plan=line.plan,
            carry_after=digested(line.carry_after) if whole else _without_memory(line.carry_after),
            whole=whole,
        )

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


def replays(line: Line) -> bool:
    """Whether decide says today what it said then. Only of a line that is whole."""
    plan, carry = decide(line.snapshot, line.carry)
    return (plan, digested(carry)) == (line.plan, line.carry_after)


def digested(carry: Carry) -> Carry:
    """With the digests of the policies' memories in their place."""
    digests = {m: hashlib.blake2b(raw, digest_size=8).digest() for m, raw in carry.policies.items()}
    return msgspec.structs.replace(carry, policies=digests)


def _without_memory(carry: Carry) -> Carry:
    return msgspec.structs.replace(carry, policies={})


def _mind(choice: Choice) -> tuple[object, ...]:
    """What of a choice is a change of mind, and not a number that wanders."""
    return choice.model, choice.action, choice.after, choice.clamp, choice.policy, choice.standby


def _reasons(plan: Plan) -> tuple[str, ...]:
    return tuple(re.sub(r"\d+\.\d+", "#", r) for r in plan.reasons)


def _encoded(line: Line) -> bytes:
    """JSON has no NaN: what nobody told is left out, and read back as such."""
    tree: dict[str, Any] = msgspec.to_builtins(line)
    for load in tree["snapshot"].get("loads", {}).values():
        for name in [k for k, v in load.items() if isinstance(v, float) and math.isnan(v)]:
            del load[name]
    return msgspec.json.encode(tree) + b"\n"
