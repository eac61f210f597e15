"""Is the simulator true? Real guide replicas behind the real gateway, against the simulator fitted to their step log.

    .venv/bin/python -m bench.truth [--minutes 10] [--loads 0.3,0.6,0.85] [--runs 3] [--replicas 1] [--keep DIR]
    .venv/bin/python -m bench.truth --from DIR      # the same runs against the simulator as it is now; serves nothing

The Azure conversation trace, its first arrival at 0, thinned to each load: a share of what the fit says the replicas
serve. Prompts are random token ids, lengths the trace's (clipped to the guide's context), answers forced to them. An
open-loop client in a process of its own sends them (bench/openloop.py); gateway, control, replica I/O and client share
core 0, the engine has one thread on core 1 (with several replicas the engines are not pinned).

The simulator learns the engine from the service's step log as it served the other runs: a run takes no part in its own
prediction. Of one request in flight comes the one constant, what client, gateway and replica add to a first token.
Before all runs, in the same service, a closed loop at each of --levels requests in flight says how much a replica can
serve, and stands in where there is no other run; after them it is made again: was the machine still as fast?

The simulator's exact tier then gets the arrivals as they were sent, and their lengths. Goals: p50 and p90 of TTFT and
TPOT within 10 %, p99 within 20 %; of each, the median of the runs counts and the worst is told (docs/decisions/0033).
Of each run it is also told where the error comes from (bench/diagnosis.py), what it is by the calibration alone, and
with the step times of the run itself, which is no prediction: what is left then is the schedule's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from bench import diagnosis, kit, trace
from bench.prediction import calibrated, capacity_rps, compared, judged, told
from bench.recorded import About, Folder, Run
from neaptide.clock import wall_s
from neaptide.models import directory
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.formats import read
from neaptide.simulate.learn import Form

GUIDE = kit.ROOT / "neaptide" / "models" / "guide"
AZURE = kit.ROOT / "examples" / "data" / "azure_llm_2023_conv.parquet"
ROLES = ("gateway", "replica", "engine", "control")
REST_S = 180.0  # after a run's last arrival
CALIBRATION_SEED = 1 << 20  # no run's
OWN = "_with_own_steps"


def config(replicas: int) -> str:
    options: dict[str, Any] = {"threads": 1, "max_running": 64, "step_log": True, "io_cpus": [kit.LOAD_CORE]}
    if replicas == 1:
        options["cpus"] = [kit.SERVE_CORE]
    scale = {"min": replicas, "max": replicas}
    return json.dumps({"models": {"guide": {"options": options, "scale": scale, "prefix_cache": "off"}}})


# ------------------------------------------------------------------------------------------------ the service


class Service:
    """Real replicas that runs are made on; each is kept in the folder."""

    def __init__(self, server: kit.Up, folder: Folder, model: trace.Model, whole: trace.Asked) -> None:
        kit.pin(server.group("supervisor", "control", "gateway"), kit.LOAD_CORE)
        self._server, self._folder, self._model, self._whole = server, folder, model, whole

    def calibrate(self, levels: Sequence[int], seconds: float, *, again: bool = False) -> None:
        for level in levels:
            at_once, seed = level * self._folder.about.replicas, CALIBRATION_SEED + level
            asked = trace.some(self._whole, 64 + 40 * at_once, seed)
            plan = trace.plan(asked, self._model, seed, at_once=at_once, seconds=seconds)
            self._kept(plan, seconds + REST_S, seed=seed, level=level, again=again)
            print(f"calibrated, {at_once} in flight", flush=True)

    def run(self, loads: Sequence[float], seeds: int, rps: float) -> None:
        """All loads in turn, and again, so that a machine that becomes slower does so to each."""
        span_s = 60 * self._folder.about.minutes
        for seed in range(seeds):
            for load in loads:
                asked = trace.stretch(self._whole, span_s, load * rps, seed)
                plan = trace.plan(asked, self._model, seed)
                self._kept(plan, span_s + REST_S, seed=seed, load=load, rps=load * rps)
                print(f"run {seed + 1} of {seeds} at {load:g}: {len(plan['requests'])} requests", flush=True)

    def _kept(self, plan: dict[str, Any], limit_s: float, **about: Any) -> None:
        since_s = wall_s()
        run = Run(told=sent(self._server, plan, limit_s), **about)
        self._folder.keep(run, self._server.state / "log", since_s)


def sent(server: kit.Up, plan: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What bench.openloop tells of the plan's requests, pinned where the gateway is; and CPU seconds by role."""
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
        told: dict[str, Any] = json.loads(out.read_text())
    told["cpu_s"] = {role: kit.cpu_s(pids) - before[role] for role, pids in watched.items()} | {"client": told["cpu_s"]}
    return told


