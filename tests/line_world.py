"""A lane in virtual time: slots, a Line, and requests that hold a slot while their tokens come evenly."""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from neaptide.gateway.queue import NORMAL, Line, May
from neaptide.gateway.shares import PROMPT_BYTE, Account

SWEEP_S = 0.1  # as the gateway's


class Job(NamedTuple):
    at_s: float
    tenant: str
    tokens: int
    prompt_bytes: int = 400
    rank: int = NORMAL


class Running:
    """A request in a slot."""

    def __init__(self, job: Job, account: Account, began_s: float, tpot_s: float) -> None:
        self.job, self.account, self.began_s, self.tpot_s = job, account, began_s, tpot_s
        self.charged = 0

    def charge(self, now: float) -> None:
        tokens = min(self.job.tokens, int((now - self.began_s) / self.tpot_s + 1e-9))
        self.account.charge(tokens - self.charged, self.job.rank)
        self.charged = tokens


class World:
    """`run` serves all jobs; what came of it stands in `waits` and `ends_s`."""

    def __init__(self, slots: int, tpot_s: float = 0.02, cap: int = 100_000) -> None:
        self.slots, self.tpot_s = slots, tpot_s
        self.line: Line[Job] = Line(cap, 1e9)
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.tokens: dict[str, int] = defaultdict(int)
        self.ends_s: list[float] = []
        self.order: list[Job] = []
        self._running: list[tuple[float, int, Running]] = []
        self._serial = 0

    def run(self, jobs: Iterable[Job], until_s: float = float("inf")) -> World:
        swept_s = 0.0
        arrivals = sorted(jobs, key=lambda job: job.at_s)
        at = 0
        while at < len(arrivals) or self._running:
            coming_s = arrivals[at].at_s if at < len(arrivals) else float("inf")
            ending_s = self._running[0][0] if self._running else float("inf")
            now = min(coming_s, ending_s)
            if now > until_s:
                break
            if now - swept_s > SWEEP_S:
                swept_s = now
                for _, _, running in self._running:
                    running.charge(now)
            if ending_s <= coming_s:
                self._end(now)
            else:
                self._arrive(arrivals[at], now)
                at += 1
        return self

    def _arrive(self, job: Job, now: float) -> None:
        account = self.line.shares.of(job.tenant)
        self.line.shares.asked(account, job.rank, now)
        may = self._may(now)
        allowed = may is None or may(account, job.rank)
        if self.line.waiting or len(self._running) >= self.slots or not allowed:
            self.line.enter(job, now, tenant=job.tenant, rank=job.rank)
            self._pump(now)
        else:
            self.line.passed(account, job.rank)
            self._begin(job, account, now)

    def _may(self, now: float) -> May | None:
        shares, free = self.line.shares, self.slots - len(self._running)
        return None if shares.alone(now) else lambda account, rank: shares.may_take(account, rank, free, self.slots)

    def _pump(self, now: float) -> None:
        while self.line.waiting and len(self._running) < self.slots:
            ticket = self.line.first(now, self._may(now))
            if ticket is None:
                return
            self._begin(ticket.item, ticket.account, now)

    def _begin(self, job: Job, account: Account, now: float) -> None:
        self.waits[job.tenant].append(now - job.at_s)
        self.order.append(job)
        account.running += 1
        account.charge(job.prompt_bytes * PROMPT_BYTE, job.rank)
        self._serial += 1
        running = Running(job, account, now, self.tpot_s)
        heapq.heappush(self._running, (now + job.tokens * self.tpot_s, self._serial, running))

    def _end(self, now: float) -> None:
        _, _, running = heapq.heappop(self._running)
        running.charge(now)
        running.account.running -= 1
        self.tokens[running.job.tenant] += running.job.tokens
        self.ends_s.append(now)
        self._pump(now)

    @property
    def release_s(self) -> float:
        """Mean time between slots that become free."""
        return (self.ends_s[-1] - self.ends_s[0]) / (len(self.ends_s) - 1)

    def p95_s(self, tenant: str) -> float:
        return float(np.quantile(self.waits[tenant], 0.95))


def lengths(seed: int, mean: float = 100.0, sigma: float = 0.8) -> Callable[[], int]:
    """Token counts as a trace has them: log-normal."""
    draw = random.Random(seed)
    middle = np.log(mean) - sigma * sigma / 2
    return lambda: max(1, round(draw.lognormvariate(float(middle), sigma)))


def poisson(tenant: str, rate_per_s: float, until_s: float, seed: int, **more: float) -> list[Job]:
    draw, length = random.Random(f"{tenant}{seed}"), lengths(seed)
    jobs, now = [], 0.0
    while (now := now + draw.expovariate(rate_per_s)) < until_s:
        jobs.append(Job(now, tenant, length()))
    return jobs
