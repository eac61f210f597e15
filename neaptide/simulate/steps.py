"""How long an engine's step takes: as a formula, or read off a measured grid.

    step = a + b B + c C + (r + p P + q X where P > 0)     B requests that decode, C tokens of context that they read
                                         together, P prompt tokens prefilled beside them, X pairs that those attend

C grows by B a step. So while nobody joins or leaves, a step's time is a straight line in time, piece by piece: `pieces`
gives them to the tier that jumps many steps at once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Floats


class Piece(NamedTuple):
    """Of one batch: at_zero_s + per_token_s x context, for contexts below `until`."""

    until: float
    at_zero_s: float
    per_token_s: float


class StepTime(Protocol):
    """Seconds. `context` is that of all who decode, the token being computed included; `pairs`: see `pairs_of`."""

    @property
    def prefill_base_s(self) -> float: ...

    @property
    def prefill_token_s(self) -> float: ...

    @property
    def prefill_pair_s(self) -> float: ...

    def pieces(self, batch: int) -> tuple[Piece, ...]:
        """Decoding alone, in the order of the context; the last one has no end."""

    def step_s(self, batch: int, context: int, prefill: int = 0, pairs: float = 0.0) -> float: ...


def prefill_s(step: StepTime, tokens: float, pairs: float) -> float:
    """What prompts add to a step."""
    return step.prefill_base_s + step.prefill_token_s * tokens + step.prefill_pair_s * pairs if tokens else 0.0


def pairs_of(tokens: int, before: int) -> float:
    """What `tokens` prompt tokens attend that follow `before` others: each sees all before it and itself."""
    return tokens * (before + (tokens + 1) / 2)


class Linear(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="linear"):
    """The formula. It fits dense models (median error 1 to 4 %), not mixtures of experts (10 to 40 %)."""

    base_s: float
    request_s: float = 0.0  # b: a request that decodes
    token_s: float = 0.0  # c: a token of context
    prefill_base_s: float = 0.0  # r: of a step that prefills at all, however little
    prefill_token_s: float = 0.0  # p
    prefill_pair_s: float = 0.0  # q

    def __post_init__(self) -> None:
        terms = (self.request_s, self.token_s, self.prefill_base_s, self.prefill_token_s, self.prefill_pair_s)
        if min(terms) < 0 or self.base_s <= 0:
            raise ValueError("a step's seconds: base_s over 0, the others 0 or more")

    def pieces(self, batch: int) -> tuple[Piece, ...]:
        return (Piece(math.inf, self.base_s + self.request_s * batch, self.token_s),)

    def step_s(self, batch: int, context: int, prefill: int = 0, pairs: float = 0.0) -> float:
        decode_s = self.base_s + self.request_s * batch + self.token_s * context
        return decode_s + prefill_s(self, prefill, pairs)


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="grid"):
    """Measured decode steps, linear between the points; below the first point as at it, above the last one straight on.
    Prefill is added by the formula's last terms; a step that only prefills takes as long as the first point."""

    batches: tuple[int, ...]  # rising
    contexts: tuple[int, ...]  # tokens a request, rising
    seconds: tuple[tuple[float, ...], ...]  # [batches][contexts]
    prefill_base_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0

    def __post_init__(self) -> None:
        for axis in (self.batches, self.contexts):
            if not axis or axis[0] < 1 or any(b <= a for a, b in pairwise(axis)):
                raise ValueError("a grid's batches and contexts rise from 1 or more")
        rows_fit = len(self.seconds) == len(self.batches) and {len(r) for r in self.seconds} == {len(self.contexts)}
        if not rows_fit or min(min(row) for row in self.seconds) <= 0:
            raise ValueError("a grid has seconds over 0 for each batch and context")

    def pieces(self, batch: int) -> tuple[Piece, ...]:
        if batch == 0:
            return (Piece(math.inf, self.seconds[0][0], 0.0),)
        row, ends = self._row(batch), [context * batch for context in self.contexts]
        found = [Piece(ends[0], row[0], 0.0)]
        for left, right, low, high in zip(ends, ends[1:], row, row[1:]):
            slope = (high - low) / (right - left)
            found.append(Piece(right, low - slope * left, slope))
        last = found[-1]
        found[-1] = Piece(math.inf, last.at_zero_s, last.per_token_s)
        return tuple(found)

    def step_s(self, batch: int, context: int, prefill: int = 0, pairs: float = 0.0) -> float:
        piece = piece_at(self.pieces(batch), context)
        decode_s = piece.at_zero_s + piece.per_token_s * context
        return decode_s + prefill_s(self, prefill, pairs)

    def _row(self, batch: int) -> list[float]:
        """The seconds of this batch at each context. Straight on never falls below the last point."""
        at = bisect_right(self.batches, batch) - 1
        if at < 0 or len(self.batches) == 1:
            return list(self.seconds[max(at, 0)])
        at = min(at, len(self.batches) - 2)
        low, high = self.seconds[at], self.seconds[at + 1]
        share = (batch - self.batches[at]) / (self.batches[at + 1] - self.batches[at])
        row = [a + share * (b - a) for a, b in zip(low, high)]
        return [max(value, b) for value, b in zip(row, high)] if share > 1 else row


def piece_at(pieces: Sequence[Piece], context: float) -> Piece:
    return next(piece for piece in pieces if context < piece.until or piece.until == math.inf)


