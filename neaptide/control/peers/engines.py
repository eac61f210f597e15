"""Autoscalers made for inference engines: llm-d's workload variant autoscaler and NVIDIA Dynamo's planner."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from neaptide.control.peers.base import ROUNDING, Peer, whole
from neaptide.control.policy import Floats, Seen, State


class Wva(Peer):
    """llm-d WVA v2, `saturation_v2/analyzer.go` and `cost_aware_optimizer.go`, one variant.

    Demand is what is in flight, a replica's capacity its slots. Required = demand / u - capacity x (ready + starting);
    if over 0, add ceil(required / capacity). Else spare = capacity x ready - demand / (u - 0.15); if over 0, remove
    floor(spare / capacity), never the last one. Shipped thresholds: .85 up, .70 down. Its engine polls every 30 s. What
    carries out its number (an HPA or KEDA of the operator's) is taken to do so at once.
    """

    name = "wva"
    every_s = 30.0
    gap = 0.15

    def __init__(self, u: ArrayLike, *, min_replicas: int = 1, max_replicas: int = 1000) -> None:
        super().__init__(u, min_replicas=min_replicas, max_replicas=max_replicas)
        if not (self.u > self.gap).all():
            raise ValueError(
                f"wva: the threshold to scale up is over {self.gap}, by which the one to scale down is lower"
            )

    def want(self, seen: Seen, state: State) -> Floats:
        current = seen.ready + seen.starting
        demand = seen.in_flight / seen.slots
        missing = demand / self.u - current
        spare = np.floor(seen.ready - demand / (self.u - self.gap) + ROUNDING)
        fewer = current - np.maximum(spare, 0.0)
        return self.bounded(np.where(missing > ROUNDING, current + whole(missing), fewer))


class Dynamo(Peer):
    """NVIDIA Dynamo's SLA planner, throughput mode (`throughput_scaling.py`), constant predictor, one pool.

    Every 180 s: max(ceil(requests predicted for the next interval / interval / what an engine serves), 1), with u x
    capacity for what an engine serves. The constant predictor says what the last interval had. Until one has passed it
    keeps what there is.
    """

    name = "dynamo"
    every_s = 180.0

    def start(self) -> State:
        return {"requests": np.zeros(self.lanes), "elapsed_s": np.zeros(1)}

    def observe(self, seen: Seen, state: State) -> None:
        state["requests"] += seen.arrivals
        state["elapsed_s"] += seen.tick_s

    def want(self, seen: Seen, state: State) -> Floats:
        requests, elapsed_s = state["requests"].copy(), float(state["elapsed_s"][0])
        state["requests"][:] = state["elapsed_s"][:] = 0.0
        if elapsed_s < self.every_s / 2:  # a simulation's first call: no interval yet
            return self.bounded(seen.ready + seen.starting)
        rate = self.predict(requests, state) / elapsed_s
        return self.bounded(whole(rate / (self.u * seen.capacity_rps)))

    def predict(self, requests: Floats, state: State) -> Floats:
        """The next interval's requests, from those of the last one."""
        return requests


class DynamoKalman(Dynamo):
    """Dynamo's planner with its Kalman predictor (`predictors.py`): level and trend, x' = F x, F = [[1, 1], [0, 1]],
    Q = diag(1, 0.1), R = 10, P = 1000 I at first; the level starts at the first interval that has requests. It sees
    requests an interval, and its prediction is the level one step ahead.
    """

    name = "dynamo-kalman"
    q_level, q_trend, r = 1.0, 0.1, 10.0
    p_first = 1000.0

    def start(self) -> State:
        kalman = np.zeros((5, self.lanes))  # level, trend, P00, P01, P11
        kalman[[2, 4]] = self.p_first
        return super().start() | {"kalman": kalman, "known": np.zeros(self.lanes)}

    def predict(self, requests: Floats, state: State) -> Floats:
        kalman, known = state["kalman"], state["known"]
        np.copyto(kalman, self._updated(kalman, requests), where=known > 0)
        fresh = (known == 0) & (requests > 0)
        np.copyto(kalman[0], requests, where=fresh)
        known[fresh] = 1.0
        np.copyto(kalman, self._ahead(kalman), where=known > 0)
        ahead: Floats = np.maximum(kalman[0], 0.0)
        return ahead

    def _updated(self, kalman: Floats, seen: Floats) -> Floats:
        level, trend, p00, p01, p11 = kalman
        k0, k1 = p00 / (p00 + self.r), p01 / (p00 + self.r)
        off = seen - level
        return np.stack([level + k0 * off, trend + k1 * off, (1 - k0) * p00, (1 - k0) * p01, p11 - k1 * p01])

    def _ahead(self, kalman: Floats) -> Floats:
        level, trend, p00, p01, p11 = kalman
        return np.stack([level + trend, trend, p00 + 2 * p01 + p11 + self.q_level, p01 + p11, p11 + self.q_trend])
