"""The fluid tier: work is a fluid, first in, first out; all policies, configurations and seeds go over the trace side
by side, a lane each. docs/decisions/0020 has the world's definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neaptide.control.policy import Floats, Policy, State
from neaptide.simulate.arrivals import DAY_S
from neaptide.simulate.pooled import PooledLanes
from neaptide.simulate.world import World


@dataclass(frozen=True)
class Entry:
    """A policy in a run: its lanes see the arrivals of `seeds` (one index a lane, into the rows of the counts)."""

    policy: Policy
    seeds: NDArray[np.int64]


@dataclass(frozen=True)
class Days:
    """What a run found, [days, lanes] of one entry."""

    replica_s: Floats  # paid, from launch on
    arrivals: Floats
    late: Floats
    launches: Floats
    drains: Floats
    standby_s: Floats  # that replicas stood by; their rent is in replica_s

    def over(self, first: int, last: int) -> Totals:
        """Both days inclusive, counted from the run's first day."""
        days = slice(first, last + 1)
        arrivals, late = self.arrivals[days].sum(0), self.late[days].sum(0)
        return Totals(
            replica_hours=self.replica_s[days].sum(0) / 3600,
            attainment=1 - late / np.maximum(arrivals, 1e-9),
            scale_events=self.launches[days].sum(0) + self.drains[days].sum(0),
        )


@dataclass(frozen=True)
class Totals:
    replica_hours: Floats
    attainment: Floats  # the share of requests that were not late
    scale_events: Floats  # replicas launched or drained


def run(
    world: World,
    capacity_rps: float,
    counts: NDArray[np.float64],
    entries: Sequence[Entry],
    *,
    start_s: float = 0.0,
    watch: Callable[[int, PooledLanes], None] | None = None,
) -> list[Days]:
    """Every entry over `counts` [seeds, ticks]; days are counted from `start_s`. At first there are as many replicas as
    the first ten minutes need. `watch(tick, lanes)` is called at each tick's end."""
    slices, lane_seeds = _lanes(entries)
    lanes = PooledLanes(world, capacity_rps, len(lane_seeds))
    first = counts[:, : round(600 / world.tick_s)].mean(axis=1) / world.tick_s
    lanes.ready[:] = np.ceil(first / capacity_rps)[lane_seeds]
    steps = [_Step(e.policy, part, lanes, world, capacity_rps) for e, part in zip(entries, slices, strict=True)]
    ticks = counts.shape[1]
    per_day = round(DAY_S / world.tick_s)
    sums = np.zeros((-(-ticks // per_day), 6, len(lane_seeds)))
    by_tick = np.ascontiguousarray(counts.T[:, lane_seeds], dtype=np.float64)
    for tick in range(ticks):
        lanes.work(by_tick[tick])
        day = sums[tick // per_day]
        day[0] += lanes.ready
        day[0] += lanes.starting
        day[0] += lanes.rent * lanes.standing
        day[5] += lanes.standing
        day[1] += lanes.arrivals
        day[2] += lanes.late
        lanes.launched[:] = lanes.drained[:] = lanes.moved[:] = 0.0
        now_s = start_s + (tick + 1) * world.tick_s
        for step in steps:
            step.take(now_s)
        day[3] += lanes.launched
        day[4] += lanes.drained
        if watch is not None:
            watch(tick, lanes)
    sums[:, [0, 5]] *= world.tick_s
    return [Days(*(sums[:, i, part] for i in range(6))) for part in slices]


class _Step:
    """One policy's share of a tick."""

    def __init__(self, policy: Policy, part: slice, lanes: PooledLanes, world: World, capacity_rps: float) -> None:
        self._policy, self._part, self._lanes = policy, part, lanes
        self._state: State = policy.start()
        self._next_s = 0.0
        self._seen = lanes.seen(part, world.tick_s, capacity_rps, world.cold_start_s, world.slack_s)

    def take(self, now_s: float) -> None:
        seen = self._seen
        seen.now_s = now_s
        self._policy.observe(seen, self._state)
        if now_s >= self._next_s:
            self._next_s = now_s + self._policy.every_s - 1e-9
            self._lanes.scale(self._part, self._policy.want(seen, self._state))
        else:
            self._lanes.rest(self._part)


def _lanes(entries: Sequence[Entry]) -> tuple[list[slice], NDArray[np.int64]]:
    slices, at = [], 0
    for entry in entries:
        slices.append(slice(at, at + len(entry.seeds)))
        at += len(entry.seeds)
    return slices, np.concatenate([e.seeds for e in entries])
