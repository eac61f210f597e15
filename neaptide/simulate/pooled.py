"""The fluid service with a warm pool: what a policy lets go stands by, as control/standby.py decides it, a lane each.

In arrays, since thousands of lanes cannot be nouns; a test holds both against each other.
"""

from __future__ import annotations

import math

import numpy as np

from neaptide.control.lanes import Lanes
from neaptide.control.policy import Floats
from neaptide.simulate.world import World

MOST_TICKS = 1 << 20  # that anybody stands by: with ticks of 5 s, two months


class PooledLanes(Lanes):
    """`standing` [lanes]: who stands by; `moved` [lanes]: by how many more than before this tick's decisions."""

    def __init__(self, world: World, capacity_rps: float, lanes: int) -> None:
        super().__init__(
            capacity_rps * world.service_s,
            lanes,
            held_ticks=world.held_ticks,
            cold_ticks=world.cold_ticks,
            on_time_share=world.on_time_share,
        )
        self.rent, self._most = world.standby.rent, world.standby.max
        hold_ticks = math.ceil(world.cold_start_s / self.rent / world.tick_s - 1e-9)
        self.standing, self.moved = np.zeros((2, lanes))
        rows = min(hold_ticks, MOST_TICKS) if self._most else 1
        self._parked = np.zeros((rows, lanes))  # a ring: who stands by, by the tick of parking

    def scale(self, part: slice, want: Floats) -> None:
        """Wake or launch what is lacking; what is too many stands by or drains."""
        if not self._most:
            super().scale(part, want)
            return
        lacking = want - self.ready[part] - self.starting[part]
        parked = np.clip(-lacking - self.starting[part], 0.0, self._most)  # those that start are no use
        woken = self._take(part, np.maximum(lacking, 0.0), oldest=False)
        self.ready[part] += woken
        super().scale(part, want)
        self.drained[part] -= parked
        self._settle(part, parked, woken)

    def rest(self, part: slice) -> None:
        """Nothing else is wanted: who has stood by for long enough drains."""
        if self._most:
            none = np.zeros(self.standing[part].shape)
            self._settle(part, none, none)

    def _settle(self, part: slice, parked: Floats, woken: Floats) -> None:
        row = self._parked[self.at % len(self._parked), part]
        gone = row.copy()  # their time is over
        row[:] = parked
        crowd = np.maximum(self.standing[part] + parked - woken - gone - self._most, 0.0)
        gone += self._take(part, crowd, oldest=True)
        self.drained[part] += gone
        change = parked - woken - gone
        self.standing[part] += change
        self.moved[part] += change

    def _take(self, part: slice, most: Floats, *, oldest: bool) -> Floats:
        """Up to `most` [part's lanes] of those that stand by, the last parked first or last; how many those were."""
        taken = np.zeros(len(most))
        rows = (self.at - np.arange(len(self._parked)) - (0 if oldest else 1)) % len(self._parked)
        for at in np.flatnonzero(most):
            column = self._parked[:, part.start + int(at)]
            there = column[rows[::-1] if oldest else rows]
            some = np.clip(most[at] - (np.cumsum(there) - there), 0.0, there)
            column[rows[::-1] if oldest else rows] -= some
            taken[at] = some.sum()
        return taken
