"""Who waits: one bounded line a deployment. A synchronous structure that takes `now`; it never calls anybody.

First in, first out today. Classes and fairness between tenants change `first` alone: a ticket carries its request, and
callers never look inside the order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import Generic, TypeVar

from neaptide.errors import RequestError

T = TypeVar("T")
RATE_SAMPLES = 64  # departures over which the drain rate is measured


class Ticket(Generic[T]):
    """A place in the line."""

    __slots__ = ("due_s", "entered_s", "hasty", "item", "waiting")

    def __init__(self, item: T, entered_s: float, max_wait_s: float, deadline_s: float) -> None:
        self.item, self.entered_s = item, entered_s
        self.due_s = min(entered_s + max_wait_s, deadline_s)
        self.hasty = deadline_s < entered_s + max_wait_s  # its own deadline comes before the longest wait
        self.waiting = True


class Line(Generic[T]):
    """At most `cap` waiting tickets, each for at most `max_wait_s` and no longer than its own deadline."""

    __slots__ = ("_departures", "_dues", "_order", "_serial", "cap", "max_wait_s", "waiting")

    def __init__(self, cap: int, max_wait_s: float) -> None:
        self.cap, self.max_wait_s = cap, max_wait_s
        self.waiting = 0
        self._order: deque[Ticket[T]] = deque()
        self._dues: list[tuple[float, int, Ticket[T]]] = []
        self._departures: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._serial = 0

    def __len__(self) -> int:
        return self.waiting

    def enter(self, item: T, now: float, *, since_s: float | None = None, deadline_s: float = math.inf) -> Ticket[T]:
        """Join the end. `since_s`: when it first began to wait, if that was earlier (a request that lost its replica
        goes to the front and keeps its clock). RequestError 429 with Retry-After when the line is full."""
        again = since_s is not None
        if self.waiting >= self.cap and not again:
            raise RequestError(
                429,
                f"Too many requests are waiting for this model ({self.waiting}).",
                slug="queue_full",
                retry_after_s=self.retry_after_s(now),
            )
        entered_s = now if since_s is None else since_s
        ticket = Ticket(item, entered_s, self.max_wait_s, deadline_s)
        if again:
            self._order.appendleft(ticket)
        else:
            self._order.append(ticket)
        self._serial += 1
        heapq.heappush(self._dues, (ticket.due_s, self._serial, ticket))
        self.waiting += 1
        return ticket

    def first(self, now: float) -> Ticket[T] | None:
        """Take the next ticket out of the line; None when nobody waits."""
        while self._order:
            ticket = self._order.popleft()
            if ticket.waiting:
                self.leave(ticket)
                self._departures.append(now)
                return ticket
        return None

    def leave(self, ticket: Ticket[T]) -> None:
        """Forget a ticket (its client left, or it was served). Leaving twice is leaving once."""
        if not ticket.waiting:
            return
        ticket.waiting = False
        self.waiting -= 1
        if not self.waiting:
            self._order.clear()
            self._dues.clear()
        elif len(self._dues) > 2 * self.waiting + RATE_SAMPLES:  # abandoned tickets must not pile up
            self._order = deque(t for t in self._order if t.waiting)
            self._dues = [entry for entry in self._dues if entry[2].waiting]
            heapq.heapify(self._dues)

    def expired(self, now: float) -> list[Ticket[T]]:
        """Take out all tickets that are due."""
        out = []
        while self._dues and self._dues[0][0] <= now:
            ticket = heapq.heappop(self._dues)[2]
            if ticket.waiting:
                self.leave(ticket)
                out.append(ticket)
        return out

    def oldest_wait_s(self, now: float) -> float:
        for ticket in self._order:
            if ticket.waiting:
                return now - ticket.entered_s
        return 0.0

    def retry_after_s(self, now: float) -> float:
        """When a place is likely: those ahead over the recent drain rate; at least 1, at most the longest wait."""
        departures = self._departures
        longest = max(1.0, self.max_wait_s)
        if len(departures) < 2 or now <= departures[0]:
            return longest
        rate_per_s = len(departures) / (now - departures[0])
        return min(longest, max(1.0, math.ceil((self.waiting + 1) / rate_per_s)))


def too_long(ticket: Ticket[T], retry_after_s: float) -> RequestError:
    """The refusal of a ticket that expired: by its own deadline, or by the longest wait."""
    waited_s = ticket.due_s - ticket.entered_s
    return RequestError(
        429,
        f"No replica was free {'before its deadline' if ticket.hasty else 'in time'} ({waited_s:.1f} s).",
        slug="deadline_passed" if ticket.hasty else "wait_expired",
        retry_after_s=retry_after_s,
    )
