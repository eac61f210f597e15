"""Looking at all replicas against the less loaded of a few: what it costs, and how evenly requests are spread.

    .venv/bin/python -m bench.choice [--replicas 4,16,64,256] [--few 2,3,4] [--busy 2,8,32] [--repeat 9]
        [--arrivals 20000]

Evenness is virtual: Poisson arrivals, exponential times, so many requests in flight a replica on average; after each
arrival the most that one replica has over the mean, averaged. Cost is CPU time of this process for one choice among
replicas that are all busy, the ways in turns, as the median over the repeats of the ratio of the two.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from typing import Any

from bench import kit
from neaptide.gateway import route
from neaptide.gateway.route import Target
from neaptide.table import ReplicaRow

CALLS = 3000
ALL = 0  # of `few`: every replica is looked at


def look_at(few: int) -> None:
    route.SCANNED = 0 if few else 1 << 30
    route.FEW = tuple(16 * at for at in range(few))


def targets(count: int) -> list[Target]:
    return [Target(ReplicaRow(id=f"r{at}", model="m", endpoint="http://h", max_running=1000)) for at in range(count)]


def evenness(count: int, few: int, busy: int, arrivals: int, seed: int = 0) -> float:
    """Mean of max over mean, once as many have come as there are in flight three times over."""
    look_at(few)
    chance, all_of = random.Random(seed), targets(count)
    ends: list[tuple[float, int]] = []
    now, most, seen = 0.0, 0.0, 0
    warm = 3 * count * busy
    for turn in range(warm + arrivals):
        now += chance.expovariate(count * busy)
        while ends and ends[0][0] <= now:
            all_of[heapq.heappop(ends)[1]].release()
        target = route.choose(all_of, now, turn)
        if target is None:
            raise kit.BenchError("no replica had room, and each has a thousand slots")
        target.take()
        heapq.heappush(ends, (now + chance.expovariate(1.0), int(target.row.id[1:])))
        if turn >= warm and turn % 8 == 0:
            most, seen = most + max(t.in_flight for t in all_of) * count / len(ends), seen + 1
    return most / seen


def choice_s(all_of: list[Target], few: int) -> float:
    look_at(few)
    begun_s = time.process_time()
    for turn in range(CALLS):
        route.choose(all_of, 0.0, turn, (), "m")
    return (time.process_time() - begun_s) / CALLS


def costs(count: int, ways: list[int], repeat: int) -> dict[int, tuple[float, float]]:
    """Of each way: microseconds, and how many times as long looking at all takes."""
    chance, all_of = random.Random(count), targets(count)
    for target in all_of:
        target.in_flight = chance.randint(4, 12)
    took: dict[int, list[float]] = {few: [] for few in ways}
    for _ in range(repeat):
        for few in ways:
            took[few].append(choice_s(all_of, few))
    ratios = {few: statistics.median(a / b for a, b in zip(took[ALL], took[few], strict=True)) for few in ways}
    return {few: (1e6 * statistics.median(took[few]), ratios[few]) for few in ways}


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=integers, default=[4, 16, 64, 256])
    parser.add_argument("--few", type=integers, default=[2, 3, 4])
    parser.add_argument("--busy", type=integers, default=[2, 8, 32], help="requests in flight a replica")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--arrivals", type=int, default=20_000)
    args = parser.parse_args()
    ways, found = [ALL, *args.few], list[dict[str, Any]]()
    for count in args.replicas:
        cost = costs(count, ways, args.repeat)
        for few in ways:
            even = {busy: evenness(count, few, busy, args.arrivals) for busy in args.busy}
            found.append(
                {"replicas": count, "few": few, "us": cost[few][0], "times": cost[few][1], "max_over_mean": even}
            )
    rows = [
        [
            str(row["replicas"]), str(row["few"] or "all"), f"{row['us']:.2f} us", f"{row['times']:.2f}",
            *(f"{x:.2f}" for x in row["max_over_mean"].values()),
        ]
        for row in found
    ]  # fmt: skip
    kit.table(["replicas", "looked at", "a choice", "all / this", *(f"{busy} in flight" for busy in args.busy)], rows)
    kit.save("choice", {"rows": found})


if __name__ == "__main__":
    main()
