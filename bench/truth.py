"""Is the simulator true? Real guide replicas behind the real gateway, against the simulator fitted to their step log.

    .venv/bin/python -m bench.truth [--minutes 10] [--loads 0.3,0.6,0.85] [--runs 3] [--replicas 1]

The Azure conversation trace, its first arrival at 0, thinned to each load: a share of what the fit says the replicas
serve. Prompts are random token ids, lengths the trace's (clipped to the guide's context), answers forced to them. An
open-loop client in a process of its own sends them (bench/openloop.py); gateway, control, replica I/O and client share
core 0, the engine has one thread on core 1 (with several replicas the engines are not pinned).

Before, in the same service: a closed loop at each of --levels requests in flight, whose step log is what the simulator
learns the engine from. Of one in flight comes the one constant, what client, gateway and replica add to a first token:
the median of measured less simulated. No run that is predicted takes part in either.

The simulator's exact tier then gets the arrivals as they were sent, and their lengths. Goals: p50 and p90 of TTFT and
TPOT within 10 %, p99 within 20 %; of each, the median of the runs counts and the worst is told (docs/decisions/0033).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import kit, trace
from neaptide.models import directory
from neaptide.simulate import learn
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Traits
from neaptide.simulate.formats import read
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup, capacity

GUIDE = kit.ROOT / "neaptide" / "models" / "guide"
AZURE = kit.ROOT / "examples" / "data" / "azure_llm_2023_conv.parquet"
ROLES = ("gateway", "replica", "engine", "control")
GOALS = {0.5: 0.10, 0.9: 0.10, 0.99: 0.20}  # relative error of each quantile
REST_S = 180.0  # after a run's last arrival
APART_S = 1000.0  # between requests that are simulated alone
CALIBRATION_SEED = 1 << 20  # no run's


class Sent(NamedTuple):
    """What the client saw of the requests that were answered, arrays [requests] in the order of sending."""

    t_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]  # NaN of a single token
    in_tokens: NDArray[np.int64]
    out_tokens: NDArray[np.int64]
    told: dict[str, Any]  # errors, lag, CPU seconds


def config(replicas: int) -> str:
    options: dict[str, Any] = {"threads": 1, "max_running": 64, "step_log": True, "io_cpus": [kit.LOAD_CORE]}
    if replicas == 1:
        options["cpus"] = [kit.SERVE_CORE]
    scale = {"min": replicas, "max": replicas}
    return json.dumps({"models": {"guide": {"options": options, "scale": scale, "prefix_cache": "off"}}})


def sent(server: kit.Up, plan: dict[str, Any], limit_s: float) -> Sent:
    """The plan's requests, by a client process pinned where the gateway is."""
    watched = {role: server.group(role) for role in ROLES}
    before = {role: kit.cpu_s(pids) for role, pids in watched.items()}
    with tempfile.TemporaryDirectory(prefix="bench-truth-") as scratch:
        file, out = Path(scratch, "plan.json"), Path(scratch, "out.json")
        file.write_text(json.dumps(plan))
        command = [sys.executable, "-m", "bench.openloop", "--port", str(server.port)]
        command += ["--plan", str(file), "--out", str(out)]
        with subprocess.Popen(command, cwd=kit.ROOT, stdin=subprocess.PIPE, text=True) as client:
            kit.pin([client.pid], kit.LOAD_CORE)
            try:
                client.communicate(server.key + "\n", timeout=limit_s)
            except subprocess.TimeoutExpired:
                client.kill()
                raise kit.BenchError(f"the answers did not end within {limit_s:.0f} s; lower the load") from None
        if client.returncode:
            raise kit.BenchError(f"bench.openloop ended with exit code {client.returncode}")
        told = json.loads(out.read_text())
    told["cpu_s"] = {role: kit.cpu_s(pids) - before[role] for role, pids in watched.items()} | {"client": told["cpu_s"]}
    return answered(told)


def answered(told: dict[str, Any]) -> Sent:
    """BenchError where more than one in a hundred requests failed: what is left would be another experiment."""
    rows = told.pop("rows")
    good = sorted((row for row in rows if not row[6]), key=lambda row: row[1])
    told["requests"], told["failed"] = len(rows), len(rows) - len(good)
    if told["failed"] > len(rows) / 100 or not good:
        raise kit.BenchError(f"{told['failed']} of {len(rows)} requests failed: {[r[6] for r in rows if r[6]][:1]}")
    _, sent_s, first_s, end_s, prompt, out, _ = (np.array(column) for column in zip(*good))
    sent_s, first_s, end_s = (column.astype(np.float64) for column in (sent_s, first_s, end_s))
    tpot_s = np.where(out > 1, (end_s - first_s) / np.maximum(out - 1, 1), np.nan)
    return Sent(sent_s, first_s - sent_s, tpot_s, prompt.astype(np.int64), out.astype(np.int64), told)


# ------------------------------------------------------------------------------------------------ the simulator


class Fitted(NamedTuple):
    setup: Setup
    overhead_s: float  # added to a first token by what is not simulated
    capacity_rps: float  # of all replicas
    told: dict[str, Any]


