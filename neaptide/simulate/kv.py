"""A replica's KV memory, counted in tokens: what its requests hold, and prefixes that stay behind for the next ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Memory:
    """What requests hold alone (`private`), and blocks of prompts that several share. A block that nobody holds stays
    until its room is needed, the longest unused one going first."""

    __slots__ = ("_held", "_idle", "block_tokens", "free", "total")

    def __init__(self, total_tokens: int, block_tokens: int) -> None:
        self.total, self.block_tokens = total_tokens, block_tokens
        self.free = total_tokens  # tokens that could be taken; blocks that nobody holds would go for them
        self._held: dict[int, int] = {}  # by how many
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def private(self) -> int:
        return self.total - self.free - len(self._held) * self.block_tokens

    @property
    def used(self) -> int:
        return self.total - self.free + len(self._idle) * self.block_tokens

    def known(self, blocks: Sequence[int]) -> int:
        """How many leading ones need no computing."""
        for at, block in enumerate(blocks):
            if block not in self._held and block not in self._idle:
                return at
        return len(blocks)

    def free_beside(self, blocks: Sequence[int]) -> int:
        """`free` once these, all known, are held."""
        return self.free - self.block_tokens * sum(block in self._idle for block in blocks)

    def take(self, tokens: int) -> None:
        """The caller has seen that they are free."""
        self.free -= tokens
        while self._idle and self.used > self.total:
            self._idle.popitem(last=False)

    def give(self, tokens: int) -> None:
        self.free += tokens

    def hold(self, blocks: Sequence[int]) -> None:
        """All known."""
        for block in blocks:
            if block in self._held:
                self._held[block] += 1
            else:
                del self._idle[block]
                self._held[block] = 1
                self.free -= self.block_tokens

    def share(self, blocks: Sequence[int]) -> list[int]:
        """These are computed now, in the caller's private memory. Those that nobody knew become shared ones that the
        caller holds; it keeps the others to itself. A block known by its id is known with all before it."""
        fresh = [block for block in dict.fromkeys(blocks) if block not in self._held and block not in self._idle]
        for block in fresh:
            self._held[block] = 1  # taken already: free does not change
        return fresh

    def release(self, blocks: Sequence[int]) -> None:
        """The last ones become idle first, so that they go first: what leads is of more use."""
        for block in reversed(blocks):
            left = self._held[block] - 1
            if left:
                self._held[block] = left
            else:
                del self._held[block]
                self._idle[block] = None
                self.free += self.block_tokens
