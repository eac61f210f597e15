"""What one request costs at list prices, and how a sum is shared out. Integers throughout."""

from __future__ import annotations

from collections.abc import Sequence

from neaptide.cost.prices import PriceList
from neaptide.cost.rate import CHARGED, cost_nanos
from neaptide.types import Charge, Usage


def charge(usage: Usage, prices: PriceList) -> Charge | None:
    """The charge at list prices; None where nothing is charged: a failed or refused request, or a model without
    price."""
    rate = prices.rates.get(usage.model)
    if rate is None or usage.outcome not in CHARGED:
        return None
    amount = cost_nanos(rate, usage)
    return Charge(
        request_id=usage.request_id, tenant=usage.tenant, revision=usage.revision, amount_nanos=amount, basis="list"
    )


def allocate(amount: int, weights: Sequence[int]) -> list[int]:
    """`amount` (>= 0) in whole units, in proportion to `weights` (>= 0, not all 0): the shares sum to it exactly.

    Largest remainder (Hamilton): everybody gets the floor, what is left goes to the largest remainders, the earlier
    first where they tie. No share is further than one unit from the exact one.
    """
    total = sum(weights)
    if amount < 0 or total <= 0 or min(weights) < 0:
        raise ValueError(f"cannot share {amount} by weights that sum to {total}")
    shares = [amount * w // total for w in weights]
    remainders = [amount * w % total for w in weights]
    largest = sorted(range(len(weights)), key=lambda i: (-remainders[i], i))
    for i in largest[: amount - sum(shares)]:
        shares[i] += 1
    return shares
