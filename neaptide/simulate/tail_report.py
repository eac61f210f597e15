"""A comparison of small models as JSON, and as the cells of its table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from neaptide.simulate.tail import Plan, Row, Tail
from neaptide.simulate.tail_bound import DEFINITION

Tree = dict[str, Any]
COLUMNS = ("policy", "replica", "cost", "attainment", "hours", "starts")


def by_cost(found: Tail) -> list[Row]:
    return sorted(found.rows, key=lambda row: row.hours)


def cells(found: Tail, row: Row) -> list[str]:
    """Those of COLUMNS."""
    starts = sum(paid.starts for paid in row.paid) / len(row.paid)
    return [
        row.name, _replica(found, row), f"{row.hours / found.bound_hours:.3f}", f"{100 * row.attainment:.2f} %",
        f"{row.hours:,.1f}", f"{starts:,.0f}",
    ]  # fmt: skip


def outcome(found: Tail) -> Tree:
    """Shares are fractions, times in seconds, hours those of replicas; means over the seeds."""
    question = found.question
    return {
        "world": {**asdict(found.shop), "slo": found.slo},
        "tier": "tail",
        "seeds": list(question.seeds),
        "days": {"from": question.first_day, "to": question.last_day, "tune": list(question.tune)},
        "models": {
            "below_rps": question.below_rps,
            "names": [model.name for model in found.models],
            "pools": [[found.models[at].name for at in pool] for pool in found.groups],
            "requests": sum(paid.requests for paid in found.rows[0].paid) / len(question.seeds),
        },
        "bound": {
            "definition": DEFINITION,
            "replica_hours": found.bound_hours,
            "replica_hours_no_budget": found.bound_hours_no_budget,
            "by_seed": [asdict(bound) for bound in found.bounds],
        },
        "policies": [_policy(found, row) for row in by_cost(found)],
        "plans": [
            {"seed": seed, "pooled": pooled, **_plan(plan)}
            for seed, plans in zip(question.seeds, found.plans, strict=True)
            for pooled, plan in plans.items()
        ],
    }


def _replica(found: Tail, row: Row) -> str:
    return f"of {found.question.pool}" if row.pooled else "alone"


def _policy(found: Tail, row: Row) -> Tree:
    return {
        "name": row.name,
        "models_a_replica": found.question.pool if row.pooled else 1,
        "cost_ratio": row.hours / found.bound_hours,
        "cost_ratio_no_budget": row.hours / found.bound_hours_no_budget,
        "attainment": row.attainment,
        "replica_hours": row.hours,
        "reached_slo": row.attainment >= found.slo - 1e-9,
        "by_seed": [
            {
                "seed": seed,
                "cost_ratio": paid.replica_s / 3600 / bound.replica_hours,
                "attainment": 1.0 - paid.late / max(paid.requests, 1),
                **paid._asdict(),
            }
            for seed, paid, bound in zip(found.question.seeds, row.paid, found.bounds, strict=True)
        ],
    }


def _plan(plan: Plan) -> Tree:
    """Infinite times are null: always on."""
    keep_s = [float(k) if np.isfinite(k) else None for k in plan.keep_s]
    return {
        "keep_s": keep_s, "headroom": plan.headroom, "further_keep_s": plan.further_keep_s, "price_s": plan.price_s,
        "late_share": plan.late_share,
    }  # fmt: skip
