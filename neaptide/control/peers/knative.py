"""Knative Serving's pod autoscaler (KPA)."""

from __future__ import annotations

import numpy as np

from neaptide.control.peers.base import ROUNDING, Peer, whole
from neaptide.control.policy import Floats, Seen, State, mean_window


class Knative(Peer):
    """Knative Serving, `pkg/autoscaler/scaling/autoscaler.go`: requests in flight.

    Over the stable window (60 s) and the panic window (6 s): ceil(mean / target), kept within [floor(ready / 2),
    1000 ready], ready at least 1. Panic begins when the panic window's unbounded count / ready >= 2 and ends when
    that was last so more than 60 s ago; in it the count is the highest of either window since it began. It starts in
    panic where more than 1 is ready. To 0 after 30 s more at 0 (scale-to-zero-grace-period); from 0 with any request.
    Every 2 s, or at every tick of a slower world, whose panic window then is a whole number of ticks, at least one.
    """

    name = "knative"
    every_s = 2.0
    never_zero = False
    window_s, panic_s = 60.0, 6.0  # stable and panic window
    panic_ratio = 2.0  # panic-threshold-percentage 200
    up_rate, down_rate = 1000.0, 2.0  # max-scale-up-rate, max-scale-down-rate
    grace_s = 30.0

    def start(self) -> State:
        never = np.full(self.lanes, -np.inf)
        return {"panic_s": never, "panic_count": np.zeros(self.lanes), "zero_s": -never, "began": np.zeros(1)}

    def want(self, seen: Seen, state: State) -> Floats:
        if not state["began"][0]:
            self._begin(seen, state)
        target = self.u * seen.slots
        ready = np.maximum(seen.ready, 1.0)
        stable = whole(mean_window(state, self.signal, self.window_s, seen.tick_s) / target)
        burst = whole(mean_window(state, self.signal, self.panic_s, seen.tick_s) / target)
        np.copyto(state["panic_s"], seen.now_s, where=burst >= self.panic_ratio * ready)
        if self.high > self.up_rate:  # or else what 1 ready replica may grow to is over the bound anyhow
            stable, burst = np.minimum(stable, self.up_rate * ready), np.minimum(burst, self.up_rate * ready)
        stable = np.maximum(stable, np.floor(ready / self.down_rate))
        highest = np.maximum(state["panic_count"], burst, out=state["panic_count"])
        np.maximum(highest, stable, out=highest)
        highest *= state["panic_s"] >= seen.now_s - self.window_s - ROUNDING
        count = self.bounded(np.maximum(highest, stable))
        return count if self.low > 0 else self._graced(count, seen, state)

    def _begin(self, seen: Seen, state: State) -> None:
        """A new autoscaler has no history: it starts in panic, so that it does not scale down for want of one."""
        state["began"][0] = 1.0
        np.copyto(state["panic_s"], seen.now_s, where=seen.ready > 1)
        state["panic_count"][:] = np.where(seen.ready > 1, seen.ready, 0.0)

    def _graced(self, count: Floats, seen: Seen, state: State) -> Floats:
        since = state["zero_s"]
        since[:] = np.where(count == 0, np.minimum(since, seen.now_s), np.inf)
        wait = (count == 0) & (seen.now_s - since < self.grace_s - ROUNDING)
        return np.where(wait, np.minimum(seen.ready + seen.starting, self.high), count)
