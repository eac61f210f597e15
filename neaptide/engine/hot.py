"""Which beginnings of prompts recur: a bounded tree of blocks with fading counts. Pure; the time is given.

Docs/decisions/0029. A block's key is the chained hash of itself and all before it, as in the engine's prefix cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

HALF_LIFE_S = 600.0
MOST_BLOCKS = 4096
MOST_BLOCKS_A_PROMPT = 256
LEAST_REQUESTS = 2  # what one request alone began with is nobody else's
RESCALE_AT = 512.0  # half-lives; counts would leave the range of floats at 1024


class _Block:
    __slots__ = ("count", "depth", "ids", "key", "parent", "requests")

    def __init__(self, key: int, parent: int, depth: int, ids: array[int]) -> None:
        self.key, self.parent, self.depth, self.ids = key, parent, depth, ids
        self.count, self.requests = 0.0, 0


class Hot:
    """Counts prompts' blocks. No block counts more than the one before it: both take the same additions, in order."""

    def __init__(self, block_tokens: int, most_blocks: int = MOST_BLOCKS) -> None:
        self._width, self._most = block_tokens, most_blocks
        self._blocks: dict[int, _Block] = {}
        self._zero_s: float | None = None  # when a request counted 1

    def saw(self, ids: Sequence[int], now_s: float) -> None:
        """A request with this prompt goes to the engine."""
        weight, key = self._weight(now_s), 0
        whole = min(len(ids) // self._width, MOST_BLOCKS_A_PROMPT)
        for depth in range(whole):
            part = array("i", ids[depth * self._width : (depth + 1) * self._width])
            parent, key = key, hash((key, part.tobytes()))
            block = self._blocks.get(key)
            if block is None:
                block = self._blocks[key] = _Block(key, parent, depth, part)
            block.count += weight
            block.requests += 1
        if len(self._blocks) > self._most:
            self._sweep()

    def hottest(self, most_tokens: int) -> list[list[int]]:
        """The most counted prefixes, as token ids in whole blocks; at most `most_tokens` that differ. One that is the
        beginning of another is not listed beside it."""
        hot = [b for b in self._blocks.values() if b.requests >= LEAST_REQUESTS]
        hot.sort(key=lambda b: (-b.count, b.depth))
        taken = hot[: most_tokens // self._width]
        inner = {b.parent for b in taken}
        return [self._prefix(b) for b in taken if b.key not in inner]

    def __len__(self) -> int:
        return len(self._blocks)

    def _prefix(self, last: _Block) -> list[int]:
        parts, block = [], last
        while True:
            parts.append(block.ids)
            if not block.depth:
                return [id for part in reversed(parts) for id in part]
            block = self._blocks[block.parent]

    def _weight(self, now_s: float) -> float:
        if self._zero_s is None:
            self._zero_s = now_s
        age = (now_s - self._zero_s) / HALF_LIFE_S
        if age > RESCALE_AT:
            self._zero_s = now_s
            for block in self._blocks.values():
                block.count *= 2.0**-age
            return 1.0
        return float(2.0**age)

    def _sweep(self) -> None:
        """Keep three quarters. A block goes before those that it follows."""
        kept = sorted(self._blocks.values(), key=lambda b: (-b.count, b.depth))[: self._most * 3 // 4]
        self._blocks = {b.key: b for b in kept}
