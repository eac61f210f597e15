"""What one request costs at list prices, and how a sum is shared out. Integers throughout."""

from __future__ import annotations

from collections.abc import Sequence

from neaptide.cost.prices import PriceList
from neaptide.types import Charge, Usage

PER_TOKENS = 10**6
MILLIS = 1000  # of a list price
MAX_CHARGE_NANOS = 10**14  # 100,000 of the currency for one request
CHARGED = frozenset({"ok", "aborted"})
# An answer that we or the replica broke (error, timeout, lost) is not charged, whatever it had already generated: its
# tokens stay in the usage row, where real cost is shared out from. Who leaves midway pays for what was generated.


def charge(usage: Usage, prices: PriceList) -> Charge | None:
    """The charge at list prices; None where nothing is charged: a failed or refused request, or a model without price.

    Cached prompt tokens are part of prompt_tokens and reasoning tokens part of output_tokens, as in the OpenAI API. Of
    an answer that another request brought it is the share that its row says. Rounded once, half to even.
    """
    rate = prices.rates.get(usage.model)
    if rate is None or usage.outcome not in CHARGED:
        return None
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    millionths = (
        (usage.prompt_tokens - cached) * rate.prompt_nanos
        + cached * rate.cached_nanos
        + usage.output_tokens * rate.output_nanos
    )
    # A replica that reports absurd counts must not overflow the sums (int64 takes 92,000 of these an hour) and so stop
    # the books for everybody.
    amount = min(_round_half_even(millionths * usage.price_millis, PER_TOKENS * MILLIS), MAX_CHARGE_NANOS)
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


def _round_half_even(numerator: int, denominator: int) -> int:
    quotient, rest = divmod(numerator, denominator)
    up = rest * 2 > denominator or (rest * 2 == denominator and quotient % 2 == 1)
    return quotient + up
