"""What a scaling policy sees and says. The loop calls it with one lane; the simulator with many at once, a lane being
one configuration of the policy on one seed of the arrivals. Time comes in with `Seen`, what is remembered with `state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
State = dict[str, Floats]  # arrays whose last axis is the lane; changed in place by `want`


@dataclass(slots=True)
class Seen:
    """One model at one tick. Arrays have one element a lane; counts may be fractional (fluid)."""

    now_s: float  # days begin at multiples of 86,400: daily patterns lean on it
    tick_s: float  # since the last tick
    arrivals: Floats  # requests that came within the tick
    in_flight: Floats  # running or waiting
    waiting: Floats
    ready: Floats  # replicas that take requests
    starting: Floats  # replicas launched and not ready
    capacity_rps: float  # what one replica serves within the goal
    slots: float  # requests that one replica runs at once
    cold_start_s: float
    slack_s: float = 2.0  # a request may wait so long


class Policy(Protocol):
    name: str
    every_s: float  # how often it acts
    lanes: int

    def start(self) -> State:
        """What it remembers at the beginning."""

    def observe(self, seen: Seen, state: State) -> None:
        """Take note of a tick; called every tick, before `want`."""

    def want(self, seen: Seen, state: State) -> Floats:
        """Replicas wanted, starting ones included; called every `every_s`. Whole numbers, 0 or more."""


def mean_window(state: State, name: str, seconds: float, tick_s: float) -> Floats:
    """The mean of the last `seconds` noted under `name`; see `note`. Slices, since a list of rows is copied."""
    rows = state[name]
    at, noted = int(state[name + ".at"][0]), int(state[name + ".n"][0])
    ticks = max(1, min(len(rows), round(seconds / tick_s), noted))
    if ticks == 1:
        total = rows[at - 1]
    elif ticks == len(rows):
        total = np.add.reduce(rows, axis=0)
    elif ticks <= at:
        total = np.add.reduce(rows[at - ticks : at], axis=0)
    else:
        total = np.add.reduce(rows[:at], axis=0) + np.add.reduce(rows[at - ticks :], axis=0)
    mean: Floats = total / ticks
    return mean


def ring(state: State, name: str, seconds: float, tick_s: float, lanes: int) -> None:
    """Room for the last `seconds` of a signal."""
    state[name] = np.zeros((max(1, round(seconds / tick_s)), lanes))
    state[name + ".at"], state[name + ".n"] = np.zeros(1), np.zeros(1)


def note(state: State, name: str, value: Floats) -> None:
    rows = state[name]
    at = int(state[name + ".at"][0])
    rows[at] = value
    state[name + ".at"][0] = (at + 1) % len(rows)
    state[name + ".n"][0] += 1
