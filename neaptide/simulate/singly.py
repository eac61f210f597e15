"""A comparison request by request: every policy and target alone over the same requests, tuned and reported as in the
fluid tier.

The requests are those of the file where it has single ones, else drawn from its rates, a draw a seed. The bound is the
fluid world's over the same requests; the replayed world is that one, request by request (decision 0022).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from neaptide.control.policy import Floats
from neaptide.simulate import policies
from neaptide.simulate.arrivals import DAY_S, Rates, Requests
from neaptide.simulate.bound import bound
from neaptide.simulate.compare import Comparison, Point, Question, Span, Tell, row_of, targets_of
from neaptide.simulate.fluid import Days
from neaptide.simulate.replay import Tier, replay
from neaptide.simulate.sample import sample
from neaptide.simulate.served import Served
from neaptide.simulate.settings import of_world
from neaptide.simulate.world import World

MOST_REQUESTS = 5_000_000  # replayed by default, over all policies, targets and seeds: a minute or two


def replayed_requests(rates: Rates, span: Span, question: Question, world: World) -> float:
    """How many single requests the tiers below the fluid one would have to go through."""
    begins = rates.start_s + np.arange(len(rates.rates)) * rates.window_s
    requests = float(rates.rates[begins < span.end_s].sum() * rates.window_s)
    points = sum(len(targets) for _, targets in targets_of(question, world, world.replicas_at_peak))
    return requests * points * len(question.seeds)


def singly(
    found: Comparison, tier: Tier, recorded: Requests | None = None, tell: Tell = lambda share: None
) -> Comparison:
    """The same comparison with what single requests met; `recorded` are on the clock of its rates."""
    seeds = found.question.seeds
    bounds = []
    served: dict[int, list[Served]] = {at: [] for at in range(len(found.points))}
    steps = len(seeds) * len(found.points)
    for nth, seed in enumerate(seeds):
        requests = recorded or sample(found.rates, seed, found.span.start_s, found.span.end_s, found.world.tick_s)
        bounds.append(bound(found.world, found.capacity_rps, _counts(found, requests)))
        for at, point in enumerate(found.points):
            done = nth * len(found.points) + at
            served[at].append(_replayed(found, point, tier, seed, requests, _part(tell, done, steps)))
    points = tuple(_point(found, point, served[at]) for at, point in enumerate(found.points))
    rows = tuple(row_of(row.name, points, found.question, found.world, found.peak) for row in found.rows)
    return replace(found, tier=tier, points=points, rows=rows, bounds=tuple(bounds))


def _part(tell: Tell, done: int, steps: int) -> Tell:
    return lambda share: tell((done + share) / steps)


def _counts(found: Comparison, requests: Requests) -> Floats:
    """[ticks] of the reported days."""
    tick_s, from_s, to_s = found.world.tick_s, found.span.from_s, found.span.to_s
    ticks = round((to_s - from_s) / tick_s)
    inside = requests.t_s[(requests.t_s >= from_s) & (requests.t_s < to_s)]
    at = np.minimum(((inside - from_s) // tick_s).astype(np.int64), ticks - 1)
    return np.bincount(at, minlength=ticks).astype(np.float64)


def _replayed(found: Comparison, point: Point, tier: Tier, seed: int, requests: Requests, tell: Tell) -> Served:
    policy = policies.build(point.policy, [point.target], found.peak)
    setup = of_world(found.world, found.capacity_rps)
    span = found.span
    return replay(requests, setup, policy, tier=tier, seed=seed, from_s=span.start_s, to_s=span.end_s, progress=tell)


def _point(found: Comparison, point: Point, runs: list[Served]) -> Point:
    count = len(point.days.arrivals)
    columns = [_days(run, point.first_day, count, found.world.tick_s) for run in runs]
    days = Days(*(np.stack(column, axis=1) for column in zip(*columns, strict=True)))
    p99_s = float(np.mean([_p99(found, run) for run in runs]))
    return replace(point, days=days, p99_ttft_s=p99_s if math.isfinite(p99_s) else None)


def _p99(found: Comparison, run: Served) -> float:
    """Of the reported requests that were served; NaN where none was."""
    waited = run.ttft_s[(run.t_s >= found.span.from_s) & (run.t_s < found.span.to_s)]
    waited = waited[~np.isnan(waited)]
    return float(np.quantile(waited, 0.99)) if len(waited) else math.nan


def _days(run: Served, first_day: int, days: int, tick_s: float) -> tuple[Floats, ...]:
    """Each [days]: replica-seconds, arrivals, late ones, launches and drains (from tick to tick, netted), seconds that
    replicas stood by."""
    came = (run.t_s // DAY_S).astype(np.int64) - first_day
    late = ~np.less_equal(run.ttft_s, run.slo_ttft_s)  # NaN was never served
    ticks = ((run.ticks_s - tick_s / 2) // DAY_S).astype(np.int64) - first_day
    count = (run.ready + run.starting).astype(np.float64)
    stood = run.standing.astype(np.float64)
    change = np.diff(count + stood, prepend=(count + stood)[:1])

    def by_day(days_of: np.ndarray, weights: np.ndarray | None = None) -> Floats:
        return np.bincount(days_of, weights, minlength=days).astype(np.float64)

    return (
        by_day(ticks, count + run.standby_rent * stood) * tick_s,
        by_day(came),
        by_day(came, late.astype(np.float64)),
        by_day(ticks, np.maximum(change, 0.0)),
        by_day(ticks, np.maximum(-change, 0.0)),
        by_day(ticks, stood) * tick_s,
    )