def calibrate(server: kit.Up, model: trace.Model, whole: trace.Asked, args: argparse.Namespace) -> Fitted:
    alone: Sent | None = None
    for level in args.levels:
        at_once = level * args.replicas
        asked = trace.some(whole, 64 + 40 * at_once, CALIBRATION_SEED + level)
        plan = trace.plan(asked, model, CALIBRATION_SEED + level, at_once=at_once, seconds=args.calibrate_s)
        found = sent(server, plan, args.calibrate_s + REST_S)
        alone = found if level == min(args.levels) else alone
        print(f"calibrating, {at_once} in flight: {found.told['requests']} requests", flush=True)
    assert alone is not None
    logs = sorted((server.state / "log").glob("guide-*.steps.jsonl"))
    traits, learnt = learn.engine(logs, args.form)
    assert learnt is not None
    setup = Setup(engine=traits, replicas=args.replicas)
    rps = args.replicas * capacity(setup, float(whole.in_tokens.mean()), float(whole.out_tokens.mean())).rps
    overhead_s = float(np.median(alone.ttft_s - first_tokens(traits, alone)))
    told: dict[str, Any] = {
        "form": learnt.form,
        "steps": learnt.steps,
        "stalls": learnt.stalls,
        "stalled_s": learnt.stalled_s,
    }
    told |= {"linear": learnt.linear._asdict(), "grid": learnt.grid._asdict()}
    told |= {"overhead_s": overhead_s, "capacity_rps": rps, "engine": msgspec.to_builtins(traits)}
    return Fitted(setup, overhead_s, rps, told)


def first_tokens(traits: Traits, asked: Sent) -> NDArray[np.float64]:
    """Simulated TTFT of each request with nobody beside it."""
    t_s = np.arange(len(asked.t_s)) * APART_S
    alone = Requests(t_s=t_s, in_tokens=asked.in_tokens, out_tokens=np.ones_like(asked.out_tokens))
    return replay(alone, Setup(engine=traits, replicas=1), tier="exact").ttft_s


def compared(fitted: Fitted, real: Sent) -> dict[str, Any]:
    """Quantiles of both sides and the simulated ones' relative errors, by name: p50_ttft_s ..."""
    arrivals = Requests(t_s=real.t_s, in_tokens=real.in_tokens, out_tokens=real.out_tokens)
    served = replay(arrivals, fitted.setup, tier="exact")
    sides = {
        "real": {"ttft_s": real.ttft_s, "tpot_s": real.tpot_s},
        "simulated": {"ttft_s": served.ttft_s + fitted.overhead_s, "tpot_s": served.tpot_s},
    }
    found: dict[str, Any] = {
        side: {f"p{100 * q:g}_{what}": float(np.nanquantile(x, q)) for what, x in values.items() for q in GOALS}
        for side, values in sides.items()
    }
    found["error"] = {name: found["simulated"][name] / value - 1 for name, value in found["real"].items()}
    return found


def judged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the runs of a load: each quantile's error, as the median and as the worst of the runs; was the goal met?"""
    found: dict[str, Any] = {}
    for q, goal in GOALS.items():
        for what in ("ttft_s", "tpot_s"):
            name = f"p{100 * q:g}_{what}"
            errors = [run["error"][name] for run in runs]
            median = kit.median(errors)
            found[name] = {
                "median_error": median, "worst_error": max(errors, key=abs), "goal": goal, "met": abs(median) <= goal,
            }  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------ the experiment


def measure(server: kit.Up, args: argparse.Namespace) -> dict[str, Any]:
    kit.pin(server.group("supervisor", "control", "gateway"), kit.LOAD_CORE)
    files = directory.read(GUIDE)
    model = trace.Model("guide", min(args.context, files.context_tokens), files.vocab_size)
    recorded = read(args.arrivals)
    if not isinstance(recorded, Requests):
        raise kit.BenchError(f"{args.arrivals} has rates; single requests are needed")
    whole = trace.fitted(recorded, model)
    fitted = calibrate(server, model, whole, args)
    print(json.dumps(fitted.told), flush=True)
    loads = []
    for load in args.loads:
        rps = load * fitted.capacity_rps
        runs = []
        for seed in range(args.runs):
            asked = trace.stretch(whole, 60 * args.minutes, rps, seed)
            real = sent(server, trace.plan(asked, model, seed), 60 * args.minutes + REST_S)
            runs.append({"seed": seed, **real.told, **compared(fitted, real)})
            print(f"load {load}, run {seed}: {json.dumps(runs[-1]['error'])}", flush=True)
        loads.append({"load": load, "rps": rps, "runs": runs, "judged": judged(runs)})
    met = all(one["met"] for load in loads for one in load["judged"].values())
    return {"minutes": args.minutes, "replicas": args.replicas, "fit": fitted.told, "loads": loads, "met": met}


def rows(loads: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Of a Markdown table: a row a load and quantile; values are the runs' medians."""
    found = []
    for load in loads:
        for name, one in load["judged"].items():
            values = [kit.median([run[side][name] for run in load["runs"]]) for side in ("real", "simulated")]
            errors = [f"{100 * one[which]:+.1f} %" for which in ("median_error", "worst_error")]
            verdict = "met" if one["met"] else "**missed**"
            found.append([f"{load['load']:g}", name, *(f"{1000 * v:.1f} ms" for v in values), *errors, verdict])
    return found


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run")
    parser.add_argument("--loads", type=shares, default=[0.3, 0.6, 0.85])
    parser.add_argument("--runs", type=int, default=3, help="at each load")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--levels", type=counts, default=[1, 2, 4, 8, 16, 32, 64], help="in flight, a replica")
    parser.add_argument("--calibrate-s", type=float, default=12.0, help="at each level")
    parser.add_argument("--context", type=int, default=1 << 20, help="clip lengths to fewer tokens than the guide's")
    parser.add_argument("--form", choices=("linear", "grid"), help="of step times; default: the nearer one")
    parser.add_argument("--arrivals", type=Path, default=AZURE)
    args = parser.parse_args()
    with kit.up(config(args.replicas)) as server:
        found = measure(server, args)
    head = ["load", "quantile", "real", "simulated", "error, median run", "worst run", "goal"]
    kit.table(head, rows(found["loads"]))
    kit.save("truth", found)


if __name__ == "__main__":
    main()
