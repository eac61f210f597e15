"""Policies beside each other on the same arrivals, and beside the clairvoyant bound.

A comparison walks: rates → capacity from the tuning days → counts a tick and seed → one fluid run, all policies,
targets and seeds side by side, from the first day of the history to the last day reported → the bound over the reported
days → for NAME-tuned, the target that was cheapest on the tuning days among those that reached the SLO there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neaptide.control.peers.table import TUNED
from neaptide.control.policy import Floats
from neaptide.simulate import policies
from neaptide.simulate.arrivals import Rates, capacity, join, no_such_days
from neaptide.simulate.bound import Bound, bound
from neaptide.simulate.counts import counts
from neaptide.simulate.fluid import Days, Entry, run
from neaptide.simulate.pooled import PooledLanes
from neaptide.simulate.tally import Tally
from neaptide.simulate.world import World

Tell = Callable[[float], None]  # the share that is done, 0..1


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is compared. Days are inclusive."""

    policies: tuple[str, ...]
    first_day: int
    last_day: int
    tune: tuple[int, int] = (0, 6)
    seeds: tuple[int, ...] = (0,)
    slos: tuple[float, ...] = ()  # at which Neaptide's own policy runs too, for the price of the SLO
    capacity_rps: float | None = None  # of one replica; None: from the tuning days

    @property
    def in_sample(self) -> bool:
        """Whether a reported day is one that targets and capacity were chosen on."""
        return self.first_day <= self.tune[1] and self.tune[0] <= self.last_day


@dataclass(frozen=True)
class Measured:
    """One policy at one target over some days; arrays are [seeds]."""

    replica_hours: Floats
    requests: Floats
    late: Floats
    scale_events: Floats
    standby_hours: Floats  # their rent is in replica_hours

    @property
    def attainment(self) -> float:
        """Of all seeds' requests."""
        return max(0.0, float(1 - self.late.sum() / max(self.requests.sum(), 1e-9)))

    @property
    def hours(self) -> float:
        """Replica-hours, the seeds' mean."""
        return float(self.replica_hours.mean())


@dataclass(frozen=True)
class Point:
    """One policy at one target."""

    policy: str
    target: float
    days: Days  # [days of the clock, seeds], from the run's first
    first_day: int
    lanes: slice  # of the run's tally
    p99_ttft_s: float | None = None  # on the reported days, in a tier that has single requests

    def over(self, first: int, last: int) -> Measured:
        """Both days inclusive, as far as the run covers them."""
        found = self.days
        part = slice(max(first - self.first_day, 0), max(last - self.first_day + 1, 0))
        return Measured(
            found.replica_s[part].sum(0) / 3600,
            found.arrivals[part].sum(0),
            found.late[part].sum(0),
            found.launches[part].sum(0) + found.drains[part].sum(0),
            found.standby_s[part].sum(0) / 3600,
        )


@dataclass(frozen=True)
class Row:
    """A policy by the name it was asked for, and the point that stands for it."""

    name: str
    point: Point
    tuned: bool
    reported: Measured
    daily: Mapping[int, Measured]  # of the reported days that have requests

    @property
    def p99_ttft_s(self) -> float | None:
        return self.point.p99_ttft_s


class Span(NamedTuple):
    """On the arrivals' clock, at ticks: when all begins, the reported part, the end of the last day that matters."""

    start_s: float
    from_s: float
    to_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    world: World
    rates: Rates
    question: Question
    capacity_rps: float
    peak: float  # replicas that the busiest windows of the tuning days need
    bounds: tuple[Bound, ...]  # a seed
    rows: tuple[Row, ...]
    points: tuple[Point, ...]  # every policy at every target that was run
    tally: Tally
    span: Span
    tier: str = "fluid"

    @property
    def slo_points(self) -> tuple[Point, ...]:
        """Neaptide's own policy at each SLO that was asked for: what an SLO costs."""
        return tuple(p for p in self.points if p.policy == policies.OWN and p.target in self.question.slos)

    @property
    def bound_hours(self) -> float:
        return float(np.mean([b.replica_hours for b in self.bounds]))

    def reported(self, point: Point) -> Measured:
        return point.over(self.question.first_day, self.question.last_day)

    def tuning(self, point: Point) -> Measured:
        return point.over(*self.question.tune)

    def ratio(self, measured: Measured) -> float:
        return measured.hours / self.bound_hours

    def reached(self, measured: Measured) -> bool:
        return reached(measured, self.world.slo)


def with_history(rates: Rates, history: Rates | None) -> Rates:
    return join(history, rates) if history is not None else rates


