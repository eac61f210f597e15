"""Many small models: what keeping, letting go and pooling their replicas costs, beside the clairvoyant bound.

    .venv/bin/python -m bench.tail [--arrivals FILE] [--series m-large] [--seeds 5]

Clients under 0.5 requests/s on days 0 to 6 as models of their own, cold start 120 s, days 7 and 8 reported, 99 % within
2 s. Simulated: the processor matters for the time it takes, not for what it says.
"""

from __future__ import annotations

import argparse
import sys
import time

from bench import kit
from neaptide.simulate.arrivals import Rates
from neaptide.simulate.formats import read
from neaptide.simulate.tail import COLD_START_S, TailQuestion, compare_tail
from neaptide.simulate.tail_bound import DEFINITION
from neaptide.simulate.tail_report import COLUMNS, by_cost, cells, outcome
from neaptide.simulate.world import changed, read_world

TRACE = str(kit.ROOT / "examples/data/servegen_client_rates.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrivals", default=TRACE)
    parser.add_argument("--series", default="m-large")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--below", type=float, default=0.5, help="requests/s of the largest of the small models")
    parser.add_argument("--pool", type=int, default=4, help="models a replica, at most")
    args = parser.parse_args()
    rates = read(args.arrivals, args.series)
    if not isinstance(rates, Rates):
        parser.error("--arrivals needs rates by client")
    question = TailQuestion(seeds=tuple(range(args.seeds)), below_rps=args.below, pool=args.pool)
    world = changed(read_world(), cold_start_s=COLD_START_S)
    start = time.process_time()
    found = compare_tail(rates, world, question, lambda share: print(f"{100 * share:.0f} %", file=sys.stderr))
    took_s = time.process_time() - start
    kit.table(list(COLUMNS), [cells(found, row) for row in by_cost(found)])
    print(f"bound: {found.bound_hours:,.1f} replica-hours, {found.bound_hours_no_budget:,.1f} with nobody late: "
          f"{DEFINITION}")  # fmt: skip
    kit.save("tail", {"series": args.series, "cpu_s": took_s, **outcome(found)})


if __name__ == "__main__":
    main()
