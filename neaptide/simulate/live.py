"""A request-level run that the scaling loop itself drives, in virtual time: loop, driver protocol and decisions are
those of a service. Without requests it is a fleet for tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np

from neaptide.clock import VirtualClock
from neaptide.control.loop import Loop
from neaptide.control.size import TICK_S
from neaptide.control.traits import Told
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.driver import SimulatedDriver
from neaptide.simulate.fates import Fate
from neaptide.simulate.replay import Replay, Tier
from neaptide.simulate.served import Served
from neaptide.simulate.settings import Setup
from neaptide.table import Gauges, ModelGauge

NOBODY = Requests(t_s=np.zeros(0))


class Live:
    """One deployment, `model`, with nothing there at first; time begins at 0 and moves by `advance` only."""

    def __init__(
        self,
        setup: Setup,
        requests: Requests = NOBODY,
        fates: Iterable[Fate] = (),
        *,
        model: str = "m",
        tier: Tier = "fast",
        seed: int = 0,
    ) -> None:
        self._setup, self._model = msgspec.structs.replace(setup, replicas=0), model
        self.clock = VirtualClock()
        self.replay = Replay(requests, self._setup, None, tier, seed, 0.0, math.inf)
        self.driver = SimulatedDriver(self.replay.replicas, self.clock, fates)
        self._counted = Counted()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.replay.advance(self.clock.mono_s())

    async def drive(self, loop: Loop, until_s: float) -> None:
        """Beat by beat, with `loop` at this clock, this driver and what is told here. It ticks on beats only: nothing
        nudges it."""
        while self.clock.mono_s() < until_s:
            await loop.tick()
            self.advance(TICK_S)

    def gauges(self) -> list[Gauges]:
        """What one gateway would tell now."""
        now_s = self.clock.mono_s()
        gauge = self._counted.gauge(self.replay, now_s, self._setup.slo_ttft_s)
        models, busy = {self._model: gauge}, self.driver.in_flight()
        return [Gauges(gateway="gateway-0", mono_s=now_s, fast=1, slow=1, models=models, replicas=busy)]

    def about(self) -> dict[str, Told]:
        """What the replicas would tell of themselves."""
        return {self._model: Told(slots=self._setup.engine.max_batch, stages=self.driver.stages())}

    def served(self, from_s: float, to_s: float) -> Served:
        return self.replay.served(from_s, to_s)


class Counted:
    """A gateway's counters, brought up to date whenever they are read."""

    def __init__(self) -> None:
        self._seen = 0  # requests that had come
        self._open: list[int] = []
        self._gauge = ModelGauge()

    def gauge(self, run: Replay, now_s: float, slo_ttft_s: float) -> ModelGauge:
        finish_s = run.book.finish_s
        present = [*self._open, *range(self._seen, run.arrived)]
        done = [id for id in present if finish_s[id] <= now_s]
        self._open = [id for id in present if not finish_s[id] <= now_s]  # NaN: not known yet
        self._seen = run.arrived
        self._gauge = self._counting(run, done, slo_ttft_s)
        waiting = len(run.line)
        oldest_s = now_s - run.book.arrived_s[run.line[0]] if waiting else 0.0
        running = len(self._open) - waiting
        return msgspec.structs.replace(self._gauge, waiting=waiting, oldest_wait_s=oldest_s, running=running)

    def _counting(self, run: Replay, done: list[int], slo_ttft_s: float) -> ModelGauge:
        book, g, n = run.book, self._gauge, len(done)
        ttfts_s = [book.first_s[id] - book.arrived_s[id] for id in done]
        paced = [id for id in done if book.out[id] > 1]
        paces_s = ((book.finish_s[id] - book.first_s[id]) / (book.out[id] - 1) for id in paced)
        return ModelGauge(
            arrivals=run.arrived,
            done=g.done + n,
            tokens=g.tokens + sum(book.out[id] for id in done),
            late=g.late + sum(s > slo_ttft_s for s in ttfts_s),
            firsts=g.firsts + n,
            ttft_sum_s=g.ttft_sum_s + sum(ttfts_s),
            paced=g.paced + len(paced),
            tpot_sum_s=g.tpot_sum_s + sum(paces_s),
            served=g.served + n,
            held_sum_s=g.held_sum_s + sum(book.finish_s[id] - run.sent_s[id] for id in done),
        )
