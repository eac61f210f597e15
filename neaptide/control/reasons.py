"""Why a model has the count it has, as a sentence with numbers and money: what `scale why` and the dashboard show."""

from __future__ import annotations

import math
from typing import Literal

from neaptide.control.size import Asked, Case, policy_name
from neaptide.types import Choice, Snapshot

SIGNS = {"CNY": "¥", "USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}
Action = Literal["launch", "drain", "hold"]


def choice(case: Case, asked: Asked | None, launches: bool, drains: bool, wait: str, snapshot: Snapshot) -> Choice:
    """`asked`: None where the bounds are equal; `wait`: why what is missing is not started yet."""
    scale, before = case.scale, case.fleet.present
    after = asked.replicas if asked else scale.min
    action: Action = "launch" if launches and after > before else "drain" if drains and after < before else "hold"
    return Choice(
        model=case.deployment.model,
        action=action,
        before=before,
        after=after,
        sentence=_sentence(case, asked, action, wait, snapshot.currency),
        policy=policy_name(scale),
        wanted=asked.policy if asked else after,
        clamp=asked.clamp if asked else "",
        numbers=_numbers(case, asked),
        cost_per_hour=round(after * scale.price_per_hour, 9),
        cost_change_per_hour=round((after - before) * scale.price_per_hour, 9),
    )


def price(amount: float, currency: str) -> str:
    """1.5 -> ¥1.50; a currency without a sign is named."""
    sign = SIGNS.get(currency) or (f"{currency} " if currency else "")
    digits = 2 if amount >= 0.1 or amount <= 0 else 1 - math.floor(math.log10(amount))  # two that count
    return f"{sign}{amount:,.{digits}f}"


def _sentence(case: Case, asked: Asked | None, action: Action, wait: str, currency: str) -> str:
    model, before = case.deployment.model, case.fleet.present
    after = asked.replicas if asked else case.scale.min
    why = asked.why if asked else f"min and max are {after}"
    if before == after:
        stay = "replica stays" if after == 1 else "replicas stay"
        return f"{model}: {after} {stay}: {why}{_cost(case, after, currency)}"
    if wait:
        why = f"{why}; {wait.partition(': ')[2]}"
    replicas = "replica" if after == 1 else "replicas"
    served = case.traits.slots / case.traits.service_s
    change = after - before
    money = case.scale.price_per_hour * abs(change)
    cost = f"; {'+' if change > 0 else '-'}{price(money, currency)}/h" if money else ""
    return f"{model}: {before} to {after} {replicas}: {why}, one replica serves {served:.1f}{cost}"


def _cost(case: Case, count: int, currency: str) -> str:
    money = case.scale.price_per_hour * count
    return f"; {price(money, currency)}/h" if money else ""


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
