"""The clairvoyant bound of small models, each alone: exact over single requests, in logarithmic depth.

A level (tail_levels) is on or off. Holding it over a pause costs the pause, a start the cold start less the allowed
wait, leaving the last request's service; a request that comes while it is off costs a price. Each request is a 2 x 2
matrix in the (min, +) algebra, and a level's cheapest schedule is their product, which is taken in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neaptide.simulate.arrivals import Floats
from neaptide.simulate.tail_levels import Shop

DEFINITION = (
    "clairvoyant scale to zero of each model alone: a replica is paid from its launch, a pause is bridged where that "
    "costs less than a restart, a start may come as late as the allowed wait lets it, what runs at the beginning is "
    "free; with the budget, requests are late at one price for all models, the one at which the allowed share is "
    "(the Lagrangian dual: no schedule of each alone within the budget costs less)"
)
SEARCH_STEPS = 14
CHEAPEST_S, DEAREST_S = 0.01, 1e4  # of a late request, in seconds of a replica
GOLDEN = (np.sqrt(5.0) - 1) / 2


@dataclass(frozen=True)
class TailBound:
    replica_hours: float  # with the budget
    replica_hours_no_budget: float
    price_s: float  # of a late request, in seconds of a replica


def bound(served: Sequence[Floats], shop: Shop, budget: float, from_s: float, to_s: float) -> TailBound:
    """Of the levels' requests [levels][requests], those in [from_s, to_s); `budget` is how many may be late."""
    inside = [t_s[(t_s >= from_s) & (t_s < to_s)] for t_s in served]
    inside = [t_s for t_s in inside if len(t_s)]

    def dual(price: float) -> float:
        return sum(cheapest(t_s, shop, price, from_s, to_s) for t_s in inside) - price * budget

    whole = sum(cheapest(t_s, shop, np.inf, from_s, to_s) for t_s in inside)
    price, best = _highest(dual)
    return TailBound(max(best, 0.0) / 3600, whole / 3600, price)


def cheapest(t_s: Floats, shop: Shop, price: float, from_s: float, to_s: float) -> float:
    """Seconds of a replica, and `price` for each late request, of the best schedule of one level."""
    gap = np.diff(t_s, prepend=from_s)
    tail = np.minimum(shop.service_s, to_s - t_s)
    start = np.full(len(t_s), shop.cold_start_s - shop.slack_s)
    rows = [gap, start, gap + tail, np.minimum(start + tail, price)]  # to on from on, off; to off from on, off
    while len(rows[0]) > 1:
        odd = [row[-1:] for row in rows] if len(rows[0]) % 2 else [row[:0] for row in rows]
        end = len(rows[0]) // 2 * 2
        before, after = [row[0:end:2] for row in rows], [row[1:end:2] for row in rows]
        rows = [np.concatenate(pair) for pair in zip(_product(after, before), odd, strict=True)]
    return float(min(rows[2][0], rows[3][0]))


def _product(after: Sequence[Floats], before: Sequence[Floats]) -> list[Floats]:
    a, b, c, d = after
    e, f, g, h = before
    return [
        np.minimum(a + e, b + g), np.minimum(a + f, b + h), np.minimum(c + e, d + g), np.minimum(c + f, d + h),
    ]  # fmt: skip


def _highest(dual: Callable[[float], float]) -> tuple[float, float]:
    """(price, value) of a concave function of the price, by golden section over its logarithm. Where the search stops
    short of the top, the bound is only lower."""
    low, high = np.log(CHEAPEST_S), np.log(DEAREST_S)
    points = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    values = [dual(float(np.exp(point))) for point in points]
    for _ in range(SEARCH_STEPS):
        if values[0] < values[1]:
            low, points[0], values[0] = points[0], points[1], values[1]
            points[1] = low + GOLDEN * (high - low)
            values[1] = dual(float(np.exp(points[1])))
        else:
            high, points[1], values[1] = points[1], points[0], values[0]
            points[0] = high - GOLDEN * (high - low)
            values[0] = dual(float(np.exp(points[0])))
    at = int(np.argmax(values))
    return float(np.exp(points[at])), float(values[at])
