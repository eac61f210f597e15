"""Requests of a recorded trace as a short benchmark sends them: a stretch of it at the rate that is wanted, the lengths
that the model's context allows, prompts of random token ids. Pure: a seed says which.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.kit import BenchError
from neaptide.simulate.arrivals import Requests

FIRST_TOKEN_ID = 256  # below are special tokens and single bytes


class Model(NamedTuple):
    name: str
    context_tokens: int
    vocab_size: int


class Asked(NamedTuple):
    """Arrays [requests]."""

    t_s: NDArray[np.float64]
    in_tokens: NDArray[np.int64]
    out_tokens: NDArray[np.int64]


def fitted(trace: Requests, model: Model) -> Asked:
    """The whole trace from its first arrival on, its lengths clipped so that prompt and answer fit the context: the
    answer to half of it, the prompt to what is left."""
    if trace.in_tokens is None or trace.out_tokens is None or not len(trace.t_s):
        raise BenchError("the trace has no lengths: pass one with columns t_s, in_tok, out_tok")
    out = np.clip(trace.out_tokens, 1, model.context_tokens // 2)
    prompt = np.clip(trace.in_tokens, 1, model.context_tokens - out - 1)
    return Asked(trace.t_s - trace.t_s[0], prompt, out)


def stretch(trace: Asked, span_s: float, rps: float, seed: int) -> Asked:
    """`span_s` seconds at `rps` on average, the first arrival at 0. The trace is cut into stretches of that length; as
    many of them as it takes, chosen by the seed, are laid over each other and thinned to the rate, so that each one's
    bursts stay bursts. BenchError where all of them together are too few, or none is left."""
    random = np.random.default_rng(seed)
    whole = max(1, int(trace.t_s[-1] // span_s))
    part = (trace.t_s // span_s).astype(np.int64)
    order = random.permutation(whole)
    counts = np.cumsum(np.bincount(part[part < whole], minlength=whole)[order])
    wanted = rps * span_s
    if counts[-1] < wanted:
        most = counts[-1] / span_s
        raise BenchError(f"{rps:.1f} requests/s are wanted, the whole trace laid over itself has {most:.1f}")
    taken = order[: int(np.searchsorted(counts, wanted)) + 1]
    inside = np.flatnonzero(np.isin(part, taken))
    kept = inside[random.random(len(inside)) < wanted / len(inside)]
    if not len(kept):
        raise BenchError(f"{rps:.2f} requests/s send none in {span_s:.0f} s: take more minutes or a higher load")
    kept = kept[np.argsort(trace.t_s[kept] % span_s)]
    t_s = trace.t_s[kept] % span_s
    return Asked(t_s - t_s[0], trace.in_tokens[kept], trace.out_tokens[kept])


def some(trace: Asked, count: int, seed: int) -> Asked:
    """`count` of its requests at random, at no particular times."""
    kept = np.random.default_rng(seed).integers(0, len(trace.t_s), count)
    return Asked(np.zeros(count), trace.in_tokens[kept], trace.out_tokens[kept])


def plan(asked: Asked, model: Model, seed: int, **more: object) -> dict[str, Any]:
    """What bench.openloop takes."""
    random = np.random.default_rng(seed)
    rows = [
        [float(at_s), random.integers(FIRST_TOKEN_ID, model.vocab_size, size).tolist(), int(tokens)]
        for at_s, size, tokens in zip(*asked)
    ]
    return {"model": model.name, "requests": rows, **more}
