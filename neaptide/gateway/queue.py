"""Who waits: one bounded line a deployment. A synchronous structure that takes `now`; it never calls anybody.

    who lost a replica  >  class by class, highest first  >  the tenant least served (shares.py)  >  first come

One departure in SPARED looks at the lower classes first, so that none waits for ever. In a full line a newcomer takes
the place of the last one of a lower class, or of the tenant that has most of them.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from neaptide.errors import RequestError
from neaptide.gateway.shares import CLASSES, Account, Shares

T = TypeVar("T")
May = Callable[[Account, int], bool]  # whether a request of this account and class may have what is free
Fits = Callable[[T], bool]  # whether this one could go to a replica that has room
RATE_SAMPLES = 64  # departures over which the drain rate is measured
NORMAL = 1
SPARED = 16
SPARED_ORDERS = ((2, 1, 0), (1, 2, 0), (1, 2, 0), (1, 2, 0))  # of four such departures one begins with the lowest


class Ticket(Generic[T]):
    """A place in the line. `again`: it lost a replica, and is before all classes."""

    __slots__ = ("account", "again", "due_s", "entered_s", "hasty", "item", "rank", "waiting")

    def __init__(
        self, item: T, account: Account, rank: int, again: bool, entered_s: float, max_wait_s: float, latest_s: float
    ) -> None:
        self.item, self.account, self.rank, self.again = item, account, rank, again
        self.entered_s = entered_s
        self.due_s = min(entered_s + max_wait_s, latest_s)
        self.hasty = latest_s < entered_s + max_wait_s  # its own deadline comes before the longest wait
        self.waiting = True


class _Queue(Generic[T]):
    """One tenant's, of one class. Those who left are passed over."""

    __slots__ = ("account", "serial", "tickets", "waiting")

    def __init__(self, account: Account, serial: int) -> None:
        self.account, self.serial = account, serial
        self.tickets: deque[Ticket[T]] = deque()
        self.waiting = 0

    def first(self, fits: Fits[T] | None = None) -> Ticket[T] | None:
        """Of those that what is free `fits`; it stays."""
        tickets = self.tickets
        while tickets and not tickets[0].waiting:
            tickets.popleft()
        if fits is None:
            return tickets[0] if tickets else None
        return next((t for t in tickets if t.waiting and fits(t.item)), None)

    def compact(self) -> None:
        self.tickets = deque(t for t in self.tickets if t.waiting)


class Rank(Generic[T]):
    """Those of one class: a queue a tenant, and a heap of tenants by what they had been served when they were put in.
    That is at most what they have been served by now, so the first one that is up to date is the least."""

    __slots__ = ("_heap", "_level", "_number", "_serial", "queues", "waiting")

    def __init__(self, number: int) -> None:
        self._number = number
        self.waiting = 0
        self.queues: dict[str, _Queue[T]] = {}  # of tenants of whom somebody waits
        self._heap: list[tuple[float, int, int, str]] = []  # (served, running, serial of the queue, tenant)
        self._level = 0.0  # what the one who left last had been served
        self._serial = 0

    def add(self, ticket: Ticket[T]) -> None:
        account = ticket.account
        queue = self.queues.get(account.tenant)
        if queue is None:
            self._lift(account)
            self._serial += 1
            queue = self.queues[account.tenant] = _Queue(account, self._serial)
            entry = (account.served[self._number], account.running, self._serial, account.tenant)
            heapq.heappush(self._heap, entry)
        queue.tickets.append(ticket)
        queue.waiting += 1
        self.waiting += 1

    def left(self, tenant: str) -> None:
        """One of these is not waiting any more."""
        queue = self.queues[tenant]
        queue.waiting -= 1
        self.waiting -= 1
        if not queue.waiting:
            del self.queues[tenant]  # its entry in the heap is dead

    def least(self) -> _Queue[T] | None:
        """Of the tenant that has been served least."""
        heap = self._heap
        while heap:
            served, _, serial, tenant = heap[0]
            queue = self.queues.get(tenant)
            if queue is None or queue.serial != serial:
                heapq.heappop(heap)
            elif served < (by_now := queue.account.served[self._number]):
                heapq.heapreplace(heap, (by_now, queue.account.running, serial, tenant))
            else:
                return queue
        return None

    def first(self, may: May | None, fits: Fits[T] | None = None) -> Ticket[T] | None:
        """Of the tenant that has been served least, of those that `may` take what is free and that it `fits`. It
        stays."""
        if fits is not None:
            by_service = sorted(self.queues.values(), key=lambda q: (q.account.served[self._number], q.account.running))
            allowed = (q for q in by_service if may is None or may(q.account, self._number))
            return next((t for q in allowed if (t := q.first(fits)) is not None), None)
        queue = self.least()
        if queue is not None and may is not None and not may(queue.account, self._number):
            allowed = (q for q in self.queues.values() if may(q.account, self._number))
            queue = min(allowed, key=lambda q: q.account.served[self._number], default=None)
        return queue.first() if queue is not None else None

    def departs(self, account: Account) -> None:
        """One of its requests is served: where it stands is where others begin."""
        self._level = account.served[self._number]

    def passed(self, account: Account) -> None:
        """One of its requests is served, and nobody waits here."""
        served = account.served
        if served[self._number] < self._level:
            served[self._number] = self._level
        else:
            self._level = served[self._number]

    def compact(self) -> None:
        for queue in self.queues.values():
            queue.compact()
        alive = {queue.serial for queue in self.queues.values()}
        self._heap = [entry for entry in self._heap if entry[2] in alive]
        heapq.heapify(self._heap)

    def _lift(self, account: Account) -> None:
        """It begins again, nobody of it waiting here: not behind where the least served one stands."""
        least, served = self.least(), account.served
        floor = self._level if least is None else least.account.served[self._number]
        served[self._number] = max(served[self._number], floor)


