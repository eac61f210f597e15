"""What a small model costs that keeps its replica for a while: closed form over sorted arrival times, no ticks.

    levels    the k-th replica of a model is a level: it serves the requests that find the slots of those below it
              taken, as in a loss system. A level is called for by what it serves, and before that by each request that
              finds more than a share of the slots below it taken (headroom).
    serve     called for, a level starts; it is ready a cold start later, serves, and stays until it has been idle for
              `keep_s`. Requests that came before it was ready wait; those in time go first, the late ones in waves of
              `slots` before the replica may leave.

Levels depend on arrivals alone, so that each policy goes over the same ones. docs/decisions/0026 has the world.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neaptide.simulate.arrivals import Floats, Ints

MOST_LEVELS = 1000


@dataclass(frozen=True, slots=True)
class Shop:
    """One replica of the tail's world; seconds."""

    slots: int
    cold_start_s: float = 120.0
    service_s: float = 10.0
    slack_s: float = 2.0


class Level(NamedTuple):
    served: Floats  # [requests] sorted arrival times
    calls: Floats  # [calls] sorted times at which it is called for; those served are among them
    begins: Floats  # [stretches] first calls of stretches without a pause longer than the service
    ends: Floats  # [stretches] their last calls


class Paid(NamedTuple):
    """Of one or more levels over some time."""

    replica_s: float = 0.0
    late: int = 0
    starts: int = 0
    requests: int = 0

    def plus(self, other: Paid) -> Paid:
        return Paid(self[0] + other[0], self[1] + other[1], self[2] + other[2], self[3] + other[3])


def levels(t_s: Floats, shop: Shop, headrooms: Sequence[float] = (0.0,)) -> dict[float, list[Level]]:
    """Of one model's sorted arrivals, for each headroom. A level above the first is called for when more than
    1 - headroom of the slots below it are taken."""
    taken = in_flight(t_s, shop.service_s)
    split = _split(t_s, shop)
    first = [level(t_s[split[0]], t_s, shop)] if split else []
    found = {}
    for headroom in headrooms:
        hot = np.flatnonzero(taken > (1.0 - headroom) * shop.slots + 1e-9)
        found[headroom] = first + _further(t_s, taken, hot, split, shop, headroom)
    return found


def _split(t_s: Floats, shop: Shop) -> list[Ints]:
    """[levels]: which requests each serves."""
    found: list[Ints] = []
    rest = np.arange(len(t_s))
    while len(rest):
        if len(found) == MOST_LEVELS:
            raise ValueError(f"more than {MOST_LEVELS} replicas of {shop.slots} slots")
        free = finds_slot(t_s[rest], shop)
        found.append(rest[free])
        rest = rest[~free]
    return found


def _further(t_s: Floats, taken: Ints, hot: Ints, split: list[Ints], shop: Shop, headroom: float) -> list[Level]:
    found: list[Level] = []
    while True:
        below = (len(found) + 1) * shop.slots
        hot = hot[taken[hot] > (1.0 - headroom) * below + 1e-9]
        mine = split[len(found) + 1] if len(found) + 1 < len(split) else hot[:0]
        if not len(hot) and not len(mine):
            return found
        called = np.zeros(len(t_s), dtype=np.bool_)  # np.union1d made a run seven times longer
        called[hot] = called[mine] = True
        found.append(level(t_s[mine], t_s[called], shop))


def level(served: Floats, calls: Floats, shop: Shop) -> Level:
    pauses = np.diff(calls) > shop.service_s
    begins = calls[np.concatenate(([True], pauses))] if len(calls) else calls
    ends = calls[np.concatenate((pauses, [True]))] if len(calls) else calls
    return Level(served, calls, begins, ends)


def in_flight(t_s: Floats, service_s: float) -> Ints:
    """[requests]: how many run as each comes, itself included, were all to start at once."""
    return np.arange(1, len(t_s) + 1) - np.searchsorted(t_s, t_s - service_s, side="right")


def finds_slot(t_s: Floats, shop: Shop) -> NDArray[np.bool_]:
    """[requests]: whether one of the replica's slots is free as it comes. Only stretches that have more in flight than
    slots are gone through one by one."""
    free = np.ones(len(t_s), dtype=np.bool_)
    taken = in_flight(t_s, shop.service_s)
    if not len(t_s) or taken.max() <= shop.slots:
        return free
    edges = np.flatnonzero(np.diff(t_s, prepend=-np.inf) > shop.service_s)
    full = np.maximum.reduceat(taken, edges) > shop.slots
    edges = np.append(edges, len(t_s))
    for first, end in zip(edges[:-1][full].tolist(), edges[1:][full].tolist(), strict=True):
        free[first:end] = _one_by_one(t_s[first:end].tolist(), shop)
    return free


def _one_by_one(times: list[float], shop: Shop) -> list[bool]:
    ends: list[float] = [-np.inf] * shop.slots  # of what was accepted, in order; the slot that is free first
    found, slots, service_s = [], shop.slots, shop.service_s
    for now_s in times:
        free = ends[-slots] <= now_s
        if free:
            ends.append(now_s + service_s)
        found.append(free)
    return found


def serve(level: Level, keep_s: float | Floats, shop: Shop, from_s: float, to_s: float) -> Paid:
    """What the level pays and who is late in [from_s, to_s). `keep_s` is one number, or one for each stretch; infinite
    is always on."""
    first, end = np.searchsorted(level.served, [from_s, to_s])
    if np.ndim(keep_s) == 0 and np.isinf(keep_s):
        return Paid(to_s - from_s, 0, 0, int(end - first))
    launched, left = np.array(runs(level, keep_s, shop)).reshape(-1, 2).T
    paid_s = np.clip(np.minimum(left, to_s) - np.maximum(launched, from_s), 0.0, None).sum()
    edges = np.clip([launched, launched + shop.cold_start_s - shop.slack_s], from_s, to_s)
    late = np.diff(np.searchsorted(level.served, edges), axis=0).sum()
    starts = ((launched >= from_s) & (launched < to_s)).sum()
    return Paid(float(paid_s), int(late), int(starts), int(end - first))


def runs(level: Level, keep_s: float | Floats, shop: Shop) -> list[tuple[float, float]]:
    """[(launched, left)], in order. Only a stretch followed by a longer pause than is kept over can end a run: the loop
    goes over those."""
    begins, ends = level.begins.tolist(), level.ends.tolist()
    keep = np.broadcast_to(keep_s, len(begins)).tolist()
    pauses = np.append(level.begins[1:] - level.ends[:-1], np.inf)
    lasts = np.flatnonzero(pauses > shop.service_s + np.asarray(keep)).tolist()
    after = [*begins[1:], np.inf]
    found, at = [], 0
    while at < len(begins):
        ready = begins[at] + shop.cold_start_s
        waited = int(np.subtract(*np.searchsorted(level.served, [ready, begins[at]])))
        done = ready + shop.service_s * ceil(waited / shop.slots)
        end = lasts[bisect_left(lasts, bisect_right(begins, ready) - 1)]
        while (left := max(ends[end] + shop.service_s, done) + keep[end]) >= after[end]:
            end = lasts[bisect_left(lasts, end + 1)]
        found.append((begins[at], left))
        at = end + 1
    return found
