"""Requests and tokens of the last minute, and requests in flight, held against limits. Pure: `now` and the cells, int64
that several gateways share (gateway/counters.py), are given; whoever calls has its turn at them.

A row is an id, a window of requests, a window of tokens, and the requests in flight of each seat (a gateway). A window
counts by seconds of the clock: any 60 s touch at most 61 of them, so their sum bounds what any 60 s hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from neaptide.table import Quota

SPAN_S = 60
SECONDS = SPAN_S + 1
NEWEST, SUM, FIRST = range(3)  # of a window: its newest second, what all of them hold, where they begin
WINDOW = FIRST + SECONDS
SEATS = 64  # gateways
ID, REQUESTS, TOKENS, FLIGHT = 0, 1, 1 + WINDOW, 1 + 2 * WINDOW
ROW = FLIGHT + SEATS
FLIGHT_WAIT_S = 1.0  # until another try where too many are in flight: nobody knows when one ends
_EMPTY = memoryview(bytes(8 * ROW)).cast("q")
Cells = memoryview  # of int64
Limit = Literal["rpm", "tpm", "concurrency"]


class Bucket(NamedTuple):
    """Limits, and the row that is held against them."""

    quota: Quota
    id: int
    at: int


class Bound(NamedTuple):
    """One limit, and the window, or the first seat, that is held against it."""

    at: int
    limit: int
    of: str


class Bounds:
    """All limits of a key, its tenant's among them, laid out for the walk of each request."""

    __slots__ = ("crowds", "flights", "requests", "rows", "tokens", "windows")

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        rows: list[tuple[int, int]] = []  # (id, where it stands)
        requests: list[Bound] = []
        tokens: list[Bound] = []
        crowds: list[Bound] = []
        for quota, id, at in buckets:
            rows.append((id, at))
            for bounds, first, limit in (
                (requests, at + REQUESTS, quota.rpm),
                (tokens, at + TOKENS, quota.tpm),
                (crowds, at + FLIGHT, quota.concurrency),
            ):
                if limit is not None:
                    bounds.append(Bound(first, limit, quota.of))
        self.rows, self.requests, self.tokens, self.crowds = tuple(rows), tuple(requests), tuple(tokens), tuple(crowds)
        self.windows = tuple(bound.at for bound in requests + tokens)
        self.flights = tuple(at + FLIGHT for _, at in rows)  # counted without a limit, too: such a row is not idle


class Refusal(NamedTuple):
    of: str  # key | tenant
    limit: Limit
    value: int
    wait_s: float  # until it has room, if nobody else takes it


class Permit:
    """Of an admitted request: what it has been counted as."""

    __slots__ = ("bounds", "lines", "output", "prompt", "second")

    def __init__(self, bounds: Bounds, prompt: int, second: int) -> None:
        self.bounds = bounds
        self.prompt = prompt  # tokens, at most, until its replica has counted them
        self.output = 0  # tokens so far
        self.second = second  # in which it came
        self.lines = b""  # of its answer's head


def admit(cells: Cells, bounds: Bounds, seat: int, seats: int, prompt: int, now: float) -> Permit | Refusal:
    """Count a request with at most `prompt` tokens against all of `bounds`; or against none, where one has no room:
    then the refusal is the one that lasts longest. `seats`: that may be taken."""
    second = int(now)
    for at in bounds.windows:
        if cells[at] > second:  # another gateway is ahead of `now`
            second = cells[at]
    for at in bounds.windows:
        if cells[at] < second:
            _advance(cells, at, second)
    worst = _worst(cells, bounds, seats, prompt, now)
    if worst is not None:
        return worst
    for at in bounds.flights:
        cells[at + seat] += 1
    cell = FIRST + second % SECONDS
    for at, _, _ in bounds.requests:
        cells[at + cell] += 1
        cells[at + SUM] += 1
    for at, limit, _ in bounds.tokens:
        bound = min(prompt, limit)
        cells[at + cell] += bound
        cells[at + SUM] += bound
    return Permit(bounds, prompt, second)


def produced(cells: Cells, permit: Permit, tokens: int, now: float) -> None:
    """It has so many tokens of answer by now."""
    for at, _, _ in permit.bounds.tokens:
        _advance(cells, at, int(now))
        _count(cells, at, tokens - permit.output)
    permit.output = tokens


