"""What tokens cost, and at most: the one arithmetic of gateways, which reserve and pay from budgets, and of the ledger,
which charges. Integers, rounded once, half to even; so what was reserved for at least as many tokens is never less."""

from __future__ import annotations

from neaptide.types import Rate, Usage

PER_TOKENS = 10**6
MILLIS = 1000  # of a list price
MAX_TOKENS = 10**9  # of one request; a replica of somebody else's may report anything, and the sums must stay in int64
MAX_CHARGE_NANOS = 10**14  # 100,000 of the currency for one request
CHARGED = frozenset({"ok", "aborted"})
# An answer that we or the replica broke (error, timeout, lost) is not charged, whatever it had already generated: its
# tokens stay in the usage row, where real cost is shared out from. Who leaves midway pays for what was generated.


def reserve_nanos(rate: Rate, prompt_tokens: int, output_tokens: int) -> int:
    """No request with at most so many tokens costs more, however many of its prompt are cached."""
    dearest = max(rate.prompt_nanos, rate.cached_nanos)
    return _nanos(_sane(prompt_tokens) * dearest + _sane(output_tokens) * rate.output_nanos)


def cost_nanos(rate: Rate, usage: Usage) -> int:
    """Of a request that is charged. Cached prompt tokens are part of prompt_tokens and reasoning tokens part of
    output_tokens, as in the OpenAI API. Of an answer that another request brought it is the share that its row says."""
    prompt = _sane(usage.prompt_tokens)
    cached = min(_sane(usage.cached_tokens), prompt)
    output = _sane(usage.output_tokens)
    millionths = (prompt - cached) * rate.prompt_nanos + cached * rate.cached_nanos + output * rate.output_nanos
    return _nanos(millionths, max(0, min(usage.price_millis, MILLIS)))


def reserve_tokens(prompt_tokens: int, output_tokens: int) -> int:
    """What a budget of tokens is to hold for a request of at most so many."""
    return _sane(prompt_tokens) + _sane(output_tokens)


def cost_tokens(usage: Usage) -> int:
    """What a charged request takes from a budget of tokens: cached ones count like others."""
    return _sane(usage.prompt_tokens) + _sane(usage.output_tokens)


def _sane(tokens: int) -> int:
    return max(0, min(tokens, MAX_TOKENS))


def _nanos(millionths: int, millis: int = MILLIS) -> int:
    # A replica that reports absurd counts must not overflow the sums (int64 takes 92,000 of these an hour) and so stop
    # the books for everybody.
    per = PER_TOKENS * MILLIS
    quotient, rest = divmod(millionths * millis, per)
    up = rest * 2 > per or (rest * 2 == per and quotient % 2 == 1)
    return min(quotient + up, MAX_CHARGE_NANOS)
