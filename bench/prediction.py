"""What the simulator says of a kept run: an engine learnt from the calibration, the run's arrivals, what came of both.

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
from bench.recorded import Folder, Sent, answered
from neaptide.simulate import learn
from neaptide.simulate.arrivals import Requests
from neaptide.simulate.engine import Traits
from neaptide.simulate.replay import replay
from neaptide.simulate.settings import Setup, capacity

GOALS = {0.5: 0.10, 0.9: 0.10, 0.99: 0.20}  # relative error of each quantile
APART_S = 1000.0  # between requests that are simulated alone
Quantiles = dict[str, float]  # by name: p50_ttft_s ...


class Fitted(NamedTuple):
    setup: Setup
    overhead_s: float  # added to a first token by what is not simulated
    capacity_rps: float  # of all replicas
    calibration: learn.Steps
    told: dict[str, Any]


def fitted(folder: Folder, form: learn.Form | None) -> Fitted:
    """From the folder's calibration."""
    levels, about = folder.levels(), folder.about
    logs = folder.logs(*levels)
    traits, learnt = learn.engine(logs, form)
    assert learnt is not None  # a log of ours
    setup = Setup(engine=traits, replicas=about.replicas)
    rps = about.replicas * capacity(setup, about.in_tokens, about.out_tokens).rps
    alone = answered(levels[0].told)
    overhead_s = float(np.median(alone.ttft_s - first_tokens(traits, alone)))
    told = {
        "form": learnt.form, "steps": learnt.steps, "stalls": learnt.stalls, "stalled_s": learnt.stalled_s,
        "linear": learnt.linear._asdict(), "grid": learnt.grid._asdict(),
        "levels": by_level(folder, traits, again=False),
        "overhead_s": overhead_s, "capacity_rps": rps, "engine": msgspec.to_builtins(traits),
    }  # fmt: skip
    return Fitted(setup, overhead_s, rps, learn.read(logs)[1], told)


def by_level(folder: Folder, traits: Traits, *, again: bool) -> dict[str, float | None]:
    """What these step times say of each calibration's sum of steps, over what it took, less 1. `again`: of the one
    after the runs. There as off as before: the formula; further off, all alike: the machine's speed has changed."""
    steps = {str(run.level): learn.read(folder.logs(run))[1] for run in folder.levels(again=again)}
    return {level: diagnosis.error(traits.step, learn.calm(traits.step, its)[0]) for level, its in steps.items()}


def first_tokens(traits: Traits, asked: Sent) -> NDArray[np.float64]:
    """Simulated TTFT of each request with nobody beside it."""
    t_s = np.arange(len(asked.t_s)) * APART_S
    alone = Requests(t_s=t_s, in_tokens=asked.in_tokens, out_tokens=np.ones_like(asked.out_tokens))
    return replay(alone, Setup(engine=traits, replicas=1), tier="exact").ttft_s


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


def compared(fit: Fitted, asked: Sent, logs: Sequence[Path]) -> dict[str, Any]:
    """Quantiles of both sides, the simulated ones' relative errors, and where these come from. `logs`: of the run."""
    real = quantiles(asked.ttft_s, asked.tpot_s)
    predicted, instead = simulated(fit.setup, fit.overhead_s, asked)
    own, _ = learn.engine(logs, fit.told["form"])
    by_own, _ = simulated(msgspec.structs.replace(fit.setup, engine=own), fit.overhead_s, asked)
    _, ran = learn.read(logs)
    step, span_s = fit.setup.engine.step, asked.told["wall_s"] * (fit.setup.replicas or 1)
    return {
        "real": real,
        "simulated": predicted,
        "error": errors(predicted, real),
        "error_with_own_steps": errors(by_own, real),
        "load_real": diagnosis.load_of(ran, span_s),
        "load_simulated": diagnosis.load_of(instead, span_s),
        "stalled_s": float(learn.calm(step, ran)[1].seconds.sum()),
        "classes": diagnosis.classes(step, ran, fit.calibration, instead),
    }


def judged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the runs of a load: each quantile's error, as the median and as the worst of the runs; was the goal met?"""
    found: dict[str, Any] = {}
    for q, goal in GOALS.items():
        for what in ("ttft_s", "tpot_s"):
            name = f"p{100 * q:g}_{what}"
            each = [run["error"][name] for run in runs]
            median = kit.median(each)
            found[name] = {
                "median_error": median, "worst_error": max(each, key=abs), "goal": goal, "met": abs(median) <= goal,
            }  # fmt: skip
    return found
