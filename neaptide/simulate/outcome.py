"""A comparison as JSON: the fields of `neaptide simulate --json`."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from neaptide.simulate.arrivals import DAY_S
from neaptide.simulate.bound import DEFINITION
from neaptide.simulate.compare import Comparison, Measured, Point, Row

Tree = dict[str, Any]
SIGNS = {"CNY": "¥", "USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}


class Price(NamedTuple):
    """What a replica costs an hour."""

    per_hour: float
    currency: str = "CNY"

    def a_day(self, found: Comparison, measured: Measured) -> float:
        return measured.hours * self.per_hour / reported_days(found)

    def text(self, amount: float) -> str:
        sign = SIGNS.get(self.currency, self.currency + " ")
        return f"{'-' if amount < 0 else ''}{sign}{abs(amount):,.{0 if abs(amount) >= 10 else 2}f}"


def outcome(found: Comparison, price: Price | None = None) -> Tree:
    """Shares are fractions, times in seconds; means over the seeds where there are several."""
    question = found.question
    return {
        "world": {
            **msgspec.structs.asdict(found.world),
            "standby": _standby(found),
            "capacity_rps": found.capacity_rps,
        },
        "tier": found.tier,
        "seed": question.seeds[0],
        "seeds": list(question.seeds),
        "days": {
            "from": question.first_day,
            "to": question.last_day,
            "tune": list(question.tune),
            "in_sample": question.in_sample,
        },
        "arrivals": _arrivals(found),
        "bound": {
            "definition": DEFINITION,
            "replica_hours": found.bound_hours,
            "replica_hours_no_budget": sum(b.replica_hours_no_budget for b in found.bounds) / len(found.bounds),
            "dropped": sum(b.dropped for b in found.bounds) / len(found.bounds),
            "by_seed": [msgspec.to_builtins(b) for b in found.bounds],
        },
        "policies": [_policy(found, row) for row in by_cost(found)],
        "grid": [_point(found, point) for point in found.points],
        "slo_price": [_priced(found, point) for point in found.slo_points],
        "price": _money(found, price) if price else None,
    }


def _standby(found: Comparison) -> Tree:
    standby = found.world.standby
    return {"max": standby.max, "rent": standby.rent}


def by_cost(found: Comparison) -> list[Row]:
    return sorted(found.rows, key=lambda row: row.reported.hours)


def reported_days(found: Comparison) -> float:
    """How many days are reported: a log may begin and end within one."""
    return (found.span.to_s - found.span.from_s) / DAY_S


def _money(found: Comparison, price: Price) -> Tree:
    a_day = {row.name: price.a_day(found, row.reported) for row in by_cost(found)}
    return {"per_replica_hour": price.per_hour, "currency": price.currency, "per_day": a_day}


def _arrivals(found: Comparison) -> Tree:
    source, rates = found.rates.source, found.rates
    return {
        "path": source.path,
        "format": source.format,
        "series": rates.series,
        "rows": source.rows,
        "bad_rows": source.bad,
        "dispersion": rates.dispersion,
        "window_s": rates.window_s,
        "windows_filled": rates.filled,
        "requests": float(found.rows[0].reported.requests.mean()) if found.rows else 0.0,
    }


def _policy(found: Comparison, row: Row) -> Tree:
    tuning = found.tuning(row.point)
    return {
        "name": row.name,
        **_measured(found, row.reported),
        "p99_ttft_s": row.p99_ttft_s,
        "target": row.point.target,
        "tuned": {"target": row.point.target, **_short(found, tuning)} if row.tuned else None,
        "daily": _daily(found, row),
        "by_seed": _by_seed(found, row),
    }


def _measured(found: Comparison, measured: Measured) -> Tree:
    return {
        "cost_ratio": found.ratio(measured),
        "attainment": measured.attainment,
        "replica_hours": measured.hours,
        "scale_events": float(measured.scale_events.mean()),
        "standby_hours": float(measured.standby_hours.mean()),
        "standby_paid_hours": found.world.standby.rent * float(measured.standby_hours.mean()),
        "reached_slo": found.reached(measured),
    }


def _short(found: Comparison, measured: Measured) -> Tree:
    return {
        "attainment": measured.attainment,
        "replica_hours": measured.hours,
        "reached_slo": found.reached(measured),
    }


def _daily(found: Comparison, row: Row) -> list[Tree]:
    return [{"day": day, "requests": float(m.requests.mean()), **_short(found, m)} for day, m in row.daily.items()]


def _by_seed(found: Comparison, row: Row) -> list[Tree]:
    m = row.reported
    return [
        {
            "seed": seed,
            "cost_ratio": float(m.replica_hours[at]) / found.bounds[at].replica_hours,
            "attainment": float(1 - m.late[at] / max(m.requests[at], 1e-9)),
            "replica_hours": float(m.replica_hours[at]),
            "scale_events": float(m.scale_events[at]),
        }
        for at, seed in enumerate(found.question.seeds)
    ]


def _point(found: Comparison, point: Point) -> Tree:
    return {
        "policy": point.policy,
        "target": point.target,
        "tune": _short(found, found.tuning(point)),
        "reported": _measured(found, found.reported(point)),
    }


def _priced(found: Comparison, point: Point) -> Tree:
    measured = found.reported(point)
    return {
        "slo": point.target,
        "replica_hours_per_day": measured.hours / reported_days(found),
        **_measured(found, measured),
    }