LEAST_CONSTANT = 0.01  # of the shortest step: no step takes no time, whatever few noisy ones say


class Fit(NamedTuple):
    step: Linear
    median_error: float  # relative
    p95_error: float
    rows: int


def fit(
    batch: ArrayLike,
    context: ArrayLike,
    prefill: ArrayLike,
    seconds: ArrayLike,
    pairs: ArrayLike | None = None,
    scale: Floats | None = None,
) -> Fit:
    """The formula's coefficients from steps that ran [steps each], by least squares of the errors relative to `scale`,
    by default to what was measured: stalls weigh little then, but the sum of noisy steps comes out too small. What
    would come out negative is left out. ConfigError E121 where nothing can be learnt."""
    columns = [np.asarray(c, dtype=np.float64) for c in (batch, context, prefill)]
    columns.append(np.zeros_like(columns[0]) if pairs is None else np.asarray(pairs, dtype=np.float64))
    took = np.asarray(seconds, dtype=np.float64)
    known = np.stack([np.ones_like(took), *columns, prefills(columns[2])], axis=1)
    if len(took) < 2 or not np.isfinite(known).all() or not (np.isfinite(took) & (took > 0)).all():
        raise ConfigError("no step times to learn from", why="it takes two steps, each over 0 s", code="E121")
    found = coefficients(known, took, took if scale is None else scale)
    found[0] = max(found[0], LEAST_CONSTANT * float(took.min()))
    error = np.abs(known @ found / took - 1)
    names = ("base_s", "request_s", "token_s", "prefill_token_s", "prefill_pair_s", "prefill_base_s")
    step = Linear(**{name: float(value) for name, value in zip(names, found, strict=True)})
    return Fit(step, float(np.median(error)), float(np.quantile(error, 0.95)), len(took))


def prefills(tokens: Floats) -> Floats:
    """1 of a step that prefills [steps]. 0 of all where every one does, or all as much: it tells nothing apart then."""
    some = tokens > 0
    told = not some.all() and some.any() and np.ptp(tokens[some]) > 0
    return some.astype(np.float64) if told else np.zeros(len(tokens))


def coefficients(known: Floats, wanted: Floats, scale: Floats) -> Floats:
    """Of the columns of `known` [rows, columns], those whose sum is nearest to `wanted` [rows], by least squares of the
    errors over `scale` [rows]. None is negative: what would come out so is 0, and so is a column of zeros."""
    columns, target = known / scale[:, None], wanted / scale
    used = columns.any(axis=0)
    found = np.zeros(known.shape[1])
    while True:
        found[:] = 0.0
        found[used] = _scaled_least_squares(columns[:, used], target)
        if (found >= 0).all():
            return found
        used &= found > 0


def _scaled_least_squares(columns: Floats, target: Floats) -> Floats:
    """Columns of very different sizes are brought to one."""
    size = np.abs(columns).max(axis=0)
    solved: Floats = np.linalg.lstsq(columns / size, target, rcond=None)[0] / size
    return solved


GRID_COLUMNS = ("batch", "context", "step_s")


def read_grid(path: Path, *, prefill_token_s: float = 0.0, prefill_pair_s: float = 0.0) -> Grid:
    """A CSV with a header and the columns batch, context (tokens a request), step_s; a row for every pair of both.
    ConfigError E120 or E121."""
    batch, context, seconds = read_columns(path, GRID_COLUMNS)
    batches, contexts = np.unique(batch), np.unique(context)
    table = np.full((len(batches), len(contexts)), np.nan)
    table[np.searchsorted(batches, batch), np.searchsorted(contexts, context)] = seconds
    if np.isnan(table).any() or len(seconds) != table.size:
        raise ConfigError(
            f"{path}: {len(seconds)} rows for {len(batches)} batches and {len(contexts)} contexts",
            why="a grid has each pair once", code="E121", fix="add or remove rows",
        )  # fmt: skip
    try:
        return Grid(
            batches=tuple(int(b) for b in batches),
            contexts=tuple(int(c) for c in contexts),
            seconds=tuple(tuple(float(s) for s in row) for row in table),
            prefill_token_s=prefill_token_s,
            prefill_pair_s=prefill_pair_s,
        )
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", code="E121", fix="correct the file") from e


def read_columns(path: Path, names: tuple[str, ...]) -> list[Floats]:
    """These columns [rows] of a CSV with a header. ConfigError E120 where it lacks one, E121 where it has no rows."""
    try:
        with path.open(encoding="utf-8") as file:
            header = [name.strip() for name in file.readline().split(",")]
            empty = not file.read(4096).strip()
        if missing := [name for name in names if name not in header]:
            raise ConfigError(
                f"{path} lacks {', '.join(missing)}", why=f"its first line is {','.join(header)[:120]!r}", code="E120",
                fix=f"begin it with {','.join(names)}",
            )  # fmt: skip
        if empty:
            raise ConfigError(f"{path} has no rows", code="E121", fix="pass a file that does")
        rows = np.loadtxt(path, delimiter=",", skiprows=1, usecols=[header.index(n) for n in names], ndmin=2)
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", code="E120", fix="check the path") from e
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", why="numbers alone, with commas between", code="E121") from e
    return list(rows.T)
