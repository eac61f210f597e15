"""How many requests a replica gets at once that does not say what it can take: learnt from how it answers. Pure.

Between two looks (100 ms) it is told what came: first tokens, and the pace of the streams. Once in STEP_S these are
weighed against the latency goals. At first the limit grows quickly where it binds, until too much is late in two steps
running. Then the `peak` is what was in flight, less those without a first token who are more than may wait (Little:
first tokens a second times the wait that can be asked), or less the share by which the pace was too slow. The limit
falls below it, and nothing is concluded until no more than that is in flight. From there it grows as TCP's CUBIC does,
where it binds: back to the peak, slowly past it, then faster, though never by more than MOST_GROWTH a step, because a
line in a replica shows late.

A goal that the replica misses when it has but one request is not missed for the crowd. So what it does then is
remembered, and where that is near the goal or over it, twice that is the goal.
"""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

START = 16  # requests, of which nothing is known yet
FIRST_GROWTH = 0.25  # a step, until it falls for the first time;
QUICK = 0.1  # with so much of what can be asked it doubles at every look: it answers at once
STEP_S = 0.5  # between two decisions, at least
STALE_S = 10.0  # too few first tokens for a decision are forgotten after it
DELAYS = 8  # first tokens that say something; where the limit binds, as many as are in flight
TOKENS = 16  # as many for the pace,
KEPT = 0.7  # of which so much counts in the next step, too: one long prompt in the batch is not yet a slow replica
MOST_DELAYS = 256  # kept of a step
DELAY, PACE = 0.35, 0.95  # parts of the goals to keep: a line inside a replica shows late and grows without bound
CUT = 0.1  # how far below the peak the limit begins
FLAT_S = 8.0  # until it is at the peak again
MOST_GROWTH = 0.025  # a step
SLOWER = 0.2  # of what can be asked: nearer to it than this the limit grows more slowly
WORST = 0.7  # the peak is at least this part of what was in flight
FAR = 2.0  # so far over the goals one step is enough
RATE_S = 2.0  # over which first tokens are counted
LEAST = 1.0
NEAR, TOLERANCE = 0.8, 2.0  # alone it takes this part of what is asked, or more: then this times that is asked
LEARN = 0.1  # weight of what it last did alone


class Goals(NamedTuple):
    """Of latency, as a model's `slo` has them."""

    ttft_s: float
    tpot_s: float


class Signal:
    """One measure, as shares of its goal; `part` of the goal is to be kept."""

    __slots__ = ("_alone", "_part")

    def __init__(self, part: float) -> None:
        self._part = part
        self._alone = 0.0  # with one in flight; 0: not known

    @property
    def asked(self) -> float:
        """As much as can be asked of this replica."""
        return self._part if self._alone < NEAR * self._part else TOLERANCE * self._alone

    def learn(self, share: float) -> None:
        self._alone = share if not self._alone else self._alone + LEARN * (share - self._alone)


