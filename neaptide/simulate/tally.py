"""What a fluid run did, stretch by stretch: sums over a few minutes of the clock, a lane each."""

from __future__ import annotations

import numpy as np

from neaptide.control.policy import Floats
from neaptide.simulate.arrivals import DAY_S
from neaptide.simulate.fluid import Days
from neaptide.simulate.pooled import PooledLanes

STRETCHES_S = (300, 900, 1800, 3600)
MOST_STRETCHES = 3000
PAID, ARRIVALS, LATE, LAUNCHES, DRAINS, STANDBY = range(6)


class Tally:
    """The `watch` of a run. Its stretches begin with the clock's days, so that a log that begins at noon has days too:
    the run's own are counted from its first tick."""

    def __init__(self, tick_s: float, start_s: float, ticks: int, lanes: int) -> None:
        span_s = ticks * tick_s
        fits = [s for s in STRETCHES_S if span_s / s <= MOST_STRETCHES]
        self.stretch_s = float(fits[0] if fits else STRETCHES_S[-1])
        self.tick_s = tick_s
        self.first_day = int(start_s // DAY_S)
        middles = start_s + (np.arange(ticks) + 0.5) * tick_s
        self._at = ((middles - self.first_day * DAY_S) // self.stretch_s).astype(np.int64).tolist()
        self.sums = np.zeros((self._at[-1] + 1, 6, lanes))

    def __call__(self, tick: int, lanes: PooledLanes) -> None:
        sums = self.sums[self._at[tick]]
        paid = sums[PAID]  # what there was before this tick's launches and drains
        paid += lanes.ready
        paid += lanes.starting
        paid += lanes.drained
        paid -= lanes.launched
        stood = lanes.standing - lanes.moved
        paid += lanes.moved
        paid += lanes.rent * stood
        sums[STANDBY] += stood
        sums[ARRIVALS] += lanes.arrivals
        sums[LATE] += lanes.late
        sums[LAUNCHES] += lanes.launched
        sums[DRAINS] += lanes.drained

    def days(self, lanes: slice) -> Days:
        """[days of the clock, lanes], from `first_day` on."""
        edges = np.arange(0, len(self.sums), round(DAY_S / self.stretch_s))
        sums = np.add.reduceat(self.sums[:, :, lanes], edges, axis=0)
        sums[:, [PAID, STANDBY]] *= self.tick_s
        return Days(*(sums[:, i] for i in (PAID, ARRIVALS, LATE, LAUNCHES, DRAINS, STANDBY)))

    def times(self) -> Floats:
        """When each stretch begins, on the clock; the first one may begin before the run does."""
        begins: Floats = self.first_day * DAY_S + np.arange(len(self.sums), dtype=np.float64) * self.stretch_s
        return begins
