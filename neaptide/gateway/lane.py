"""One model in this gateway: its replicas, its waiting line, its counters."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING
from zlib import crc32

from neaptide.errors import RequestError
from neaptide.gateway import resume, route
from neaptide.gateway.affinity import Familiar
from neaptide.gateway.concurrency import Goals
from neaptide.gateway.metrics import ModelMetrics
from neaptide.gateway.queue import Line, May
from neaptide.gateway.retries import Retries
from neaptide.gateway.route import Target
from neaptide.table import DeploymentRow, ModelGauge

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange

SERVED_KEPT = 128  # of how many answers the time is known,
SERVED_LEAST = 10  # of how many at least, before anybody is refused for it,
SERVED_S = 60.0  # and for how long
PROBES = 8  # one in so many of those that look hopeless is let through: they would tell if it had become quicker


class Lane:
    """Lives as long as its deployment is in the table, or a request of it runs."""

    __slots__ = (
        "_by_id", "_familiar", "_hopeless", "_longest_s", "_took", "line", "metrics", "retries", "row", "running",
        "seed", "targets", "tokens", "turn",
    )  # fmt: skip

    def __init__(self, row: DeploymentRow, metrics: ModelMetrics, familiar: Familiar) -> None:
        self.row = row
        self.seed = crc32(row.model.encode())
        self.metrics = metrics
        metrics.slo_ttft_s = row.slo_ttft_s
        self.line: Line[Exchange] = Line(row.max_waiting, row.max_wait_s)
        self.targets: list[Target] = []  # the door's; a replica of several models is in several lanes
        self._by_id: dict[str, Target] = {}
        self._familiar = familiar
        self.retries = Retries()
        self.turn = 0
        self.running = 0
        self.tokens = 0
        self._took: deque[tuple[float, float, int]] = deque(maxlen=SERVED_KEPT)  # (now, seconds, tokens) of answers
        self._longest_s = 0.0  # no answer of late took longer
        self._hopeless = 0

    def aim(self, targets: list[Target]) -> None:
        """These serve it from now on."""
        self.targets = targets
        self._by_id = {target.row.id: target for target in targets}
        goals = Goals(self.row.slo_ttft_s, self.row.slo_tpot_s) if self.row.adaptive else None
        for target in targets:
            target.learn(goals)

    def pick(self, exchange: Exchange, now: float) -> Target | None:
        """Where a request goes: the least loaded replica that can take it, or the one that has seen its beginning, if
        that one is not much more loaded. None: it must wait."""
        self.turn += 1
        targets = resume.fit(exchange, self.targets) if exchange.ids else self.targets
        least = route.choose(targets, now, self.turn, exchange.tried, self.row.model)
        if least is None or len(targets) < 2 or not self.row.affinity or exchange.tried:
            return least
        blocks = exchange.blocks()
        if not blocks:
            return least
        return self._familiar.choose(blocks, self._by_id, least, now, self.row.model)

    def fits(self, exchange: Exchange, now: float) -> bool:
        """Whether some replica that has room can go on with what it has begun."""
        if not exchange.ids:
            return True
        return route.choose(resume.fit(exchange, self.targets), now, model=self.row.model) is not None

    def may_retry(self, now: float) -> bool:
        """Whether one of its requests may be sent again; that is then counted."""
        if self.retries.take(now, self.metrics.arrivals, self.running):
            return True
        self.metrics.denied += 1
        return False

    def served(self, now: float, seconds: float, tokens: int) -> None:
        """An answer ended well, so long after it was sent to a replica."""
        self._took.append((now, seconds, max(1, tokens)))
        self._longest_s = max(seconds, 0.99 * self._longest_s)

    def quick_s(self, exchange: Exchange, now: float) -> float:
        """What every answer of the last minute would have taken longer than, had it ended after as many tokens as this
        one may have: who has less time left cannot make it. 0: nobody knows."""
        most = exchange.asked.max_tokens or 1 << 30
        took = [seconds * min(1.0, most / tokens) for at, seconds, tokens in self._took if now - at < SERVED_S]
        return min(took) if len(took) >= SERVED_LEAST else 0.0

    def hopeless(self, exchange: Exchange, now: float) -> RequestError | None:
        """The refusal of a request whose answer cannot end by its deadline, even if there is room."""
        left_s = exchange.deadline_s - now
        if left_s > self._longest_s or exchange.call.route == "tokenize":
            return None
        quick_s = self.quick_s(exchange, now)
        if quick_s <= left_s:
            return None
        self._hopeless += 1
        if self._hopeless % PROBES == 0:
            return None
        return RequestError(
            429,
            f"Its deadline is in {max(0.0, left_s):.1f} s, and the quickest of the last answers took {quick_s:.1f} s.",
            slug="deadline_unreachable",
            retry_after_s=1.0,
        )

    def may(self, now: float) -> May | None:
        """Whose requests may have what is free; None: anybody's."""
        shares = self.line.shares
        if not shares.crowded or shares.alone(now):
            return None
        free, slots = route.room(self.targets, now, self.row.model)
        return lambda account, rank: shares.may_take(account, rank, free, slots)

    def adopt(self, row: DeploymentRow) -> None:
        """The table changed what is configured; those who wait keep their places."""
        self.row = row
        self.metrics.slo_ttft_s = row.slo_ttft_s
        self.line.cap, self.line.max_wait_s = row.max_waiting, row.max_wait_s

    def gauge(self, now: float, tokens: int) -> ModelGauge:
        """`tokens`: of the requests that still run."""
        counted = self.metrics
        return ModelGauge(
            arrivals=counted.arrivals,
            waiting=len(self.line),
            oldest_wait_s=round(self.line.oldest_wait_s(now), 3),
            running=self.running,
            done=counted.done,
            errors=counted.errors,
            tokens=self.tokens + tokens,
            late=counted.late,
            firsts=sum(counted.ttft.counts),
            ttft_sum_s=round(counted.ttft.total, 6),
            paced=sum(counted.tpot.counts),
            tpot_sum_s=round(counted.tpot.total, 6),
            served=counted.served,
            held_sum_s=round(counted.held_s, 6),
        )
