"""The Horizontal Pod Autoscaler, and those that go through it (KEDA) or took over its stabilisation (AIBrix)."""

from __future__ import annotations

import numpy as np

from neaptide.control.peers.base import ROUNDING, Mask, Peer, is_first, remember, whole
from neaptide.control.policy import Floats, Seen, State, mean_window

TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance; AIBrix's up and down fluctuation tolerance
DOWN_WINDOW_S = 300.0  # scaleDown.stabilizationWindowSeconds; AIBrix's ScaleDownCooldownWindow


class Stabilised(Peer):
    """Scale up at once, down only to the highest recommendation of the last 300 s, this one included."""

    knows_first = True  # the replicas there are at the start count as the first recommendation

    def stabilised(self, state: State, proposal: Floats, current: Floats) -> Floats:
        higher = np.maximum(proposal, current)
        first = self.knows_first and is_first(state, "proposals")
        remember(state, "proposals", DOWN_WINDOW_S, self.every_s, higher if first else proposal)
        calm: Floats = np.minimum(higher, state["proposals"].max(axis=0))
        return calm


class Hpa(Stabilised):
    """Kubernetes HPA, autoscaling/v2, a Pods metric: requests in flight a pod.

    `replica_calculator.go`, calcPlainMetricReplicas: r = mean over ready pods / target. Pods that have no metric yet
    count as 0 if r >= 1 and as the target if r < 1; with them r' = sum / (target x pods). No change if
    |1 - r'| <= 0.1, if r' is on the other side of 1 than r, or if no pod is ready; else ceil(r' x pods). Every 15 s
    (--horizontal-pod-autoscaler-sync-period); up by max(100 %, 4 pods) in 15 s; down to the highest proposal of 300 s.
    A sync is taken to end the 15 s of the one before. Never 0: HPAScaleToZero is off by default.
    """

    name = "hpa"

    def want(self, seen: Seen, state: State) -> Floats:
        current = seen.ready + seen.starting
        calm = self.stabilised(state, self._proposal(seen, current), current)
        return self.bounded(up_limited(calm, current))

    def _proposal(self, seen: Seen, current: Floats) -> Floats:
        target = self.u * seen.slots
        full = target * current
        below = seen.in_flight < target * seen.ready
        load = seen.in_flight + np.where(below, target * seen.starting, 0.0)
        keep = np.abs(load - full) <= (TOLERANCE + ROUNDING) * full
        keep |= (load < full) & ~below
        keep |= seen.ready == 0
        return np.where(keep, current, whole(load / target))


def up_limited(count: Floats, current: Floats) -> Floats:
    """HPA's default scale-up policies: 100 % or 4 pods in 15 s, the larger."""
    return np.minimum(count, np.maximum(2.0 * current, current + 4.0))


class Keda(Stabilised):
    """KEDA 2 with the HTTP add-on's request rate (its window: 60 s).

    1 to N is an HPA on an External metric with AverageValue (GetExternalPerPodMetricReplicas): r = rate / (target x
    replicas); no change if |1 - r| <= 0.1, else ceil(rate / target); the HPA's 15 s, scale-up limit and stabilisation.
    0 to 1 is KEDA's, polled every 30 s: to 1 when the rate is over 0, to 0 when it was 0 for more than 300 s.
    """

    name = "keda"
    never_zero = False
    signal, window_s = "arrivals", 60.0
    poll_s = 30.0
    cooldown_s = 300.0

    def start(self) -> State:
        return {"active_s": np.full(self.lanes, -np.inf), "poll_s": np.full(1, -np.inf)}

    def want(self, seen: Seen, state: State) -> Floats:
        rate = mean_window(state, self.signal, self.window_s, seen.tick_s) / seen.tick_s
        current = seen.ready + seen.starting
        target = self.u * seen.capacity_rps
        full = target * current
        keep = np.abs(rate - full) <= (TOLERANCE + ROUNDING) * full
        keep |= current == 0  # an HPA is off at 0 replicas
        calm = self.stabilised(state, np.where(keep, current, whole(rate / target)), current)
        count = np.minimum(np.maximum(up_limited(calm, current), max(self.low, 1.0)), self.high)
        return count if self.low > 0 else self._or_zero(count, rate > 0, current, seen.now_s, state)

    def _or_zero(self, count: Floats, active: Mask, current: Floats, now_s: float, state: State) -> Floats:
        if now_s - state["poll_s"][0] < self.poll_s - ROUNDING:
            return np.where(current == 0, 0.0, count)
        state["poll_s"][0] = now_s
        np.copyto(state["active_s"], now_s, where=active)
        idle = now_s - state["active_s"] > self.cooldown_s
        return np.where(current == 0, active, np.where(idle, 0.0, count)).astype(np.float64)


class Aibrix(Stabilised):
    """AIBrix APA, `podautoscaler/algorithm/apa.go`: requests in flight a pod.

    v = the load of the last 180 s a pod; n = pods. v / target > 1.1: min(ceil(n v / target), ceil(2 n));
    v / target < 0.9: max(ceil(n v / target), floor(n / 2)); else n. Every 10 s; scale-up cooldown 0; down to the
    highest proposal of 300 s. Never 0: ScaleToZero is off by default.

    v is the window's mean load over the pods of now, those that start included. The code takes the mean of each
    sample's mean over the pods that answered then and multiplies it by the pods of now: with a cold start of minutes
    that multiplies n every 10 s. This is the kinder reading.
    """

    name = "aibrix"
    every_s = 10.0
    knows_first = False
    window_s = 180.0

    def want(self, seen: Seen, state: State) -> Floats:
        current = seen.ready + seen.starting
        need = mean_window(state, self.signal, self.window_s, seen.tick_s) / (self.u * seen.slots)
        fit = whole(need)
        up = np.where(need > (1 + TOLERANCE + ROUNDING) * current, np.minimum(fit, 2.0 * current), current)
        low = need < (1 - TOLERANCE - ROUNDING) * current
        proposal = np.where(low, np.maximum(fit, np.floor(current / 2)), up)
        return self.bounded(self.stabilised(state, proposal, current))
