"""Columns → Rates or Requests: what the values must be, and what their absence means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import (
    DAY_S,
    LONGEST_DAYS,
    Floats,
    Ints,
    Labels,
    Lists,
    Rates,
    Requests,
    Source,
    Tokens,
    bridged,
    overdispersion,
)
from neaptide.simulate.columns import BAD_SHARE, Columns, Tally

MOST = {"t_s": 1e11, "t_ms": 1e14, "rate_rps": 1e9, "cv": 1e9, "in_tok": 1e12, "out_tok": 1e12}
WHOLE = ("in_tok", "out_tok")
SERVEGEN_WINDOW_S = 600.0
HOLE_SHARE = 0.02  # of the series' median: a window below it was not collected
MOST_WINDOWS = 5_000_000
MOST_CELLS = 20_000_000  # of clients x windows, 160 MB; beyond it only the sum is kept
_CLIENT_RATES = {"model", "client", "t_s", "rate_rps", "cv", "dist", "p1", "p2"}


class Shape(NamedTuple):
    """What a table's column names say it is."""

    name: str
    rates: bool
    collected: bool = False  # of windows in which nothing is written, and collection had holes


def shape(names: tuple[str, ...]) -> Shape | None:
    found = set(names)
    if found >= _CLIENT_RATES:
        return Shape("ServeGen client rates", rates=True, collected=True)
    if found >= {"t_s", "rate_rps"}:
        return Shape("rates", rates=True)
    if found >= {"t_ms", "hash_ids"}:
        return Shape("Mooncake trace", rates=False)
    if found & {"t_s", "t_ms"} and "field" not in found:
        return Shape("requests", rates=False)
    return None


def sound(columns: Columns, path: Path, tally: Tally) -> Columns:
    """The rows whose numbers are finite, not negative and of a sane size. ConfigError E121 where more than 1 % of all
    rows were bad, or nothing is left."""
    rows = row_count(columns)
    good = np.ones(rows, dtype=bool)
    for name, most in MOST.items():
        values = columns.get(name)
        if isinstance(values, np.ndarray):
            good &= np.isfinite(values) & (values >= 0) & (values <= most)
            good &= (np.floor(values) == values) if name in WHOLE else True
    at = np.flatnonzero(good)
    if len(at) < rows:
        first = int(np.argmin(good))
        values_there = {n: float(v[first]) for n, v in columns.items() if isinstance(v, np.ndarray)}
        tally.add_bad(first + 1, f"{values_there} is out of range", rows - len(at))
        columns = {name: _taken(values, at) for name, values in columns.items()}
    if tally.bad > BAD_SHARE * tally.rows:
        raise ConfigError(
            f"{path}: {tally.bad:,} of {tally.rows:,} rows cannot be read; {tally.first_bad}",
            why="at most 1 % may be bad", code="E121", fix="correct or remove them",
        )  # fmt: skip
    if not len(at):
        raise ConfigError(f"{path} holds no requests", code="E121", fix="pass a file that does")
    return columns


def row_count(columns: Columns) -> int:
    first = next(iter(columns.values()), np.zeros(0))
    if isinstance(first, Labels):
        return len(first.codes)
    return len(first.starts) - 1 if isinstance(first, Lists) else len(first)


def _taken(values: Floats | Labels | Lists, at: Ints) -> Floats | Labels | Lists:
    if isinstance(values, Labels):
        return Labels(values.names, values.codes[at])
    return values.take(at) if isinstance(values, Lists) else values[at]


# --------------------------------------------------------------------------------------------------- requests


