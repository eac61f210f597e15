"""The token-exact tier: every step of an engine is put together, timed and settled, request by request, block by block.
It is the plain version that the fast one is checked against. What a step is: see Engine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from neaptide.simulate.engine import Book, Traits, could_hold, memory, rounded, whole
from neaptide.simulate.steps import pairs_of


class _Sequence:
    """A request in the batch. `tokens`: prompt and what is generated; `left`: of them still to prefill."""

    __slots__ = ("blocks", "id", "left", "private", "tokens")

    def __init__(self, id: int, tokens: int, left: int, blocks: list[int], private: int) -> None:
        self.id, self.tokens, self.left = id, tokens, left
        self.blocks, self.private = blocks, private  # KV memory: shared blocks held, tokens of its own


class Exact:
    """Implements Engine. `steps` counts the steps that were run, `longest_s` is the longest of them."""

    def __init__(self, traits: Traits, book: Book) -> None:
        self._traits, self._book = traits, book
        self.memory = memory(traits)
        self._headroom = math.ceil(traits.headroom * self.memory.total)
        self._promised = 0  # KV tokens that the batch will have taken by its end
        self._line: deque[int] = deque()
        self._decoding: list[_Sequence] = []  # in the order of admission
        self._prefilling: list[_Sequence] = []  # all that this step works on; the last one may go on after it
        self.end_s = math.inf
        self.steps, self.longest_s = 0, 0.0

    @property
    def in_flight(self) -> int:
        return len(self._line) + len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        for id, now_s in zip(ids, times):
            self._advance(now_s)
            self._enter(id, now_s)
        self._advance(until_s)

    def drop(self, now_s: float) -> list[int]:
        self._advance(now_s)
        batch = self._decoding + self._prefilling
        for sequence in batch:
            self._book.made[sequence.id] = sequence.tokens - self._book.prompt[sequence.id]
            self._release(sequence)
        dropped = [s.id for s in batch] + list(self._line)
        self._decoding, self._prefilling = [], []
        self._line.clear()
        self.end_s = math.inf
        return dropped

    def _enter(self, id: int, now_s: float) -> None:
        if not could_hold(self._traits, self.memory, self._book.prompt[id], self._book.out[id]):
            return  # refused: never served
        self._line.append(id)
        if self.end_s == math.inf:
            self._compose(now_s)

    def _advance(self, until_s: float) -> None:
        while self.end_s <= until_s:
            now_s = self.end_s
            self._settle(now_s)
            self._compose(now_s)

    def _compose(self, now_s: float) -> None:
        """Put the next step together, and say when it ends."""
        squeezed = self._make_room()
        prefill, pairs = self._fill(squeezed)
        batch, context = len(self._decoding), sum(s.tokens for s in self._decoding)
        if not batch and not prefill:
            self.end_s = math.inf
            return
        step_s = self._traits.step.step_s(batch, context, prefill, pairs)
        self.steps, self.longest_s = self.steps + 1, max(self.longest_s, step_s)
        self.end_s = now_s + step_s

    def _settle(self, now_s: float) -> None:
        """The step has ended: a token for everybody who decoded or is past the prompt."""
        ready = [s for s in self._prefilling if not s.left]
        self._prefilling = [s for s in self._prefilling if s.left]
        for sequence in ready:
            if self._book.made[sequence.id] == 0:
                self._book.first_s[sequence.id] = now_s
            self._learn(sequence)
        self._decoding += ready
        staying = []
        for sequence in self._decoding:
            sequence.tokens += 1
            if sequence.tokens == self._book.prompt[sequence.id] + self._book.out[sequence.id]:
                self._book.finish_s[sequence.id] = now_s
                self._release(sequence)
            else:
                staying.append(sequence)
        self._decoding = staying

    # ------------------------------------------------------------------------------------------------- prompts

    def _fill(self, squeezed: bool) -> tuple[int, float]:
        """Prompt tokens of this step and the pairs that they attend."""
        room = budget = max(0, self._traits.chunk_tokens - len(self._decoding))
        pairs = 0.0
        if self._prefilling:
            budget, pairs = self._prefill(self._prefilling[0], budget)
        while budget and not squeezed and self._line and self._admit():
            budget, more = self._prefill(self._prefilling[-1], budget)
            pairs += more
        return room - budget, pairs

    def _prefill(self, sequence: _Sequence, budget: int) -> tuple[int, float]:
        chunk = min(budget, sequence.left)
        pairs = pairs_of(chunk, sequence.tokens - sequence.left)
        sequence.left -= chunk
        return budget - chunk, pairs

    def _admit(self) -> bool:
        """The first in line begins, if there is room for it."""
        batch = len(self._decoding) + len(self._prefilling)
        if batch >= self._traits.max_batch:
            return False
        id = self._line[0]
        tokens = self._book.prompt[id] + self._book.made[id]
        wanted = self._book.wanted(id, self._traits.prefix_block_tokens)
        known = wanted[: self.memory.known(wanted)]
        cached = len(known) * self.memory.block_tokens
        private = rounded(self._traits, tokens) - cached
        promise = whole(self._traits, self._book.prompt[id], self._book.out[id])
        if self._traits.admit == "answer":
            asked, free = promise, self.memory.total - self._promised
        else:
            asked, free = private, self.memory.free_beside(known)
        if asked + (self._headroom if batch else 0) > free:
            return False
        self._promised += promise
        self.memory.hold(known)
        self.memory.take(private)
        if not self._book.made[id]:
            self._book.cached[id] = cached
        self._line.popleft()
        self._prefilling.append(_Sequence(id, tokens, tokens - cached, known, private))
        return True

    # ------------------------------------------------------------------------------------------------- memory

    def _make_room(self) -> bool:
        """A KV block for everybody who needs a new one; was somebody put back for it?"""
        squeezed, at = False, 0
        while at < len(self._decoding):
            sequence = self._decoding[at]
            held = sequence.private + len(sequence.blocks) * self.memory.block_tokens
            if sequence.tokens > held:
                if self.memory.free < self._traits.kv_block_tokens:
                    self._put_back()
                    squeezed = True
                    continue
                self.memory.take(self._traits.kv_block_tokens)
                sequence.private += self._traits.kv_block_tokens
            at += 1
        return squeezed

    def _put_back(self) -> None:
        """Who was admitted last, to the head of the line."""
        sequence = (self._prefilling or self._decoding).pop()
        id = sequence.id
        self._book.made[id] = sequence.tokens - self._book.prompt[id]
        self._book.preempted[id] += 1
        self._release(sequence)
        self._line.appendleft(id)

    def _learn(self, sequence: _Sequence) -> None:
        """Its prompt's blocks are there for others now."""
        shareable = self._book.shareable(sequence.id, self._traits.prefix_block_tokens)
        fresh = self.memory.share(shareable[len(sequence.blocks) :])
        sequence.blocks = sequence.blocks + fresh
        sequence.private -= len(fresh) * self.memory.block_tokens

    def _release(self, sequence: _Sequence) -> None:
        self._promised -= whole(self._traits, self._book.prompt[sequence.id], self._book.out[sequence.id])
        self.memory.give(sequence.private)
        self.memory.release(sequence.blocks)