class Limiter:
    """Of one replica in one gateway. `limit`: so many may be in flight from here; seconds throughout."""

    __slots__ = (
        "_crowd", "_delay", "_delays", "_firsts", "_gone", "_grown_s", "_inside", "_known", "_overdue", "_pace",
        "_peak", "_rate", "_settled_s", "_settling", "_since_s", "_spent", "_tokens", "_warned", "goals", "limit",
        "looked_s",
    )  # fmt: skip

    def __init__(self, goals: Goals) -> None:
        self.goals = goals
        self.limit, self._peak = float(START), math.inf
        self.looked_s = self._settled_s = 0.0
        self._delay, self._pace = Signal(DELAY), Signal(PACE)
        self._settling = False  # more is in flight than the limit; who was sent until then tells of another crowd
        self._warned = False  # the last step was over the goals
        self._gone = self._firsts = 0  # ended, and begun, since the last look
        self._inside = 0  # streams without a first token as of this look ...
        self._overdue: list[float] = []  # ... and those of them that are late already, as shares of the goal
        self._rate = 0.0  # of first tokens, a second
        self._spent = self._tokens = 0.0  # time of streams in units of what a token may take, and their tokens
        self._grown_s = 0.0  # for how long it has bound since it fell
        self._restart(0.0)

    def _restart(self, now: float, kept: float = 0.0) -> None:
        """Of what came before nothing counts, but for this part of the pace."""
        self._since_s = now
        self._delays: list[float] = []  # shares of the goal ...
        self._known = 0  # ... of which so many were there at the last look
        self._spent, self._tokens, self._crowd = kept * self._spent, kept * self._tokens, 0

    # --- what is told between looks

    def delayed(self, after_s: float, sent_s: float) -> None:
        """A first token came so long after the request was sent."""
        self._firsts += 1
        self._delayed(after_s / self.goals.ttft_s, sent_s)

    def waits(self, for_s: float, sent_s: float) -> None:
        """Just before a look: a stream has no first token yet."""
        self._inside += 1
        if for_s > self.goals.ttft_s and sent_s >= self._settled_s:
            self._overdue.append(for_s / self.goals.ttft_s)

    def answered(self, after_s: float, tokens: int, sent_s: float) -> None:
        """A whole answer came at once."""
        self._firsts += 1
        self._delayed(after_s / (self.goals.ttft_s + tokens * self.goals.tpot_s), sent_s)

    def _delayed(self, share: float, sent_s: float) -> None:
        if sent_s >= self._settled_s and len(self._delays) < MOST_DELAYS:
            self._delays.append(share)

    def paced(self, spent_s: float, tokens: int) -> None:
        """Streams brought so many tokens in so much time, all of them together."""
        self._spent += spent_s / self.goals.tpot_s
        self._tokens += tokens

    def ended(self) -> None:
        self._gone += 1

    def refused(self, in_flight: int) -> None:
        """It answered that it has too much to do."""
        if not self._settling:
            self._fall(in_flight, in_flight)

    # --- the decision

    def look(self, now: float, in_flight: int) -> None:
        crowd, since_s = in_flight + self._gone, max(1e-3, now - self.looked_s)
        self._rate += (self._firsts / since_s - self._rate) * min(1.0, since_s / RATE_S)
        self._gone, self._firsts, self.looked_s = 0, 0, now
        self._crowd = max(self._crowd, crowd)
        if crowd <= 1:
            for share in self._delays[self._known :]:
                self._delay.learn(share)
        self._known = len(self._delays)
        if self._settling:
            if in_flight <= self.limit:
                self._settling, self._settled_s = False, now
            self._restart(now)
        elif now - self._since_s >= STEP_S or self._peak == math.inf:
            self._step(now, in_flight)
        self._inside, self._overdue = 0, []

    def _step(self, now: float, in_flight: int) -> None:
        binds = self._crowd + 1 > self.limit or self._crowd >= 0.9 * self.limit
        weighed = self._weigh(in_flight, min(DELAYS, self._crowd) if binds else DELAYS)
        if weighed is None:
            if now - self._since_s >= STALE_S:
                self._restart(now)
            return
        pressure, fits = weighed
        if now - self._since_s < STEP_S and not (binds and pressure < QUICK):
            return
        if pressure <= 1.0:
            self._warned = False
            if binds:
                self._grow(pressure, now - self._since_s)
        elif self._warned or pressure > FAR:
            self._fall(fits, in_flight)
        else:
            self._warned = True
        self._restart(now, KEPT)

    def _weigh(self, in_flight: int, delays: int) -> tuple[float, float] | None:
        """(what came, of what can be asked, the worse of both; how many in flight would do). None: too little came."""
        pressure, fits = -1.0, float(in_flight)
        found = self._delays + self._overdue
        if found and len(found) >= delays:
            asked = self._delay.asked
            pressure = median(found) / asked
            queued = self._inside - self._rate * asked * self.goals.ttft_s
            if queued > 0.0:
                fits -= queued
            elif pressure > 1.0:
                fits /= pressure
        if self._tokens >= TOKENS:
            share = self._spent / self._tokens
            if self._crowd <= 1:
                self._pace.learn(share)
            slow = share / self._pace.asked
            pressure, fits = max(pressure, slow), min(fits, in_flight / max(1.0, slow))
        return None if pressure < 0.0 else (pressure, fits)

    def _grow(self, pressure: float, for_s: float) -> None:
        if self._peak == math.inf:
            self.limit *= 2.0 if pressure < QUICK else 1.0 + FIRST_GROWTH * (1.0 - pressure)
            return
        self._grown_s += for_s * min(1.0, (1.0 - pressure) / SLOWER)
        cubic = self._peak * (1.0 + CUT * (self._grown_s / FLAT_S - 1.0) ** 3)
        self.limit = min(cubic, self.limit * (1.0 + MOST_GROWTH))

    def _fall(self, fits: float, in_flight: int) -> None:
        most = min(self.limit, float(in_flight))
        self._peak = max(LEAST / (1.0 - CUT), min(most, max(WORST * most, fits)))
        self.limit, self._grown_s = self._peak * (1.0 - CUT), 0.0
        self._settling, self._warned = True, False
