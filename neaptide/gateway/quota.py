"""Requests and tokens of the last minute, and requests in flight, held against limits. Pure: `now` and the cells, int64
that several gateways share (gateway/counters.py), are given; whoever calls has its turn at them.

A row is an id, a window of requests, a window of tokens, and the requests in flight of each seat (a gateway). A window
counts by seconds of the clock: any 60 s touch at most 61 of them, so their sum bounds what any 60 s hold.
"""

from __future__ import annotations

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


class Refusal(NamedTuple):
    quota: Quota
    limit: Limit
    value: int
    wait_s: float  # until it has room, if nobody else takes it


class Permit:
    """Of an admitted request: what it has been counted as."""

    __slots__ = ("buckets", "lines", "output", "prompt", "second")

    def __init__(self, buckets: tuple[Bucket, ...], prompt: int, second: int) -> None:
        self.buckets = buckets
        self.prompt = prompt  # tokens, at most, until its replica has counted them
        self.output = 0  # tokens so far
        self.second = second  # in which it came
        self.lines = b""  # of its answer's head


def admit(
    cells: Cells, buckets: tuple[Bucket, ...], seat: int, seats: int, prompt: int, now: float
) -> Permit | Refusal:
    """Count a request with at most `prompt` tokens in all of `buckets`; or in none, where one has no room: then the
    refusal is the one that lasts longest. `seats`: that may be taken."""
    second = _second(cells, buckets, now)
    worst: Refusal | None = None
    for quota, _, at in buckets:
        for found in _full(cells, quota, at, seats, prompt, now):
            if worst is None or found.wait_s > worst.wait_s:
                worst = found
    if worst is not None:
        return worst
    for quota, _, at in buckets:
        cells[at + FLIGHT + seat] += 1
        if quota.rpm is not None:
            _count(cells, at + REQUESTS, 1)
        if quota.tpm is not None:
            _count(cells, at + TOKENS, min(prompt, quota.tpm))
    return Permit(buckets, prompt, second)


def produced(cells: Cells, permit: Permit, tokens: int, now: float) -> None:
    """It has so many tokens of answer by now."""
    for quota, _, at in permit.buckets:
        if quota.tpm is not None:
            _advance(cells, at + TOKENS, int(now))
            _count(cells, at + TOKENS, tokens - permit.output)
    permit.output = tokens


def settle(cells: Cells, permit: Permit, seat: int, prompt: int, output: int, now: float) -> None:
    """It is over, and these are its tokens."""
    produced(cells, permit, output, now)
    for quota, _, at in permit.buckets:
        _land(cells, at + FLIGHT + seat)
        if quota.tpm is not None:
            bound = min(permit.prompt, quota.tpm)
            if prompt > bound:
                _count(cells, at + TOKENS, prompt - bound)
            else:
                _take_back(cells, at + TOKENS, permit.second, bound - prompt)


def give_back(cells: Cells, permit: Permit, seat: int, now: float) -> None:
    """It was refused for another reason: as if it had never come."""
    settle(cells, permit, seat, 0, 0, now)
    for quota, _, at in permit.buckets:
        if quota.rpm is not None:
            _advance(cells, at + REQUESTS, int(now))
            _take_back(cells, at + REQUESTS, permit.second, 1)


def in_flight(cells: Cells, at: int, seats: int) -> int:
    """Of the row at `at`."""
    if seats == 1:
        return cells[at + FLIGHT]
    return sum(cells[at + FLIGHT : at + FLIGHT + seats])


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


def _second(cells: Cells, buckets: tuple[Bucket, ...], now: float) -> int:
    """The one to count in: all windows are advanced to it. Another gateway may be ahead of `now`."""
    second = int(now)
    for _, _, at in buckets:
        second = max(second, cells[at + REQUESTS + NEWEST], cells[at + TOKENS + NEWEST])
    for quota, _, at in buckets:
        if quota.rpm is not None:
            _advance(cells, at + REQUESTS, second)
        if quota.tpm is not None:
            _advance(cells, at + TOKENS, second)
    return second


def _full(cells: Cells, quota: Quota, at: int, seats: int, prompt: int, now: float) -> list[Refusal]:
    """The limits of `quota` that have no room."""
    found: list[Refusal] = []
    rpm, tpm, concurrency = quota.rpm, quota.tpm, quota.concurrency
    if rpm is not None and cells[at + REQUESTS + SUM] >= rpm:
        found.append(Refusal(quota, "rpm", rpm, _wait_s(cells, at + REQUESTS, 1, rpm, now)))
    if tpm is not None:
        need = max(1, min(prompt, tpm))
        if cells[at + TOKENS + SUM] + need > tpm:
            found.append(Refusal(quota, "tpm", tpm, _wait_s(cells, at + TOKENS, need, tpm, now)))
    if concurrency is not None and in_flight(cells, at, seats) >= concurrency:
        found.append(Refusal(quota, "concurrency", concurrency, FLIGHT_WAIT_S))
    return found


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


def _land(cells: Cells, at: int) -> None:
    if cells[at] > 0:  # nothing is left of it where its seat was thought empty
        cells[at] -= 1
