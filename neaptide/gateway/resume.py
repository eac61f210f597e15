"""Going on elsewhere with an answer whose replica was lost: whether it can be, and where. Pure.

Own replicas tell each token's id, which the exchange keeps: 4 bytes a token. Another replica of the same revision gets
them with the request, computes them as it does a prompt, and says what comes next; the client sees no seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neaptide.gateway.route import Target
from neaptide.wire.peek import replays

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange

LOST = frozenset(("replica_lost", "engine_died", "draining"))  # the replica's end, not the request's fault
RESUMES_AT_MOST = 8  # of one answer


def possible(exchange: Exchange, slug: str) -> bool:
    """After a failure of this name, some of the answer being out."""
    target = exchange.target
    if slug not in LOST or target is None or not target.resumes:
        return False
    if not exchange.ids or exchange.resumes >= RESUMES_AT_MOST:
        return False
    if exchange.barren and not exchange.brought:  # two in a row died of it without a token: it may be what kills them
        return False
    return needs(exchange) <= target.replayable


def needs(exchange: Exchange) -> frozenset[str]:
    """What its answer depends on beyond its tokens. Each chunk of a chat stream carries its own log-probabilities."""
    found = replays(exchange.call.body)
    own = exchange.asked.stream and exchange.call.route == "chat.completions"
    return found - {"logprobs"} if own else found


def fit(exchange: Exchange, targets: Sequence[Target]) -> list[Target]:
    """Those that say the same next: own ones of the revision that has begun."""
    model, features = exchange.model, needs(exchange)
    own = (t for t in targets if t.resumes and t.row.revision_of(model) == exchange.revision)
    return [t for t in own if features <= t.replayable]
