"""One model in this gateway: its replicas, its waiting line, its counters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

from neaptide.errors import RequestError
from neaptide.gateway import refusals, resume, route
from neaptide.gateway.affinity import CONVERSATION, Familiar, conversation_of, first_words
from neaptide.gateway.cache import Cache
from neaptide.gateway.concurrency import Goals
from neaptide.gateway.degrade import Relief
from neaptide.gateway.metrics import ModelMetrics
from neaptide.gateway.queue import Line, May
from neaptide.gateway.retries import Retries
from neaptide.gateway.revisions import NOBODY, Group, Split
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
        "_all", "_familiar", "_hopeless", "_inside", "_longest_s", "_split", "_took", "cache", "line", "metrics",
        "mixed", "pumping", "relief", "retries", "row", "running", "seed", "targets", "tokens", "turn",
    )  # fmt: skip

    def __init__(self, row: DeploymentRow, metrics: ModelMetrics, familiar: Familiar) -> None:
        self.row = row
        self.cache: Cache | None = None  # of its answers
        self.relief: Relief | None = None  # what is done under pressure
        self.seed = crc32(row.model.encode())
        self.metrics = metrics
        metrics.slo_ttft_s = row.slo_ttft_s
        self.line: Line[Exchange] = Line(row.max_waiting, row.max_wait_s)
        self.targets: list[Target] = []  # the door's; a replica of several models is in several lanes
        self._all = self._inside = NOBODY
        self.mixed = False  # not every request may go to every replica
        self._split: Split | None = None
        self._familiar = familiar
        self.retries = Retries()
        self.pumping = False  # those who wait are being sent right now
        self.turn = 0
        self.running = 0
        self.tokens = 0
        self._took: deque[tuple[float, float, int]] = deque(maxlen=SERVED_KEPT)  # (now, seconds, tokens) of answers
        self._longest_s = 0.0  # no answer of late took longer
        self._hopeless = 0

    def aim(self, targets: list[Target]) -> None:
        """These serve it from now on."""
        self.targets = targets
        inside = [target for target in targets if not target.row.outside]
        self._all = Group(targets, self.row.model)
        self._inside = self._all if len(inside) == len(targets) else Group(inside, self.row.model)
        self.mixed = self._inside is not self._all or len(self._all.revisions) > 1
        goals = Goals(self.row.slo_ttft_s, self.row.slo_tpot_s) if self.row.adaptive else None
        for target in targets:
            target.learn(goals)

    def pick(self, exchange: Exchange, now: float) -> Target | None:
        """Where a request goes: the least loaded replica that can take it, or the one that has seen its beginning, if
        that one is not much more loaded. None: it must wait."""
        self.turn += 1
        group, targets = self._open_now(exchange, now)
        least = route.choose(targets, now, self.turn, exchange.tried, self.row.model)
        if least is None or len(self.targets) < 2 or not self.row.affinity or exchange.tried:
            return least
        blocks = exchange.blocks()
        if not blocks:
            return least
        return self._familiar.choose(blocks, group.by_id, least, now, self.row.model)

    def fits(self, exchange: Exchange, now: float) -> bool:
        """Whether some replica that it may go to has room, and can go on with what it has begun."""
        _, targets = self._open_now(exchange, now)
        return route.choose(targets, now, model=self.row.model) is not None

    def _open_now(self, exchange: Exchange, now: float) -> tuple[Group, Sequence[Target]]:
        """The replicas that it may go to at all, and those of them that can go on with what it has begun."""
        group = self._group(exchange, now) if self.mixed or exchange.pinned else self._all
        if exchange.ids or exchange.resumes:
            return group, resume.fit(exchange, group.targets)
        return group, group.targets

    def _open_to(self, exchange: Exchange) -> Group:
        return self._inside if exchange.key.inside else self._all

    def _group(self, exchange: Exchange, now: float) -> Group:
        """The replicas that it may go to at all: of its data class, and of its revision."""
        group = self._open_to(exchange)
        if exchange.pinned:
            return group.revisions.get(exchange.pinned, NOBODY)
        if self._split is None or exchange.ids or exchange.resumes:  # who has begun goes on at its own revision
            return group
        wanted = exchange.wanted
        if not wanted or not group.has(wanted, now):
            exchange.wanted = wanted = self._drawn(self._split, exchange, group, now)
        return group.revisions.get(wanted, group)

    def _drawn(self, split: Split, exchange: Exchange, group: Group, now: float) -> str:
        """Its revision: its conversation's, which its client names or its user's first words are, else the next one.
        Revisions without a share only where no other is there. "": none is."""
        call = exchange.call
        name = call.headers.get(CONVERSATION)
        conversation = conversation_of(name, self.seed)[0] if name else first_words(call.body, self.seed)
        return split.draw(lambda revision: group.has(revision, now), conversation) or group.any_there(now)

    def barred(self, exchange: Exchange) -> RequestError | None:
        """The refusal of a request that no replica of those configured may ever take."""
        if exchange.key.inside and self.targets and not self._inside.targets:
            return refusals.outside_only(self.row.model)
        revision = exchange.pinned
        if not revision or revision == self.row.revision or revision in self._open_to(exchange).revisions:
            return None
        return (
            refusals.outside_only(self.row.model)
            if revision in self._all.revisions
            else refusals.no_revision(self.row.model, revision)
        )

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
        if self._split is None or self._split.traffic != row.traffic:
            self._split = Split(row.traffic) if row.traffic else None
        if not row.cache.ttl_s:
            self.cache = None
        elif self.cache is None:
            self.cache = Cache(row.cache)
        else:
            self.cache.adopt(row.cache)
        if self.relief is None or self.relief.steps != row.degrade:
            self.relief = Relief(row.degrade) if row.degrade else None

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
