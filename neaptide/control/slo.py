"""The default policy: fewest replicas that keep the goal, a cold start ahead.

    expected  = the forecast's rate, in replicas                                     (control/forecast.py)
    wanted    = expected + margin x spread, to the nearest replica
    held      while it is not over wanted by half a spread: a restart costs what holding costs meanwhile

The margin is nobody's setting. A ladder of margins, each a quantile of the forecast's own past errors, is imagined on
the live arrivals, each rung with replicas of its own in the fluid service (control/lanes.py). The margin in force is
the lowest place on the ladder whose imagined days kept the goal. The last replica is kept for as long as the goal's
share of requests comes within (a gap's quantile). docs/decisions/0024 has what was tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neaptide.control.forecast import Expected, Forecast
from neaptide.control.lanes import Lanes
from neaptide.control.policy import Floats, Seen, State

TAILS = (0.35, 0.22, 0.14, 0.09, 0.055, 0.03, 0.015, 0.006, 0.002)  # of errors above each rung
NORMAL = (0.385, 0.772, 1.080, 1.341, 1.598, 1.881, 2.170, 2.512, 2.878)  # the rungs' margins before errors are known
QUANTILE_GAIN = 0.003  # spreads a beat: how fast a rung follows the errors' quantile
HELD = 0.5  # spreads: the band in which the count stays
JUDGED_S = 5 * 86400.0  # how long an imagined late request counts
PRIOR_S = 3600.0  # of traffic: what the assumption below weighs
PRIOR_LATE = 0.3  # late requests a rung is assumed to have, as a share of its tail
KEEP_GAIN = 0.05  # a gap between requests, of the logarithm of the time the last replica is kept
KEEP_FIRST_S, KEEP_LEAST_S, KEEP_LONGEST_S = 300.0, 10.0, 3600.0
CAUTION = 0.9  # of the allowed late share is planned for


class Slo:
    """`slo`: the share of requests to start in time. Lanes are seeds in the simulator; there is one live."""

    name = "neaptide"
    every_s = 0.0  # at each tick

    def __init__(
        self,
        lanes: int = 1,
        slo: float | Floats = 0.99,  # one for all lanes, or one a lane
        *,
        min_replicas: int = 1,
        max_replicas: int = 1000,
        events: Sequence[Expected] = (),
    ) -> None:
        self.lanes, self.slo = lanes, slo
        self.low, self.high = float(min_replicas), float(max_replicas)
        self._forecast = Forecast(lanes, events)

    def start(self) -> State:
        rungs = (len(TAILS), self.lanes)
        return self._forecast.start() | {
            "s.margins": np.repeat(np.array(NORMAL)[:, None], self.lanes, axis=1),
            "s.place": np.full(self.lanes, float(TAILS.index(0.03))),  # on the ladder, between rungs
            "s.late": np.zeros(rungs),
            "s.arrivals": np.zeros(self.lanes),
            "s.count": np.zeros(self.lanes),
            "s.expected": np.zeros(self.lanes),  # replicas, a cold start from now
            "s.quiet_s": np.full(self.lanes, np.inf),  # since the last request
            "s.keep_s": np.full(self.lanes, KEEP_FIRST_S),  # the last replica stays for so long after it
            "s.spread": np.ones(self.lanes),  # of that, in replicas
        }

    def observe(self, seen: Seen, state: State) -> None:
        beat = self._forecast.observe(seen, state)
        rate = self._forecast.rate(seen, state)
        state["s.expected"] = rate / seen.capacity_rps
        state["s.spread"] = self._forecast.spread(state) * np.sqrt(rate) / seen.capacity_rps
        self._wait_for_more(seen, state)
        self._imagine(seen, state)
        if beat:
            self._learn(rate, seen, state)

    def want(self, seen: Seen, state: State) -> Floats:
        margin = _between_rungs(state["s.margins"], state["s.place"])
        state["s.count"] = self._held(margin, state["s.count"], state)
        state["s.count"] = np.maximum(state["s.count"], self._backlog(seen, state))
        keeps = (state["s.quiet_s"] <= state["s.keep_s"]) | (seen.waiting > 0)
        state["s.count"] = np.maximum(state["s.count"], keeps)
        return np.minimum(np.maximum(state["s.count"], self.low), self.high)

    # --- parts

    def _backlog(self, seen: Seen, state: State) -> Floats:
        """Replicas that serve what comes now and, within a cold start, what waits; 0 where what waits will start in
        time by itself."""
        soon = seen.slack_s * seen.capacity_rps * (seen.ready + seen.starting)
        need = self._forecast.recent(state) + seen.waiting / max(seen.cold_start_s, seen.slack_s, seen.tick_s)
        return np.where(seen.waiting > soon, np.ceil(need / seen.capacity_rps), 0.0)

    def _held(self, margin: Floats, count: Floats, state: State) -> Floats:
        """The count moved no more than it must; arrays are [lanes] or [rungs, lanes]."""
        expected, spread = state["s.expected"], state["s.spread"]
        lowest = np.ceil(expected + margin * spread - 0.5)
        highest = np.ceil(expected + (margin + HELD) * spread - 0.5)
        moved: Floats = np.minimum(np.maximum(count, lowest), highest)
        return moved

    def _learn(self, rate: Floats, seen: Seen, state: State) -> None:
        """At a beat: the rungs follow their quantiles, the place follows what was imagined."""
        error = self._forecast.last_error(seen, state)
        if error is not None:
            above = error > state["s.margins"]
            state["s.margins"] += QUANTILE_GAIN * (above - np.array(TAILS)[:, None])
        self._forecast.note(rate, state)
        state["s.place"] = self._place(rate, state)

    def _wait_for_more(self, seen: Seen, state: State) -> None:
        """Follow the gap within which the goal's share of requests comes after the one before."""
        came, quiet_s, keep_s = seen.arrivals > 0, state["s.quiet_s"], state["s.keep_s"]
        missed = came & np.isfinite(quiet_s) & (quiet_s > keep_s)
        change = np.where(missed, self.slo, 0.0) - (1.0 - self.slo) * np.maximum(seen.arrivals - missed, 0.0)
        keep_s *= np.exp(KEEP_GAIN * np.clip(change, -1.0, 1.0))
        np.clip(keep_s, KEEP_LEAST_S, KEEP_LONGEST_S, out=keep_s)
        state["s.quiet_s"] = np.where(came, 0.0, quiet_s + seen.tick_s)

    def _imagine(self, seen: Seen, state: State) -> None:
        """The ladder's replicas serve the tick, each rung as if it were in force."""
        imagined = self._ladder(seen, state)
        imagined.work(np.tile(seen.arrivals, len(TAILS)))
        keep = np.exp(-seen.tick_s / JUDGED_S)
        state["s.late"] *= keep
        state["s.late"] += imagined.late.reshape(state["s.late"].shape)
        state["s.arrivals"] *= keep
        state["s.arrivals"] += seen.arrivals
        count = (imagined.ready + imagined.starting).reshape(state["s.late"].shape)
        wanted = self._held(state["s.margins"], count, state)
        imagined.scale(slice(0, imagined.ready.size), np.maximum(wanted, 0.0).ravel())
        state["l.at"][0] = imagined.at

    def _ladder(self, seen: Seen, state: State) -> Lanes:
        """The imagined service, its arrays being those of `state`. A start anew where a replica's traits have changed
        by a quarter: a day's judgement stays, only what runs at the moment is lost."""
        held_ticks = max(1, round(seen.slots / seen.capacity_rps / seen.tick_s))
        cold_ticks = max(1, round(seen.cold_start_s / seen.tick_s))
        slots = seen.capacity_rps * held_ticks * seen.tick_s  # as many a second, whatever the tick
        if "l.at" in state:
            kept = Lanes.of(slots, {k[2:]: v for k, v in state.items() if k.startswith("l.")})
            if _near(kept.held_ticks, held_ticks) and _near(kept.cold_ticks, cold_ticks):
                return kept
        share = max(0.0, 1.0 - seen.slack_s / seen.tick_s)
        size = len(TAILS) * self.lanes
        lanes = Lanes(slots, size, held_ticks=held_ticks, cold_ticks=cold_ticks, on_time_share=share)
        lanes.ready[:] = np.tile(seen.ready + seen.starting, len(TAILS))
        state.update({f"l.{k}": v for k, v in lanes.arrays().items()})
        return lanes

    def _place(self, rate: Floats, state: State) -> Floats:
        """The lowest place on the ladder whose late share is allowed, between rungs by the share's logarithm."""
        prior = PRIOR_S * rate
        assumed = PRIOR_LATE * np.array(TAILS)[:, None] * prior
        share = (state["s.late"] + assumed) / np.maximum(state["s.arrivals"] + prior, 1e-9)
        share = np.minimum.accumulate(np.maximum(share, 1e-7), axis=0)
        allowed = CAUTION * (1.0 - self.slo)
        over = (share > allowed).sum(axis=0)  # the first rung that keeps the goal
        high = np.clip(over, 1, len(TAILS) - 1)
        columns = np.arange(self.lanes)
        above, below = np.log(share[high - 1, columns]), np.log(share[high, columns])
        part = np.clip((above - np.log(allowed)) / np.maximum(above - below, 1e-9), 0.0, 1.0)
        place: Floats = high - 1 + part
        return place


def _between_rungs(margins: Floats, place: Floats) -> Floats:
    low = np.minimum(place.astype(np.int64), len(margins) - 2)
    columns = np.arange(margins.shape[1])
    part = place - low
    between: Floats = margins[low, columns] * (1 - part) + margins[low + 1, columns] * part
    return between


def _near(one: int, other: int) -> bool:
    return abs(one - other) <= 0.25 * one
