"""When a replica that answers with errors is left out, and when it is tried again. Pure.

    closed --more than half of the last results are bad--> open --its time is up--> one request goes as a probe
      ^                                                      ^--------------------------- bad --|
      |---------------------------------------------- good -------------------------------------|

Good results are counted only while a bad one is remembered: a replica that never fails costs nothing here.
"""

from __future__ import annotations

import math

from neaptide.types import Usage

LAST = 16  # results that count,
LEAST = 5  # and how many tell enough
WINDOW_S = 30.0  # without a bad one for so long, all is forgotten
OPEN_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # how long it is left out, by openings in a row
CALM_S = 60.0  # closed for so long, it begins with the first of these again
GOOD, NEITHER, BAD = 1, 0, -1
SILENT = frozenset(("first_byte_timeout", "idle_timeout"))  # other limits may be the request's own doing
_MASK = (1 << LAST) - 1


class Breaker:
    """Of one replica in one gateway. `opened`: nothing goes there but a probe, or where all others are open, too."""

    __slots__ = ("_bad_s", "_bits", "_closed_s", "_openings", "_seen", "opened", "opened_s", "probing", "until_s")

    def __init__(self) -> None:
        self.opened = self.probing = False
        self.opened_s = self.until_s = 0.0
        self._bits = self._seen = self._openings = 0  # results since the first bad one, the last one lowest
        self._bad_s = self._closed_s = -math.inf

    def lets(self, now: float) -> bool:
        """While open: whether a probe may go."""
        return now >= self.until_s and not self.probing

    def ended(self, result: int, sent_s: float, now: float) -> None:
        """One attempt is over. Of those sent before it opened nothing can be learnt."""
        if self.opened:
            if sent_s >= self.opened_s:
                self.probing = False
                if result == GOOD:
                    self.close(now)
                elif result == BAD and now >= self.until_s:
                    self.open(now)
        elif result == BAD:
            self._bad(now)
        elif self._bits and result == GOOD:
            self._bits = self._bits << 1 & _MASK
            self._seen = self._seen + 1 if self._bits else 0

    def _bad(self, now: float) -> None:
        if now - self._bad_s > WINDOW_S:
            self._bits = self._seen = 0
        self._bad_s = now
        self._bits = (self._bits << 1 | 1) & _MASK
        self._seen += 1
        seen = min(self._seen, LAST)
        if seen >= LEAST and 2 * self._bits.bit_count() > seen:
            self.open(now)

    def open(self, now: float, for_s: float | None = None) -> None:
        """`for_s`: where the caller knows better for how long."""
        if for_s is None:
            in_a_row = self.opened or now - self._closed_s < CALM_S
            self._openings = self._openings + 1 if in_a_row else 1
            for_s = OPEN_S[min(self._openings, len(OPEN_S)) - 1]
        self.opened, self.probing = True, False
        self.opened_s, self.until_s = now, now + for_s
        self._bits = self._seen = 0

    def close(self, now: float) -> None:
        if self.opened:
            self.opened = self.probing = False
            self._closed_s = now


def result(usage: Usage) -> int:
    """What a request that is over tells of the replica that had it. Its own faults (4xx), its client's leaving and its
    own deadline tell nothing."""
    if usage.outcome == "ok":
        return GOOD
    if usage.error == "replica_full":  # a link's: the report of the last slot had crossed
        return NEITHER
    if usage.outcome == "error" or (usage.outcome == "timeout" and usage.error in SILENT):
        return BAD
    return NEITHER