# ------------------------------------------------------------------------------------------------ the experiment


def evaluated(folder: Folder, form: Form | None) -> dict[str, Any]:
    """All that comes out of the kept runs."""
    fit = calibrated(folder, form)
    fit_told = told(fit, folder)
    tell_calibration(fit_told)
    by_load: dict[float, list[dict[str, Any]]] = {}
    for run in folder.runs():
        found = compared(folder, run, fit, form)
        by_load.setdefault(run.load or 0.0, []).append(found)
        tell(run, found)
    loads = [
        {"load": load, "runs": its, "judged": judged(its), "judged_with_own_steps": judged(its, "error_with_own_steps")}
        for load, its in by_load.items()
    ]
    met = all(one["met"] for load in loads for one in load["judged"].values())
    return {**msgspec.to_builtins(folder.about), "fit": fit_told, "loads": loads, "met": met}


def tell_calibration(fit: dict[str, Any]) -> None:
    """Its error on itself beside that on the one made again after the runs."""
    print(json.dumps({name: value for name, value in fit.items() if not name.startswith("levels")}))
    for level, error in fit["levels"].items():
        after = diagnosis.signed(fit["levels_again"].get(level))
        print(f"{level} in flight: its step times are off by {diagnosis.signed(error)}, {after} after the runs")


def tell(run: Run, found: dict[str, Any]) -> None:
    print(f"\n{run.name}: {found['requests']} requests; predicted by the steps of: {found['predicted_by']}")
    for what in ("error", "error_by_calibration", "error_with_own_steps"):
        print(f"{what}: {', '.join(f'{name} {diagnosis.signed(x)}' for name, x in found[what].items())}")
    for side in ("real", "simulated"):
        load = found[f"load_{side}"]
        print(f"{side}: busy {100 * load['busy']:.1f} %, {load['batch']:.2f} requests decode in a step on average")
    print(f"{found['stalled_s']:.2f} s of the real steps were stalls, which the table leaves out")
    kit.table(diagnosis.HEAD, diagnosis.rows(found["classes"]))
    sys.stdout.flush()


def rows(loads: Sequence[dict[str, Any]], own: str = "") -> list[list[str]]:
    """Of a Markdown table: a row a load and quantile; values are the runs' medians. `own`: OWN, or as predicted."""
    found = []
    for load in loads:
        for name, one in load[f"judged{own}"].items():
            sides = ("real", f"simulated{own}")
            values = [kit.median([run[side][name] for run in load["runs"]]) for side in sides]
            both = [diagnosis.signed(one[which]) for which in ("median_error", "worst_error")]
            verdict = "met" if one["met"] else "**missed**"
            found.append([f"{load['load']:g}", name, *(f"{1000 * v:.1f} ms" for v in values), *both, verdict])
    return found


def measured(args: argparse.Namespace, path: Path) -> Folder:
    """Calibration and runs on a service of our own, kept under `path`."""
    files = directory.read(GUIDE)
    model = trace.Model("guide", min(args.context, files.context_tokens), files.vocab_size)
    recorded = read(args.arrivals)
    if not isinstance(recorded, Requests):
        raise kit.BenchError(f"{args.arrivals} has rates; single requests are needed")
    whole = trace.fitted(recorded, model)
    means = {"in_tokens": float(whole.in_tokens.mean()), "out_tokens": float(whole.out_tokens.mean())}
    folder = Folder.begin(path, About(minutes=args.minutes, replicas=args.replicas, **means))
    with kit.up(config(args.replicas)) as server:
        service = Service(server, folder, model, whole)
        service.calibrate(args.levels, args.calibrate_s)
        rps = capacity_rps(calibrated(folder, args.form), folder.about)
        service.run(args.loads, args.runs, rps)
        service.calibrate(args.levels, args.calibrate_s, again=True)
    return folder


def shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
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
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--keep", type=Path, metavar="DIR", help="what was sent, seen and computed, for --from")
    where.add_argument("--from", type=Path, metavar="DIR", dest="kept", help="judge kept runs again; with --form alone")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with ExitStack() as stack:
        if args.kept is not None:
            folder = Folder.read(args.kept)
        else:
            path = args.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-truth-"))
            folder = measured(args, Path(path))
        found = evaluated(folder, args.form)
    head = ["load", "quantile", "real", "simulated", "error, median run", "worst run", "goal"]
    sides = ((OWN, "fitted to the step log of the run itself"), ("", "predicted by the steps of the other runs"))
    for own, said in sides:
        print(f"\n{said}:")
        kit.table(head, rows(found["loads"], own))
    if args.kept is None:
        kit.save("truth", found)


if __name__ == "__main__":
    main()
