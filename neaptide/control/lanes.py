"""The fluid service: work is a fluid, first in, first out; replicas start, serve and leave; a lane each.

The simulator runs policies over it, and a live decision imagines with it what another choice would have led to.
docs/decisions/0020 has the world's definition.
"""

from __future__ import annotations

import numpy as np

from neaptide.control.policy import Floats, Seen, State

ARRAYS: tuple[str, ...] = (
    "ready",
    "starting",
    "queue",
    "in_flight",
    "arrivals",
    "arrived",
    "started",
    "counted",
    "late",
    "launched",
)
ARRAYS += ("drained", "held", "coming")


class Lanes:
    """The state of all lanes; arrays are changed in place, so that the policies' views stay valid.

    A replica runs `slots` requests; one holds its slot for `held_ticks`, a start takes `cold_ticks`, and of a tick's
    arrivals `on_time_share` must have started by the tick's end."""

    def __init__(self, slots: float, lanes: int, *, held_ticks: int, cold_ticks: int, on_time_share: float) -> None:
        self.slots, self.on_time_share = slots, on_time_share
        self.ready, self.starting, self.queue, self.in_flight, self.arrivals = np.zeros((5, lanes))
        self.arrived, self.started, self.counted = np.zeros((3, lanes))  # running totals of requests
        self.late, self.launched, self.drained = np.zeros((3, lanes))  # of this tick
        self.held = np.zeros((held_ticks - 1, lanes))  # what started in the ticks before and still runs
        self.coming = np.zeros((cold_ticks + 1, lanes))  # launched, by the tick in which they are ready
        self.at = 0

    @classmethod
    def of(cls, slots: float, arrays: State) -> Lanes:
        """Goes on from `arrays()`, which stay the ones it changes; the number of the tick is the caller's to keep."""
        lanes = cls.__new__(cls)
        lanes.slots, lanes.on_time_share, lanes.at = slots, float(arrays["share"][0]), int(arrays["at"][0])
        for name in ARRAYS:
            setattr(lanes, name, arrays[name])
        return lanes

    def arrays(self) -> State:
        """All that it remembers."""
        own = {name: getattr(self, name) for name in ARRAYS}
        return own | {"at": np.array([float(self.at)]), "share": np.array([self.on_time_share])}

    def seen(self, part: slice, tick_s: float, capacity_rps: float, cold_start_s: float, slack_s: float = 2.0) -> Seen:
        """What a policy of the lanes of `part` sees: views, which stay true; its time is the caller's to set."""
        return Seen(
            now_s=0.0,
            tick_s=tick_s,
            arrivals=self.arrivals[part],
            in_flight=self.in_flight[part],
            waiting=self.queue[part],
            ready=self.ready[part],
            starting=self.starting[part],
            capacity_rps=capacity_rps,
            slots=self.slots,
            cold_start_s=cold_start_s,
            slack_s=slack_s,
        )

    @property
    def held_ticks(self) -> int:
        return len(self.held) + 1

    @property
    def cold_ticks(self) -> int:
        return len(self.coming) - 1

    def work(self, arrivals: Floats) -> None:
        """One tick: starting replicas become ready, work comes in and starts, the late are counted."""
        self.at += 1
        row = self.coming[self.at % len(self.coming)]
        self.ready += row
        self.starting -= row
        row[:] = 0.0
        self.arrivals[:] = arrivals
        due = self.arrived + self.on_time_share * arrivals
        self.arrived += arrivals
        self.queue += arrivals
        held = self.held.sum(axis=0)
        begin = np.minimum(self.queue, np.maximum(self.slots * self.ready - held, 0.0))
        self.queue -= begin
        self.started += begin
        np.maximum(due - np.maximum(self.started, self.counted), 0.0, out=self.late)
        np.maximum(self.counted, due, out=self.counted)
        np.add(held, begin, out=self.in_flight)
        self.in_flight += self.queue
        if len(self.held):
            self.held[self.at % len(self.held)] = begin

    def scale(self, part: slice, want: Floats) -> None:
        """Launch or drain what the lanes of `part` lack or have too many of."""
        change = want - self.ready[part] - self.starting[part]
        if not change.any():
            return
        up = np.maximum(change, 0.0)
        self.coming[self.at % len(self.coming), part] += up  # this row comes round again after the cold start
        self.starting[part] += up
        self.launched[part] += up
        down = np.maximum(-change, 0.0)
        if down.any():
            self.drained[part] += down
            cancelled = np.minimum(down, self.starting[part])
            for lane in np.flatnonzero(cancelled):
                self._cancel(part.start + int(lane), float(cancelled[lane]))
            self.starting[part] -= cancelled
            self.ready[part] -= down - cancelled

    def _cancel(self, lane: int, number: float) -> None:
        """Starting replicas go first, the youngest of them first."""
        for back in range(len(self.coming)):
            row = self.coming[(self.at - back) % len(self.coming)]
            gone = min(number, row[lane])
            row[lane] -= gone
            number -= gone
            if number <= 0:
                return
