"""How long a replica takes from launch to ready: stages in a row. A warm node skips those that it has cached, a spare
those that it has behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Such as node, image, weights, compile, graphs, first request."""

    name: str
    seconds: float
    cacheable: bool = False  # what it makes stays on the node
    spared: bool = False  # it is no model's: a spare has it behind it

    def __post_init__(self) -> None:
        if self.seconds < 0:
            raise ValueError(f"stage {self.name}: {self.seconds} s is under 0")


def remaining(stages: Sequence[Stage], *, warm: bool = False, spared: bool = False) -> tuple[Stage, ...]:
    """What is left of a start on a warm node, or from a spare."""
    return tuple(s for s in stages if not (warm and s.cacheable) and not (spared and s.spared))


def boot_s(stages: Sequence[Stage]) -> float:
    return sum((stage.seconds for stage in stages), 0.0)


class Nodes:
    """Where replicas were: a node keeps its caches for `warm_s` after a replica that had been ready left it."""

    def __init__(self, warm_s: float) -> None:
        self._warm_s = warm_s
        self._left_s: list[float] = []

    def take(self, now_s: float) -> bool:
        """A node for a launch, the one that was left last; is it warm?"""
        warm = bool(self._left_s) and now_s - self._left_s[-1] <= self._warm_s
        if self._left_s:
            self._left_s.pop()
        return warm

    def give(self, now_s: float) -> None:
        if self._warm_s > 0:
            self._left_s.append(now_s)
