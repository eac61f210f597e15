"""The fast-forward tier: the exact one's engine, but steps in which nobody comes, goes or starts are one jump.

    k steps last   k base + growth k (k - 1) / 2      base: the first of them; growth: what each next one takes more

Nothing is done a token. `count` counts the steps since the beginning: who has its first token at count v and wants n
more is done at v + n, so a heap of such numbers tells the next end, and nobody in it need be touched meanwhile.
Contexts are one sum. KV memory is counted in tokens, half a block more for each request, where the exact tier counts
blocks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

from neaptide.simulate.engine import Book, Traits, could_hold, memory
from neaptide.simulate.steps import Piece, pairs_of, piece_at

ID_BITS = 32  # a heap's number is (count at which it is done) << ID_BITS | id: integers compare quicker than tuples
ID_MASK = (1 << ID_BITS) - 1
ENDLESS = 1 << 60  # steps
IDLE = math.inf


@lru_cache(maxsize=64)
def _pieces(traits: Traits) -> tuple[tuple[Piece, ...], ...]:
    """By batch."""
    return tuple(traits.step.pieces(batch) for batch in range(traits.max_batch + 1))


class Fast:
    """Implements Engine."""

    __slots__ = (
        "_base_s", "_blocks", "_book", "_bounded", "_chunk", "_context", "_count", "_done", "_finish_s", "_first_s",
        "_growth_s", "_half_block", "_headroom", "_left", "_line", "_long", "_made", "_max_batch", "_open", "_order",
        "_out", "_pair_s", "_part", "_pieces", "_prefill_s", "_promised", "_promises", "_prompt", "_ready", "_shares",
        "_start_s", "_steps", "_token_s", "_tokens", "_traits", "end_s", "memory",
    )  # fmt: skip

    def __init__(self, traits: Traits, book: Book) -> None:
        self._traits, self._book = traits, book
        self._prompt, self._out, self._made = book.prompt, book.out, book.made
        self._first_s, self._finish_s = book.first_s, book.finish_s
        self._max_batch, self._chunk = traits.max_batch, traits.chunk_tokens
        self._prefill_s = traits.step.prefill_base_s
        self._token_s, self._pair_s = traits.step.prefill_token_s, traits.step.prefill_pair_s
        self._pieces = _pieces(traits)
        self._shares = book.prefixes is not None and traits.prefix_block_tokens > 0
        self._bounded = traits.kv_tokens is not None or self._shares
        self.memory = memory(traits)
        self._headroom = math.ceil(traits.headroom * self.memory.total)
        self._half_block = traits.kv_block_tokens // 2
        self._promises = traits.admit == "answer"
        self._line: deque[int] = deque()
        self._count = 0
        self._reset()

    def _reset(self) -> None:
        self._done: list[int] = []  # heap: who decodes, by the count at which it is done
        self._context = 0  # of all of them, the token being computed included
        self._left = self._tokens = self._part = 0  # the prompt that has begun: still to do, in all, whose
        self._ready: list[int] = []  # whose prompts are complete at the end of this step
        self._promised = 0  # KV tokens that the batch will have taken by its end
        self._blocks: dict[int, list[int]] = {}  # shared ones that a request holds
        self._order: list[int] = []  # ids as they were admitted; some have left
        self._steps, self._start_s, self._base_s, self._growth_s = 0, 0.0, 0.0, 0.0  # of this jump
        self._long = False  # this jump prefills nothing but a long prompt
        self._open = False  # who comes may cut this jump short
        self.end_s = IDLE

    @property
    def in_flight(self) -> int:
        return len(self._line) + len(self._done) + len(self._ready) + (self._left > 0)

    @property
    def waiting(self) -> int:
        return len(self._line)

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        prompt, out, most = self._prompt, self._out, self.memory.total
        line, settle, compose = self._line, self._settle, self._compose
        for id, now_s in zip(ids, times):
            while self.end_s <= now_s:
                settle()
                compose()
            if prompt[id] + out[id] > most and not could_hold(self._traits, self.memory, prompt[id], out[id]):
                continue  # refused: never served
            line.append(id)
            if self._open:
                self._cut(now_s)
            elif self.end_s == IDLE:
                self._start_s = now_s
                compose()
        while self.end_s <= until_s:
            settle()
            compose()

    def drop(self, now_s: float) -> list[int]:
        self.run((), (), now_s)
        book, ran = self._book, int(self._ran(now_s)) if self._done else 0
        batch = [key & ID_MASK for key in sorted(self._done)]
        for key in self._done:
            id = key & ID_MASK
            book.made[id] = book.out[id] - ((key >> ID_BITS) - self._count - ran)
        dropped = batch + self._ready + ([self._part] if self._left else []) + list(self._line)
        self._line.clear()
        self.memory = memory(self._traits)
        self._reset()
        return dropped

    # --------------------------------------------------------------------------------------------- a jump

    def _compose(self) -> None:
        """Put the next steps together, from `_start_s` on, and say when they end."""
        done = self._done
        squeezed = self._make_room() if self._bounded and done else False
        tokens, pairs, steps = 0, 0.0, ENDLESS
        self._long = False
        if self._line or self._left:
            tokens, pairs, steps = self._fill(squeezed)
        batch = len(done)
        if not batch and not tokens:
            self.end_s, self._open = IDLE, False
            return
        pieces = self._pieces[batch]
        until, at_zero_s, per_token_s = pieces[0] if len(pieces) == 1 else piece_at(pieces, self._context)
        if batch:
            left = (done[0] >> ID_BITS) - self._count
            if left < steps:
                steps = left
            if self._bounded and steps > 1 and self.memory.free < (steps - 1) * batch:
                steps = max(1, 1 + self.memory.free // batch)
            if until != math.inf:
                steps = min(steps, max(1, math.ceil((until - self._context) / batch)))
        base_s, growth_s = at_zero_s + per_token_s * self._context, per_token_s * batch
        if tokens:
            base_s += self._prefill_s + self._token_s * tokens + self._pair_s * pairs
            if self._long:
                self._left -= steps * tokens
                growth_s += self._pair_s * tokens * tokens
        self._open = not tokens and steps > 1 and not self._line and batch < self._max_batch
        self._steps, self._base_s, self._growth_s = steps, base_s, growth_s
        self.end_s = self._start_s + steps * base_s + growth_s * (steps * (steps - 1) // 2)

    def _settle(self) -> None:
        """The jump has ended: who is done leaves, who is past the prompt has the first token."""
        now_s = self._start_s = self.end_s
        done, steps = self._done, self._steps
        self._count = count = self._count + steps
        if done:
            batch = len(done)
            self._context += batch * steps
            if self._bounded and steps > 1:
                self.memory.take(batch * (steps - 1))
            end = (count + 1) << ID_BITS
            while done and done[0] < end:
                id = heappop(done) & ID_MASK
                self._context -= self._prompt[id] + self._out[id]
                self._finish(id, now_s)
        if self._ready:
            for id in self._ready:
                self._begin(id, now_s, count)
            self._ready = []

    def _begin(self, id: int, now_s: float, count: int) -> None:
        """It is past the prompt."""
        made = self._made[id]
        if not made:
            self._first_s[id] = now_s
        if self._shares:
            self._learn(id)
        left = self._out[id] - made - 1
        if left:
            heappush(self._done, (count + left) << ID_BITS | id)
            self._context += self._prompt[id] + made + 1
        else:
            self._finish(id, now_s)

    def _finish(self, id: int, now_s: float) -> None:
        self._finish_s[id] = now_s
        if self._bounded:
            self._release(id, self._prompt[id] + self._out[id] - 1)

    def _cut(self, now_s: float) -> None:
        """Somebody has come who can join: the jump ends with the step that runs now."""
        steps = math.ceil(self._ran(now_s)) or 1
        if steps < self._steps:
            self._steps = steps
            self.end_s = self._start_s + steps * self._base_s + self._growth_s * (steps * (steps - 1) // 2)
        self._open = False

    def _ran(self, now_s: float) -> float:
        """Steps of this jump until now: x (base - growth / 2) + x^2 growth / 2 = elapsed, without cancellation."""
        elapsed_s = now_s - self._start_s
        slope = self._base_s - self._growth_s / 2
        root = math.sqrt(max(0.0, slope * slope + 2 * self._growth_s * elapsed_s))
        return 2 * elapsed_s / (slope + root)

    # --------------------------------------------------------------------------------------------- prompts

    def _fill(self, squeezed: bool) -> tuple[int, float, int]:
        """Prompt tokens of a step, the pairs that they attend, and for how many steps it can go on like this."""
        chunk = budget = max(0, self._chunk - len(self._done))  # as long as nobody ends or joins, so for this jump
        pairs = 0.0
        while budget:
            if not self._left and (squeezed or not self._line or not self._admit()):
                break
            left = self._left
            if left > budget:
                before = self._tokens - left
                if budget == chunk:
                    self._long = True
                    return chunk, pairs_of(chunk, before), (left - 1) // chunk
                self._left = left - budget
                return chunk, pairs + pairs_of(budget, before), 1
            pairs += pairs_of(left, self._tokens - left)
            self._ready.append(self._part)
            budget -= left
            self._left = 0
        return chunk - budget, pairs, 1 if budget < chunk else ENDLESS

    def _admit(self) -> bool:
        """The first in line begins, if there is room for it."""
        batch = len(self._done) + len(self._ready)
        if batch >= self._max_batch:
            return False
        id = self._line[0]
        tokens = left = self._prompt[id] + self._made[id]
        if self._bounded:
            known = self._known(id) if self._shares else []
            left -= len(known) * self.memory.block_tokens
            if batch and not self._fits(id, left, known):
                return False
            self._promised += self._promise(id)
            if known:
                self.memory.hold(known)
                self._blocks[id] = known
            self.memory.take(left + self._half_block)
            self._order.append(id)
            if not self._made[id]:
                self._book.cached[id] = tokens - left
        self._line.popleft()
        self._part, self._tokens, self._left = id, tokens, left
        return True

    # --------------------------------------------------------------------------------------------- memory

    def _fits(self, id: int, left: int, known: list[int]) -> bool:
        """Beside others, `left` tokens of it and its answer."""
        if self._promises:
            return self._promised + self._promise(id) + self._headroom <= self.memory.total
        free = self.memory.free_beside(known) if known else self.memory.free
        return left + self._half_block + self._headroom <= free

    def _promise(self, id: int) -> int:
        return self._prompt[id] + self._out[id] - 1 + self._half_block

    def _known(self, id: int) -> list[int]:
        """The blocks of its prompt that need no computing."""
        wanted = self._book.wanted(id, self._traits.prefix_block_tokens)
        return wanted[: self.memory.known(wanted)]

    def _make_room(self) -> bool:
        """A token of KV for each that decodes; was somebody put back for it?"""
        squeezed = False
        while self.memory.free < len(self._done) and len(self._done) + (self._left > 0) > 1:
            self._put_back()
            squeezed = True
        self.memory.take(len(self._done))
        return squeezed

    def _put_back(self) -> None:
        """Who was admitted last, to the head of the line."""
        book = self._book
        if self._left:
            id, self._left = self._order.pop(), 0
            held = book.prompt[id] + book.made[id]
        else:
            there = {key & ID_MASK: at for at, key in enumerate(self._done)}
            while (id := self._order.pop()) not in there:
                pass
            key = self._done[there[id]]
            self._done[there[id]] = self._done[-1]
            self._done.pop()
            heapify(self._done)
            book.made[id] = book.out[id] - ((key >> ID_BITS) - self._count)
            held = book.prompt[id] + book.made[id] - 1
            self._context -= held + 1
        book.preempted[id] += 1
        self._release(id, held)
        self._line.appendleft(id)

    def _learn(self, id: int) -> None:
        """Its prompt's blocks are there for others now."""
        shareable = self._book.shareable(id, self._traits.prefix_block_tokens)
        if shareable:
            held = self._blocks.get(id, [])
            self._blocks[id] = held + self.memory.share(shareable[len(held) :])

    def _release(self, id: int, tokens: int) -> None:
        self._promised -= self._promise(id)
        if self._shares:
            blocks = self._blocks.pop(id, [])
            self.memory.release(blocks)
            tokens -= len(blocks) * self.memory.block_tokens
        self.memory.give(tokens + self._half_block)
