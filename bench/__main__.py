"""Runs every benchmark, one after the other: `python -m bench [--quick] [startup gateway ...]`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.kit import ROOT

LOOK_AT_TRUTH = ["--minutes", "0.1", "--loads", "0.3", "--runs", "1"]
LOOK_AT_TRUTH += ["--levels", "1,4", "--calibrate-s", "4", "--context", "128"]
# name: (module, arguments of a full run, arguments of a look)
BENCHMARKS = {
    "startup": ("bench.startup", [], ["--up", "1", "--help-runs", "3"]),
    "gateway": ("bench.gateway.run", [], ["--repeat", "1", "--duration", "1", "--warmup", "0.5", "--streams", "100"]),
    "link": ("bench.gateway.link", [], ["--repeat", "1", "--duration", "1", "--warmup", "0.5", "--streams", "100"]),
    "serve": ("bench.serve", [], ["--repeat", "1", "--duration", "2", "--warmup", "1", "--streams", "4"]),
    "scale-out": ("bench.scale_out", [], ["--replicas", "10", "--from-zero", "1"]),
    "truth": ("bench.truth", [], LOOK_AT_TRUTH),
    "simulate": ("bench.simulate", [], ["--requests", "3000", "--exact", "500", "--repeat", "1"]),
    "choice": ("bench.choice", [], ["--arrivals", "500", "--busy", "2", "--repeat", "1"]),
    "soak": ("bench.soak", [], ["--requests", "1000", "--round", "100"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="seconds each: whether it runs, not what it measures")
    args = parser.parse_args()
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    failed = []
    for name in args.names or BENCHMARKS:
        module, full, quick = BENCHMARKS[name]
        command = [sys.executable, "-m", module, *(quick if args.quick else full)]
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
