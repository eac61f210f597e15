"""An engine learnt from its step log: how long its steps take, as formula or grid, and how near that is.

    step logs (our replicas' JSON lines, or anybody's CSV) → Steps → without stalls → formula and grid, each judged on
    blocks of steps that it was not fitted to → the better one, fitted to all → Traits

The grid's values, and what prefill adds, are found all at once by least squares. Where few steps came near a point of
it, its value leans on the formula's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Floats
from neaptide.simulate.engine import Traits
from neaptide.simulate.steps import Grid, Linear, coefficients, fit, prefills, read_columns, read_grid

Form = Literal["linear", "grid"]
STALL = 5.0  # a step over so many times its prediction tells of the machine, not of the engine
BLOCK_STEPS = 50  # neighbours are alike: every other block of so many is kept for judging
BETTER = 0.9  # of the formula's error, that a grid must be under to be worth its size
LEAN_STEPS = 3.0  # the formula counts as so many steps at each point of the grid
CONTEXT_QUANTILES = (0.05, 0.35, 0.65, 0.95)  # of the tokens a request: the grid's contexts
PREFIX_TOKENS = 512  # that a prefix id of the arrivals stands for
LOG_COLUMNS = ("batch", "context", "prefill", "step_s")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a step log says of its engine."""

    model: str = ""
    max_running: int
    chunk_tokens: int = 0  # 0: whole prompts
    kv_tokens: int
    kv_block_tokens: int = 1
    prefix_cache: bool = False


class Steps(NamedTuple):
    """Columns [steps]; what they mean stands in the step log."""

    batch: Floats
    context: Floats
    prefill: Floats
    pairs: Floats
    seconds: Floats

    def take(self, rows: NDArray[np.bool_]) -> Steps:
        return Steps(*(column[rows] for column in self))


class Error(NamedTuple):
    """Of step times that were not fitted, relative: predicted over measured less 1."""

    median: float
    p95: float
    total: float  # of the sum of all; signed


class Learnt(NamedTuple):
    traits: Traits
    form: Form
    steps: int
    stalls: int  # steps that were left out
    stalled_s: float  # what these took
    linear: Error
    grid: Error


class _Line(msgspec.Struct):
    event: str
    batch: float = 0.0
    context: float = 0.0
    prefill: float = 0.0
    pairs: float = 0.0
    turn_s: float = 0.0


def engine(paths: Sequence[Path], form: Form | None = None) -> tuple[Traits, Learnt | None]:
    """From step logs of one engine, each with its rotated predecessor, or from one CSV: with columns batch, context (of
    all who decode), prefill, step_s as a log; with batch, context (a request), step_s as a grid that was measured, for
    which there is nothing to learn. None: the form that is nearer. ConfigError E120, E121."""
    if _is_json(paths[0]):
        about, steps = read(paths)
        found = learn(steps, form)
        return traits(about, found.traits), found
    if len(paths) > 1:
        raise ConfigError("several CSV files", why="one engine's steps are in one", code="E121", fix="pass one")
    try:
        columns = read_columns(paths[0], LOG_COLUMNS)
    except ConfigError as e:
        if "lacks prefill" not in e.what:
            raise
        return Traits(step=read_grid(paths[0])), None
    batch, context, prefill, seconds = columns
    found = learn(Steps(batch, context, prefill, np.zeros_like(batch), seconds), form)
    return found.traits, found


def read(paths: Sequence[Path]) -> tuple[About, Steps]:
    """Of all these step logs; the engine is the first one's. ConfigError: E120 no step log, E121 it has no steps."""
    about: About | None = None
    rows: list[tuple[float, ...]] = []
    for path in paths:
        before = Path(f"{path}.1")
        for part in ([before] if before.exists() else []) + [path]:
            head, more = _read(part)
            about = about or head
            rows += more
    if about is None or not rows:
        raise ConfigError(f"{paths[0]} has no steps", code="E121", fix="send the model requests first")
    return about, Steps(*np.array(rows).T)


def learn(steps: Steps, form: Form | None = None) -> Learnt:
    """`form` None: the one that is nearer. ConfigError E121 where the steps teach nothing."""
    kept, stalled = calm(_formula(steps, None), steps)
    judged = np.arange(len(kept.seconds)) // BLOCK_STEPS % 2 == 1
    part, rest = (kept.take(~judged), kept.take(judged)) if judged.any() else (kept, kept)
    linear = _error(_by_formula(_unbiased(part), rest), rest)
    grid = _error(_by_grid(_grid(part), rest), rest)
    form = form or ("grid" if grid.median < BETTER * linear.median else "linear")
    step = _grid(kept) if form == "grid" else _unbiased(kept)
    stalled_s = float(stalled.seconds.sum())
    return Learnt(Traits(step=step), form, len(steps.seconds), len(stalled.seconds), stalled_s, linear, grid)


def predicted(step: Linear | Grid, steps: Steps) -> Floats:
    """Seconds of each."""
    return _by_grid(step, steps) if isinstance(step, Grid) else _by_formula(step, steps)


def calm(step: Linear | Grid, steps: Steps) -> tuple[Steps, Steps]:
    """Those that tell of the engine, and those that stalled."""
    ran = steps.seconds <= STALL * predicted(step, steps)
    return steps.take(ran), steps.take(~ran)