def requests(columns: Columns, source: Source, series: str | None, wall: bool) -> Requests:
    """Sorted by arrival; of one model where `series` is given (E122 where it has none)."""
    columns = dict(columns)
    if "t_ms" in columns:
        columns["t_s"] = number(columns, "t_ms") / 1000.0
    if series is not None:
        at = np.flatnonzero(_chosen(columns, source, series))
        columns = {name: _taken(values, at) for name, values in columns.items()}
    t_s = number(columns, "t_s")
    _check_span(source, t_s)
    origin_s = float(t_s.min() // DAY_S * DAY_S) if wall else None
    if (np.diff(t_s) < 0).any():
        order = np.argsort(t_s, kind="stable")
        columns = {name: _taken(values, order) for name, values in columns.items()}
        t_s = number(columns, "t_s")
    prefixes = columns.get("hash_ids")
    return Requests(
        t_s=t_s - (origin_s or 0.0),
        in_tokens=number(columns, "in_tok").astype(np.int64) if "in_tok" in columns else None,
        out_tokens=number(columns, "out_tok").astype(np.int64) if "out_tok" in columns else None,
        model=label(columns, "model") if "model" in columns else None,
        tenant=label(columns, "tenant") if "tenant" in columns else None,
        prefixes=prefixes if isinstance(prefixes, Lists) else None,
        origin_s=origin_s,
        source=source,
    )


def _check_span(source: Source, t_s: Floats) -> None:
    days = (t_s.max() - t_s.min()) / DAY_S
    if days > LONGEST_DAYS:
        raise ConfigError(
            f"{source.path}: the first and the last row lie {days:,.0f} days apart",
            why=f"at most {LONGEST_DAYS}", code="E121", fix="times are seconds; split a longer file",
        )  # fmt: skip


def number(columns: Columns, name: str) -> Floats:
    values = columns[name]
    if isinstance(values, np.ndarray):
        return values
    raise ConfigError(f"column {name} holds no numbers", code="E121", fix="write plain numbers there")


def label(columns: Columns, name: str) -> Labels:
    """Numbers serve as names too: ServeGen's clients are."""
    values = columns[name]
    if isinstance(values, Labels):
        return values
    found, codes = np.unique(number(columns, name), return_inverse=True)
    return Labels(tuple(f"{value:g}" for value in found), codes.astype(np.int64))


def _chosen(columns: Columns, source: Source, series: str) -> NDArray[np.bool_]:
    if "model" not in columns:
        raise ConfigError(f"{source.path} tells no models", code="E122", fix="leave out --series")
    models = label(columns, "model")
    present = [models.names[code] for code in np.unique(models.codes)]
    if series not in present:
        raise _which(source, f"there is no series {series!r}", present)
    chosen: NDArray[np.bool_] = models.codes == models.names.index(series)
    return chosen


def _which(source: Source, what: str, present: list[str]) -> ConfigError:
    shown = ", ".join(present[:20]) + (f" and {len(present) - 20} more" if len(present) > 20 else "")
    return ConfigError(
        f"{source.path}: {what}", why=f"it holds {shown}", code="E122", fix=f"--series {present[0] or 'NAME'}"
    )


# --------------------------------------------------------------------------------------------------- rates


def rates(columns: Columns, source: Source, series: str | None, collected: bool) -> Rates:
    """One series' windows from its clients'. A client's missing window is 0; where rates were `collected`, a window
    whose total is under 2 % of the series' median is a hole, filled linearly. E122 where the series is not clear."""
    if series is None and "model" in columns:
        models = label(columns, "model")
        present = [models.names[code] for code in np.unique(models.codes)]
        if len(present) > 1:
            raise _which(source, f"{len(present)} series", present)
        series = present[0]
    if series is not None:
        at = np.flatnonzero(_chosen(columns, source, series))
        columns = {name: _taken(values, at) for name, values in columns.items()}
    t_s, rps = number(columns, "t_s"), number(columns, "rate_rps")
    _check_span(source, t_s)
    window_s = SERVEGEN_WINDOW_S if collected else _window_s(t_s)
    start_s = float(t_s.min())
    window = np.rint((t_s - start_s) / window_s).astype(np.int64)
    if not np.allclose(window * window_s + start_s, t_s, atol=1e-3):
        raise ConfigError(f"{source.path}: t_s is not in steps of {window_s:g} s", code="E121", fix="one row a window")
    clients = label(columns, "client") if "client" in columns else Labels(("",), np.zeros(len(t_s), dtype=np.int64))
    windows = int(window.max()) + 1
    if windows > MOST_WINDOWS:
        raise ConfigError(f"{source.path}: {windows:,} windows of {window_s:g} s", code="E121", fix="use longer ones")
    _check_once(source, clients.codes * windows + window)
    total = np.bincount(window, weights=rps, minlength=windows).astype(np.float64)
    holes = total < HOLE_SHARE * np.median(total) if collected else np.zeros(windows, dtype=bool)
    names, single = _single(clients, window, rps, holes)
    return Rates(
        series=series or "",
        window_s=window_s,
        start_s=start_s,
        rates=bridged(total, holes),
        dispersion=overdispersion(rps, number(columns, "cv")) if "cv" in columns else 1.0,
        filled=int(holes.sum()),
        clients=single,
        client_names=names,
        source=source,
    )


def _window_s(t_s: Floats) -> float:
    """The smallest step between rows; ten minutes where there is none."""
    steps = np.diff(np.unique(t_s))
    return float(steps.min()) if len(steps) else SERVEGEN_WINDOW_S


def _check_once(source: Source, places: Ints) -> None:
    if len(np.unique(places)) < len(places):
        raise ConfigError(
            f"{source.path}: two rows for one window of one client", code="E121",
            fix="add a column `client`, or `model` and --series",
        )  # fmt: skip


def _single(
    clients: Labels, window: Ints, rps: Floats, holes: NDArray[np.bool_]
) -> tuple[tuple[str, ...], Floats | None]:
    """[clients, windows], holes filled as in their sum; None for one client, or more cells than MOST_CELLS."""
    found, row = np.unique(clients.codes, return_inverse=True)
    if len(found) < 2 or len(found) * len(holes) > MOST_CELLS:
        return (), None
    matrix = np.zeros((len(found), len(holes)))
    matrix[row, window] = rps
    return tuple(clients.names[code] for code in found), np.stack([bridged(client, holes) for client in matrix])


# --------------------------------------------------------------------------------------------------- token lengths

LEVELS = {"q05": 0.05, "q10": 0.1, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q90": 0.9, "q95": 0.95, "q99": 0.99, "max": 1}
TOKEN_COLUMNS = ("model", "client", "t_s", "field", *LEVELS)


def with_tokens(rates: Rates, beside: tuple[Path, Columns] | None) -> Rates:
    """The same with the quantiles of its series: rows that have both prompts' and answers'."""
    if beside is None:
        return rates
    path, columns = beside
    source = Source(str(path), "ServeGen token quantiles")
    if missing := [name for name in TOKEN_COLUMNS if name not in columns]:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}", why="token quantiles lie beside client rates", code="E121",
            fix="restore or remove the file",
        )  # fmt: skip
    client = number(columns, "client").astype(np.int64)
    keys = client * 2**40 + number(columns, "t_s").astype(np.int64)
    fields = label(columns, "field")
    mine = _chosen(columns, source, rates.series)
    rows = [
        np.flatnonzero(mine & np.isin(fields.codes, [c for c, n in enumerate(fields.names) if n == name]))
        for name in ("input_tokens", "output_tokens")
    ]
    _, first, second = np.intersect1d(keys[rows[0]], keys[rows[1]], return_indices=True)
    asked, answered = rows[0][first], rows[1][second]
    grid = np.stack([number(columns, name) for name in LEVELS], axis=1)
    levels = np.array(list(LEVELS.values()), dtype=np.float64)
    found = Tokens(levels, client[asked], number(columns, "t_s")[asked], grid[asked], grid[answered])
    return replace(rates, tokens=found)
