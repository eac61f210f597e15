"""The clairvoyant schedule of the fluid world: what the cheapest service would have cost that knows all arrivals, pays
for its cold starts, and may be late for a share of the requests. docs/decisions/0020 has the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neaptide.control.policy import Floats
from neaptide.simulate.world import World

DEFINITION = (
    "clairvoyant schedule of the same fluid world: starts follow the smoothest path that is late for nobody, each "
    "replica is paid from its launch, a gap is bridged where that costs less than a restart; with the budget, the "
    "costliest requests are dropped by Lagrangian search until the allowed share is late"
)
SEARCH_STEPS = 24


@dataclass(frozen=True)
class Bound:
    replica_hours: float  # with the violation budget
    replica_hours_no_budget: float
    dropped: float  # the share of requests that the first one drops


def bound(world: World, capacity_rps: float, counts: NDArray[np.float64]) -> Bound:
    """Of one seed's counts [ticks]. Replicas that the first tick needs are there already, for free."""
    load = level_loads(world, capacity_rps, counts)
    requests = float(counts.sum())
    whole = schedule(world, load, np.inf)
    dear, cheap, best = 0.0, 1e3, whole
    for _ in range(SEARCH_STEPS):  # the price of a dropped request, in ticks of a replica
        price = np.sqrt(dear * cheap) if dear else cheap / 2
        found = schedule(world, load, price)
        if found.dropped <= (1 - world.slo) * requests:
            cheap, best = price, found
        else:
            dear = price
        if dear and cheap / dear < 1.002:
            break
    hours = world.tick_s / 3600
    return Bound(best.ticks * hours, whole.ticks * hours, best.dropped / max(requests, 1.0))


@dataclass(frozen=True)
class Schedule:
    ticks: float  # replicas paid, in ticks
    dropped: float  # requests
    on: NDArray[np.bool_]  # [ticks, levels]: ready; a start is paid `cold_ticks` earlier


def level_loads(world: World, capacity_rps: float, counts: NDArray[np.float64]) -> Floats:
    """[ticks, levels]: slots that the k-th replica would have in use, when starts follow the smoothest path."""
    arrived = np.cumsum(counts)
    lowest = arrived - (1 - world.on_time_share) * counts
    started = taut_string(lowest, arrived)
    before = np.concatenate([np.zeros(world.held_ticks), started[: -world.held_ticks]])
    slots = capacity_rps * world.service_s
    used = started - before
    levels = np.arange(int(np.ceil(used.max() / slots)) or 1)
    loads: Floats = np.clip(used[:, None] - slots * levels, 0.0, slots)
    loads[loads < 1e-9 * slots] = 0.0
    return loads


def schedule(world: World, load: Floats, price: float) -> Schedule:
    """Each level apart: on or off a tick, by dynamic programming. Being on costs 1, switching on the cold start, being
    off `price` a request that is not served (a request holds a slot for `held_ticks`)."""
    ticks, levels = load.shape
    lost = load / world.held_ticks
    with np.errstate(invalid="ignore"):
        off_cost = np.where(lost > 0, price * lost, 0.0)
    stay_on = np.zeros((ticks, levels), dtype=np.bool_)  # on at t: was it on before?
    stay_off = np.zeros((ticks, levels), dtype=np.bool_)
    on, off = np.zeros(levels), np.zeros(levels)
    for t in range(ticks):
        restart = off + (world.cold_ticks if t else 0)
        np.less_equal(on, restart, out=stay_on[t])
        np.less_equal(off, on, out=stay_off[t])
        on, off = np.minimum(on, restart) + 1.0, np.minimum(off, on) + off_cost[t]
    chosen = _walk_back(stay_on, stay_off, on <= off)
    starts = chosen[1:] & ~chosen[:-1]
    return Schedule(
        ticks=float(chosen.sum() + world.cold_ticks * starts.sum()), dropped=float(lost[~chosen].sum()), on=chosen
    )


def _walk_back(stay_on: NDArray[np.bool_], stay_off: NDArray[np.bool_], last: NDArray[np.bool_]) -> NDArray[np.bool_]:
    chosen = np.empty_like(stay_on)
    state = last
    for t in range(len(chosen) - 1, -1, -1):
        chosen[t] = state
        state = np.where(state, stay_on[t], ~stay_off[t])
    return chosen


def taut_string(lowest: Floats, highest: Floats) -> Floats:
    """The shortest path from the origin to the last `lowest` that stays between both, point by point; of all such paths
    it has the least peaks of its slope (for every convex cost at once)."""
    n = len(lowest)
    low, high = lowest.copy(), highest.copy()
    high[-1] = low[-1] = lowest[-1]
    path = np.empty(n)
    x, y = -1, 0.0  # where the string is fixed
    while x < n - 1:
        at, to = _next_corner(low, high, x, y)
        path[x + 1 : at + 1] = y + (to - y) * np.arange(1, at - x + 1) / (at - x)
        x, y = at, to
    return path


def _next_corner(low: Floats, high: Floats, x: int, y: float) -> tuple[int, float]:
    """Where the string from (x, y) bends next: the corridor narrows until a later point lies outside of it."""
    steepest, flattest = np.inf, -np.inf  # slopes that pass so far
    at_high = at_low = x + 1
    for i in range(x + 1, len(low)):
        run = i - x
        up, down = (high[i] - y) / run, (low[i] - y) / run
        if down > steepest:
            return at_high, float(high[at_high])
        if up < flattest:
            return at_low, float(low[at_low])
        if up <= steepest:
            steepest, at_high = up, i
        if down >= flattest:
            flattest, at_low = down, i
    return len(low) - 1, float(low[-1])
