"""The fast tier's engine for a plain queue: no memory that runs out, no prefixes, step times by formula.

It is Fast, number by number; but a stretch of arrivals is one loop over local names, without a call a jump, which takes
three quarters of the time. A few arrivals at a time (a route that looks at loads) go Fast's way: there the loop's own
beginning and end would cost more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import ceil, sqrt

from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.fast import ENDLESS, ID_BITS, ID_MASK, IDLE, Fast
from neaptide.simulate.steps import Linear

FEW = 8  # arrivals


def is_plain(traits: Traits, book: Book) -> bool:
    shares = book.prefixes is not None and traits.prefix_block_tokens > 0
    return traits.kv_tokens is None and not shares and isinstance(traits.step, Linear)


class Plain(Fast):
    """Implements Engine, where `is_plain`."""

    __slots__ = ("_at_zero_s", "_per_token_s")

    def __init__(self, traits: Traits, book: Book) -> None:
        super().__init__(traits, book)
        self._at_zero_s = [pieces[0].at_zero_s for pieces in self._pieces]  # by batch
        self._per_token_s = [pieces[0].per_token_s for pieces in self._pieces]

    def run(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        if len(ids) < FEW:
            super().run(ids, times, until_s)
        else:
            self._stretch(ids, times, until_s)

    def _stretch(self, ids: Sequence[int], times: Sequence[float], until_s: float) -> None:
        """Fast.run with _settle, _compose, _fill, _admit, _begin, _finish and _cut written out."""
        prompt, out, made, first_s, finish_s = self._prompt, self._out, self._made, self._first_s, self._finish_s
        at_zero_s, token_by_batch_s = self._at_zero_s, self._per_token_s
        prefill_s, token_s, pair_s = self._prefill_s, self._token_s, self._pair_s
        chunk, max_batch = self._chunk, self._max_batch
        line, done, ready = self._line, self._done, self._ready
        join, leave = line.append, line.popleft
        count, context, steps = self._count, self._context, self._steps
        left, total, part = self._left, self._tokens, self._part
        start_s, base_s, growth_s, end_s = self._start_s, self._base_s, self._growth_s, self.end_s
        long, is_open, idle, endless = self._long, self._open, IDLE, ENDLESS
        arrivals = len(ids)
        for at in range(arrivals + 1):
            limit_s = times[at] if at < arrivals else until_s
            while end_s <= limit_s:
                start_s = end_s
                count += steps
                if done:
                    context += len(done) * steps
                    edge = (count + 1) << ID_BITS
                    while done and done[0] < edge:
                        id = heappop(done) & ID_MASK
                        context -= prompt[id] + out[id]
                        finish_s[id] = start_s
                if ready:
                    for id in ready:
                        had = made[id]
                        if not had:
                            first_s[id] = start_s
                        more = out[id] - had - 1
                        if more:
                            heappush(done, (count + more) << ID_BITS | id)
                            context += prompt[id] + had + 1
                        else:
                            finish_s[id] = start_s
                    ready.clear()
                tokens, pairs, steps, long = 0, 0.0, endless, False
                batch = len(done)
                if left or line:
                    budget = room = max(0, chunk - batch)
                    while budget:
                        if not left:
                            if not line or batch + len(ready) >= max_batch:
                                break
                            part = leave()
                            total = left = prompt[part] + made[part]
                        if left > budget:
                            before = total - left
                            pairs += budget * (before + (budget + 1) / 2)
                            if budget == room:
                                long, steps = True, (left - 1) // room
                            else:
                                left -= budget
                            budget = 0
                            break
                        pairs += left * (total - left + (left + 1) / 2)
                        ready.append(part)
                        budget -= left
                        left = 0
                    tokens = room - budget
                    if tokens and not long:
                        steps = 1
                if not batch and not tokens:
                    end_s, is_open, steps = idle, False, 0
                    break
                if batch:
                    rest = (done[0] >> ID_BITS) - count
                    if rest < steps:
                        steps = rest
                growth_s = token_by_batch_s[batch]
                base_s = at_zero_s[batch] + growth_s * context
                growth_s *= batch
                if tokens:
                    base_s += prefill_s + token_s * tokens + pair_s * pairs
                    if long:
                        left -= steps * tokens
                        growth_s += pair_s * tokens * tokens
                is_open = not tokens and steps > 1 and not line and batch < max_batch
                end_s = start_s + steps * base_s + growth_s * (steps * (steps - 1) // 2)
            if at == arrivals:
                break
            join(ids[at])
            if is_open:
                slope = base_s - growth_s / 2
                elapsed_s = limit_s - start_s
                ran = 2 * elapsed_s / (slope + sqrt(max(0.0, slope * slope + 2 * growth_s * elapsed_s)))
                cut = ceil(ran) or 1
                if cut < steps:
                    steps = cut
                    end_s = start_s + steps * base_s + growth_s * (steps * (steps - 1) // 2)
                is_open = False
            elif end_s == idle:
                end_s, steps = limit_s, 0  # a jump of no steps ends now: the next one is put together above
        self._count, self._context, self._steps = count, context, steps
        self._left, self._tokens, self._part = left, total, part
        self._start_s, self._base_s, self._growth_s, self.end_s = start_s, base_s, growth_s, end_s
        self._long, self._open = long, is_open
