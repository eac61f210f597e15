"""Which replica has lately computed the beginning of a prompt, and so has it in its prefix cache. Pure.

A prompt's blocks are numbers, each of which stands for all of the prompt up to it. The gateway makes them of a body's
bytes; the simulator takes those of its arrivals.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from math import ceil
from zlib import crc32

from neaptide.gateway.route import Target

KNOWN_BLOCKS = 200_000  # that are remembered, of all models' prompts; about 30 MB
MATCH = 0.5  # of a prompt's blocks must be known at a replica, or the load decides: a system prompt is known to all
SPREAD, SLACK = 1.5, 1  # it is left where it has more in flight than 1.5 x the least loaded one + 1
BLOCK_BYTES = 1024
USER = b'"user"'
SHORT_BYTES = 2 * BLOCK_BYTES  # a body under it is computed anew sooner than looked up
CONVERSATION = b"x-neaptide-conversation"  # a client's own name for what belongs together
LOOKED_AT = 256  # of them: it is a hint, and a wrong one costs a prefill
MOST_BLOCKS = 64


def blocks_of(body: bytes, seed: int) -> list[int]:
    """Of a chat or completion request; none of a short one. `seed`: another for each model."""
    size = len(body)
    if size < SHORT_BYTES:
        return []
    start = body.find(b'"messages"')  # what stands before may differ between turns of one conversation
    if start < 0:
        start = max(0, body.find(b'"prompt"'))
    found: list[int] = []
    known, view = seed, memoryview(body)
    for at in range(start, min(size - BLOCK_BYTES, start + MOST_BLOCKS * BLOCK_BYTES), BLOCK_BYTES):
        known = crc32(view[at : at + LOOKED_AT], known)
        found.append(known << 8 | len(found))
    return found


def conversation_of(name: bytes, seed: int) -> list[int]:
    """A client's own word for what belongs together, as one block."""
    return [-1 - crc32(name, seed)]


def first_words(body: bytes, seed: int) -> int | None:
    """A number of the conversation that a chat request goes on with: of what its user said first, whatever stands
    before. It is the same in every turn. None for a short body, and where nobody says anything."""
    if len(body) < SHORT_BYTES:
        return None
    start = body.find(b'"messages"')
    at = body.find(USER, start) if start >= 0 else -1
    if at < 0:
        return None
    said = body[at : at + BLOCK_BYTES]
    end = said.find(b'"}')  # of the message, where it is no longer: what follows it is not there in the first turn
    return crc32(said if end < 0 else said[:end], seed)


class Familiar:
    """Where each block went last; the oldest are forgotten."""

    __slots__ = ("_most", "_where")

    def __init__(self, most: int = KNOWN_BLOCKS) -> None:
        self._most = most
        self._where: OrderedDict[int, str] = OrderedDict()  # block -> replica

    def __len__(self) -> int:
        return len(self._where)

    def replica(self, blocks: Sequence[int], present: Container[str]) -> str | None:
        """Of those that are present the one where the longest known beginning went, if it is MATCH of the prompt."""
        where = self._where
        for at in range(len(blocks) - 1, max(0, ceil(MATCH * len(blocks)) - 1) - 1, -1):
            replica = where.get(blocks[at])
            if replica is not None and replica in present:
                return replica
        return None

    def went(self, blocks: Sequence[int], replica: str) -> None:
        where = self._where
        for block in blocks:
            where[block] = replica
            where.move_to_end(block)
        while len(where) > self._most:
            where.popitem(last=False)

    def choose(
        self, blocks: Sequence[int], by_id: Mapping[str, Target], least: Target, now: float, model: str = ""
    ) -> Target:
        """The replica that has seen the beginning, if it can take it and is not too loaded beside the `least` loaded
        one; else that one. Whoever it is gets it."""
        known = by_id.get(self.replica(blocks, by_id) or "")
        fits = known is not None and may_take(known.in_flight, least.in_flight) and known.can_take(now, model)
        target = known if known is not None and fits else least
        self.went(blocks, target.row.id)
        return target


def may_take(in_flight: int, least: int) -> bool:
    """Whether a replica with so many in flight is not too loaded beside the least loaded one."""
    return in_flight <= SPREAD * least + SLACK
