"""What the peers' policies have in common: bounds, whole replicas, a target a lane, and how long a count was wanted."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neaptide.control.policy import Floats, Seen, State, note, ring

Mask = NDArray[np.bool_]
ROUNDING = 1e-9  # a float's noise: 3.0000000001 replicas are 3


class Peer:
    """A published policy with one target a lane.

    `u` is the load that a replica should have, as a share of what it can do: of its slots where the signal is requests
    in flight, of its capacity where it is a rate. `never_zero` is the peer's own rule, whatever `min_replicas` says.
    """

    name = "peer"
    every_s = 15.0
    never_zero = True
    signal = "in_flight"  # of Seen: noted at each tick under its own name, for the last window_s; 0: nothing is
    window_s = 0.0

    def __init__(self, u: ArrayLike, *, min_replicas: int = 1, max_replicas: int = 1000) -> None:
        self.u: Floats = np.atleast_1d(np.asarray(u, dtype=np.float64)).copy()
        if self.u.ndim != 1 or not (self.u > 0).all():
            raise ValueError(f"{self.name}: targets are one number over 0 a lane, not {u!r}")
        if not 0 <= min_replicas <= max_replicas or max_replicas < 1:
            raise ValueError(f"{self.name}: {min_replicas} to {max_replicas} replicas is no range")
        self.lanes = len(self.u)
        self.low, self.high = float(max(min_replicas, self.never_zero)), float(max_replicas)

    def start(self) -> State:
        return {}

    def observe(self, seen: Seen, state: State) -> None:
        if self.window_s:
            remember(state, self.signal, self.window_s, seen.tick_s, getattr(seen, self.signal))

    def want(self, seen: Seen, state: State) -> Floats:
        raise NotImplementedError

    def bounded(self, count: Floats) -> Floats:
        within: Floats = np.minimum(np.maximum(count, self.low), self.high)
        return within


class Static(Peer):
    """The same number of replicas at all times; the target is that number."""

    name = "static"
    never_zero = False

    def want(self, seen: Seen, state: State) -> Floats:
        return self.bounded(np.rint(self.u))


def whole(count: Floats) -> Floats:
    """Rounded up: one more replica for any part of one."""
    up: Floats = np.ceil(count - ROUNDING)
    return up


def remember(state: State, name: str, seconds: float, tick_s: float, value: Floats) -> None:
    """Note `value` in a ring of `seconds`, made at the first note: only then is the tick known."""
    if name not in state:
        ring(state, name, seconds, tick_s, len(value))
    note(state, name, value)


def is_first(state: State, name: str) -> bool:
    """Whether nothing was noted yet under `name`."""
    return name not in state or not state[name + ".n"][0]


def wanted_for(held_s: Floats, change: Floats, step_s: float) -> Floats:
    """How long a change up (over 0) or down (under 0) was wanted without a break, this decision's step included."""
    way = np.sign(change)
    longer: Floats = held_s * (held_s * way > 0) + way * step_s
    return longer
