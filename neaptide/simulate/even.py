"""The fast tier's engine for worlds in which every step takes as long: what joins changes nothing for the others, so a
request's whole course is known when it joins, and only ends are events. The fluid tier's world is one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.fast import ID_BITS, ID_MASK, IDLE, Fast
from neaptide.simulate.plain import Plain, is_plain
from neaptide.simulate.steps import Linear, prefill_s


def is_even(traits: Traits, book: Book) -> bool:
    """No part of a step depends on what is in it, and a whole batch's prompts fit into one, computed anew or not."""
    step = traits.step
    if not isinstance(step, Linear) or traits.kv_tokens is not None or not book.prompt:
        return False
    if step.request_s or step.token_s or prefill_s(step, 1, 1.0):
        return False
    return traits.chunk_tokens >= traits.max_batch * (max(book.prompt) + max(book.out))


def jumping(traits: Traits, book: Book) -> type[Even] | type[Fast]:
    """The fast tier's engine for this run."""
    if is_even(traits, book):
        return Even
    return Plain if is_plain(traits, book) else Fast


class Even:
    """Implements Engine, where `is_even`; prefixes would shorten nothing. `start_s` is the border at `count` steps."""

    __slots__ = ("_book", "_count", "_done", "_line", "_max_batch", "_start_s", "_step_s", "end_s")

    def __init__(self, traits: Traits, book: Book) -> None:
        self._book, self._max_batch = book, traits.max_batch
        self._step_s = traits.step.step_s(0, 0)
        self._done: list[int] = []  # heap: who is in the batch, by the count at which it is done
        self._line: deque[int] = deque()
        self._count, self._start_s = 0, 0.0
        self.end_s = IDLE

    @property
    def in_flight(self) -> int:
        return len(self._done) + len(self._line)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        for id, now_s in zip(ids, times):
            if self.end_s <= now_s:
                self._advance(now_s)
            if len(self._done) >= self._max_batch:
                self._line.append(id)
                continue
            steps = 0
            if self._done:
                steps = math.ceil((now_s - self._start_s) / self._step_s) or 1
            else:
                self._start_s = now_s
            self._join(id, steps)
            self._look_ahead()
        if self.end_s <= until_s:
            self._advance(until_s)

    def drop(self, now_s: float) -> list[int]:
        self.run((), (), now_s)
        book = self._book
        count = self._count + int((now_s - self._start_s) / self._step_s)
        for key in self._done:
            id = key & ID_MASK
            made = book.out[id] - ((key >> ID_BITS) - count)
            if made <= 0:
                book.first_s[id] = math.nan
            book.made[id] = max(book.made[id], made)
        dropped = [key & ID_MASK for key in sorted(self._done)] + list(self._line)
        self._done = []
        self._line.clear()
        self.end_s = IDLE
        return dropped

    def _join(self, id: int, steps: int) -> None:
        """Its first step begins that many after the present border."""
        book = self._book
        if not book.made[id]:
            book.first_s[id] = self._start_s + (steps + 1) * self._step_s
        heappush(self._done, (self._count + steps + book.out[id] - book.made[id]) << ID_BITS | id)

    def _look_ahead(self) -> None:
        steps = (self._done[0] >> ID_BITS) - self._count if self._done else 0
        self.end_s = self._start_s + steps * self._step_s if steps else IDLE

    def _advance(self, until_s: float) -> None:
        done, line, finish_s = self._done, self._line, self._book.finish_s
        while self.end_s <= until_s:
            self._start_s, self._count = self.end_s, done[0] >> ID_BITS
            end = (self._count + 1) << ID_BITS
            while done and done[0] < end:
                finish_s[heappop(done) & ID_MASK] = self._start_s
            while line and len(done) < self._max_batch:
                self._join(line.popleft(), 0)
            self._look_ahead()
