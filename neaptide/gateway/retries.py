"""How many requests a lane may send again before their first byte: as many as a tenth of those that come, so that
retries cannot multiply a load that the replicas fail under. Pure.

It is a bucket: each arrival adds SHARE, a retry takes 1. It holds one retry for each request that runs (a replica that
dies loses all of its requests at once, and once), and at least CAP; a lane of few requests earns by the second.

A link's `replica_full` is none of these: the request and the report of the last slot had crossed, no work was lost, and
the report that comes ends it.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from neaptide.gateway.upstream import Failure

SHARE = 0.1  # of a retry, that a request earns ...
A_SECOND = 0.1  # ... and that a second earns
CAP = 10.0


class Retries:
    """Reckoned only when somebody asks: requests that are answered at once cost nothing here."""

    __slots__ = ("_arrivals", "_at_s", "_left")

    def __init__(self) -> None:
        self._left, self._arrivals, self._at_s = 0.0, 0, -math.inf  # a full bucket

    def take(self, now: float, arrivals: int, running: int) -> bool:
        """One more, if there is one. `arrivals`: of the lane, all so far; `running`: at its replicas now."""
        earned = SHARE * (arrivals - self._arrivals) + A_SECOND * (now - self._at_s)
        self._left = min(max(CAP, running), self._left + earned)
        self._arrivals, self._at_s = arrivals, now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def denied(failure: Failure) -> Failure:
    """What the client is told instead of another try."""
    why = f"{failure.message}, and the request was not sent again: retries are at most {SHARE:.0%} of requests"
    return replace(failure, message=why, retryable=False)