class Line(Generic[T]):
    """At most `cap` waiting tickets, each for at most `max_wait_s` and no longer than its own deadline."""

    __slots__ = (
        "_again", "_departed", "_departures", "_dues", "_ranks", "_serial", "cap", "max_wait_s", "shares", "waiting",
    )  # fmt: skip

    def __init__(self, cap: int, max_wait_s: float) -> None:
        self.cap, self.max_wait_s = cap, max_wait_s
        self.waiting = 0
        self.shares = Shares()
        self._ranks: tuple[Rank[T], ...] = tuple(Rank(number) for number in range(CLASSES))
        self._again: deque[Ticket[T]] = deque()  # who lost a replica, the last first
        self._dues: list[tuple[float, int, Ticket[T]]] = []
        self._departures: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._serial = self._departed = 0

    def __len__(self) -> int:
        return self.waiting

    def enter(
        self,
        item: T,
        now: float,
        *,
        tenant: str = "",
        rank: int = NORMAL,
        since_s: float | None = None,
        latest_s: float = math.inf,
    ) -> Ticket[T]:
        """Join. `latest_s`: when it has to be served to make its deadline. `since_s`: when it first began to wait, if
        that was earlier (a request that lost its replica goes to the front and keeps its clock). RequestError 429 with
        Retry-After when the line is full, or when it would not be its turn by `latest_s`."""
        account = self.shares.of(tenant)
        self.shares.asked(account, rank, now)
        again = since_s is not None
        if not again:
            self.check_deadline(account, rank, now, latest_s)
            self._check_room(account, rank, now)
        self._skip_idle(now)
        ticket = Ticket(item, account, rank, again, now if since_s is None else since_s, self.max_wait_s, latest_s)
        if again:
            self._again.appendleft(ticket)
        else:
            self._ranks[rank].add(ticket)
        self._serial += 1
        heapq.heappush(self._dues, (ticket.due_s, self._serial, ticket))
        self.waiting += 1
        account.waiting += 1
        return ticket

    def passed(self, account: Account, rank: int) -> None:
        """A request of it found room at once."""
        self._ranks[rank].passed(account)

    @property
    def lost(self) -> bool:
        """Somebody here may have lost a replica, and wait for another of the same kind."""
        return bool(self._again)

    def first(self, now: float, may: May | None = None, fits: Fits[T] | None = None) -> Ticket[T] | None:
        """Take the next ticket out of the line, of a tenant that `may` take what is free, of those that it `fits`.
        None when none waits, or what is free is kept for somebody else."""
        lost = next((t for t in self._again if t.waiting and (fits is None or fits(t.item))), None)
        if lost is not None:
            return self._depart(lost, now)
        spared = (self._departed + 1) % SPARED == 0
        order = SPARED_ORDERS[(self._departed + 1) // SPARED % len(SPARED_ORDERS)] if spared else range(CLASSES)
        kept = CLASSES
        for number in order:
            rank = self._ranks[number]
            if number > kept or not rank.waiting:
                continue
            found = rank.first(may, fits)
            if found is not None:
                rank.departs(found.account)
                return self._depart(found, now)
            if fits is None or rank.first(None, fits) is not None:
                kept = number  # from these, and so from those below them
        return None

    def _depart(self, ticket: Ticket[T], now: float) -> Ticket[T]:
        self.leave(ticket)
        self._departures.append(now)
        self._departed += 1
        return ticket

    def leave(self, ticket: Ticket[T]) -> None:
        """Forget a ticket (its client left, or it was served). Leaving twice is leaving once."""
        if not ticket.waiting:
            return
        ticket.waiting = False
        self.waiting -= 1
        ticket.account.waiting -= 1
        if not ticket.again:
            self._ranks[ticket.rank].left(ticket.account.tenant)
        while self._again and not self._again[0].waiting:
            self._again.popleft()
        if not self.waiting:
            self._again.clear()
            self._dues.clear()
        elif len(self._dues) > 2 * self.waiting + RATE_SAMPLES:  # abandoned tickets must not pile up
            for rank in self._ranks:
                rank.compact()
            self._again = deque(t for t in self._again if t.waiting)
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

    def crowded_out(self, tenant: str, rank: int) -> Ticket[T] | None:
        """In a full line, whose place a newcomer takes: the last of a lower class, else the last of the tenant that has
        most of its own class, for its weight, if it then still has as many as the newcomer's. It has left the line."""
        if self.waiting != self.cap:  # below it there is room; above it one place less would make none
            return None
        mine = self.shares.of(tenant)
        for low in range(CLASSES - 1, rank - 1, -1):
            queues = self._ranks[low].queues
            if not queues:
                continue
            most = max(queues.values(), key=lambda q: q.waiting / q.account.weight)
            own = queues[tenant].waiting if tenant in queues else 0
            fair = (own + 1) / mine.weight <= (most.waiting - 1) / most.account.weight
            if low > rank or (fair and most.account is not mine):
                ticket = next(t for t in reversed(most.tickets) if t.waiting)
                self.leave(ticket)
                return ticket
        return None

    # --- how long

    def oldest_wait_s(self, now: float) -> float:
        firsts = [queue.first() for rank in self._ranks for queue in rank.queues.values()]
        waiting = [t for t in (*firsts, *self._again) if t is not None and t.waiting]
        return now - min((t.entered_s for t in waiting), default=now)

    def wait_s(self, account: Account, rank: int, now: float) -> float | None:
        """When a newcomer would be served, by the recent drain rate; None where nobody has left lately."""
        departures = self._departures
        if len(departures) < 2 or now <= departures[0]:
            return None
        return (self.ahead(account, rank) + 1) * (now - departures[0]) / len(departures)

    def drain_s(self, now: float) -> float | None:
        """When all who wait would be served, by the recent drain rate; None where nobody has left lately."""
        departures = self._departures
        if len(departures) < 2 or now <= departures[0]:
            return None
        return self.waiting * (now - departures[0]) / len(departures)

    def ahead(self, account: Account, rank: int) -> float:
        """Who is served before a newcomer: all of higher classes, and of its own class each tenant as many, for its
        weight, as its own tenant has there with it."""
        queues = self._ranks[rank].queues
        own = queues[account.tenant].waiting if account.tenant in queues else 0
        turns = (own + 1) / account.weight
        others = sum(min(q.waiting, turns * q.account.weight) for q in queues.values() if q.account is not account)
        lost = self.waiting - sum(r.waiting for r in self._ranks)
        return lost + sum(r.waiting for r in self._ranks[:rank]) + own + others

    def retry_after_s(self, now: float, tenant: str = "", rank: int = NORMAL) -> float:
        """When a place is likely: at least 1, at most the longest wait."""
        wait_s, longest = self.wait_s(self.shares.of(tenant), rank, now), max(1.0, self.max_wait_s)
        return longest if wait_s is None else min(longest, max(1.0, math.ceil(wait_s)))

    def check_deadline(self, account: Account, rank: int, now: float, latest_s: float) -> None:
        """RequestError 429 where it would not be its turn by then."""
        if latest_s == math.inf:
            return
        wait_s = (self.wait_s(account, rank, now) or 0.0) if self.waiting else 0.0
        if wait_s > latest_s - now:
            raise RequestError(
                429,
                f"It would be its turn in {wait_s:.1f} s; to make its deadline it had to be in {latest_s - now:.1f} s.",
                slug="deadline_unreachable",
                retry_after_s=self.retry_after_s(now, account.tenant, rank),
            )

    def _check_room(self, account: Account, rank: int, now: float) -> None:
        if self.waiting >= self.cap:
            raise RequestError(
                429,
                f"Too many requests are waiting for this model ({self.waiting}, {account.waiting} of them yours).",
                slug="queue_full",
                retry_after_s=self.retry_after_s(now, account.tenant, rank),
            )

    def _skip_idle(self, now: float) -> None:
        """Time in which nobody waited says nothing of how quickly a line moves."""
        departures = self._departures
        if not self.waiting and departures and (gap_s := now - departures[-1]) > 0:
            self._departures = deque((at + gap_s for at in departures), RATE_SAMPLES)


def too_long(ticket: Ticket[T], retry_after_s: float) -> RequestError:
    """The refusal of a ticket that expired: by its own deadline, or by the longest wait."""
    waited_s = max(0.0, ticket.due_s - ticket.entered_s)
    return RequestError(
        429,
        f"No replica was free {'before its deadline' if ticket.hasty else 'in time'} ({waited_s:.1f} s).",
        slug="deadline_passed" if ticket.hasty else "wait_expired",
        retry_after_s=retry_after_s,
    )


def crowded(ticket: Ticket[T], retry_after_s: float) -> RequestError:
    """The refusal of a ticket whose place somebody else took."""
    return RequestError(
        429,
        f"The line is full, and {ticket.account.waiting + 1} of those in it were this tenant's or of a low class.",
        slug="queue_full",
        retry_after_s=retry_after_s,
    )
