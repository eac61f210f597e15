"""Where a prediction's error comes from: the fit is wrong about the steps that ran, or the simulator runs other steps.

Steps are told apart by what is in them, prompts alone, decoding alone or both; the first by how many tokens of prompts
(and those that go on with one), the others by how many requests decode. Of each class:

    error        what the fit says of the run's own steps, over what they took, less 1
    fitted       the same of the steps that it was fitted to. As far off there: the formula does not suit the class. Not
                 off there, and every class alike in the run: the machine was faster or slower than then.
    simulated    the steps that the simulator ran instead, and what they took: here the schedule shows
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neaptide.simulate import learn
from neaptide.simulate.arrivals import Floats
from neaptide.simulate.learn import Steps
from neaptide.simulate.steps import Grid, Linear, Piece

BATCHES = (1, 2, 4, 8, 16, 32, math.inf)
PROMPTS = (1, 256, 512, 1024, math.inf)  # tokens
HEAD = ("steps with", "real", "seconds", "error of the fit", "where it was fitted", "simulated", "seconds")
Class = dict[str, Any]
Mask = NDArray[np.bool_]


class Witness:
    """A StepTime that writes down which steps it was asked about: what the exact tier ran."""

    def __init__(self, step: Linear | Grid) -> None:
        self._step = step
        self._rows: list[tuple[float, ...]] = []
        self.prefill_base_s = step.prefill_base_s
        self.prefill_token_s, self.prefill_pair_s = step.prefill_token_s, step.prefill_pair_s

    def pieces(self, batch: int) -> tuple[Piece, ...]:
        return self._step.pieces(batch)

    def step_s(self, batch: int, context: int, prefill: int = 0, pairs: float = 0.0) -> float:
        seconds = self._step.step_s(batch, context, prefill, pairs)
        self._rows.append((batch, context, prefill, pairs, seconds))
        return seconds

    def steps(self) -> Steps:
        return Steps(*np.array(self._rows, dtype=np.float64).reshape(-1, 5).T)


def load_of(steps: Steps, span_s: float) -> dict[str, float]:
    """`busy`: share of the time (all replicas' together) in steps; `batch`: requests decoding in them, on average."""
    busy_s = float(steps.seconds.sum())
    return {"busy": busy_s / span_s, "batch": float(steps.batch @ steps.seconds) / busy_s}


def classes(step: Linear | Grid, real: Steps, fitted: Steps, simulated: Steps) -> list[Class]:
    """Of those that have steps on either side; stalls, by the fit's own measure, are nobody's."""
    real, fitted = (learn.calm(step, steps)[0] for steps in (real, fitted))
    masks = [_masks(steps) for steps in (real, fitted, simulated)]
    found = []
    for name in masks[0]:
        ours, theirs, instead = (mask[name] for mask in masks)
        if ours.any() or instead.any():
            found.append(
                {
                    "class": name, "steps": int(ours.sum()), "real_s": float(real.seconds[ours].sum()),
                    "error": error(step, real.take(ours)), "fitted_error": error(step, fitted.take(theirs)),
                    "simulated_steps": int(instead.sum()), "simulated_s": float(simulated.seconds[instead].sum()),
                }
            )  # fmt: skip
    return found


def rows(found: list[Class]) -> list[list[str]]:
    """Of a Markdown table under HEAD."""
    return [
        [
            one["class"], f"{one['steps']:d}", f"{one['real_s']:.1f}", signed(one["error"]),
            signed(one["fitted_error"]), f"{one['simulated_steps']:d}", f"{one['simulated_s']:.1f}",
        ]
        for one in found
    ]  # fmt: skip


def signed(error: float | None) -> str:
    return "" if error is None else f"{100 * error:+.1f} %"


def error(step: Linear | Grid, steps: Steps) -> float | None:
    """Of the sum, relative; None of no steps."""
    return float(learn.predicted(step, steps).sum() / steps.seconds.sum()) - 1 if len(steps.seconds) else None


def _masks(steps: Steps) -> dict[str, Mask]:
    decodes, prefills = steps.batch > 0, steps.prefill > 0
    goes_on = ~decodes & (steps.pairs > steps.prefill * (steps.prefill + 1) / 2)
    found = {"any": decodes | prefills, "prompts": ~decodes}
    found |= _sizes("prompts", ~decodes & ~goes_on, steps.prefill, PROMPTS) | {"prompts that go on": goes_on}
    for kind, inside in (("decoding", decodes & ~prefills), ("both", decodes & prefills)):
        found |= {kind: inside} | _sizes(kind, inside, steps.batch, BATCHES)
    return found


def _sizes(kind: str, inside: Mask, sizes: Floats, edges: Sequence[float]) -> dict[str, Mask]:
    found = {}
    for low, high in pairwise(edges):
        name = f"{low}" if high == low + 1 else f"{low} up" if high == math.inf else f"{low} to {high - 1}"
        found[f"{kind}, {name}"] = inside & (sizes >= low) & (sizes < high)
    return found
