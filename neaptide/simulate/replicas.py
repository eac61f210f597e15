"""The replicas of a request-level run: launched, ready, leaving, gone; and for how long each one is paid."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from neaptide.gateway.route import Target
from neaptide.simulate.cold import Nodes, boot_s
from neaptide.simulate.engine import Engine
from neaptide.simulate.routes import Pool
from neaptide.simulate.settings import Setup
from neaptide.simulate.spot import Reclaims
from neaptide.table import ReplicaRow

What = Literal["ready", "notice", "gone"]


class Change(NamedTuple):
    """For the count of scale events."""

    at_s: float
    kind: Literal["launch", "drain", "reclaim"]


class Replica:
    """`target` is what the gateway knows of it: its load is brought up to date whenever its engine has run."""

    __slots__ = ("ended_s", "engine", "launched_s", "number", "ready_s", "reclaimed", "target")

    def __init__(self, number: int, engine: Engine, max_running: int | None, launched_s: float) -> None:
        row = ReplicaRow(id=str(number), model="", endpoint="http://replica", max_running=max_running)
        self.number, self.engine, self.target = number, engine, Target(row)
        self.launched_s, self.ready_s, self.ended_s = launched_s, math.inf, math.inf
        self.reclaimed = False  # its machine goes, or is gone

    def run(self, until_s: float) -> None:
        self.engine.run((), (), until_s)
        self.target.in_flight = self.engine.in_flight

    def paid_until_s(self, billing_s: float) -> float:
        """Whole billing units from the launch; inf while it is there."""
        if not billing_s or self.ended_s == math.inf:
            return self.ended_s
        units = math.ceil((self.ended_s - self.launched_s) / billing_s - 1e-9)
        return self.launched_s + units * billing_s


class Replicas:
    def __init__(self, setup: Setup, engine: Callable[[], Engine], seed: int) -> None:
        self._setup, self._engine = setup, engine
        self._nodes, self._reclaims = Nodes(setup.warm_s), Reclaims(setup.spot, seed)
        self._events: list[tuple[float, int, What, Replica]] = []
        self._serial = 0
        self.pool = Pool()  # those that are ready
        self.all: list[Replica] = []
        self.starting: list[Replica] = []  # in the order of their launch
        self.leaving: list[Replica] = []
        self.changes: list[Change] = []

    @property
    def next_s(self) -> float:
        return self._events[0][0] if self._events else math.inf

    @property
    def ready(self) -> list[Replica]:
        return [self.of(target) for target in self.pool.targets]

    def of(self, target: Target) -> Replica:
        return self.all[int(target.row.id)]

    def begin(self, count: int, now_s: float) -> None:
        """These are there from the first, and no scale event."""
        for _ in range(count):
            self._become_ready(self._make(now_s), now_s)

    def scale(self, want: int, now_s: float) -> None:
        """Launch or drain what is lacking or too many."""
        change = want - len(self.pool.targets) - len(self.starting)
        for _ in range(change):
            self._launch(now_s)
            self.changes.append(Change(now_s, "launch"))
        for _ in range(-change):
            self._drain(now_s)
            self.changes.append(Change(now_s, "drain"))

    def happen(self, now_s: float) -> list[int]:
        """What is due now. Requests that lost their replica, in the order of its line."""
        lost: list[int] = []
        while self._events and self._events[0][0] <= now_s:
            _, _, what, replica = heappop(self._events)
            if replica.ended_s < math.inf:
                continue
            if what == "ready":
                self.starting.remove(replica)
                self._become_ready(replica, now_s)
            elif what == "notice":
                self._notice(replica, now_s)
            else:
                lost += replica.engine.drop(now_s)
                self.leaving.remove(replica)
                replica.ended_s = now_s
        return lost

    def settle(self, replica: Replica, now_s: float) -> None:
        """A replica that leaves and has nothing more to do is gone."""
        if replica in self.leaving and not replica.engine.in_flight:
            self.leaving.remove(replica)
            replica.ended_s = now_s
            if not replica.reclaimed:
                self._nodes.give(now_s)

    def _launch(self, now_s: float) -> None:
        warm = self._nodes.take(now_s)
        replica = self._make(now_s)
        self.starting.append(replica)
        self._at(now_s + boot_s(self._setup.boot, warm=warm), "ready", replica)

    def _make(self, now_s: float) -> Replica:
        setup = self._setup
        most = setup.engine.max_batch + setup.lookahead if setup.line == "gateway" else None
        replica = Replica(len(self.all), self._engine(), most, now_s)
        self.all.append(replica)
        self._at(now_s + self._reclaims.lifetime_s(), "notice", replica)
        return replica

    def _become_ready(self, replica: Replica, now_s: float) -> None:
        replica.ready_s = now_s
        self.pool.add(replica.target)

    def _drain(self, now_s: float) -> None:
        """Who starts goes first, the youngest before the others; then the least loaded, who is gone soonest."""
        if self.starting:
            self.starting.pop().ended_s = now_s
            return
        replica = self.of(min(reversed(self.pool.targets), key=lambda target: target.in_flight))
        self._leave(replica, now_s)

    def _leave(self, replica: Replica, now_s: float) -> None:
        self.pool.remove(replica.target)
        self.leaving.append(replica)
        self.settle(replica, now_s)

    def _notice(self, replica: Replica, now_s: float) -> None:
        self.changes.append(Change(now_s, "reclaim"))
        replica.reclaimed = True
        if replica in self.starting:
            self.starting.remove(replica)
            replica.ended_s = now_s
            return
        if replica not in self.leaving:
            self._leave(replica, now_s)
        notice_s = self._setup.spot.notice_s if self._setup.spot else 0.0
        self._at(now_s + notice_s, "gone", replica)

    def _at(self, time_s: float, what: What, replica: Replica) -> None:
        if time_s < math.inf:
            self._serial += 1
            heappush(self._events, (time_s, self._serial, what, replica))
