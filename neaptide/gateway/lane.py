"""One model in this gateway: its replicas, its waiting line, its counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from neaptide.gateway.metrics import ModelMetrics
from neaptide.gateway.queue import Line
from neaptide.gateway.route import Target
from neaptide.table import DeploymentRow, ModelGauge

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange


class Lane:
    """Lives as long as its deployment is in the table, or a request of it runs."""

    __slots__ = ("line", "metrics", "row", "running", "targets", "tokens", "turn")

    def __init__(self, row: DeploymentRow, metrics: ModelMetrics) -> None:
        self.row = row
        self.metrics = metrics
        metrics.slo_ttft_s = row.slo_ttft_s
        self.line: Line[Exchange] = Line(row.max_waiting, row.max_wait_s)
        self.targets: list[Target] = []  # the door's; a replica of several models is in several lanes
        self.turn = 0
        self.running = 0
        self.tokens = 0

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
