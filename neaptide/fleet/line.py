"""Whose turn it is to start: a host takes so many starts at once, the others wait in line (docs/decisions/0036). Pure.

All at once they would share the cores and be ready together, the first as late as the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, TypeVar

from neaptide.types import ReplicaState

TURN_S = 30.0  # a start that takes longer waits for a disk, or hangs: it keeps nobody else waiting any more
STARTS_PER_CORE = 2.0  # while one reads its weights another computes
FEWEST = 2


class Member(Protocol):
    """What the line asks of a replica."""

    @property
    def deployment(self) -> str: ...
    @property
    def state(self) -> ReplicaState: ...
    @property
    def queued(self) -> bool: ...
    @property
    def started_s(self) -> float: ...


M = TypeVar("M", bound=Member)


def starts_at_once(cores: float) -> int:
    """How many starts keep that many cores busy."""
    return max(FEWEST, round(STARTS_PER_CORE * cores))


def next_in_line(fleet: Iterable[M], at_once: int, now_s: float) -> M | None:
    """The queued one that may start now; None while `at_once` others are under way. `fleet`: all of the host's
    replicas, in the order in which they were launched.

    One replica for every deployment before a second one for any; then those with the fewest starts under way.
    """
    line: list[M] = []
    there: set[str] = set()
    under_way: Counter[str] = Counter()
    places = at_once
    for one in fleet:
        if one.queued:
            line.append(one)
        elif one.state == "starting":
            under_way[one.deployment] += 1
            places -= now_s - one.started_s < TURN_S
        elif one.state in ("ready", "standby"):
            there.add(one.deployment)

    def turn(one: M) -> tuple[bool, int]:
        starting = under_way[one.deployment]
        return starting > 0 or one.deployment in there, starting

    return min(line, key=turn, default=None) if places > 0 else None
