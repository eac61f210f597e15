"""One replica in virtual time that says nothing of itself, and gateways before it that each bound what they send.

The replica is the simulator's exact engine: batch, prompts in chunks, KV memory, preemption, a line of its own. A
gateway sees of it what it sees of a server: when it sent a request, first token, tokens, the end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from msgspec.structs import replace

from neaptide.gateway.concurrency import Goals
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.exact import Exact
from neaptide.simulate.steps import Linear

LOOK_S = 0.1  # as the gateway's sweep


class Shape(NamedTuple):
    """A kind of replica, what it is asked, and the goals."""

    name: str
    traits: Traits
    prompt: tuple[float, float]  # median, sigma of the logarithm
    out: tuple[float, float]
    goals: Goals = Goals(ttft_s=1.0, tpot_s=0.1)


SLOW = Shape(
    "slow steps, large KV",
    Traits(step=Linear(base_s=0.040, request_s=0.001, prefill_token_s=1e-4), kv_tokens=None, chunk_tokens=512),
    (200.0, 0.8), (60.0, 0.8),
)  # fmt: skip
SMALL = Shape(
    "fast steps, small KV",
    Traits(step=Linear(base_s=0.010, request_s=5e-5, prefill_token_s=2e-5), kv_tokens=16_000, chunk_tokens=1024),
    (400.0, 0.8), (120.0, 0.8), Goals(ttft_s=1.0, tpot_s=0.05),
)  # fmt: skip
QUEUES = Shape(
    "32 at once, the rest queue inside",
    Traits(step=Linear(base_s=0.025, request_s=2e-4, prefill_token_s=4e-5), kv_tokens=None, max_batch=32),
    (300.0, 0.8), (100.0, 0.8),
)  # fmt: skip
SHAPES = (SLOW, SMALL, QUEUES)


def slower(shape: Shape, times: float) -> Shape:
    """The same replica, each step of which takes so many times as long."""
    step = shape.traits.step
    assert isinstance(step, Linear)
    parts = {name: times * getattr(step, name) for name in Linear.__struct_fields__}
    return shape._replace(traits=replace(shape.traits, step=Linear(**parts)))


class Limit(Protocol):
    """What bounds a gateway: neaptide.gateway.concurrency.Limiter, or another to compare it with."""

    limit: float
    looked_s: float

    def delayed(self, after_s: float, sent_s: float) -> None: ...
    def waits(self, for_s: float, sent_s: float) -> None: ...
    def paced(self, spent_s: float, tokens: int) -> None: ...
    def ended(self) -> None: ...
    def look(self, now: float, in_flight: int) -> None: ...


class Fixed:
    """A limit that learns nothing."""

    def __init__(self, limit: float) -> None:
        self.limit, self.looked_s = limit, 0.0

    def delayed(self, after_s: float, sent_s: float) -> None: ...
    def waits(self, for_s: float, sent_s: float) -> None: ...
    def paced(self, spent_s: float, tokens: int) -> None: ...
    def ended(self) -> None: ...
    def look(self, now: float, in_flight: int) -> None:
        self.looked_s = now


class Watched(Exact):
    """An engine whose tokens can be seen while they come, and that can become slower."""

    def made(self) -> dict[int, int]:
        """Tokens so far of those that decode."""
        prompt = self._book.prompt
        return {s.id: s.tokens - prompt[s.id] for s in self._decoding}

    def become(self, traits: Traits) -> None:
        """From the next step on; KV memory stays."""
        self._traits = traits


class Gate:
    """A gateway: who waits in it, and what it has sent."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.line: deque[int] = deque()
        self.running: dict[int, int] = {}  # tokens told, by id
        self.limits: list[tuple[float, float]] = []  # (now, limit) of every look
        self.waited = 0  # requests that found no room

    def send(self, world: World, now: float) -> None:
        while self.line and len(self.running) + 1 <= self.limit.limit:
            id = self.line.popleft()
            self.running[id] = 0
            world.sent_s[id] = now
            world.engine.run((id,), (now,), now)

    def settle(self, world: World) -> bool:
        """Take out those that have ended; whether there were any."""
        book = world.book
        ended = [id for id in self.running if book.finish_s[id] == book.finish_s[id]]
        for id in ended:
            told, first_s, finish_s = self.running.pop(id), book.first_s[id], book.finish_s[id]
            self._tell(world, id, told, book.out[id], finish_s, first_s)
            self.limit.ended()
        return bool(ended)

    def look(self, world: World, now: float) -> None:
        made, book = world.engine.made(), world.book
        for id, told in self.running.items():
            first_s = book.first_s[id]
            if first_s == first_s:
                tokens = made.get(id, told)
                self._tell(world, id, told, tokens, now, first_s)
                self.running[id] = tokens
            else:
                self.limit.waits(now - world.sent_s[id], world.sent_s[id])
        self.limit.look(now, len(self.running))
        self.limits.append((now, self.limit.limit))

    def _tell(self, world: World, id: int, told: int, tokens: int, now: float, first_s: float) -> None:
        limit, looked_s = self.limit, self.limit.looked_s
        if first_s > looked_s:
            limit.delayed(first_s - world.sent_s[id], world.sent_s[id])
            told = 1
        limit.paced(now - max(first_s, looked_s), max(0, tokens - told))


class World:
    """Arrivals go round the gateways. What came of them stands in the book and in `sent_s`."""

    def __init__(self, shape: Shape, requests: Requests, limits: Sequence[Limit]) -> None:
        self.shape = shape
        self.book = Book(requests, 1, 1)
        self.engine = Watched(shape.traits, self.book)
        self.gates = [Gate(limit) for limit in limits]
        self.sent_s = [math.nan] * len(self.book.prompt)
        self._next = 0
        self._look_s = LOOK_S

    def run(self, until_s: float) -> World:
        arrived_s, gates = self.book.arrived_s, self.gates
        while True:
            coming_s = arrived_s[self._next] if self._next < len(arrived_s) else math.inf
            now = min(coming_s, self.engine.end_s, self._look_s)
            if now > until_s:
                return self
            self.engine.run((), (), now)
            if coming_s == now:
                gate = gates[self._next % len(gates)]
                gate.line.append(self._next)
                self._next += 1
                gate.waited += len(gate.running) + 1 > gate.limit.limit
            for gate in gates:
                gate.settle(self)
            if now == self._look_s:
                self._look_s = now + LOOK_S
                for gate in gates:
                    gate.look(self, now)
            for gate in gates:
                gate.send(self, now)

    def good(self, from_s: float, to_s: float) -> int:
        """Answers that ended in this time within the goals, which count from when the replica got the request."""
        book, goals = self.book, self.shape.goals
        sent, first, finish, out = (np.array(x) for x in (self.sent_s, book.first_s, book.finish_s, book.out))
        tpot_s = (finish - first) / np.maximum(out - 1, 1)
        met = (first - sent <= goals.ttft_s) & (tpot_s <= goals.tpot_s)
        return int(np.sum(met & (finish > from_s) & (finish <= to_s)))


def asked(shape: Shape, rps: float, seconds: float, seed: int) -> Requests:
    """Poisson arrivals, log-normal lengths."""
    random = np.random.default_rng(seed)
    rows = int(rps * seconds)
    lengths = [
        np.maximum(1, random.lognormal(math.log(median), sigma, rows)).astype(np.int64)
        for median, sigma in (shape.prompt, shape.out)
    ]
    return Requests(t_s=np.cumsum(random.exponential(1 / rps, rows)), in_tokens=lengths[0], out_tokens=lengths[1])
