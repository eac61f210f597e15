"""A Choice: what was decided for one model at a tick, with its reasons, numbers and money."""

from __future__ import annotations

import math
from typing import Literal

from msgspec.structs import replace

from neaptide.control.reasons import price, reason, sentence
from neaptide.control.size import Asked, Case, policy_name
from neaptide.control.standby import Pool, rent_per_hour
from neaptide.types import Choice, Reason, Snapshot

Action = Literal["launch", "drain", "hold"]


def choice(
    case: Case,
    asked: Asked | None,
    up: bool,
    down: bool,
    wait: Reason | None,
    standing: int,
    rest: Pool,
    snapshot: Snapshot,
) -> Choice:
    """`asked`: None where the bounds are equal; `up`: some start or wake; `down`: some drain or are parked; `wait`: why
    what is missing is not started yet; `standing`: how many stood by, `rest`: what becomes of them."""
    scale, before = case.scale, case.fleet.present
    after = asked.replicas if asked else scale.min
    action: Action = "launch" if up and after > before else "drain" if down and after < before else "hold"
    why = asked.why if asked else (reason("equal", n=after),)
    if wait is not None and before != after:
        why = (*why, replace(wait, of=""))
    if left_s := rest.left_s:
        why = (*why, reason("standby", n=len(left_s), left_s=max(left_s)), _restart(case, snapshot.currency))
    cost = after * scale.price_per_hour + rent_per_hour(scale, len(rest.left_s))
    cost_before = before * scale.price_per_hour + rent_per_hour(scale, standing)
    made = Choice(
        model=case.deployment.model,
        action=action,
        before=before,
        after=after,
        sentence="",
        why=why,
        policy=policy_name(scale),
        members=case.deployment.members,
        wanted=asked.policy if asked else after,
        clamp=asked.clamp if asked else "",
        numbers=_numbers(case, asked),
        cost_per_hour=round(cost, 9),
        cost_change_per_hour=round(cost - cost_before, 9),
        currency=snapshot.currency,
        standby=len(rest.left_s),
    )
    return replace(made, sentence=sentence(made))


def _restart(case: Case, currency: str) -> Reason:
    """What a standby is held against."""
    start_s = case.traits.cold_start_s
    cost = start_s / 3600 * case.scale.price_per_hour
    if not cost:
        return reason("restart", start_s=start_s)
    return reason("restart.paid", start_s=start_s, price=price(cost, currency))


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
        for name in ("waiting", "running", "oldest_wait_s", "ttft_s", "tpot_s", "kv_usage", "gpu_usage", "age_s"):
            numbers[name] = float(getattr(load, name))
    return {k: round(v, 6) for k, v in numbers.items() if math.isfinite(v)}
