"""Does memory stay flat? Resident memory of each process over many requests, sampled, with the slope of the last half.

    .venv/bin/python -m bench.soak [--requests 10000] [--streams 0.5] [--conns 16] [--model DIR]

The echo engine answers (deterministic, weightless), so the processes see requests as fast as they take them; with
--model an OpenVINO directory does, with KV memory of 256 MiB, which the library fills up and keeps. Non-streaming and
streaming turn by turn, in rounds of --round requests. A CSV with one row a sample goes to bench/results/soak.csv; the
slope is the least-squares line over the second half, in KiB for 1,000 requests, because caches and pools fill up in the
first.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import kit

KV_MIB = 256
WORDS = "What does a replica do when the tide of traffic goes out? "


def config(model: Path | None) -> str:
    if model is None:
        return "models:\n  soak: {engine: echo}\n"
    return json.dumps({"models": {"soak": {"source": str(model.resolve()), "options": {"kv_mib": KV_MIB}}}})


def rounds(args: argparse.Namespace) -> list[kit.Load]:
    """Rounds that add up to args.requests; every streaming share is reached within each ten rounds."""
    count = max(2, args.requests // args.round)
    found = []
    for at in range(count):
        streaming = (at % 10) < round(args.streams * 10)
        body = kit.chat("soak", WORDS, max_tokens=args.tokens, **({"stream": True} if streaming else {}))
        mode = "sse" if streaming else "closed"
        options = {"requests": args.round}
        found.append(
            kit.Load(body=body, mode=mode, conns=args.conns, warmup_s=0, duration_s=args.limit_s, options=options)
        )
    return found


def sample(server: kit.Up, done: int) -> dict[str, float]:
    roles = ("supervisor", "control", "gateway", "replica", "engine")
    return {"requests": done, **{role: kit.rss_mib(server.group(role)) for role in roles}}


def slope_kib(rows: Sequence[dict[str, float]], role: str) -> float:
    """KiB of growth for 1,000 requests over the second half; least squares."""
    half = rows[len(rows) // 2 :]
    mean_x = sum(r["requests"] for r in half) / len(half)
    mean_y = sum(r[role] for r in half) / len(half)
    spread = sum((r["requests"] - mean_x) ** 2 for r in half)
    if not spread:
        return float("nan")
    return sum((r["requests"] - mean_x) * (r[role] - mean_y) for r in half) / spread * 1024 * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--round", type=int, default=250)
    parser.add_argument("--streams", type=float, default=0.5, help="share of rounds that stream")
    parser.add_argument("--conns", type=int, default=16)
    parser.add_argument("--model", type=Path, help="an OpenVINO directory instead of the echo engine")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer at most")
    parser.add_argument("--limit-s", type=float, default=60.0, help="longest a round may take")
    args = parser.parse_args()
    rows: list[dict[str, float]] = []
    failed = 0
    with kit.up(config(args.model)) as server:
        rows.append(sample(server, 0))
        for load in rounds(args):
            result = kit.drive(load, server.port, key=server.key)
            failed += result["err"]
            rows.append(sample(server, int(rows[-1]["requests"]) + result["finished"]))
    kit.RESULTS.mkdir(exist_ok=True)
    with (kit.RESULTS / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = [
        [role, f"{rows[0][role]:.1f}", f"{rows[-1][role]:.1f}", f"{slope_kib(rows, role):.1f}"]
        for role in rows[0]
        if role != "requests"
    ]
    kit.table(["process", "MiB at 0", f"MiB at {rows[-1]['requests']:.0f}", "KiB per 1,000 requests"], table)
    found: dict[str, Any] = {"failed": failed, "summary": table, "samples": rows}
    kit.save("soak", found)
    if failed:
        raise SystemExit(f"{failed} requests failed")


if __name__ == "__main__":
    main()
