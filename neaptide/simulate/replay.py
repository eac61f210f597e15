"""One deployment, request by request: arrivals → line and route → engines of replicas that a policy scales.

Engines run on their own; `due` knows when each one's present work ends. Before anything is decided at a time (a route,
a place in the line, a count of replicas), every engine has run to it. Only a route that looks at no load (round robin
with the lines in the replicas) needs no such order: there each engine takes a tick's share at once, several times as
quick.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from typing import Literal

import numpy as np

from neaptide.control.policy import Floats, Policy, Seen
from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Book
from neaptide.simulate.even import jumping
from neaptide.simulate.exact import Exact
from neaptide.simulate.replica import Replica
from neaptide.simulate.replicas import Replicas
from neaptide.simulate.routes import RoundRobin, router
from neaptide.simulate.served import Served
from neaptide.simulate.settings import Setup, capacity

Tier = Literal["fast", "exact"]
FIRST_S = 600.0  # whose requests tell how many replicas there are at first
TAIL_S = 4 * 3600.0  # after the last arrival; who is not served by then is late for good


def replay(
    requests: Requests,
    setup: Setup,
    policy: Policy | None = None,
    *,
    tier: Tier = "fast",
    seed: int = 0,
    from_s: float | None = None,
    to_s: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Served:
    """The requests that come within [from_s, to_s), by default all; those before warm everything up, those after are
    left out. Without a policy the replicas stay as they are at first; a policy has one lane. The run goes on until all
    are served, for at most four hours. ConfigError E124 where nothing comes in that time."""
    if policy is not None and policy.lanes != 1:
        raise ValueError(f"{policy.name} has {policy.lanes} lanes; requests are replayed with one")
    t_s = requests.t_s
    start_s = math.floor((float(t_s[0]) if len(t_s) else 0.0) / setup.tick_s) * setup.tick_s
    from_s = start_s if from_s is None else from_s
    to_s = (
        (math.floor((float(t_s[-1]) if len(t_s) else 0.0) / setup.tick_s) + 1) * setup.tick_s if to_s is None else to_s
    )
    if not np.any((t_s >= from_s) & (t_s < to_s)):
        why = f"they come from {t_s[0]:.0f} s to {t_s[-1]:.0f} s" if len(t_s) else "there are none"
        raise ConfigError(f"no request comes from {from_s:.0f} s to {to_s:.0f} s", why=why, code="E124")
    run = Replay(requests, setup, policy, tier, seed, start_s, to_s)
    run.run(progress)
    return run.served(from_s, to_s)


class Replay:
    """A run's state; times rise. `arrived`: how many requests have come; `line`: who waits in the gateway."""

    def __init__(
        self,
        requests: Requests,
        setup: Setup,
        policy: Policy | None,
        tier: Tier,
        seed: int,
        start_s: float,
        to_s: float,
    ) -> None:
        if setup.lengths == "fixed":
            requests = replace(requests, in_tokens=None, out_tokens=None, prefixes=None)
        self._setup, self._policy = setup, policy
        self._start_s, self._to_s = start_s, to_s
        self.book = book = Book(requests, setup.in_tokens, setup.out_tokens)
        self._lost = [0] * len(book.prompt)
        self.sent_s = [math.nan] * len(book.prompt)  # when it was given to the replica that has it, or had it last
        self._arrivals = bisect_left(book.arrived_s, to_s)
        self.arrived = 0
        engine = Exact if tier == "exact" else jumping(setup.engine, book)
        self.replicas = Replicas(setup, lambda: engine(setup.engine, book), seed)
        self._router = router(setup.route, book, setup.engine.prefix_block_tokens, seed)
        self.line: deque[int] = deque()  # the gateway's
        self._due: list[tuple[float, int]] = []  # heap: when an engine's work ends, the replica's number
        self._capacity = capacity(setup, float(np.mean(book.prompt or [1])), float(np.mean(book.out or [1])))
        self._state = policy.start() if policy else {}
        self._next_want_s = -math.inf
        self._seen: deque[tuple[float, Floats]] = deque()  # loads as they were, for the lag
        self._counts: list[tuple[float, int, int, int]] = []
        self.replicas.begin(self._first_replicas(), start_s)

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        tick_s, tick, last_s = self._setup.tick_s, 0, self._to_s + TAIL_S
        while True:
            tick += 1
            now_s = self._start_s + tick * tick_s
            self.advance(now_s)
            if progress is not None:
                progress(min(1.0, self.arrived / max(1, self._arrivals)))
            served = (
                self.arrived >= self._arrivals and not self.line and not any(r.engine.in_flight for r in self._there())
            )
            if now_s >= last_s or (now_s >= self._to_s and served):
                return

    def advance(self, now_s: float) -> None:
        """All that happens until then, and a tick."""
        before = self.arrived
        self._until(now_s)
        self._tick(now_s, self.arrived - before)

    # ------------------------------------------------------------------------------------------------- requests

    def _until(self, until_s: float) -> None:
        for replica in self._apart():
            self._watch(replica)
        while self.replicas.next_s <= until_s:
            now_s = self.replicas.next_s
            self._serve(now_s)
            lost = self.replicas.happen(now_s)
            for id in lost:
                self._lost[id] += 1
            self.line.extendleft(reversed(lost))
            for replica in self.replicas.leaving:
                self._watch(replica)
            self._dispatch(now_s)
        self._serve(until_s)

    def _serve(self, until_s: float) -> None:
        """All that come before this time; every engine runs to it."""
        first, end = self.arrived, bisect_left(self.book.arrived_s, until_s, self.arrived, self._arrivals)
        self.arrived = end
        if isinstance(self._router, RoundRobin) and self._setup.line == "replica" and self.replicas.pool.targets:
            self._share_out(self._router, first, end, until_s)
        else:
            arrived_s, due = self.book.arrived_s, self._due
            for id in range(first, end):
                now_s = arrived_s[id]
                if due and due[0][0] <= now_s:
                    self._catch_up(now_s)
                self._arrive(id, now_s)
        self._catch_up(until_s)

    def _share_out(self, robin: RoundRobin, first: int, end: int, until_s: float) -> None:
        replicas = self.replicas.ready
        for at, replica in enumerate(replicas):
            ids = range(first + (at - robin.turn) % len(replicas), end, len(replicas))
            share = slice(ids.start, end, ids.step)
            self.book.replica[share] = [replica.number] * len(ids)
            self.sent_s[share] = self.book.arrived_s[share]
            replica.engine.run(ids, self.book.arrived_s[share], until_s)
            replica.target.in_flight = replica.engine.in_flight
        robin.turn += end - first

    def _arrive(self, id: int, now_s: float) -> None:
        target = None if self.line else self._router.pick(self.replicas.pool, id, now_s)
        if target is None:
            self.line.append(id)
        else:
            self._send(self.replicas.of(target), id, now_s)

    def _dispatch(self, now_s: float) -> None:
        """Who waits in the gateway, in order, as long as a replica takes one."""
        while self.line:
            target = self._router.pick(self.replicas.pool, self.line[0], now_s)
            if target is None:
                return
            self._send(self.replicas.of(target), self.line.popleft(), now_s)

    def _send(self, replica: Replica, id: int, now_s: float) -> None:
        engine = replica.engine
        self.book.replica[id], self.sent_s[id] = replica.number, now_s
        before_s = engine.end_s
        engine.run((id,), (now_s,), now_s)
        replica.target.in_flight = engine.in_flight
        if engine.end_s != before_s:
            heappush(self._due, (engine.end_s, replica.number))

    def _watch(self, replica: Replica) -> None:
        if replica.engine.end_s < math.inf:
            heappush(self._due, (replica.engine.end_s, replica.number))

    def _catch_up(self, until_s: float) -> None:
        """Every engine runs to this time, in the order of time; who waits gets the places that become free."""
        due, replicas = self._due, self.replicas
        while due and due[0][0] <= until_s:
            now_s, number = heappop(due)
            replica = replicas.all[number]
            if replica.engine.end_s != now_s:
                continue  # it was cut short or has run on since
            before = replica.target.in_flight
            replica.run(now_s)
            self._watch(replica)
            if replicas.leaving:
                replicas.settle(replica, now_s)
            if self.line and replica.target.in_flight < before:
                self._dispatch(now_s)

    # ------------------------------------------------------------------------------------------------- replicas

    def _there(self) -> list[Replica]:
        return self.replicas.ready + self._apart()

    def _apart(self) -> list[Replica]:
        """Those that are given nothing more, and end what they have."""
        return self.replicas.leaving + self.replicas.standing

    def _first_replicas(self) -> int:
        if self._setup.replicas is not None:
            return self._setup.replicas
        span_s = min(FIRST_S, self._to_s - self._start_s)
        first = bisect_left(self.book.arrived_s, self._start_s + span_s, 0, self._arrivals)
        return min(math.ceil(first / span_s / self._capacity.rps), self._setup.max_replicas)

    def _tick(self, now_s: float, arrivals: int) -> None:
        replicas, policy = self.replicas, self._policy
        self._counts.append((now_s, len(replicas.pool.targets), len(replicas.starting), len(replicas.standing)))
        if policy is None:
            return
        engines = [replica.engine for replica in self._there()]
        waiting = len(self.line) + sum(engine.waiting for engine in engines)
        in_flight = len(self.line) + sum(engine.in_flight for engine in engines)
        load = self._lagged(now_s, np.array([arrivals, in_flight, waiting], dtype=np.float64))
        seen = Seen(
            now_s=now_s,
            tick_s=self._setup.tick_s,
            arrivals=load[0:1],
            in_flight=load[1:2],
            waiting=load[2:3],
            ready=np.array([float(len(replicas.pool.targets))]),
            starting=np.array([float(len(replicas.starting))]),
            capacity_rps=self._capacity.rps,
            slots=self._capacity.slots,
            cold_start_s=self._setup.cold_start_s,
            slack_s=self._setup.slo_ttft_s,
        )
        policy.observe(seen, self._state)
        if now_s >= self._next_want_s:
            self._next_want_s = now_s + policy.every_s - 1e-9
            want = round(float(policy.want(seen, self._state)[0]))
            replicas.scale(max(0, min(want, self._setup.max_replicas)), now_s)
        else:
            replicas.rest(now_s)

    def _lagged(self, now_s: float, load: Floats) -> Floats:
        """The load as it was `lag_s` ago; at first, as it was when it was first seen."""
        self._seen.append((now_s, load))
        while len(self._seen) > 1 and self._seen[1][0] <= now_s - self._setup.lag_s + 1e-9:
            self._seen.popleft()
        return self._seen[0][1]

    # ------------------------------------------------------------------------------------------------- what came out

    def served(self, from_s: float, to_s: float) -> Served:
        book, billing_s, rent = self.book, self._setup.billing_s, self._setup.standby.rent
        rows = slice(bisect_left(book.arrived_s, from_s), bisect_left(book.arrived_s, to_s))
        t_s, first_s, finish_s = (np.array(c[rows]) for c in (book.arrived_s, book.first_s, book.finish_s))
        out = np.array(book.out[rows], dtype=np.int64)
        ticks = np.array([c for c in self._counts if from_s < c[0] <= to_s], dtype=np.float64).reshape(-1, 4)
        kinds = [change.kind for change in self.replicas.changes if from_s <= change.at_s < to_s]
        return Served(
            t_s=t_s,
            ttft_s=first_s - t_s,
            tpot_s=np.where(out > 1, (finish_s - first_s) / np.maximum(out - 1, 1), np.nan),
            finish_s=finish_s,
            replica=np.array(book.replica[rows], dtype=np.int64),
            in_tokens=np.array(book.prompt[rows], dtype=np.int64),
            out_tokens=out,
            cached_tokens=np.array(book.cached[rows], dtype=np.int64),
            preempted=np.array(book.preempted[rows], dtype=np.int64),
            lost=np.array(self._lost[rows], dtype=np.int64),
            slo_ttft_s=self._setup.slo_ttft_s,
            replica_hours=sum(r.paid_s(from_s, to_s, billing_s, rent) for r in self.replicas.all) / 3600,
            standby_hours=sum(r.stood_s(from_s, to_s) for r in self.replicas.all) / 3600,
            standby_rent=rent,
            launches=kinds.count("launch"),
            drains=kinds.count("drain"),
            reclaims=kinds.count("reclaim"),
            ticks_s=ticks[:, 0],
            ready=ticks[:, 1].astype(np.int64),
            starting=ticks[:, 2].astype(np.int64),
            standing=ticks[:, 3].astype(np.int64),
        )