def traits(about: About, learnt: Traits) -> Traits:
    """Its step times, in the engine that the log tells of."""
    shares = about.prefix_cache and PREFIX_TOKENS % about.kv_block_tokens == 0
    return msgspec.structs.replace(
        learnt,
        max_batch=about.max_running,
        chunk_tokens=about.chunk_tokens or about.kv_tokens,
        kv_tokens=about.kv_tokens,
        kv_block_tokens=about.kv_block_tokens,
        headroom=0.0,
        admit="answer",  # all our engines promise a request its whole answer's memory
        prefix_block_tokens=PREFIX_TOKENS if shares else 0,
    )


def _is_json(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == b"{"
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", code="E120", fix="check the path") from e


def _read(path: Path) -> tuple[About, list[tuple[float, ...]]]:
    """A line that was cut short by a full disk or a crash is passed over."""
    decode = msgspec.json.Decoder(_Line).decode
    rows: list[tuple[float, ...]] = []
    try:
        first, *lines = path.read_bytes().splitlines()
        about = msgspec.json.decode(first, type=About)
    except (OSError, ValueError) as e:
        fix = "pass log/REPLICA.steps.jsonl of the state directory (models.NAME.options.step_log: true)"
        raise ConfigError(f"{path} is no step log", why=str(e), code="E120", fix=fix) from e
    for text in lines:
        try:
            line = decode(text)
        except ValueError:
            continue
        if line.event == "step" and line.turn_s > 0:
            rows.append((line.batch, line.context, line.prefill, line.pairs, line.turn_s))
    return about, rows


def _unbiased(steps: Steps) -> Linear:
    """Errors count relative to what a first fit predicts, so that the sum of noisy steps comes out right."""
    return _formula(steps, _by_formula(_formula(steps, None), steps))


def _formula(steps: Steps, scale: Floats | None) -> Linear:
    return fit(steps.batch, steps.context, steps.prefill, steps.seconds, steps.pairs, scale).step


def _by_formula(step: Linear, steps: Steps) -> Floats:
    return step.base_s + step.request_s * steps.batch + step.token_s * steps.context + _prefill_s(step, steps)


def _prefill_s(step: Linear | Grid, steps: Steps) -> Floats:
    some_s: Floats = step.prefill_base_s * (steps.prefill > 0) + step.prefill_token_s * steps.prefill
    return some_s + step.prefill_pair_s * steps.pairs


def _grid(steps: Steps) -> Grid:
    formula = _unbiased(steps)
    batches, contexts = _axes(steps)
    lean = np.array([formula.step_s(b, b * c) for b in batches for c in contexts])
    points = len(lean)
    known = np.column_stack([_shares(batches, contexts, steps), steps.prefill, steps.pairs, prefills(steps.prefill)])
    leaning = np.column_stack([np.eye(points), np.zeros((points, 3))])
    scale = np.concatenate([_by_formula(formula, steps), lean / np.sqrt(LEAN_STEPS)])
    found = coefficients(np.vstack([known, leaning]), np.concatenate([steps.seconds, lean]), scale)
    seconds = np.where(found[:points] > 0, found[:points], lean).reshape(len(batches), len(contexts))
    return Grid(
        batches=tuple(batches),
        contexts=tuple(contexts),
        seconds=tuple(tuple(float(s) for s in row) for row in seconds),
        prefill_token_s=float(found[points]),
        prefill_pair_s=float(found[points + 1]),
        prefill_base_s=float(found[points + 2]),
    )


def _by_grid(grid: Grid, steps: Steps) -> Floats:
    shares = _shares(grid.batches, grid.contexts, steps)
    predicted: Floats = shares @ np.array(grid.seconds).ravel() + _prefill_s(grid, steps)
    return predicted


def _axes(steps: Steps) -> tuple[list[int], list[int]]:
    """Batches by doubling up to the largest; contexts a request at quantiles."""
    most = max(1, int(steps.batch.max()))
    batches = [1 << k for k in range(most.bit_length()) if 1 << k < most] + [most]
    decodes = steps.batch > 0
    each = steps.context[decodes] / steps.batch[decodes]
    contexts = np.unique(np.rint(np.quantile(each, CONTEXT_QUANTILES)).astype(int)) if len(each) else [1]
    return batches, [int(c) for c in contexts if c >= 1] or [1]


def _shares(batches: Sequence[int], contexts: Sequence[int], steps: Steps) -> Floats:
    """[steps, points] what each point of the grid counts in a step; a prompt alone is at the first point."""
    decodes = steps.batch > 0
    each = np.where(decodes, steps.context / np.maximum(steps.batch, 1), contexts[0])
    by_batch, by_context = _between(batches, steps.batch), _between(contexts, each)
    shares: Floats = (by_batch[:, :, None] * by_context[:, None, :]).reshape(len(each), -1)
    return shares


def _between(points: Sequence[int], values: Floats) -> Floats:
    """[values, points] shares of the neighbours; the first point below it, straight on above the last one."""
    if len(points) == 1:
        return np.ones((len(values), 1))
    axis = np.array(points, dtype=np.float64)
    right = np.clip(np.searchsorted(axis, values), 1, len(axis) - 1)
    share = np.maximum((values - axis[right - 1]) / (axis[right] - axis[right - 1]), 0.0)
    found = np.zeros((len(values), len(axis)))
    rows = np.arange(len(values))
    found[rows, right - 1], found[rows, right] = 1.0 - share, share
    return found


def _error(predicted: Floats, steps: Steps) -> Error:
    off = np.abs(predicted / steps.seconds - 1)
    total = float(predicted.sum() / steps.seconds.sum()) - 1
    return Error(float(np.median(off)), float(np.quantile(off, 0.95)), total)
