"""What is kept of a request: times while it runs, then one Usage row. Pure; `now` is given."""

from __future__ import annotations


class Timing:
    """First token, last token, largest gap; seconds on the monotonic clock. 0 = not yet."""

    __slots__ = ("first_s", "itl_max_s", "last_s", "tokens")

    def __init__(self) -> None:
        self.first_s = self.last_s = self.itl_max_s = 0.0
        self.tokens = 0

    def mark(self, now: float, tokens: int) -> None:
        """`tokens` came at `now`, together: a gap is between reads, not within one."""
        if self.first_s:
            gap = now - self.last_s
            if gap > self.itl_max_s:
                self.itl_max_s = gap
        else:
            self.first_s = now
        self.last_s = now
        self.tokens += tokens

    def tpot_s(self, tokens: int) -> float:
        """(last - first) / (tokens - 1); 0 where that says nothing."""
        return (self.last_s - self.first_s) / (tokens - 1) if tokens > 1 and self.last_s > self.first_s else 0.0
