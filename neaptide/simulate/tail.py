"""The long tail: a trace's small clients as models of their own, let go to zero or pooled.

    rates → the clients under a limit, a model each → their requests, a seed at a time → levels (tail_levels), of each
    model alone and of each pool as one → what each rule pays and is late → the bound of each model alone (tail_bound)

A rule says how long a first replica is kept and when further ones are launched. Those of the peers are settings;
`neaptide` chooses both on the tuning days by one price on late requests (control/tail.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neaptide.control import slo, tail
from neaptide.control.peers.table import DEFAULT_U
from neaptide.simulate.arrivals import Floats, Rates, capacity
from neaptide.simulate.tail_arrivals import Model, busy, small, warm_from_s
from neaptide.simulate.tail_bound import TailBound, bound
from neaptide.simulate.tail_levels import Level, Paid, Shop, levels, serve
from neaptide.simulate.world import World

Tell = Callable[[float], None]  # the share that is done, 0..1
Groups = tuple[tuple[int, ...], ...]  # models that share a replica
OWN, GAP = "neaptide", "gap quantile"
COLD_START_S = 120.0
KEDA_COOLDOWN_S, KNATIVE_KEEP_S = 300.0, 90.0  # stable window 60 s and grace 30 s


@dataclass(frozen=True, kw_only=True)
class TailQuestion:
    """What is compared. Days are inclusive."""

    first_day: int = 7
    last_day: int = 8
    tune: tuple[int, int] = (0, 6)
    below_rps: float = 0.5
    pool: int = 4
    seeds: tuple[int, ...] = (0,)
    capacity_rps: float | None = None  # of one replica; None: the goal's world's, from the tuning days


class Rule(NamedTuple):
    """How long the last replica is kept idle, and the share of slots kept free before a further one is launched."""

    name: str
    keep_s: float
    headroom: float


PEERS = (
    Rule("always on", np.inf, 1 - DEFAULT_U["keda"]),
    Rule("keda", KEDA_COOLDOWN_S, 1 - DEFAULT_U["keda"]),
    Rule("knative", KNATIVE_KEEP_S, 1 - DEFAULT_U["knative"]),
)


@dataclass(frozen=True)
class Plan:
    """What `neaptide` chose on the tuning days."""

    keep_s: Floats  # [groups] of the first replica
    headroom: float
    further_keep_s: float  # of the further ones
    price_s: float  # of a late request, in seconds of a replica
    late_share: float  # expected


@dataclass(frozen=True)
class Row:
    """A rule over groups of models; one entry a seed."""

    name: str
    pooled: bool
    paid: tuple[Paid, ...]

    @property
    def hours(self) -> float:
        """Replica-hours, the seeds' mean."""
        return sum(paid.replica_s for paid in self.paid) / len(self.paid) / 3600

    @property
    def attainment(self) -> float:
        """Of all seeds' requests."""
        return 1.0 - sum(paid.late for paid in self.paid) / max(sum(paid.requests for paid in self.paid), 1)


@dataclass(frozen=True)
class Tail:
    question: TailQuestion
    rates: Rates
    slo: float
    shop: Shop
    models: tuple[Model, ...]
    groups: Groups
    rows: tuple[Row, ...]
    bounds: tuple[TailBound, ...]
    plans: tuple[dict[bool, Plan], ...]  # a seed; pooled or not

    @property
    def bound_hours(self) -> float:
        return sum(b.replica_hours for b in self.bounds) / len(self.bounds)

    @property
    def bound_hours_no_budget(self) -> float:
        return sum(b.replica_hours_no_budget for b in self.bounds) / len(self.bounds)


@dataclass(frozen=True)
class Traffic:
    """One seed's levels of all groups at each headroom: [groups][levels]."""

    shop: Shop
    at: dict[float, list[list[Level]]]

    def paid(self, group: int, keep_s: float | Floats, from_s: float, to_s: float) -> Paid:
        """Of a group's first replica."""
        return serve(self.at[0.0][group][0], keep_s, self.shop, from_s, to_s) if self.at[0.0][group] else Paid()

    def further(self, headroom: float, keep_s: float, from_s: float, to_s: float) -> Paid:
        """Of all groups' further replicas."""
        found = Paid()
        for group in self.at[headroom]:
            for level in group[1:]:
                found = found.plus(serve(level, keep_s, self.shop, from_s, to_s))
        return found


def compare_tail(rates: Rates, world: World, question: TailQuestion, tell: Tell = lambda share: None) -> Tail:
    """The world's SLO, service, allowed wait and cold start. ConfigError as `small` and `Rates.span`."""
    models = small(rates, question.below_rps, question.tune)
    served_rps = question.capacity_rps or capacity(rates, days_of(question.tune))
    slots = max(1, round(world.service_s * served_rps))
    shop = Shop(slots, world.cold_start_s, world.service_s, world.slack_s)
    groups = tail.pools(busy(models, question.tune), question.pool)
    found: dict[tuple[str, bool], list[Paid]] = {}
    bounds: list[TailBound] = []
    plans: list[dict[bool, Plan]] = []
    for nth, seed in enumerate(question.seeds):
        tell(nth / len(question.seeds))
        requests = _requests(rates, models, question, seed)
        alone = traffic([(t_s,) for t_s in requests], shop)
        pooled = traffic([[requests[model] for model in group] for group in groups], shop)
        bounds.append(_bound(alone, world.slo, rates, question))
        plans.append({})
        for is_pooled, seen in ((False, alone), (True, pooled)):
            plans[-1][is_pooled] = plan(seen, world.slo, *rates.span(*question.tune))
            for name, paid in _rules(seen, plans[-1][is_pooled], world.slo, rates, question):
                found.setdefault((name, is_pooled), []).append(paid)
    rows = tuple(Row(name, is_pooled, tuple(paid)) for (name, is_pooled), paid in found.items())
    return Tail(question, rates, world.slo, shop, models, groups, rows, tuple(bounds), tuple(plans))


