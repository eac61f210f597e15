"""Where a request goes: the least loaded replica that can take it. Pure: state in, choice out, `now` given."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import msgspec

from neaptide.gateway.breaker import NEITHER, Breaker
from neaptide.gateway.concurrency import Goals, Limiter
from neaptide.link import LoadReport
from neaptide.table import ReplicaRow

SCANNED = 32  # targets that are all looked at; of more, four (docs/decisions/0048)
FEW: tuple[int, ...] = (0, 16, 32, 48)  # bits by which their places are found
SPREAD = 0xDB4F_BBE0_A0F2_89E1  # 1/x, 1/x^2, 1/x^3, 1/x^4 in 16 bits each, where x^5 = x + 1
UNLIMITED = 1 << 30
BACKOFF_S = (0.25, 0.5, 1.0, 2.0, 5.0)  # how long a replica that fails to connect is left out, by failures in a row


class Target:
    """What this gateway knows of one replica. `link`: it reports its own room; others are bounded by max_running, and
    by what the `limiter` has learnt of them."""

    __slots__ = (
        "breaker",
        "connected",
        "draining",
        "failures",
        "in_flight",
        "limit",
        "limiter",
        "link",
        "replayable",
        "report",
        "resumes",
        "row",
        "sent",
    )

    def __init__(self, row: ReplicaRow) -> None:
        self.row = row
        self.limit = row.max_running if row.max_running is not None else UNLIMITED
        self.link = row.endpoint.startswith("link:")
        self.connected = not self.link  # a link has a hello first
        self.draining = row.state == "draining"
        self.in_flight = 0
        self.resumes = False  # it goes on with answers that others have begun ...
        self.replayable: frozenset[str] = frozenset()  # ... also where these features are in use
        self.report: LoadReport | None = None
        self.sent = 0  # dispatched less ended since `report`, all its models together
        self.failures = 0  # to reach it, in a row
        self.breaker = Breaker()
        self.limiter: Limiter | None = None

    def adopt(self, row: ReplicaRow) -> None:
        """The table changed its state or limit, not its address."""
        self.row = row
        self.limit = row.max_running if row.max_running is not None else UNLIMITED
        self.draining = row.state == "draining" or (self.report is not None and self.report.draining)

    def learn(self, goals: Goals | None) -> None:
        """Find out how many it can take within these goals, unless it tells. None: max_running alone bounds it."""
        if goals is None or self.link:
            self.limiter = None
        elif self.limiter is None:
            self.limiter = Limiter(goals)
        else:
            self.limiter.goals = goals

    @property
    def most(self) -> int:
        """So many may be in flight from here, whatever it reports."""
        limiter = self.limiter
        return self.limit if limiter is None or limiter.limit >= self.limit else int(limiter.limit)

    @property
    def erring(self) -> bool:
        """It is left out because it answers with errors."""
        return self.breaker.opened and not self.failures

    def can_take(self, now: float, model: str = "", anyway: bool = False) -> bool:
        """Whether it takes one more request; of a replica of several models, one for `model`. `anyway`: although it
        answers with errors."""
        if self.draining or self.in_flight >= self.limit or not self.connected:
            return False
        if self.limiter is not None and self.in_flight + 1 > self.limiter.limit:
            return False
        if self.breaker.opened and not (self.breaker.lets(now) or (anyway and self.erring)):
            return False
        if not self.link:
            return True
        report = self.report
        return report is not None and (report.rooms.get(model, 0) if report.rooms else report.slots) > self.sent

    def room(self, now: float, model: str = "") -> int:
        """Slots that are free: what it would take only to have it at hand is none."""
        if not self.can_take(now, model):
            return 0
        free = self.most - self.in_flight
        if not self.link or self.report is None:
            return free
        report = self.report
        slots = report.rooms.get(model, 0) if report.rooms else report.slots
        return max(0, min(free, slots - report.ahead - self.sent))

    def reachable(self, now: float) -> bool:
        return self.connected and not self.draining and not (self.failures and now < self.breaker.until_s)

    def take(self) -> None:
        self.in_flight += 1
        self.sent += 1
        if self.breaker.opened:
            self.breaker.probing = True

    def release(self, result: int = NEITHER, sent_s: float = 0.0, now: float = 0.0) -> None:
        """An attempt is over; what it tells of this replica (breaker.py), when it was sent."""
        self.in_flight -= 1
        self.sent -= 1
        self.breaker.ended(result, sent_s, now)

    def heard(self, report: LoadReport) -> None:
        """A fresh report counts what was sent before it."""
        self.report, self.sent = report, 0
        self.draining = report.draining or self.row.state == "draining"

    def filled(self) -> None:
        """It refused one for want of room: what it reported had crossed others on the way. Until it reports again it
        has room only for as many as end meanwhile."""
        if self.report is not None:
            self.report, self.sent = msgspec.structs.replace(self.report, slots=0, rooms={}), 0

    def failed(self, now: float, sent_s: float = math.inf) -> None:
        """It could not be reached: leave it out for a short, growing while. Many fail at once where one does: they
        count once."""
        if not self.breaker.opened or sent_s >= self.breaker.opened_s:
            self.failures += 1
            self.breaker.open(now, BACKOFF_S[min(self.failures, len(BACKOFF_S)) - 1])

    def reached(self, now: float) -> None:
        """A connection to it was made, which says nothing of what it answers: `failures` stay, so that it is left out
        for longer where it then breaks off."""
        if self.failures:
            self.breaker.close(now)

    def answered(self, now: float, status: int = 200, sent_s: float = math.inf) -> None:
        """It can be reached, and where that is no error, it works again."""
        self.failures = 0
        if self.breaker.opened and status < 500 and sent_s >= self.breaker.opened_s:
            self.breaker.close(now)


def choose(
    targets: Sequence[Target], now: float, turn: int = 0, avoid: Collection[str] = (), model: str = ""
) -> Target | None:
    """The target with the least in flight among those that can take one for `model`; ties go round by `turn`. Replicas
    in `avoid` (already tried for this request) only where no other can take it. None: the request must wait.

    Of more than SCANNED it is the least loaded of a few, others each turn; of all where none of them can take it."""
    count = len(targets)
    if count > SCANNED:
        best = _of_few(targets, now, turn, avoid, model)
        if best is not None:
            return best
    best = None
    least = 1 << 60
    start = turn % count if count else 0
    for at in range(start - count, start):  # negative places count from the end: all of them, from `start` on
        target = targets[at]
        if target.in_flight < least and target.can_take(now, model) and (not avoid or target.row.id not in avoid):
            best, least = target, target.in_flight
            if least == 0:
                break
    if best is None and avoid:
        return choose(targets, now, turn, model=model)
    if best is None and all_failing(targets):
        able = [t for t in targets if t.can_take(now, model, anyway=True)]
        return min(able, key=lambda t: t.in_flight, default=None)
    return best


def _of_few(targets: Sequence[Target], now: float, turn: int, avoid: Collection[str], model: str) -> Target | None:
    """Their places are the turn's multiple of SPREAD in four parts, a point of a quasi-random sequence (Roberts' R4):
    each part goes evenly over all places, and no two go together. A generator of random numbers costs more, and the
    same turn must name the same again."""
    count, mixed = len(targets), turn * SPREAD
    best: Target | None = None
    least = 1 << 60
    for shift in FEW:
        target = targets[(mixed >> shift & 0xFFFF) * count >> 16]
        if target.in_flight < least and target.can_take(now, model) and (not avoid or target.row.id not in avoid):
            best, least = target, target.in_flight
    return best


def all_failing(targets: Sequence[Target]) -> bool:
    """Every replica that can be reached answers with errors. The fault is then more likely in what they share, or in
    the requests, and leaving all of them out would help nobody: they are used as if none did."""
    present = [t for t in targets if t.connected and not t.draining and not t.failures]
    return bool(present) and all(t.breaker.opened for t in present)


def room(targets: Sequence[Target], now: float, model: str = "") -> tuple[int, int]:
    """Slots that are free, and all there are: the free ones and those that are taken from here."""
    free = taken = 0
    for target in targets:
        if target.reachable(now):
            free += target.room(now, model)
            taken += target.in_flight
    return free, free + taken


def reachable(targets: Sequence[Target], now: float) -> bool:
    """Is there a replica that requests may wait for: present, not leaving, not failing to connect?"""
    return any(t.reachable(now) for t in targets)
