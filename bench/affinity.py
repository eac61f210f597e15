"""What sending prompts that begin alike to the same replica is worth: prefix hits and TTFT of three routes, simulated.

    .venv/bin/python -m bench.affinity --arrivals mooncake_conversation.parquet [--kv-tokens 380000] [--replicas 4,8,16]
        [--loads 0.5,0.7,0.9] [--routes prefix,round-robin,least-loaded] [--seeds 3] [--minutes 59] [--warm 10] [--json]

The trace is Mooncake's of conversations (kvcache-ai/Mooncake, FAST25-release): 12,031 requests of an hour as columns
t_ms, in_tok, out_tok and hash_ids, an id for each block of 512 prompt tokens, equal where that block and all before it
are equal. It is a file of its own, not part of Neaptide.

Replicas are the simulator's: Qwen3-8B in BF16 on an H100 80 GB. Its memory, less weights and activations, holds 380,000
tokens of keys and values, 742 blocks: about 32 prompts of the trace's mean, for running requests and for prefixes that
stay behind together. What nobody runs with stays until its room is needed, the longest unused first. No host memory
behind it.

A load is a share of what so many replicas serve without any prefix. The trace is laid over itself as often as that
takes, each copy begun elsewhere in it (by the seed) and with blocks of its own, then stretched by what is too much:
by less than two for two copies, less for more. The first minutes warm the caches and are not counted. `most` is the hit
rate of one cache without end that all replicas share. Time is virtual: a busy machine only makes it take longer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from bench import kit
from neaptide.simulate.arrivals import Lists, Requests
from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.formats import read
from neaptide.simulate.replay import replay
from neaptide.simulate.routes import RouteName
from neaptide.simulate.served import Served
from neaptide.simulate.settings import Setup, capacity

TRACE = kit.ROOT / "examples" / "data" / "mooncake_conversation.parquet"
ROUTES: tuple[RouteName, ...] = ("prefix", "round-robin", "least-loaded")


def trace_of(path: Path) -> Requests:
    """BenchError where the trace is not there, or tells no prefixes."""
    if not path.exists():
        raise kit.BenchError(
            f"{path} is not there: make it from conversation_trace.jsonl of kvcache-ai/Mooncake "
            "(FAST25-release/traces; timestamp, input_length, output_length become t_ms, in_tok, out_tok) "
            "and pass --arrivals FILE"
        )
    found = read(path)
    if not isinstance(found, Requests) or found.prefixes is None or found.in_tokens is None or found.out_tokens is None:
        raise kit.BenchError(f"{path} tells no prefixes: columns t_ms, in_tok, out_tok and hash_ids are needed")
    return found


def asked(trace: Requests, rps: float, span_s: float, seed: int) -> Requests:
    """So many requests a second of it, for so long."""
    random = np.random.default_rng(seed)
    prefixes = cast(Lists, trace.prefixes)
    long_s = float(trace.t_s[-1]) + 1.0
    copies = math.ceil(rps * long_s / len(trace.t_s))
    stretch = copies * len(trace.t_s) / (rps * long_s)
    size = int(prefixes.values.max()) + 1
    shifts = random.uniform(0.0, long_s, copies)
    t_s = np.concatenate([(trace.t_s - shift) % long_s * stretch for shift in shifts])
    order = np.argsort(t_s, kind="stable")
    order = order[t_s[order] < span_s]
    starts = np.concatenate([[0], *(prefixes.starts[1:] + copy * len(prefixes.values) for copy in range(copies))])
    values = np.concatenate([prefixes.values + copy * size for copy in range(copies)])
    lengths = (np.tile(cast(np.ndarray, column), copies)[order] for column in (trace.in_tokens, trace.out_tokens))
    in_tokens, out_tokens = lengths
    return Requests(
        t_s=t_s[order], in_tokens=in_tokens, out_tokens=out_tokens, prefixes=Lists(values, starts).take(order)
    )


def most_hits(requests: Requests, from_s: float, block_tokens: int) -> float:
    """The hit rate from this time on of one cache that forgets nothing and knows a prompt as soon as it comes."""
    book, seen = Book(requests, 1, 1), set[int]()
    hits = tokens = 0
    for id, at_s in enumerate(book.arrived_s):
        wanted = book.wanted(id, block_tokens)
        known = next((n for n, block in enumerate(wanted) if block not in seen), len(wanted))
        seen.update(book.shareable(id, block_tokens))
        if at_s >= from_s:
            hits, tokens = hits + known * block_tokens, tokens + book.prompt[id]
    return hits / tokens


def row_of(served: Served) -> dict[str, Any]:
    """Who was not served in four hours has waited for ever."""
    ttft_s = np.where(np.isnan(served.ttft_s), np.inf, served.ttft_s)
    p50, p95 = (float(np.percentile(ttft_s, q, method="higher")) for q in (50, 95))
    counts = np.bincount(served.replica[served.replica >= 0])
    return {
        "requests": len(ttft_s),
        "hit_rate": float(served.cached_tokens.sum() / served.in_tokens.sum()),
        "p50_ttft_s": p50,
        "p95_ttft_s": p95,
        "busiest": float(counts.max() / counts.mean()),  # requests of the replica that got most, over the mean
    }


def measured(args: argparse.Namespace, trace: Requests) -> Iterator[dict[str, Any]]:
    """One run of each route, seed, load and number of replicas."""
    engine = Traits(kv_tokens=args.kv_tokens)
    means = (float(cast(np.ndarray, column).mean()) for column in (trace.in_tokens, trace.out_tokens))
    one_rps = capacity(Setup(engine=engine), *means).rps
    warm_s, span_s = 60 * args.warm, 60 * args.minutes
    for replicas in args.replicas:
        for load in args.loads:
            for seed in range(args.seeds):
                requests = asked(trace, load * replicas * one_rps, span_s, seed)
                most = most_hits(requests, warm_s, engine.prefix_block_tokens)
                for route in args.routes:
                    begun_s = time.process_time()
                    setup = Setup(engine=engine, replicas=replicas, route=route)
                    served = replay(requests, setup, seed=seed, from_s=warm_s, to_s=span_s)
                    about = {"replicas": replicas, "load": load, "route": route, "seed": seed, "most": most}
                    yield about | row_of(served) | {"cpu_s": round(time.process_time() - begun_s, 2)}


def summary(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Of a Markdown table: a row a number of replicas, load and route; means over the seeds, and their range."""
    groups: dict[tuple[int, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["replicas"], row["load"], row["route"]), []).append(row)
    found = []
    for (replicas, load, route), its in groups.items():
        hits, most, p50, p95, busiest = (
            [row[name] for row in its] for name in ("hit_rate", "most", "p50_ttft_s", "p95_ttft_s", "busiest")
        )
        told = [f"{100 * _mean(x):.1f} %" for x in (hits, most)] + [f"{_mean(x):.2f} s" for x in (p50, p95)]
        spread = f"{min(p95):.2f} to {max(p95):.2f} s"
        found.append([str(replicas), f"{load:g}", route, *told, spread, f"{_mean(busiest):.2f}"])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def routes(text: str) -> list[str]:
    unknown = set(text.split(",")) - set(get_args(RouteName))
    if unknown:
        raise argparse.ArgumentTypeError(f"no route {', '.join(unknown)}; there are {', '.join(get_args(RouteName))}")
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arrivals", type=Path, default=TRACE)
    parser.add_argument("--replicas", type=counts, default=[4, 8, 16])
    parser.add_argument("--loads", type=numbers, default=[0.5, 0.7, 0.9])
    parser.add_argument("--routes", type=routes, default=list(ROUTES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=59.0)
    parser.add_argument("--warm", type=float, default=10.0, help="minutes at the beginning that are not counted")
    parser.add_argument("--kv-tokens", type=int, default=Traits().kv_tokens, help="of each replica")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    if not 0 <= args.warm < args.minutes or args.seeds < 1:
        parser.error("--warm is less than --minutes, --seeds 1 or more")
    rows = []
    for row in measured(args, trace_of(args.arrivals)):
        rows.append(row)
        if not args.json:
            print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if args.json:
        print(json.dumps({"command": kit.again(), "kv_tokens": args.kv_tokens, "rows": rows}, indent=1))
        return
    head = ["replicas", "load", "route", "prefix hits", "most", "p50 TTFT", "p95 TTFT", "of the seeds", "busiest"]
    kit.table(head, summary(rows))
    print(f"{sum(row['cpu_s'] for row in rows):.0f} CPU seconds")
    kit.save("affinity", {"kv_tokens": args.kv_tokens, "rows": rows})


if __name__ == "__main__":
    main()