def compare(world: World, rates: Rates, question: Question, tell: Tell = lambda share: None) -> Comparison:
    """ConfigError E124 where the arrivals lack the days, or hold no request on them."""
    own_capacity = capacity(rates, range(question.tune[0], question.tune[1] + 1), world.peak_quantile, 1.0)
    capacity_rps = question.capacity_rps or own_capacity / world.replicas_at_peak
    peak = own_capacity / capacity_rps
    span = span_of(world, rates, question)
    rows = counts_of(world, rates, question.seeds, span)
    families = targets_of(question, world, peak)
    seeds = len(question.seeds)
    entries = [_entry(family, targets, seeds, peak) for family, targets in families]
    tally = Tally(world.tick_s, span.start_s, rows.shape[1], sum(len(entry.seeds) for entry in entries))
    reported = rows[:, slice(*(round((t - span.start_s) / world.tick_s) for t in span[1:3]))]
    if not reported.sum(axis=1).all():
        raise no_such_days(rates, f"no request in days {question.first_day} to {question.last_day}")
    steps = rows.shape[1] + 2 * reported.size  # the bound's searches take about twice a run's time a tick
    run(world, capacity_rps, rows, entries, start_s=span.start_s, watch=watched(tally, steps, tell))
    bounds = []
    for at, row in enumerate(reported):
        bounds.append(bound(world, capacity_rps, row))
        tell((rows.shape[1] + 2 * (at + 1) * reported.shape[1]) / steps)
    points = _points(families, tally, seeds)
    return Comparison(
        world=world, rates=rates, question=question, capacity_rps=capacity_rps, peak=peak, bounds=tuple(bounds),
        rows=tuple(row_of(name, points, question, world, peak) for name in question.policies), points=points,
        tally=tally, span=span,
    )  # fmt: skip


def span_of(world: World, rates: Rates, question: Question) -> Span:
    """ConfigError E124 where the arrivals lack the reported days."""
    from_s, to_s = rates.span(question.first_day, question.last_day)
    start_s = math.ceil(rates.start_s / world.tick_s) * world.tick_s
    end_s = rates.span(rates.days[0], max(question.last_day, question.tune[1]))[1]
    from_s, to_s, end_s = (_floor(t, world.tick_s) for t in (from_s, to_s, end_s))
    return Span(start_s, max(start_s, from_s), to_s, end_s)


def _floor(t_s: float, tick_s: float) -> float:
    return math.floor(t_s / tick_s) * tick_s


def counts_of(world: World, rates: Rates, seeds: Sequence[int], span: Span) -> Floats:
    """[seeds, ticks] from the first day of all to the last one that matters."""
    drawn = [counts(rates, world.tick_s, seed, span.start_s, span.end_s) for seed in seeds]
    return np.stack(drawn).astype(np.float64)


def targets_of(question: Question, world: World, peak: float) -> list[tuple[policies.Family, tuple[float, ...]]]:
    """Each policy once, with all targets that its names need."""
    wanted: dict[str, dict[float, None]] = {}
    known: dict[str, policies.Family] = {}
    for name in question.policies:
        family = known.setdefault(name.removesuffix(TUNED), policies.family(name, world, peak))
        targets = family.grid if name.endswith(TUNED) else (family.default,)
        wanted.setdefault(family.name, {}).update(dict.fromkeys(targets))
    if policies.OWN in wanted:
        wanted[policies.OWN].update(dict.fromkeys(question.slos))
    return [(known[name], tuple(sorted(targets))) for name, targets in wanted.items()]


def _entry(family: policies.Family, targets: Sequence[float], seeds: int, peak: float) -> Entry:
    lanes: NDArray[np.int64] = np.tile(np.arange(seeds), len(targets))
    return Entry(policies.build(family.name, np.repeat(targets, seeds), peak), lanes)


def watched(tally: Tally, steps: int, tell: Tell) -> Callable[[int, PooledLanes], None]:
    def watch(tick: int, lanes: PooledLanes) -> None:
        tally(tick, lanes)
        if tick % 1000 == 0:
            tell(tick / steps)

    return watch


def _points(
    families: Sequence[tuple[policies.Family, tuple[float, ...]]], tally: Tally, seeds: int
) -> tuple[Point, ...]:
    keys = [(family.name, target) for family, targets in families for target in targets]
    edges = pairwise(range(0, (len(keys) + 1) * seeds, seeds))
    return tuple(
        Point(name, target, tally.days(slice(*edge)), tally.first_day, slice(*edge))
        for (name, target), edge in zip(keys, edges, strict=True)
    )


def row_of(name: str, points: Sequence[Point], question: Question, world: World, peak: float) -> Row:
    family = policies.family(name, world, peak)
    tuned = name.endswith(TUNED)
    targets = family.grid if tuned else (family.default,)
    mine = [p for p in points if p.policy == family.name and p.target in targets]
    point = best(mine, question.tune, world.slo)
    days = {day: point.over(day, day) for day in range(question.first_day, question.last_day + 1)}
    daily = {day: measured for day, measured in days.items() if measured.requests.any()}
    return Row(name, point, tuned, point.over(question.first_day, question.last_day), daily)


def best(points: Sequence[Point], tune: tuple[int, int], slo: float) -> Point:
    """The cheapest that reached the SLO on the tuning days; where none did, that of the best attainment."""

    def rank(point: Point) -> tuple[bool, float, float]:
        measured = point.over(*tune)
        good = reached(measured, slo)
        return not good, measured.hours if good else -measured.attainment, measured.hours

    return min(points, key=rank)


def reached(measured: Measured, slo: float) -> bool:
    return measured.attainment >= slo - 1e-9
