"""What the day was: requests, latency, replicas, money, and whether what the demo promises has happened. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec

from neaptide.demo.records import Killed, Played, Row, Sample, Visit
from neaptide.demo.story import ATTAINMENT, CURRENCY, PRICE, SLOTS, TPOT_GOAL_S, TTFT_GOAL_S

HELD_S = 0.1  # in line
SHADOWS_S = 60.0  # of a day shorter than this shadows say nothing


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the demo is to show. `name`: of its text; `values`: for that text."""

    name: str
    kept: bool
    values: dict[str, Any] = {}


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds; amounts in `currency`; None: nothing to measure."""

    policy: str
    short: bool
    played_s: float
    sent: int
    answered: int
    held: int  # came while no replica was ready, and waited for one
    failed: int
    moved: int  # answered by another replica than the one they were first sent to
    broken: int  # of those failed: with the replica that was killed
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    from_zero_s: float | None  # to the first token, of the first request that was held
    attainment: float | None
    goal: float
    replica_s: float
    peak: int
    fixed_s: float  # replica-seconds of `peak` all the time
    price_per_hour: float
    currency: str
    cost: float
    fixed_cost: float
    ups: int
    downs: int
    killed: Killed | None
    capacity_rps: float
    promises: tuple[Promise, ...]
    shadows: tuple[dict[str, Any], ...] = ()

    @property
    def saved(self) -> float:
        """Share of the fixed cost."""
        return 1.0 - self.replica_s / self.fixed_s if self.fixed_s else 0.0

    @property
    def kept(self) -> bool:
        return all(p.kept for p in self.promises)

    def a_day(self, amount: float) -> float:
        """As much for 24 hours of this."""
        return amount * 86400.0 / self.played_s if self.played_s else 0.0


def bill(played: Played) -> Bill:
    visits, seen = played.visits, played.seen
    rows = {row.request_id: row for row in played.rows}
    ttfts = sorted(v.ttft_s for v in visits if v.ttft_s is not None)
    failed = [v for v in visits if v.error]
    broken = [v for v in failed if _with_the_killed(v, rows, seen.killed)]
    waited = [v for v in visits if is_held(v, rows, seen.samples)]
    paid_s = replica_seconds(seen.samples, played.played_s)
    peak = max((s.ready + s.starting for s in seen.samples), default=0)
    fixed_s = peak * played.played_s
    made = Bill(
        policy=played.story.policy, short=played.story.short, played_s=played.played_s,
        sent=len(visits), answered=len(visits) - len(failed), held=len(waited), failed=len(failed), broken=len(broken),
        moved=sum(not v.error and v.request_id in rows and len(rows[v.request_id].replicas) > 1 for v in visits),
        ttft_p50_s=quantile(ttfts, 0.5), ttft_p95_s=quantile(ttfts, 0.95),
        from_zero_s=next((v.ttft_s for v in waited if v.ttft_s is not None), None),
        attainment=sum(is_good(v) for v in visits) / len(visits) if visits else None, goal=ATTAINMENT,
        replica_s=paid_s, peak=peak, fixed_s=fixed_s, price_per_hour=PRICE, currency=CURRENCY,
        cost=paid_s / 3600 * PRICE, fixed_cost=fixed_s / 3600 * PRICE,
        ups=sum(d.after > d.before for d in seen.decided), downs=sum(d.after < d.before for d in seen.decided),
        killed=seen.killed, capacity_rps=seen.samples[-1].capacity_rps if seen.samples else float(SLOTS),
        promises=(), shadows=tuple(played.shadows) if played.story.day_s >= SHADOWS_S else (),
    )  # fmt: skip
    return msgspec.structs.replace(made, promises=promises(made, played, rows))


def promises(made: Bill, played: Played, rows: Mapping[str, Row]) -> tuple[Promise, ...]:
    """What a day is to show. Under a policy of the caller's choice nobody promises that it shrinks in minutes."""
    seen, killed = played.seen, made.killed
    untold = sum(v.request_id not in rows for v in played.visits)
    elsewhere = made.failed - made.broken
    back_s = killed.back_s - killed.at_s if killed and killed.back_s is not None else None
    out = [
        Promise(name="zero", kept=bool(made.held) and made.from_zero_s is not None and _began_at_zero(seen.samples),
                values={"held": made.held, "seconds": made.from_zero_s}),
        Promise(name="grew", kept=made.peak > 1 and made.ups > 0, values={"peak": made.peak, "ups": made.ups}),
        Promise(name="kill", kept=back_s is not None,
                values={"replica": killed.replica if killed else "-", "broken": made.broken,
                        "seconds": back_s}),
        Promise(name="lost", kept=elsewhere == 0 and made.sent > 0, values={"failed": elsewhere, "sent": made.sent}),
        Promise(name="rows", kept=untold == 0, values={"missing": untold, "sent": made.sent}),
    ]  # fmt: skip
    if not made.short and made.policy == "thresholds":
        last = seen.samples[-1] if seen.samples else None
        out.insert(2, Promise(name="ebb", kept=made.downs > 0 and last is not None and last.ready + last.starting == 0,
                              values={"downs": made.downs, "left": last.ready if last else 0}))  # fmt: skip
    return tuple(out)


# --- measures ---------------------------------------------------------------------------------------------------------


def is_good(visit: Visit) -> bool:
    """Answered, within both goals."""
    in_time = visit.ttft_s is not None and visit.ttft_s <= TTFT_GOAL_S
    return not visit.error and in_time and (visit.tpot_s is None or visit.tpot_s <= TPOT_GOAL_S)


def is_held(visit: Visit, rows: Mapping[str, Row], samples: Sequence[Sample]) -> bool:
    """It came while none was ready, as last seen, and stood in line."""
    row = rows.get(visit.request_id)
    at = bisect_right(samples, visit.at_s, key=lambda s: s.at_s) - 1
    none_ready = samples[max(at, 0)].ready == 0 if samples else False
    return none_ready and row is not None and row.queued_s >= HELD_S


def replica_seconds(samples: Sequence[Sample], until_s: float) -> float:
    """What was paid for: each sample holds until the next one, the first from the begin, the last until the end."""
    if not samples:
        return 0.0
    edges = [0.0, *(s.at_s for s in samples[1:]), max(until_s, samples[-1].at_s)]
    return sum(s.paid * (b - a) for s, (a, b) in zip(samples, pairwise(edges), strict=True))


def quantile(values: Sequence[float], share: float) -> float | None:
    """Of sorted values: the smallest that `share` of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def _with_the_killed(visit: Visit, rows: Mapping[str, Row], killed: Killed | None) -> bool:
    """It ran on the replica that was killed, when it was killed. Its successor may bear the same name."""
    row = rows.get(visit.request_id)
    if killed is None or row is None or killed.replica not in row.replicas:
        return False
    return visit.at_s <= killed.at_s <= visit.end_s + 1.0


def _began_at_zero(samples: Sequence[Sample]) -> bool:
    return bool(samples) and samples[0].ready + samples[0].starting == 0
