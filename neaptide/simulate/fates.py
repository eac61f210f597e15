"""What may go wrong with a simulated replica, as data: a test says of each launch what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from neaptide.fleet.local import PROBE_READY_S, SILENT_PROBES

NOTICED_S = SILENT_PROBES * PROBE_READY_S  # from the first check that is not answered until it is killed


class Fate(msgspec.Struct, frozen=True, kw_only=True):
    """Of one launch; seconds are counted from it, inf is never."""

    refused: str = ""  # it fails at once, for this reason
    ready_s: float | None = None  # None: as its stages say; inf: it never gets ready
    dies_s: float = math.inf
    hangs_s: float = math.inf  # it answers nothing from then on


USUAL = Fate()


class Silent:
    """Implements Engine: it hangs, and holds what it had and what still comes."""

    end_s = math.inf

    def __init__(self, held: Sequence[int]) -> None:
        self._held = list(held)

    @property
    def in_flight(self) -> int:
        return len(self._held)

    @property
    def waiting(self) -> int:
        return 0

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        self._held += ids

    def drop(self, now_s: float) -> list[int]:
        return self._held
