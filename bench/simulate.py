"""The simulator's request-level tiers: requests a CPU-second, and how far the fast one is from the exact one.

    .venv/bin/python -m bench.simulate [--requests 100000] [--exact 3000] [--repeat 3]

One engine (Qwen3-8B on an H100, as simulate.engine.Traits has it) at three loads, as shares of what it can serve;
prompts of about 500 tokens and answers of about 200, lognormal, Poisson arrivals. Speed is process time, the best of
the runs, so that time given to other work does not count; what a neighbour on the core's other thread takes does.

    plain queue   KV memory never runs out: batch and chunk alone
    KV memory     380,000 tokens of it, admission and preemption
    replicas      eight of them: round robin in ticks, and the gateway's line with the least loaded, in order of time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench import kit
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Book, Engine, Traits
from neaptide.simulate.even import jumping
from neaptide.simulate.exact import Exact
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup, capacity

PROMPT, OUT = (500.0, 1.0), (200.0, 0.8)  # median, sigma of the logarithm
LOADS = (0.3, 0.7, 0.95)
REPLICAS = 8
PLAIN = Traits(kv_tokens=None)
TIGHT = Traits(kv_tokens=60_000)  # where preemption happens at the highest load


def mean(median: float, sigma: float) -> float:
    return median * float(np.exp(sigma**2 / 2))


def asked(rows: int, rps: float, seed: int = 0) -> Requests:
    random = np.random.default_rng(seed)
    prompt, out = (np.maximum(1, random.lognormal(np.log(m), s, rows)).astype(np.int64) for m, s in (PROMPT, OUT))
    return Requests(t_s=np.cumsum(random.exponential(1 / rps, rows)), in_tokens=prompt, out_tokens=out)


def rate_of(traits: Traits, load: float) -> float:
    return load * capacity(Setup(engine=traits), mean(*PROMPT), mean(*OUT)).rps


def best_s(repeat: int, run: Callable[[], object]) -> float:
    found = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def alone(kind: Callable[[Traits, Book], Engine], traits: Traits, requests: Requests) -> Book:
    """All by one engine."""
    book = Book(requests, 1, 1)
    kind(traits, book).run(range(len(book.prompt)), book.arrived_s, 1e12)
    return book


def jumped(traits: Traits, book: Book) -> Engine:
    """The fast tier's engine, as a replay chooses it."""
    return jumping(traits, book)(traits, book)


def speeds(rows: int, repeat: int) -> list[dict[str, Any]]:
    found = []
    for load in LOADS:
        row: dict[str, Any] = {"load": load}
        for name, traits in (("plain_queue", PLAIN), ("kv_memory", Traits())):
            requests = asked(rows, rate_of(traits, load))
            row[name] = rows / best_s(repeat, lambda t=traits, r=requests: alone(jumped, t, r))  # type: ignore[misc]
        many = asked(rows, REPLICAS * rate_of(Traits(), load))
        blind = Setup(replicas=REPLICAS, line="replica", route="round-robin")
        for name, setup in (("replicas_round_robin", blind), ("replicas_least_loaded", Setup(replicas=REPLICAS))):
            row[name] = rows / best_s(repeat, lambda s=setup, r=many: replay(r, s))  # type: ignore[misc]
        found.append(row)
        print(", ".join(f"{k} {v:,.0f}" if v > 1 else f"{k} {v}" for k, v in row.items()), flush=True)
    return found


def differences(rows: int) -> list[dict[str, Any]]:
    """Relative, of TTFT and TPOT at three quantiles, and the exact tier's speed."""
    found = []
    for load in LOADS:
        for name, traits in (("plain_queue", PLAIN), ("kv_binds", TIGHT)):
            requests = asked(rows, rate_of(traits, load))
            start = time.process_time()
            exact = alone(Exact, traits, requests)
            took_s = time.process_time() - start
            fast = alone(jumped, traits, requests)
            row: dict[str, Any] = {"load": load, "kind": name, "preempted": sum(exact.preempted)}
            row["exact_per_cpu_s"] = rows / took_s
            for what, values in (
                ("ttft", [ttft(b) for b in (fast, exact)]),
                ("tpot", [tpot(b) for b in (fast, exact)]),
            ):
                for q in (50, 90, 99):
                    ours, theirs = (float(np.nanpercentile(v, q)) for v in values)
                    row[f"p{q}_{what}_difference"] = ours / theirs - 1
            found.append(row)
    return found


def ttft(book: Book) -> np.ndarray:
    return np.array(book.first_s) - np.array(book.arrived_s)


def tpot(book: Book) -> np.ndarray:
    out = np.array(book.out)
    return np.where(out > 1, (np.array(book.finish_s) - np.array(book.first_s)) / np.maximum(out - 1, 1), np.nan)


def _share(value: float) -> str:
    return f"{100 * value:+.2f} %"


def _shown(rows: Sequence[dict[str, Any]], names: Sequence[str], form: Callable[[Any], str]) -> list[list[str]]:
    return [[str(row["load"]), str(row.get("kind", "")), *(form(row[name]) for name in names)] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--exact", type=int, default=3_000, help="requests of the comparison with the exact tier")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    fast, against = speeds(args.requests, args.repeat), differences(args.exact)
    names = ["plain_queue", "kv_memory", "replicas_round_robin", "replicas_least_loaded"]
    kit.table(["load", "requests a CPU-second", *names], _shown(fast, names, lambda value: f"{value:,.0f}"))
    names = [f"p{q}_{what}_difference" for what in ("ttft", "tpot") for q in (50, 99)]
    kit.table(["load", "fast against exact", *names], _shown(against, names, _share))
    kit.save("simulate", {"fast": fast, "against_exact": against})


if __name__ == "__main__":
    main()
