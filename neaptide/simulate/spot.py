"""Spot capacity: a replica's machine is taken away after a random while, with a short notice."""

from __future__ import annotations

import math
import random

import msgspec


class Spot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At the notice a replica takes no more requests; when it is over, what still runs goes back to the line."""

    reclaims_per_hour: float  # of one replica; times between are exponential
    notice_s: float = 30.0

    def __post_init__(self) -> None:
        if self.reclaims_per_hour < 0 or self.notice_s < 0:
            raise ValueError("reclaims_per_hour and notice_s are 0 or more")


class Reclaims:
    """Lifetimes of replicas in the order of their launches: the same for the same seed, whatever else happens."""

    def __init__(self, spot: Spot | None, seed: int) -> None:
        self._per_s = spot.reclaims_per_hour / 3600 if spot else 0.0
        self._random = random.Random(f"spot {seed}")

    def lifetime_s(self) -> float:
        """From launch to notice; inf: never."""
        return self._random.expovariate(self._per_s) if self._per_s else math.inf
