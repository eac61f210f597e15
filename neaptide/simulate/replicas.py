"""The replicas of a request-level run: launched, ready, standing by, leaving, gone; and what becomes due for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from neaptide.gateway.route import Target
from neaptide.simulate.cold import Nodes, boot_s, remaining
from neaptide.simulate.engine import Engine
from neaptide.simulate.fates import NOTICED_S, USUAL, Fate, Silent
from neaptide.simulate.replica import Replica
from neaptide.simulate.routes import Pool
from neaptide.simulate.settings import Setup
from neaptide.simulate.spot import Reclaims
from neaptide.simulate.standbys import Moves, WarmPool

What = Literal["ready", "wake", "notice", "gone", "hang", "die"]


class Change(NamedTuple):
    """For the count of scale events."""

    at_s: float
    kind: Literal["launch", "drain", "reclaim"]


class Replicas:
    def __init__(self, setup: Setup, engine: Callable[[], Engine], seed: int) -> None:
        self._setup, self._engine = setup, engine
        self._nodes, self._reclaims = Nodes(setup.warm_s), Reclaims(setup.spot, seed)
        self._warm = WarmPool(setup)
        self._events: list[tuple[float, int, What, Replica]] = []
        self._serial = 0
        self.pool = Pool()  # those that are ready
        self.all: list[Replica] = []
        self.starting: list[Replica] = []  # in the order of their launch
        self.standing: list[Replica] = []
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

    # ------------------------------------------------------------------------------------------------- what is wanted

    def scale(self, want: int, now_s: float) -> None:
        """Wake or launch what is lacking; what is too many stands by or drains."""
        lacking = want - len(self.pool.targets) - len(self.starting)
        leaving = self._next_to_go(-lacking)
        moves = self._warm.moves(self.standing, leaving, max(0, lacking), want, now_s)
        for replica in leaving:
            if replica not in moves.parks:
                self.drain(replica, now_s)
        self._move(moves, now_s)
        for _ in range(lacking - len(moves.wakes)):
            self.launch(now_s)

    def rest(self, now_s: float) -> None:
        """Nothing else is wanted: who has stood by for long enough drains."""
        if self.standing:
            present = len(self.pool.targets) + len(self.starting)
            self._move(self._warm.moves(self.standing, (), 0, present, now_s), now_s)

    def launch(self, now_s: float, fate: Fate = USUAL, *, spared: bool = False) -> Replica:
        """`spared`: it begins with a process that was up without a model."""
        self.changes.append(Change(now_s, "launch"))
        warm = self._nodes.take(now_s)
        replica = self._make(now_s)
        replica.stages = remaining(self._setup.boot, warm=warm, spared=spared)
        self.starting.append(replica)
        takes_s = boot_s(replica.stages) if fate.ready_s is None else fate.ready_s
        due: tuple[tuple[float, What], ...] = ((takes_s, "ready"), (fate.hangs_s, "hang"), (fate.dies_s, "die"))
        for after_s, what in due:
            self._at(now_s + after_s, what, replica)
        return replica

    def drain(self, replica: Replica, now_s: float, within_s: float = math.inf) -> None:
        """It finishes what runs, for so long, and goes; one that starts goes at once."""
        self.changes.append(Change(now_s, "drain"))
        if replica.state == "starting":
            self._end(replica, now_s)
            return
        self._leave(replica, now_s)
        self._at(now_s + within_s, "gone", replica)

    def park(self, replica: Replica, now_s: float) -> None:
        """A ready one stands by: it finishes what runs and is given nothing."""
        self._withdraw(replica, now_s)
        replica.state = "standby"
        replica.stood.append([now_s, math.inf])
        self.standing.append(replica)

    def wake(self, replica: Replica, now_s: float) -> None:
        """It is ready at once; that something is due says to look at who waits."""
        self._withdraw(replica, now_s)
        replica.state = "ready"
        self.pool.add(replica.target)
        self._at(now_s, "wake", replica)

    def _next_to_go(self, number: int) -> Sequence[Replica]:
        """Who starts goes first, the youngest before the others; then the least loaded, who is gone soonest."""
        if number <= 0:
            return ()
        by_load = self.pool.targets[::-1]  # of those that are alike the youngest
        by_load.sort(key=lambda target: target.in_flight)
        return [*reversed(self.starting), *map(self.of, by_load)][:number]

    def _move(self, moves: Moves, now_s: float) -> None:
        for replica in moves.wakes:
            self.wake(replica, now_s)
        for replica in moves.parks:
            self.park(replica, now_s)
        for replica in moves.drains:
            self.drain(replica, now_s)

    # ------------------------------------------------------------------------------------------------- what becomes due

    def happen(self, now_s: float) -> list[int]:
        """What is due now. Requests that lost their replica, in the order of its line."""
        lost: list[int] = []
        while self._events and self._events[0][0] <= now_s:
            _, _, what, replica = heappop(self._events)
            if replica.ended_s == math.inf:
                lost += self._befalls(what, replica, now_s)
        return lost

    def settle(self, replica: Replica, now_s: float) -> None:
        """A replica that leaves and has nothing more to do is gone."""
        if replica.state == "draining" and not replica.engine.in_flight:
            self._end(replica, now_s)
            if not replica.reclaimed:
                self._nodes.give(now_s)

    def _befalls(self, what: What, replica: Replica, now_s: float) -> list[int]:
        """Who was running there, where it ends."""
        if what == "ready":
            if not isinstance(replica.engine, Silent):
                self.starting.remove(replica)
                self._become_ready(replica, now_s)
        elif what == "notice":
            self._notice(replica, now_s)
        elif what == "hang":
            replica.engine = Silent(replica.engine.drop(now_s))
            if replica.state != "starting":  # there only readiness is asked for
                replica.error = "it answers no health check"
                self._at(now_s + NOTICED_S, "die", replica)
        elif what != "wake":
            return self._break_off(what, replica, now_s)
        return []

    def _break_off(self, what: What, replica: Replica, now_s: float) -> list[int]:
        """A process that ends in draining is gone, another is dead until that is taken note of."""
        lost = replica.engine.drop(now_s)
        died = what == "die" and replica.state != "draining"
        self._end(replica, now_s)
        if died:
            replica.state, replica.error = "dead", replica.error or "its process ended"
        return lost

    def _make(self, now_s: float) -> Replica:
        setup = self._setup
        most = setup.engine.max_batch + setup.lookahead if setup.line == "gateway" else None
        replica = Replica(len(self.all), self._engine(), most, now_s)
        self.all.append(replica)
        self._at(now_s + self._reclaims.lifetime_s(), "notice", replica)
        return replica

    def _become_ready(self, replica: Replica, now_s: float) -> None:
        replica.state, replica.ready_s = "ready", now_s
        self.pool.add(replica.target)

    def _leave(self, replica: Replica, now_s: float) -> None:
        self._withdraw(replica, now_s)
        replica.state = "draining"
        self.leaving.append(replica)
        self.settle(replica, now_s)

    def _notice(self, replica: Replica, now_s: float) -> None:
        self.changes.append(Change(now_s, "reclaim"))
        replica.reclaimed = True
        if replica.state == "starting":
            self._end(replica, now_s)
            return
        if replica.state != "draining":
            self._leave(replica, now_s)
        notice_s = self._setup.spot.notice_s if self._setup.spot else 0.0
        self._at(now_s + notice_s, "gone", replica)

    def _end(self, replica: Replica, now_s: float) -> None:
        self._withdraw(replica, now_s)
        replica.state, replica.ended_s = "gone", now_s

    def _withdraw(self, replica: Replica, now_s: float) -> None:
        """From where it is."""
        if replica.state == "ready":
            self.pool.remove(replica.target)
        elif replica.state == "starting":
            self.starting.remove(replica)
        elif replica.state == "draining":
            self.leaving.remove(replica)
        else:
            self.standing.remove(replica)
            replica.stood[-1][1] = now_s

    def _at(self, time_s: float, what: What, replica: Replica) -> None:
        if time_s < math.inf:
            self._serial += 1
            heappush(self._events, (time_s, self._serial, what, replica))
