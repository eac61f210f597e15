"""The only source of time.

Two readings: `mono_s` for durations and timers (CLOCK_MONOTONIC: the same scale in every process of a host, so a
begin stamped by one process can be subtracted from an end stamped by another) and `wall_s` for records that people
read. Code that must run in virtual time takes a `Clock`; code at the edge calls the module's functions.
"""

from __future__ import annotations

import time
from typing import Protocol

mono_s = time.monotonic  # seconds, CLOCK_MONOTONIC on Linux
wall_s = time.time  # seconds since the epoch, UTC


class Clock(Protocol):
    """What a component that must also run in virtual time asks for."""

    def mono_s(self) -> float: ...
    def wall_s(self) -> float: ...


class RealClock:
    """The machine's clocks."""

    __slots__ = ()

    def mono_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()


class VirtualClock:
    """A clock that moves only when told to; wall and monotonic advance together."""

    __slots__ = ("_mono", "_wall")

    def __init__(self, mono_s: float = 0.0, wall_s: float = 1_700_000_000.0) -> None:
        self._mono, self._wall = mono_s, wall_s

    def mono_s(self) -> float:
        return self._mono

    def wall_s(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"time only moves forward, not by {seconds} s")
        self._mono += seconds
        self._wall += seconds