def settle(cells: Cells, permit: Permit, seat: int, prompt: int, output: int, now: float) -> None:
    """It is over, and these are its tokens."""
    for at in permit.bounds.flights:
        if cells[at + seat] > 0:  # nothing is left of it where its seat was thought empty
            cells[at + seat] -= 1
    if permit.bounds.tokens:
        produced(cells, permit, output, now)
    for at, limit, _ in permit.bounds.tokens:
        bound = min(permit.prompt, limit)
        if prompt > bound:
            _count(cells, at, prompt - bound)
        else:
            _take_back(cells, at, permit.second, bound - prompt)


def give_back(cells: Cells, permit: Permit, seat: int, now: float) -> None:
    """It was refused for another reason: as if it had never come."""
    settle(cells, permit, seat, 0, 0, now)
    for at, _, _ in permit.bounds.requests:
        _advance(cells, at, int(now))
        _take_back(cells, at, permit.second, 1)


def in_flight(cells: Cells, at: int, seats: int) -> int:
    """Of all seats; `at`: the first."""
    return cells[at] if seats == 1 else sum(cells[at : at + seats])


def left(cells: Cells, at: int, limit: int, now: float) -> tuple[int, float]:
    """Of the window at `at`: what it has room for, and the seconds until it is empty."""
    newest = cells[at + NEWEST]
    for second in range(newest, newest - SECONDS, -1):
        if cells[at + FIRST + second % SECONDS]:
            return max(0, limit - cells[at + SUM]), max(0.0, second + SECONDS - now)
    return limit, 0.0


def is_idle(cells: Cells, at: int, now: float) -> bool:
    """The row at `at` holds nothing that counts."""
    oldest = int(now) - SECONDS
    return (
        cells[at + REQUESTS + NEWEST] < oldest
        and cells[at + TOKENS + NEWEST] < oldest
        and not any(cells[at + FLIGHT : at + ROW])
    )


def clear(cells: Cells, at: int, id: int) -> None:
    """The row at `at` is the one of `id` from now on."""
    cells[at : at + ROW] = _EMPTY
    cells[at + ID] = id


def _worst(cells: Cells, bounds: Bounds, seats: int, prompt: int, now: float) -> Refusal | None:
    """Of the limits that have no room, the one that lasts longest."""
    found: list[Refusal] = []
    for at, limit, of in bounds.requests:
        if cells[at + SUM] >= limit:
            found.append(Refusal(of, "rpm", limit, _wait_s(cells, at, 1, limit, now)))
    for at, limit, of in bounds.tokens:
        need = min(prompt, limit) or 1
        if cells[at + SUM] + need > limit:
            found.append(Refusal(of, "tpm", limit, _wait_s(cells, at, need, limit, now)))
    for at, limit, of in bounds.crowds:
        if in_flight(cells, at, seats) >= limit:
            found.append(Refusal(of, "concurrency", limit, FLIGHT_WAIT_S))
    return max(found, key=_lasting) if found else None


def _lasting(refusal: Refusal) -> float:
    return refusal.wait_s


def _wait_s(cells: Cells, at: int, need: int, limit: int, now: float) -> float:
    """Until `need` more fit, at most `limit` of them."""
    over, newest = cells[at + SUM] + need - limit, cells[at + NEWEST]
    for second in range(newest - SPAN_S, newest + 1):
        over -= cells[at + FIRST + second % SECONDS]
        if over <= 0:
            return float(second + SECONDS - now)
    return float(SECONDS)


def _advance(cells: Cells, at: int, second: int) -> None:
    """Forget what is older than a minute at `second`. The sum is made anew: a gateway that was killed between two
    writes leaves it wrong for a second at most."""
    newest = cells[at + NEWEST]
    if second <= newest:
        return
    for passed in range(max(newest + 1, second - SPAN_S), second + 1):
        cells[at + FIRST + passed % SECONDS] = 0
    cells[at + NEWEST] = second
    cells[at + SUM] = sum(cells[at + FIRST : at + WINDOW])


def _count(cells: Cells, at: int, more: int) -> None:
    """In the newest second of the window at `at`; fewer, where a replica counts fewer than came."""
    if more < 0:
        _take_back(cells, at, cells[at + NEWEST], -more)
    else:
        cells[at + FIRST + cells[at + NEWEST] % SECONDS] += more
        cells[at + SUM] += more


def _take_back(cells: Cells, at: int, second: int, less: int) -> None:
    """What was counted in `second`; nothing, where that has left the window."""
    if second > cells[at + NEWEST] - SECONDS:
        cell = at + FIRST + second % SECONDS
        less = min(less, cells[cell])
        cells[cell] -= less
        cells[at + SUM] -= less
