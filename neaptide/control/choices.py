"""A Choice: what was decided for one model at a tick, with its reasons, numbers and money."""

from __future__ import annotations

import math
from typing import Literal

from msgspec.structs import replace

from neaptide.control.reasons import reason, sentence
from neaptide.control.size import Asked, Case, policy_name
from neaptide.types import Choice, Reason, Snapshot

Action = Literal["launch", "drain", "hold"]


def choice(
    case: Case, asked: Asked | None, launches: bool, drains: bool, wait: Reason | None, snapshot: Snapshot
) -> Choice:
    """`asked`: None where the bounds are equal; `wait`: why what is missing is not started yet."""
    scale, before = case.scale, case.fleet.present
    after = asked.replicas if asked else scale.min
    action: Action = "launch" if launches and after > before else "drain" if drains and after < before else "hold"
    why = asked.why if asked else (reason("equal", n=after),)
    made = Choice(
        model=case.deployment.model,
        action=action,
        before=before,
        after=after,
        sentence="",
        why=(*why, replace(wait, of="")) if wait is not None and before != after else why,
        policy=policy_name(scale),
        wanted=asked.policy if asked else after,
        clamp=asked.clamp if asked else "",
        numbers=_numbers(case, asked),
        cost_per_hour=round(after * scale.price_per_hour, 9),
        cost_change_per_hour=round((after - before) * scale.price_per_hour, 9),
        currency=snapshot.currency,
    )
    return replace(made, sentence=sentence(made))


def _numbers(case: Case, asked: Asked | None) -> dict[str, float]:
    """What was known, finite numbers only: what nobody told is missing."""
    load, traits = case.load, case.traits
    numbers = {
        "ready": float(case.fleet.ready),
        "starting": float(case.fleet.starting),
        "slots": traits.slots,
        "service_s": traits.service_s,
        "cold_start_s": traits.cold_start_s,
        "capacity_rps": traits.slots / traits.service_s,
    }
    if asked is not None:
        numbers["expected_per_s"] = asked.expected
    if load is not None:
        if load.tick_s > 0:
            numbers["arrivals_per_s"] = load.arrivals / load.tick_s
        for name in ("waiting", "running", "oldest_wait_s", "ttft_s", "tpot_s", "kv_usage", "age_s"):
            numbers[name] = float(getattr(load, name))
    return {k: round(v, 6) for k, v in numbers.items() if math.isfinite(v)}
