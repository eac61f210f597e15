"""What the simulator says of a kept run: an engine learnt from other step logs, the run's arrivals, what came of both.

Pure: everything comes out of kept files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench import diagnosis, kit
from bench.recorded import About, Folder, Run, Sent, answered
from neaptide.simulate import learn
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Traits
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup, capacity

GOALS = {0.5: 0.10, 0.9: 0.10, 0.99: 0.20}  # relative error of each quantile
Quantiles = dict[str, float]  # by name: p50_ttft_s ...


class Fitted(NamedTuple):
    """What predicts: an engine learnt from step logs, and a constant."""

    setup: Setup
    overhead_s: float  # added to a first token by what is not simulated
    steps: learn.Steps  # that it was learnt from
    learnt: learn.Learnt


def calibrated(folder: Folder, form: learn.Form | None) -> Fitted:
    """From the closed loops before the runs."""
    levels = folder.levels()
    return learnt_from(folder, folder.logs(*levels), overhead_s(folder, levels[0]), form)


def from_others(folder: Folder, run: Run, fit: Fitted, form: learn.Form | None) -> Fitted | None:
    """From the step logs of all runs but this one; the constant stays. None: there is no other."""
    logs = folder.logs(*(other for other in folder.runs() if other.name != run.name))
    return learnt_from(folder, logs, fit.overhead_s, form) if logs else None


def learnt_from(folder: Folder, logs: Sequence[Path], overhead_s: float, form: learn.Form | None) -> Fitted:
    about, steps = learn.read(logs)
    learnt = learn.learn(steps, form)
    setup = Setup(engine=learn.traits(about, learnt.traits), replicas=folder.about.replicas)
    return Fitted(setup, overhead_s, steps, learnt)


def overhead_s(folder: Folder, alone: Run) -> float:
    """What client, gateway and replica add to a first token, on average: of requests sent one at a time, the time to
    it less the steps that held their prompts, as logged. No formula takes part."""
    asked, (_, steps) = answered(alone.told), learn.read(folder.logs(alone))
    prompts = steps.take(steps.prefill > 0)
    return float(asked.ttft_s.mean() - prompts.seconds.sum() / len(asked.t_s))


def capacity_rps(fit: Fitted, about: About) -> float:
    """Of all replicas, at the trace's mean lengths."""
    return about.replicas * capacity(fit.setup, about.in_tokens, about.out_tokens).rps


def told(fit: Fitted, folder: Folder) -> dict[str, Any]:
    learnt, traits = fit.learnt, fit.setup.engine
    return {
        "form": learnt.form, "steps": learnt.steps, "stalls": learnt.stalls, "stalled_s": learnt.stalled_s,
        "linear": learnt.linear._asdict(), "grid": learnt.grid._asdict(),
        "levels": by_level(folder, traits, again=False), "levels_again": by_level(folder, traits, again=True),
        "overhead_s": fit.overhead_s, "capacity_rps": capacity_rps(fit, folder.about),
        "engine": msgspec.to_builtins(traits),
    }  # fmt: skip


def by_level(folder: Folder, traits: Traits, *, again: bool) -> dict[str, float | None]:
    """What these step times say of each calibration's sum of steps, over what it took, less 1. `again`: of the one
    after the runs. There as off as before: the formula; further off, all alike: the machine's speed has changed."""
    steps = {str(run.level): learn.read(folder.logs(run))[1] for run in folder.levels(again=again)}
    return {level: diagnosis.error(traits.step, learn.calm(traits.step, its)[0]) for level, its in steps.items()}


def simulated(setup: Setup, overhead_s: float, asked: Sent) -> tuple[Quantiles, learn.Steps]:
    """What the exact tier makes of the arrivals as they were sent, and the steps that it ran."""
    witness = diagnosis.Witness(setup.engine.step)
    engine = msgspec.structs.replace(setup.engine, step=witness)
    arrivals = Requests(t_s=asked.t_s, in_tokens=asked.in_tokens, out_tokens=asked.out_tokens)
    served = replay(arrivals, msgspec.structs.replace(setup, engine=engine), tier="exact")
    return quantiles(served.ttft_s + overhead_s, served.tpot_s), witness.steps()


def quantiles(ttft_s: NDArray[np.float64], tpot_s: NDArray[np.float64]) -> Quantiles:
    sides = {"ttft_s": ttft_s, "tpot_s": tpot_s}
    return {f"p{100 * q:g}_{what}": float(np.nanquantile(x, q)) for what, x in sides.items() for q in GOALS}


def errors(simulated: Quantiles, real: Quantiles) -> Quantiles:
    return {name: simulated[name] / value - 1 for name, value in real.items()}


def compared(folder: Folder, run: Run, fit: Fitted, form: learn.Form | None) -> dict[str, Any]:
    """Quantiles of both sides, the simulated ones' relative errors, and where these come from. `fit`: the
    calibration's, which predicts where there is no other run to learn from."""
    asked = answered(run.told)
    real = quantiles(asked.ttft_s, asked.tpot_s)
    others = from_others(folder, run, fit, form)
    by = others or fit
    predicted, instead = simulated(by.setup, by.overhead_s, asked)
    before, _ = simulated(fit.setup, fit.overhead_s, asked)
    own = learnt_from(folder, folder.logs(run), fit.overhead_s, form)
    by_own, _ = simulated(own.setup, own.overhead_s, asked)
    ran = own.steps
    step, span_s = by.setup.engine.step, asked.told["wall_s"] * folder.about.replicas
    return {
        "seed": run.seed, "rps": run.rps, **asked.told,
        "predicted_by": "other runs" if others else "calibration", "form": by.learnt.form,
        "real": real,
        "simulated": predicted,
        "simulated_with_own_steps": by_own,
        "error": errors(predicted, real),
        "error_by_calibration": errors(before, real),
        "error_with_own_steps": errors(by_own, real),
        "load_real": diagnosis.load_of(ran, span_s),
        "load_simulated": diagnosis.load_of(instead, span_s),
        "stalled_s": float(learn.calm(step, ran)[1].seconds.sum()),
        "classes": diagnosis.classes(step, ran, by.steps, instead),
    }  # fmt: skip


def judged(runs: Sequence[dict[str, Any]], which: str = "error") -> dict[str, Any]:
    """Over the runs of a load: each quantile's error, as the median and as the worst of the runs; was the goal met?"""
    found: dict[str, Any] = {}
    for q, goal in GOALS.items():
        for what in ("ttft_s", "tpot_s"):
            name = f"p{100 * q:g}_{what}"
            each = [run[which][name] for run in runs]
            median = kit.median(each)
            found[name] = {
                "median_error": median, "worst_error": max(each, key=abs), "goal": goal, "met": abs(median) <= goal,
            }  # fmt: skip
    return found
