"""How much of what the best fixed limit serves within the goals a learnt one serves, in a flood, in virtual time.

    .venv/bin/python -m bench.concurrency [--seeds 3] [--seconds 60]

Three kinds of replica (bench/crowd.py) at 5 times what they can do. The best fixed limit is found by a sweep with one
seed and then run with all. `aimd` adds a request a step and takes a fifth off when too much is late; `gradient` follows
the latency against the least seen, as Netflix's concurrency-limits does. Nothing here depends on the processor.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

from bench import kit
from bench.crowd import QUEUES, SHAPES, SLOW, Fixed, Limit, Shape, World, asked, slower
from neaptide.gateway.concurrency import LEAST, STEP_S, Limiter

FLOOD = 5.0
COARSE = range(8, 65, 8)
FINER = ((-6, -4, -2, 2, 4, 6), (-1, 1))
SMOOTH = 0.2  # of the gradient's new limit


class Aimd(Limiter):
    """The same signals, and the rule that TCP began with."""

    def _fall(self, fits: float, in_flight: int) -> None:
        super()._fall(in_flight, in_flight)
        self._peak = self.limit = max(LEAST, 0.8 * min(self._peak, in_flight))

    def _step(self, now: float, in_flight: int) -> None:
        before = self.limit
        super()._step(now, in_flight)
        if self.limit > before and self._peak < math.inf:
            self.limit = before + 1.0


class Gradient:
    """Lets latency be `tolerance` times the least seen, and adds the root of the limit."""

    def __init__(self, tolerance: float, late_s: float) -> None:
        """`late_s`: who has waited so long for a first token counts before it has come."""
        self.limit, self.looked_s, self._tolerance, self._late_s = 32.0, 0.0, tolerance, late_s
        self._late: list[float] = []
        self._least = [math.inf, math.inf]
        self._restart(0.0)

    def _restart(self, now: float) -> None:
        self._since_s, self._spent_s, self._tokens = now, 0.0, 0
        self._delays: list[float] = []

    def delayed(self, after_s: float, sent_s: float) -> None:
        self._delays.append(after_s)

    def waits(self, for_s: float, sent_s: float) -> None:
        if for_s > self._late_s:
            self._late.append(for_s)

    def paced(self, spent_s: float, tokens: int) -> None:
        self._spent_s += spent_s
        self._tokens += tokens

    def ended(self) -> None: ...

    def look(self, now: float, in_flight: int) -> None:
        late, self._late, self.looked_s = self._late, [], now
        if now - self._since_s < STEP_S:
            return
        seen = (
            mean(self._delays + late) if len(self._delays + late) >= 8 else None,
            self._spent_s / self._tokens if self._tokens >= 16 else None,
        )
        gradient = 1.0
        for at, value in enumerate(seen):
            if value is not None:
                self._least[at] = min(self._least[at], value)
                gradient = min(gradient, max(0.5, self._tolerance * self._least[at] / value))
        if in_flight >= self.limit / 2:
            wanted = self.limit * gradient + math.sqrt(self.limit)
            self.limit = max(1.0, (1 - SMOOTH) * self.limit + SMOOTH * wanted)
        self._restart(now)


LAWS: dict[str, Callable[[Shape], Limit]] = {
    "learnt": lambda shape: Limiter(shape.goals),
    "aimd": lambda shape: Aimd(shape.goals),
    "gradient 1.5": lambda shape: Gradient(1.5, shape.goals.ttft_s),
    "gradient 2": lambda shape: Gradient(2.0, shape.goals.ttft_s),
    "no limit": lambda _: Fixed(math.inf),
}


def flood(shape: Shape, rps: float, seconds: float, seed: int, *limits: Limit) -> World:
    return World(shape, asked(shape, rps, seconds, seed), limits).run(seconds)


def best_fixed(shape: Shape, seconds: float) -> tuple[int, float]:
    """(limit, answers a second within the goals) at more than any of them can do."""
    arrivals = FLOOD * 12.0

    def good(limit: int) -> int:
        return flood(shape, arrivals, seconds, 0, Fixed(limit)).good(0.0, seconds)

    found = {limit: good(limit) for limit in COARSE}
    for steps in FINER:
        near = max(found, key=lambda limit: found[limit])
        found |= {near + step: good(near + step) for step in steps}
    best = max(found, key=lambda limit: found[limit])
    return best, found[best] / seconds


def compared(shape: Shape, seconds: float, seeds: Sequence[int]) -> dict[str, Any]:
    best, rps = best_fixed(shape, seconds)
    row: dict[str, Any] = {"shape": shape.name, "limit": best, "rps": rps}
    most = [flood(shape, FLOOD * rps, seconds, seed, Fixed(best)).good(0.0, seconds) for seed in seeds]
    for name, law in LAWS.items():
        shares = [
            flood(shape, FLOOD * rps, seconds, seed, law(shape)).good(0.0, seconds) / of
            for seed, of in zip(seeds, most)
        ]
        row[name], row[f"{name}, least"] = median(shares), min(shares)
    half = [flood(shape, 0.5 * rps, seconds, seed, Limiter(shape.goals)) for seed in seeds]
    row["waited at half load"] = sum(w.gates[0].waited for w in half) / sum(len(w.book.prompt) for w in half)
    return row


def halved(rps: float, seeds: Sequence[int]) -> list[list[float]]:
    """The median limit at the end of: as it is for 40 s, half as quick for 50 s, as before for 60 s; and the least."""
    found = []
    for seed in seeds:
        world = World(SLOW, asked(SLOW, FLOOD * rps, 150.0, seed), [Limiter(SLOW.goals)]).run(40.0)
        world.engine.become(slower(SLOW, 2.0).traits)
        world.run(90.0).engine.become(SLOW.traits)
        limits = world.run(150.0).gates[0].limits
        ends = [median(limit for at, limit in limits if end - 15 < at <= end) for end in (40.0, 90.0, 150.0)]
        found.append([*ends, min(limit for _, limit in limits)])
    return found


def shared(row: dict[str, Any], seconds: float, seeds: Sequence[int]) -> list[list[float]]:
    """Two gateways before one replica: their share of the best fixed limit's, and where their limits end."""
    found = []
    for seed in seeds:
        world = flood(QUEUES, FLOOD * row["rps"], seconds, seed, Limiter(QUEUES.goals), Limiter(QUEUES.goals))
        share = world.good(0.0, seconds) / (row["rps"] * seconds)
        found.append([share, *(gate.limit.limit for gate in world.gates)])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    seeds = range(1, args.seeds + 1)
    rows = [compared(shape, args.seconds, seeds) for shape in SHAPES]
    head = ["replica", "best fixed", "answers/s", *LAWS, "waited at half load"]
    kit.table(head, [_cells(row) for row in rows])
    change, two = halved(rows[0]["rps"], seeds), shared(rows[2], args.seconds, seeds)
    columns = [median(column) for column in zip(*change)]
    print("half as quick and back: limits {:.0f}, {:.0f}, {:.0f}; least {:.0f}".format(*columns))
    print("two gateways: {:.0%} together, limits {:.0f} and {:.0f}".format(*(median(c) for c in zip(*two))))
    kit.save("concurrency", {"rows": rows, "halved": change, "two_gateways": two})


def _cells(row: dict[str, Any]) -> list[str]:
    laws = [f"{row[name]:.0%} ({row[f'{name}, least']:.0%})" for name in LAWS]
    return [row["shape"], str(row["limit"]), f"{row['rps']:.1f}", *laws, f"{row['waited at half load']:.1%}"]


if __name__ == "__main__":
    main()
