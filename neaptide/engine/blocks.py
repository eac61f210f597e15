"""KV memory counted in blocks: what is promised to requests, and which prompts the prefix cache has seen.

Pure bookkeeping beside the inference library's own: the library allocates block by block and preempts when it runs
out; we promise a request its worst case at admission, so that it never has to.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence


class Reservations:
    """Blocks promised to requests. A request holds ceil(tokens / block) blocks from `hold` to `release`; blocks shared
    through the prefix cache are counted for each holder, which errs on the safe side."""

    __slots__ = ("_held", "block_tokens", "free_blocks", "total_blocks")

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self.total_blocks, self.block_tokens = total_blocks, block_tokens
        self.free_blocks = total_blocks
        self._held: dict[int, int] = {}

    def can_hold(self, tokens: int) -> bool:
        return -(-tokens // self.block_tokens) <= self.free_blocks

    def could_hold(self, tokens: int) -> bool:
        """Whether it would fit if nobody held anything."""
        return -(-tokens // self.block_tokens) <= self.total_blocks

    def hold(self, id: int, tokens: int) -> None:
        """The caller has asked `can_hold`; `id` holds nothing yet."""
        blocks = -(-tokens // self.block_tokens)
        self._held[id] = blocks
        self.free_blocks -= blocks

    def release(self, id: int) -> None:
        self.free_blocks += self._held.pop(id, 0)

    @property
    def total_tokens(self) -> int:
        return self.total_blocks * self.block_tokens

    @property
    def free_tokens(self) -> int:
        return self.free_blocks * self.block_tokens

    @property
    def usage(self) -> float:
        return 1.0 - self.free_blocks / self.total_blocks


class PrefixModel:
    """Which full blocks of tokens have been computed lately, as chained hashes in least-recently-used order.

    It mirrors the rule of a block-wise prefix cache: a block is reusable when it and all before it are equal, and the
    prompt's last token is always computed. At most `total_blocks` hashes are kept.
    """

    __slots__ = ("_block", "_capacity", "_seen")

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self._capacity, self._block = total_blocks, block_tokens
        self._seen: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, ids: Sequence[int]) -> int:
        """Leading tokens of `ids` that need no computing; a multiple of the block."""
        cached = 0
        for key in self._keys(ids, len(ids) - 1):
            if key not in self._seen:
                break
            cached += self._block
        return cached

    def learn(self, ids: Sequence[int]) -> None:
        """`ids` (prompt, or prompt and answer) have been computed and lie in the cache."""
        for key in self._keys(ids, len(ids)):
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def _keys(self, ids: Sequence[int], end: int) -> list[int]:
        raw, width, keys, chain = array("i", ids).tobytes(), 4 * self._block, [], 0
        for stop in range(width, 4 * end + 1, width):
            chain = hash((chain, raw[stop - width : stop]))
            keys.append(chain)
        return keys
