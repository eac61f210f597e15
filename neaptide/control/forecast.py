"""How many requests a second will come, a cold start from now: an ensemble that learns whom to trust.

Members: running means of several lengths (the shortest is nearly the last value), and a running mean moved as the
same time moved yesterday and last week. A trend is no member: it swings, and every swing is paid (docs/log.md). Each is
scored when its moment has come; the weights follow the scores. The spread is learnt beside it: an hour's and a day's
mean of the squared errors. Counts of overdispersed arrivals wander with the square root of their mean, so errors are
kept between square roots, twice: a jump from nothing is no more than what came. Means and patterns are of usual
traffic: the calendar's factor is taken out of what came and put on what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neaptide.control.policy import Floats, Seen, State

MEANS_S = (45.0, 75.0, 120.0, 300.0, 900.0)
STEADY = 2  # of MEANS_S: what the seasons lean on
SHORTEST_S = 5.0  # the first is a quarter of a cold start, at least this, at most its own length
MEANS_COLUMN = np.array(MEANS_S)[:, None]
MEMBERS = (*(f"mean of {s:g} s" for s in MEANS_S), "yesterday", "last week")
BEATS = 12  # forecasts a horizon at most: how often members are scored
TRUST_S = 6 * 3600.0  # how long a member's error counts
SHARPNESS = 20.0  # a member with a tenth more squared error has a seventh of the weight
SPREADS_S = (3600.0, 86400.0)
WINDOW_S = 600.0  # of the daily and weekly patterns
DAY, WEEK = 144, 1008  # windows
PENDING = 3  # windows: what closed within the last two stands beside its forerunner, not in its place
SLOWEST = 1e-3  # requests/s below which a rate counts as this much
LEAST_ERROR = 1e-6  # squared: a forecast that was never wrong is not trusted without end
ASLEEP_S = 120.0  # a longer silence of the clock: what was just now is no longer


class Expected(NamedTuple):
    """A line of the calendar: between two times on the clock of `Seen`, traffic is `factor` times the usual."""

    start_s: float
    end_s: float
    factor: float


class Forecast:
    """For many lanes at once; all that is remembered lies in `state`, under names that begin with "f."."""

    def __init__(self, lanes: int, events: Sequence[Expected] = ()) -> None:
        self.lanes, self._events = lanes, tuple(events)

    def start(self) -> State:
        members, lanes = len(MEMBERS), self.lanes
        return {
            "f.means": np.zeros((len(MEANS_S), lanes)),
            "f.ticks": np.zeros(1),
            "f.sum": np.zeros(lanes),  # arrivals since the last beat
            "f.sum_s": np.zeros(1),
            "f.members": np.zeros((members, lanes)),  # what each expects, requests/s
            "f.made": np.zeros((BEATS + 1, members + 1, lanes)),  # the members' and the ensemble's
            "f.beats": np.zeros(1),
            "f.scored": np.zeros(1),
            "f.now": np.full(1, np.nan),
            "f.last": np.zeros(lanes),  # the ensemble's last error, in spreads
            "f.error": np.ones((members, lanes)),  # squared, over the rate
            "f.weights": np.full((members, lanes), 1.0 / members),
            "f.spread": np.ones((len(SPREADS_S), lanes)),
            "f.day": np.zeros((DAY, lanes)),  # requests/s of the same window a day ago
            "f.week": np.zeros((WEEK, lanes)),
            "f.known": np.zeros(1),  # windows seen
            "f.window": np.full(1, -1.0),
            "f.closed": np.zeros((PENDING, lanes)),  # windows that are still compared with those a period ago
            "f.in_window": np.zeros(lanes),
            "f.in_window_s": np.zeros(1),
        }

    def observe(self, seen: Seen, state: State) -> bool:
        """Take note of a tick; whether a beat ended, that is, whether the scores and the spread moved."""
        if seen.now_s - state["f.now"][0] > ASLEEP_S:
            for name in ("f.ticks", "f.beats", "f.sum", "f.sum_s"):
                state[name][:] = 0.0
        state["f.now"][0] = seen.now_s
        self._mean(seen, state)
        self._season(seen, state)
        state["f.sum"] += seen.arrivals
        state["f.sum_s"] += seen.tick_s
        if state["f.sum_s"][0] < seen.cold_start_s / _beats(seen) - 1e-9:
            return False
        rate = state["f.sum"] / state["f.sum_s"][0]
        self._score(rate, _beats(seen), state)
        state["f.sum"][:] = 0.0
        state["f.sum_s"][:] = 0.0
        return True

    def rate(self, seen: Seen, state: State) -> Floats:
        """Requests/s expected a cold start from now, [lanes]; the members' stay for `note`."""
        state["f.members"][:] = self._members(seen.now_s, seen.cold_start_s, state)
        expected: Floats = (state["f.weights"] * state["f.members"]).sum(axis=0)
        return expected

    def _factor(self, at_s: float) -> float:
        """Of the calendar; where lines overlap, the largest."""
        return max((e.factor for e in self._events if e.start_s <= at_s < e.end_s), default=1.0)

    def spread(self, state: State) -> Floats:
        """Standard deviation of what comes around what was expected, over the square root of the latter, [lanes]."""
        hour, day = state["f.spread"]
        wide: Floats = np.sqrt(0.5 * hour + 0.5 * day)
        return wide

    def last_error(self, seen: Seen, state: State) -> Floats | None:
        """By how many spreads the last beat was over what was expected of it, [lanes]; None before any was."""
        return state["f.last"] if state["f.beats"][0] > _beats(seen) else None

    def recent(self, state: State) -> Floats:
        """Requests/s of just now, [lanes]."""
        now: Floats = state["f.means"][0]
        return now

    def note(self, expected: Floats, state: State) -> None:
        """At a beat, after `rate`: keep what was expected, to be scored when its time has come."""
        made = state["f.made"][int(state["f.beats"][0]) % (BEATS + 1)]
        made[:-1] = state["f.members"]
        made[-1] = expected

    # --- members

    def _members(self, now_s: float, ahead_s: float, state: State) -> Floats:
        means = state["f.means"]
        known = float(state["f.known"][0])
        day = _growth(state["f.day"], known, now_s, ahead_s)
        week = _growth(state["f.week"], known, now_s, ahead_s)
        steady = means[STEADY]
        members = np.empty((len(MEMBERS), self.lanes))
        members[: len(MEANS_S)] = means
        members[len(MEANS_S) :] = steady * day, steady * week
        return members * self._factor(now_s + ahead_s)

    def _mean(self, seen: Seen, state: State) -> None:
        rate = seen.arrivals / seen.tick_s / self._factor(seen.now_s)
        state["f.ticks"] += 1
        first = 1.0 / state["f.ticks"][0]  # at the beginning, the plain mean of what there is
        lengths = MEANS_COLUMN.copy()
        lengths[0] = min(MEANS_S[0], max(SHORTEST_S, seen.cold_start_s / 4))
        gain = np.maximum(first, 1.0 - np.exp(-seen.tick_s / lengths))
        state["f.means"] += gain * (rate - state["f.means"])

    def _score(self, rate: Floats, ago: int, state: State) -> None:
        """Hold what came in the beat that ended against what was expected of it a horizon, `ago` beats, before."""
        beat_s = float(state["f.sum_s"][0])
        state["f.beats"] += 1
        if state["f.beats"][0] <= ago:
            return
        made = state["f.made"][int(state["f.beats"][0] - ago) % (BEATS + 1)]
        errors = 2.0 * (np.sqrt(rate) - np.sqrt(np.maximum(made, 0.0)))
        squared = errors**2
        state["f.last"][:] = errors[-1] / self.spread(state)
        state["f.scored"] += 1
        first = 1.0 / (state["f.scored"][0] + 1.0)  # the assumption counts as one
        gain = max(first, 1.0 - np.exp(-beat_s / TRUST_S))
        state["f.error"] += gain * (squared[:-1] + LEAST_ERROR - state["f.error"])
        trust = (state["f.error"].min(axis=0) / state["f.error"]) ** SHARPNESS
        state["f.weights"] = trust / trust.sum(axis=0)
        for i, tau_s in enumerate(SPREADS_S):
            gain = max(first, 1.0 - np.exp(-beat_s / tau_s))
            state["f.spread"][i] += gain * (squared[-1] + LEAST_ERROR - state["f.spread"][i])

    def _season(self, seen: Seen, state: State) -> None:
        """Windows lie on the clock: the same one comes round a day and a week later."""
        window = (seen.now_s - seen.tick_s / 2) // WINDOW_S
        if window != state["f.window"][0]:
            self._close_window(state)
            state["f.window"][0] = window
        state["f.in_window"] += seen.arrivals / self._factor(seen.now_s)
        state["f.in_window_s"] += seen.tick_s

    def _close_window(self, state: State) -> None:
        spent_s, window = state["f.in_window_s"][0], int(state["f.window"][0])
        if spent_s > WINDOW_S / 2 and window >= 0:
            closed, old = state["f.closed"], window - PENDING + 1
            closed[window % PENDING] = state["f.in_window"] / spent_s
            state["f.known"] += 1
            for name in ("f.day", "f.week"):
                rows = state[name]
                if state["f.known"][0] >= PENDING:
                    rows[old % len(rows)] = closed[old % PENDING]
        state["f.in_window"][:] = 0.0
        state["f.in_window_s"][:] = 0.0


def _beats(seen: Seen) -> int:
    """Forecasts a horizon: no more than it has ticks."""
    return max(1, min(BEATS, round(seen.cold_start_s / seen.tick_s)))


def _growth(rows: Floats, known: float, now_s: float, ahead_s: float) -> Floats:
    """How the rate moved over the next `ahead_s` a period ago, [lanes]; 1 where that is not known."""
    if known < len(rows) + PENDING:
        return np.ones(rows.shape[1])
    then, before = _between(rows, now_s + ahead_s), _between(rows, now_s)
    moved: Floats = np.clip(then / np.maximum(before, SLOWEST), 0.5, 2.0)
    return moved


def _between(rows: Floats, at_s: float) -> Floats:
    """Linear between the windows' centres."""
    place = at_s / WINDOW_S - 0.5
    left = int(np.floor(place))
    part = place - left
    between: Floats = rows[left % len(rows)] * (1 - part) + rows[(left + 1) % len(rows)] * part
    return between
