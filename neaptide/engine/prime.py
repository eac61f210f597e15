"""Filling a new replica's prefix cache: hot prefixes of a sibling, computed while the engine has nothing else to do.

A piece at a time, each one prefill step longer than the last, so that a real request never waits for more than a step
(docs/decisions/0029). Ids and sizes only: nothing here is logged but numbers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from neaptide.engine import pipe
from neaptide.engine.protocol import Description, Sampling

MOST_TOKENS = 8192  # that a replica tells
KV_SHARE = 4  # at most 1/4 of KV memory is filled ahead
KEPT_S = 60.0  # what is not computed by then is dropped
START_SHARE, MOST_S = 0.1, 1.0  # of the start: how long it may hold back readiness
ONE = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)


class Piece(NamedTuple):
    """A prefix up to `end`, of which the tokens up to `start` are there already."""

    prefix: Sequence[int]
    start: int
    end: int


class Primer:
    """What one engine is to compute ahead. The engine's answers to its requests come to `ended`."""

    def __init__(self) -> None:
        self.tokens = 0  # computed ahead
        self._offered: list[Sequence[int]] = []
        self._pieces: deque[Piece] = deque()
        self._running: Piece | None = None
        self._id = 0  # the engine's number for it
        self._until_s = 0.0
        self._description: Description | None = None
        self._done = asyncio.Event()
        self._done.set()

    def offer(self, prefixes: Sequence[Sequence[int]], now_s: float) -> None:
        """Take prefixes of a sibling, hottest first; they may come before the engine is warm."""
        self._offered += prefixes
        self._plan(now_s)

    def warm(self, description: Description, now_s: float) -> None:
        self._description = description
        self._plan(now_s)

    def next(self, ids: Iterator[int], now_s: float) -> pipe.Add | None:
        """The next piece, as the engine's request of the next of `ids`; None where one is under way or nothing is left.
        Ask only when the engine has no other request."""
        if self._running is not None or not self._pieces:
            return None
        if now_s > self._until_s:
            self._pieces.clear()
            self._done.set()
            return None
        self._id, self._running = next(ids), self._pieces.popleft()
        return pipe.Add(self._id, list(self._running.prefix[: self._running.end]), [], 0, ONE)

    def is_running(self, id: int) -> bool:
        return self._running is not None and self._id == id

    def ended(self, finish: str) -> None:
        """The engine has ended the piece under way. What follows one that it refused would be refused too."""
        ended, self._running = self._running, None
        if ended is not None and finish in ("stop", "length"):
            self.tokens += ended.end - ended.start
        elif ended is not None:
            self._pieces = deque(p for p in self._pieces if p.prefix is not ended.prefix)
        if not self._pieces:
            self._done.set()

    async def done(self) -> None:
        """Until nothing is left to compute."""
        await self._done.wait()

    def _plan(self, now_s: float) -> None:
        told = self._description
        if told is None or not self._offered:
            return
        fitting = [p for p in self._offered if p and min(p) >= 0 and max(p) < told.vocab_size]
        self._offered = []
        block = told.kv_block_tokens
        step = (told.chunk_tokens or told.kv_tokens) // block * block  # a step's worth, in whole blocks
        room = told.kv_tokens // KV_SHARE
        self._pieces += pieces([p[: told.context_tokens - 1] for p in fitting], max(step, block), room)
        self._until_s = now_s + KEPT_S
        if self._pieces:
            self._done.clear()


def pieces(prefixes: Sequence[Sequence[int]], step: int, most_tokens: int) -> Iterator[Piece]:
    """Every prefix in growing pieces of `step` tokens more each; what an earlier prefix shares is not computed again.
    At most `most_tokens` are computed."""
    done: list[Sequence[int]] = []
    for prefix in prefixes:
        begun = max((_shared(prefix, other) for other in done), default=0)
        prefix = prefix[: begun + most_tokens]
        most_tokens -= len(prefix) - begun
        for start in range(begun, len(prefix), step):
            yield Piece(prefix, start, min(start + step, len(prefix)))
        done.append(prefix)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens at the beginning that are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
