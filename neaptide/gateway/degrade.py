"""What is done with less while a deployment is under pressure: an operator's steps, in their order. Pure; `apply`
changes the one request that it is given.

    wait of the line  ->  level: so many steps are in force  ->  measures of all of them  ->  apply, to one request

A step comes into force at once, and goes when the wait has been under half of its own for CALM_S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from neaptide.errors import RequestError
from neaptide.gateway import route
from neaptide.table import Degrade
from neaptide.wire.peek import splice

if TYPE_CHECKING:
    from neaptide.gateway.exchange import Exchange
    from neaptide.gateway.lane import Lane
    from neaptide.gateway.queue import Line

LEAVE = 0.5  # of the wait at which a step came into force
CALM_S = 5.0
LOOK_S = 0.1  # the line is looked at so often
LOWEST = 2  # of a request's classes


class Level(NamedTuple):
    """How many steps are in force, and when the wait was last too long for one of them to go."""

    steps: int = 0
    pressed_s: float = 0.0


def level(steps: Sequence[Degrade], before: Level, wait_s: float, now: float) -> Level:
    """The next one. `steps` by rising `wait_s`; `wait_s`: what a newcomer has to wait, inf for a full line."""
    reached = sum(wait_s > step.wait_s for step in steps)
    held = min(before.steps, len(steps))
    if reached >= held:
        return Level(reached, now)
    if wait_s >= LEAVE * steps[held - 1].wait_s:
        return Level(held, now)
    gone = int((now - before.pressed_s) / CALM_S)
    if not gone:
        return Level(held, before.pressed_s)
    while gone and held > reached and wait_s < LEAVE * steps[held - 1].wait_s:
        gone, held = gone - 1, held - 1
    return Level(held, now)


class Measures(NamedTuple):
    """All that is in force. Falsy fields are not."""

    max_tokens: int = 0
    model: str = ""
    stale_s: float = 0.0
    refuse: bool = False


NONE = Measures()


def measures(steps: Sequence[Degrade]) -> Measures:
    """Of these steps; of two of a kind the later counts."""
    found = NONE
    for step in steps:
        if step.max_tokens is not None:
            found = found._replace(max_tokens=step.max_tokens)
        elif step.model:
            found = found._replace(model=step.model)
        elif step.stale_s is not None:
            found = found._replace(stale_s=step.stale_s)
        else:
            found = found._replace(refuse=True)
    return found


def wait_s(line: Line[Exchange], now: float) -> float:
    """When all who wait would be served, by the recent drain rate; no less than the first of them has waited. Inf for a
    full line."""
    if not line.waiting:
        return 0.0
    return math.inf if line.waiting >= line.cap else max(line.oldest_wait_s(now), line.drain_s(now) or 0.0)


class Relief:
    """One deployment's steps, and how many of them are in force."""

    __slots__ = ("_looked_s", "level", "measures", "steps")

    def __init__(self, steps: Sequence[Degrade]) -> None:
        self.steps = steps
        self.level = Level()
        self.measures = NONE
        self._looked_s = -math.inf

    def now(self, line: Line[Exchange], now: float) -> Measures:
        """What is in force; the line is looked at if it was not just now."""
        if now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self.level = level(self.steps, self.level, wait_s(line, now), now)
            self.measures = measures(self.steps[: self.level.steps])
        return self.measures


def apply(exchange: Exchange, found: Measures, lanes: Mapping[str, Lane], now: float) -> bool:
    """Make the request less, in place; whether it has changed. RequestError 429 for one that is refused."""
    lane, asked = exchange.lane, exchange.asked
    if found.refuse and exchange.rank == LOWEST:
        _say(exchange, "refuse", "low")
        lane.metrics.arrivals += 1
        raise RequestError(
            429,
            "The model is under pressure, and requests of the class low are refused for a while.",
            slug="class_refused",
            fix="Send it again later, or with `x-neaptide-degrade: no` to wait for its turn.",
            retry_after_s=lane.line.retry_after_s(now, exchange.key.tenant, exchange.rank),
        )
    body, most = exchange.call.body, math.inf if asked.max_tokens is None else asked.max_tokens
    shorter = found.max_tokens if 0 < found.max_tokens < most else None
    other = _other(exchange, found.model, lanes, now)
    if b'"min_tokens"' in body:
        shorter = None  # a replica refuses a least that is over the most
    if shorter is None and other is None:
        return False
    model = other.row.model if other is not None else None
    body = splice(body, model=model, max_tokens=shorter)
    if shorter is not None:
        asked = replace(asked, max_tokens=shorter)
        _say(exchange, "max_tokens", str(shorter))
    if other is not None and model is not None:
        asked = replace(asked, model=model)
        _say(exchange, "model", model)
        lane.metrics.arrivals += 1  # it would be served here, were there room
        exchange.lane = other
    exchange.asked, exchange.call.body, exchange.body = asked, body, body
    return True


def stale(exchange: Exchange, age_s: float) -> None:
    """It is told an answer that is so old."""
    _say(exchange, "cache", str(int(age_s)))


def _other(exchange: Exchange, model: str, lanes: Mapping[str, Lane], now: float) -> Lane | None:
    """The deployment that it goes to instead: one that its key may use, and where nobody waits."""
    other = lanes.get(model)
    if other is None or other is exchange.lane or (exchange.key.models and model not in exchange.key.models):
        return None
    if exchange.pinned or other.barred(exchange) is not None:
        return None
    return other if not other.line.waiting and route.reachable(other.targets, now) else None


def _say(exchange: Exchange, how: str, what: str) -> None:
    """In the header, in the row, in the counters."""
    said = f"{how}={what}"
    marks = exchange.marks = exchange.marks or {}
    before = marks.get("degraded")
    marks["degraded"] = said = f"{before}, {said}" if before else said
    exchange.says = f"x-neaptide-degraded: {said}\r\n".encode()
    counts = exchange.lane.metrics.degraded
    counts[how] = counts.get(how, 0) + 1
