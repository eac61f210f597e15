"""From `neaptide up -d` to ready, and what `neaptide --help` takes: medians of wall seconds.

    .venv/bin/python -m bench.startup [--up 5] [--help-runs 20]

Ready means that the command has returned: the replica answers and the self-test passed. The first start on a machine
calibrates the engine and reads the model from disk; it is reported apart. --help is set against `python -c pass`,
because the interpreter's own start is not ours to lose. Starts are counted from outside: fork to exit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench import kit


def wall_s(command: Sequence[str]) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return time.monotonic() - start


def starts(runs: int, config: str) -> list[dict[str, float]]:
    """Each run in a fresh state directory: wall time outside, ready_s as the service told it, time to stop."""
    found = []
    for _ in range(runs):
        start = time.monotonic()
        with kit.up(config) as server:
            took = time.monotonic() - start
            rss = kit.rss_mib(server.group(*server.pids, "engine"))
            told = server.ready_s
            stop = time.monotonic()
        found.append({"wall_s": took, "ready_s": told, "down_s": time.monotonic() - stop, "rss_mib": rss})
        print(f"up {took:.2f} s (told {told:.2f}), down {found[-1]['down_s']:.2f} s, {rss:.0f} MiB", flush=True)
    return found


def help_times(runs: int) -> dict[str, list[float]]:
    """Alternating, so that both see the same machine."""
    found: dict[str, list[float]] = {"help": [], "python": []}
    for _ in range(runs):
        found["help"].append(wall_s([kit.NEAPTIDE, "--help"]))
        found["python"].append(wall_s([sys.executable, "-c", "pass"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--up", type=int, default=5)
    parser.add_argument("--help-runs", type=int, default=20)
    parser.add_argument("--config", default="models: {guide: {}}\n", help="neaptide.yaml's text")
    args = parser.parse_args()
    found: dict[str, Any] = {"starts": starts(args.up, args.config), **help_times(args.help_runs)}
    rows = [[name, f"{kit.median(found[name]) * 1000:.0f} ms"] for name in ("help", "python") if found[name]]
    if found["starts"]:
        rows.append(["up, first", f"{found['starts'][0]['wall_s']:.2f} s"])
        for name in ("wall_s", "ready_s", "down_s"):
            rows.append([f"up, {name}", f"{kit.median([s[name] for s in found['starts']]):.2f} s"])
        rows.append(["memory after ready", f"{kit.median([s['rss_mib'] for s in found['starts']]):.0f} MiB"])
    kit.table(["median", ""], rows)
    kit.save("startup", {"summary": rows, **found})


if __name__ == "__main__":
    main()
