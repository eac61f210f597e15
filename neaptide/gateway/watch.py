"""What the gateway's sweep tells of the requests at replicas whose concurrency is learnt (concurrency.py). Nothing is
done a token: a stream's tokens since the last sweep are those that its tenant has not been charged for yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from neaptide.gateway.breaker import GOOD
from neaptide.gateway.concurrency import Limiter
from neaptide.gateway.route import Target

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange


def look(live: Iterable[Exchange], targets: Iterable[Target], now: float) -> None:
    """Before the streams are charged for."""
    learning = [t for t in targets if t.limiter is not None]
    if not learning:
        return
    for exchange in live:
        limiter = exchange.target.limiter if exchange.target is not None else None
        if limiter is None or not exchange.asked.stream:
            continue
        sent_s = exchange.sent_s
        if exchange.timing.first_s:
            if not exchange.paused_s:
                _stream(limiter, exchange, now)
        else:
            limiter.waits(now - sent_s, sent_s)
    for target in learning:
        if target.limiter is not None:
            target.limiter.look(now, target.in_flight)


def ended(limiter: Limiter, exchange: Exchange, now: float, told: int) -> None:
    """One of its requests is over, at least there."""
    limiter.ended()
    if exchange.timing.first_s:
        _stream(limiter, exchange, exchange.timing.last_s)
    elif told == GOOD and exchange.counts is not None:
        limiter.answered(now - exchange.sent_s, exchange.counts.output, exchange.sent_s)


def _stream(limiter: Limiter, exchange: Exchange, until_s: float) -> None:
    """Its tokens since the last look."""
    first_s, sent_s, looked_s = exchange.timing.first_s, exchange.sent_s, limiter.looked_s
    if first_s < sent_s:  # another replica's: when its own first one came is not known
        return
    tokens = exchange.timing.tokens - exchange.charged
    if first_s > looked_s:
        limiter.delayed(first_s - sent_s, sent_s)
        looked_s, tokens = first_s, tokens - 1
    limiter.paced(max(0.0, until_s - looked_s), max(0, tokens))
