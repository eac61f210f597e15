"""Going on elsewhere with an answer whose replica was lost: whether it can be, and where. Pure.

Own replicas tell each token's id, which the exchange keeps: 4 bytes a token. Another replica of the same revision gets
them with the request, computes them as it does a prompt, and says what comes next; the client sees no seam. Replicas of
others bring text; those of which the operator says so go on from it, as the last message of the chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neaptide.gateway.route import Target
from neaptide.gateway.seam import sendable
from neaptide.wire.peek import replays
from neaptide.wire.rest import rest

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange

# the replica's end, not the request's fault
LOST = frozenset(("replica_lost", "engine_died", "draining", "replica_broke_off"))
RESUMES_AT_MOST = 8  # of one answer


def possible(exchange: Exchange, slug: str) -> bool:
    """After a failure of this name, some of the answer being out."""
    target = exchange.target
    if slug not in LOST or target is None or exchange.resumes >= RESUMES_AT_MOST:
        return False
    if exchange.barren and not exchange.brought:  # two in a row died of it without a token: it may be what kills them
        return False
    if target.link:
        return bool(exchange.ids) and target.resumes and needs(exchange) <= target.replayable
    return _rest(exchange) is not None


def needs(exchange: Exchange) -> frozenset[str]:
    """What its answer depends on beyond its tokens. Each chunk of a chat stream carries its own log-probabilities."""
    found = replays(exchange.call.body)
    own = exchange.asked.stream and exchange.call.route == "chat.completions"
    return found - {"logprobs"} if own else found


def fit(exchange: Exchange, targets: Sequence[Target]) -> list[Target]:
    """Those that say the same next, of the revision that has begun: own ones where its ids are known, else those that
    go on from text."""
    model = exchange.model
    same = (t for t in targets if t.row.revision_of(model) == exchange.revision)
    if not exchange.ids:
        return [t for t in same if t.row.resumes and not t.link]
    features = needs(exchange)
    return [t for t in same if t.resumes and features <= t.replayable]


def body(exchange: Exchange) -> bytes:
    """What a replica that brings text is asked, to go on with what is out."""
    return _rest(exchange) or exchange.call.body


def _rest(exchange: Exchange) -> bytes | None:
    transcript, chat = exchange.transcript, exchange.call.route == "chat.completions"
    if transcript is None or not transcript.usable:
        return None
    return rest(exchange.call.body, chat, sendable(transcript.text, chat), transcript.tokens)
