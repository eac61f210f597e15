"""Policies that act once a count was wanted for long enough without a break: Ray Serve and SkyServe. Both hold a target
of their own, at first the replicas there are.
"""

from __future__ import annotations

import numpy as np

from neaptide.control.peers.base import ROUNDING, Mask, Peer, wanted_for, whole
from neaptide.control.policy import Floats, Seen, State, mean_window


class Delayed(Peer):
    never_zero = False

    def start(self) -> State:
        return {"target": np.full(self.lanes, np.nan), "held_s": np.zeros(self.lanes)}

    def target(self, seen: Seen, state: State) -> Floats:
        if np.isnan(state["target"][0]):
            state["target"][:] = self.bounded(seen.ready + seen.starting)
        return state["target"]

    def settled(self, state: State, desired: Floats, longer: Floats, act: Mask) -> Floats:
        """The target once `desired` has taken its place where it is time to act, whose wait then starts over."""
        state["held_s"][:] = np.where(act, 0.0, longer)
        np.copyto(state["target"], desired, where=act)
        return state["target"].copy()


class Ray(Delayed):
    """Ray Serve 2.60, `serve/autoscaling_policy.py`: ongoing requests, mean of 30 s (look_back_period_s).

    ceil(current + factor x (total / target - current)) with both factors 1 is ceil(total / target), within the bounds.
    It becomes the target once more was wanted for over 30 s (upscale_delay_s), or fewer for over 600 s
    (downscale_delay_s); a decision that is neither starts both over. To 0 only from 1. While none runs, any request
    asks for 1 at once and nothing else changes. The control loop runs every 0.1 s: at every tick of a slower world.
    """

    name = "ray"
    every_s = 0.1
    window_s = 30.0
    up_delay_s, down_delay_s = 30.0, 600.0

    def want(self, seen: Seen, state: State) -> Floats:
        target, held = self.target(seen, state), state["held_s"]
        load = mean_window(state, self.signal, self.window_s, seen.tick_s)
        desired = self.bounded(whole(load / (self.u * seen.slots)))
        if self.low < 1:
            desired = np.maximum(desired, target > 1)
        longer = wanted_for(held, desired - target, max(seen.tick_s, self.every_s))
        act = (longer > self.up_delay_s + ROUNDING) | (longer < -self.down_delay_s - ROUNDING)
        if not (runs := seen.ready > 0).all():
            longer, act = np.where(runs, longer, held), act & runs
            np.maximum(target, ~runs & (load > 0), out=target)
        return self.settled(state, desired, longer, act)


class Sky(Delayed):
    """SkyServe, `sky/serve/autoscalers.py`, RequestRateAutoscaler: ceil(requests of the last 60 s / 60 s / target).

    Every 20 s; it becomes the target at the 15th decision in a row that wants more (upscale_delay_seconds 300) or the
    60th that wants fewer (downscale_delay_seconds 1200); at a target of 0 at once. At 0 SkyServe itself decides every
    5 s; here every 20 s.
    """

    name = "skyserve"
    every_s = 20.0
    signal, window_s = "arrivals", 60.0
    up_delay_s, down_delay_s = 300.0, 1200.0

    def want(self, seen: Seen, state: State) -> Floats:
        target, held = self.target(seen, state), state["held_s"]
        ring = state[self.signal]
        rate = np.add.reduce(ring, axis=0) / (len(ring) * seen.tick_s)
        desired = self.bounded(whole(rate / (self.u * seen.capacity_rps)))
        longer = wanted_for(held, desired - target, self.every_s)
        act = (longer >= self.up_delay_s - ROUNDING) | (longer <= -self.down_delay_s + ROUNDING)
        act |= target == 0
        return self.settled(state, desired, longer, act)