def days_of(span: tuple[int, int]) -> range:
    return range(span[0], span[1] + 1)


def traffic(groups: Sequence[Sequence[Floats]], shop: Shop) -> Traffic:
    """Of models that share a replica, each group's arrivals as one."""
    merged = [np.sort(np.concatenate(group)) for group in groups]
    shares = {*tail.HEADROOM, *(rule.headroom for rule in PEERS)}
    found = [levels(t_s, shop, sorted(shares)) for t_s in merged]
    return Traffic(shop, {share: [group[share] for group in found] for share in shares})


def plan(seen: Traffic, goal: float, from_s: float, to_s: float) -> Plan:
    """How long each group's first replica is kept, and what all further ones do, by what that would have cost in
    [from_s, to_s): the goal is kept there, with some caution, at least cost."""
    first = np.array([
        [seen.paid(group, keep_s, from_s, to_s)[:2] for keep_s in tail.KEEP_S] for group in range(len(seen.at[0.0]))
    ])  # fmt: skip
    more = [(headroom, keep_s) for headroom in tail.HEADROOM for keep_s in tail.KEEP_S if np.isfinite(keep_s)]
    further = np.array([seen.further(*rule, from_s, to_s)[:2] for rule in more])
    requests = sum(int(np.diff(np.searchsorted(g[0].served, [from_s, to_s]))[0]) for g in seen.at[0.0] if g)
    requests += seen.further(0.0, 0.0, from_s, to_s).requests
    first = tail.with_unseen(first)
    allowed = tail.CAUTION * (1.0 - goal) * requests
    chosen = tail.choose([*first[..., 0], further[:, 0]], [*first[..., 1], further[:, 1]], allowed)
    headroom, further_keep_s = more[chosen.options[-1]]
    keep_s = np.array(tail.KEEP_S)[chosen.options[:-1]]
    return Plan(keep_s, headroom, further_keep_s, chosen.price_s, chosen.late / max(requests, 1))


def gap_quantile(level: Level, goal: float) -> Floats:
    """[stretches] how long the live default policy (control/slo.py) would keep the last replica after each: it follows
    the gap within which the goal's share of requests comes after the one before."""
    counts = np.diff(np.searchsorted(level.calls, level.begins), append=len(level.calls))
    pauses = np.concatenate(([0.0], level.begins[1:] - level.ends[:-1]))[: len(counts)]
    keep_s, found = slo.KEEP_FIRST_S, []
    for came, pause_s in zip(counts.tolist(), pauses.tolist(), strict=True):
        missed = pause_s > keep_s
        if missed:
            keep_s *= np.exp(slo.KEEP_GAIN * goal)
        keep_s *= np.exp(-slo.KEEP_GAIN * (1.0 - goal) * (came - missed))
        keep_s = min(max(keep_s, slo.KEEP_LEAST_S), slo.KEEP_LONGEST_S)
        found.append(keep_s)
    return np.array(found)


def _requests(rates: Rates, models: Sequence[Model], question: TailQuestion, seed: int) -> list[Floats]:
    """[models][requests] of the tuning days, of the reported ones, and of what lies between or a day before."""
    tuned_from_s, tuned_to_s = rates.span(*question.tune)
    from_s, to_s = rates.span(question.first_day, question.last_day)
    from_s = min(warm_from_s(rates, from_s), tuned_from_s)
    return [model.requests(seed, from_s, max(to_s, tuned_to_s)) for model in models]


def _bound(alone: Traffic, goal: float, rates: Rates, question: TailQuestion) -> TailBound:
    from_s, to_s = rates.span(question.first_day, question.last_day)
    served = [level.served for model in alone.at[0.0] for level in model]
    requests = sum(int(np.diff(np.searchsorted(t_s, [from_s, to_s]))[0]) for t_s in served)
    return bound(served, alone.shop, (1.0 - goal) * requests, from_s, to_s)


def _rules(seen: Traffic, own: Plan, goal: float, rates: Rates, question: TailQuestion) -> Iterator[tuple[str, Paid]]:
    span = rates.span(question.first_day, question.last_day)
    groups = range(len(seen.at[0.0]))
    for rule in PEERS:
        keep_s = rule.keep_s if np.isfinite(rule.keep_s) else KEDA_COOLDOWN_S
        yield rule.name, _sum([*(seen.paid(g, rule.keep_s, *span) for g in groups),
                               seen.further(rule.headroom, keep_s, *span)])  # fmt: skip
    further = seen.further(own.headroom, own.further_keep_s, *span)
    gaps = [gap_quantile(group[0], goal) if group else 0.0 for group in seen.at[0.0]]
    yield GAP, _sum([*(seen.paid(g, gaps[g], *span) for g in groups), further])
    yield OWN, _sum([*(seen.paid(g, float(own.keep_s[g]), *span) for g in groups), further])


def _sum(parts: Sequence[Paid]) -> Paid:
    found = Paid()
    for part in parts:
        found = found.plus(part)
    return found
