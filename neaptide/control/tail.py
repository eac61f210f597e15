"""Many small models at once: how long each keeps its replica, which share one, which are never let go.

What it costs to keep a model's replica for a while, and how many requests are late then, is known from its past days
(simulate/tail.py computes it). A price on a late request, the same for all, then makes every model's choice: the one of
least cost + price x late. The price is the lowest at which the total is allowed, so that seconds are spent where they
help most requests; a model that is hardly asked for is let go, however many of its own few are late.
docs/decisions/0026 has what was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neaptide.control.policy import Floats

KEEP_S = (0.0, 15.0, 30.0, 60.0, 90.0, 150.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0, 9600.0, np.inf)  # inf: always on
HEADROOM = (0.0, 0.15, 0.3, 0.45)  # of the slots taken, kept free before a further replica is launched
CAUTION = 0.75  # of the allowed late requests is planned for: other days are other days
UNSEEN = 1 / 7  # what the mean model weighs beside each one's own past, for those that have hardly any
SEARCH_STEPS = 60
CHEAPEST_S, DEAREST_S = 1e-3, 1e6  # of a late request, in seconds of a replica


class Chosen(NamedTuple):
    options: NDArray[np.int64]  # [models] index into each one's options
    price_s: float  # of a late request, in seconds of a replica
    late: float  # requests, expected


def choose(cost_s: Sequence[Floats], late: Sequence[Floats], allowed: float) -> Chosen:
    """One option for each model, so that at most `allowed` requests are late in all, where that can be. `cost_s` and
    `late` have an array [options] a model; the first of equals is taken."""

    def at(price_s: float) -> Chosen:
        taken = [int(np.argmin(cost + price_s * n)) for cost, n in zip(cost_s, late, strict=True)]
        total = float(sum(n[option] for n, option in zip(late, taken, strict=True)))
        return Chosen(np.array(taken, dtype=np.int64), price_s, total)

    cheap = at(0.0)
    if cheap.late <= allowed:
        return cheap
    low, high = np.log(CHEAPEST_S), np.log(DEAREST_S)
    best = at(DEAREST_S)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        found = at(float(np.exp(middle)))
        if found.late <= allowed:
            high, best = middle, found
        else:
            low = middle
    return best


def with_unseen(values: Floats, weight: float = UNSEEN) -> Floats:
    """[models, options]: each with some of the mean one added, so that one never seen is taken for it."""
    found: Floats = values + weight * values.mean(axis=0)
    return found


def pools(busy: NDArray[np.bool_], most: int) -> tuple[tuple[int, ...], ...]:
    """Which models share a replica: at most `most` a pool, each model in one. `busy` [models, windows]: when each was
    asked for. A pool begins with the busiest that is left and takes in turn the one whose busy time lies most within
    its own: what they share is what is saved."""
    if most < 1:
        raise ValueError(f"a pool of {most} models")
    left = sorted(range(len(busy)), key=lambda model: (-int(busy[model].sum()), model))
    found = []
    while left:
        pool = [left.pop(0)]
        on = busy[pool[0]].copy()
        while left and len(pool) < most:
            shared = (busy[left] & on).sum(axis=1)
            nearest = left.pop(int(np.argmax(shared)))  # the busiest of equals
            on |= busy[nearest]
            pool.append(nearest)
        found.append(tuple(sorted(pool)))
    return tuple(found)
