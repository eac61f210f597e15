"""Where a simulation's requests come from: `Rates` (requests a second, window by window) or `Requests` (one by one).

Both have a clock of their own. A file with t_s keeps its own; a log with wall times is put on one that begins at 00:00
UTC of its first day (`origin_s`). DAY n is always t_s // 86400, so the first day of a log is day 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neaptide.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_S = 86400
LONGEST_DAYS = 400  # a longer span is a mistaken unit, and its windows would not fit in memory
CV_CAP = 10.0  # a client's coefficient of variation counts at most so much in the overdispersion
DISPERSION_TICK_S = 5.0  # at which overdispersion is measured from single requests: the goal world's tick


class Source(NamedTuple):
    """What was read, for telling."""

    path: str
    format: str
    rows: int = 0
    bad: int = 0  # rows that were left out
    first_bad: str = ""

    def __str__(self) -> str:
        told = f"{self.path}: {self.format}, {self.rows:,} rows"
        return f"{told}, {self.bad:,} bad ones left out (first: {self.first_bad})" if self.bad else told


MADE = Source("", "synthetic")


class Labels(NamedTuple):
    """One name a row, kept once."""

    names: tuple[str, ...]
    codes: Ints  # [rows] index into names


class Lists(NamedTuple):
    """One list a row: that of row i is values[starts[i]:starts[i + 1]]."""

    values: Ints
    starts: Ints  # [rows + 1]

    def take(self, rows: Ints) -> Lists:
        sizes = np.diff(self.starts)[rows]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        at = np.arange(starts[-1]) - np.repeat(starts[:-1] - self.starts[rows], sizes)
        return Lists(self.values[at], starts)


class Tokens(NamedTuple):
    """Lengths of prompts and answers: quantiles of each client within each stretch of time."""

    levels: Floats  # [levels] 0..1, rising; the last is the maximum
    client: Ints  # [rows]
    t_s: Floats  # [rows] the stretch begins
    input: Floats  # [rows, levels] tokens
    output: Floats  # [rows, levels]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rates:
    """Requests a second, window by window without a gap. Arrays are read-only."""

    series: str
    window_s: float
    start_s: float  # of the first window, on the file's clock
    rates: Floats  # [windows] requests/s
    dispersion: float = 1.0  # D: variance over mean of a tick's count; 1 is Poisson
    filled: int = 0  # windows that the file lacks: interpolated
    clients: Floats | None = None  # [clients, windows] requests/s; their sum is `rates`
    client_names: tuple[str, ...] = ()
    tokens: Tokens | None = None
    origin_s: float | None = None  # wall seconds, UTC, of the clock's 0; None: the file's clock is its own
    source: Source = MADE

    def __post_init__(self) -> None:
        for array in (self.rates, self.clients):
            if array is not None:
                array.flags.writeable = False

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.rates) * self.window_s

    @property
    def days(self) -> range:
        """The days in which a window begins."""
        return range(int(self.start_s // DAY_S), int((self.end_s - self.window_s) // DAY_S) + 1)

    def span(self, first_day: int, last_day: int) -> tuple[float, float]:
        """(from_s, to_s) of these days, both inclusive, as far as the trace goes: a log begins and ends within a day.
        ConfigError E124 where it has none of them."""
        from_s, to_s = max(first_day * DAY_S, self.start_s), min((last_day + 1) * DAY_S, self.end_s)
        if from_s >= to_s:
            raise no_such_days(self, f"nothing in days {first_day} to {last_day}")
        return from_s, to_s

    def at(self, t_s: Floats) -> Floats:
        """Requests/s at these times: linear between the windows' centres, level before the first and after the last."""
        centres = self.start_s + (np.arange(len(self.rates)) + 0.5) * self.window_s
        return np.interp(t_s, centres, self.rates)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """Single requests in the order of their arrival. An absent column is None. Arrays are read-only."""

    t_s: Floats  # [requests] arrival, on the file's clock
    in_tokens: Ints | None = None
    out_tokens: Ints | None = None
    model: Labels | None = None  # of an access log: the path
    tenant: Labels | None = None
    prefixes: Lists | None = None  # ids of the prompt's leading blocks; equal ids are equal tokens
    origin_s: float | None = None
    source: Source = MADE

    def __post_init__(self) -> None:
        for array in (self.t_s, self.in_tokens, self.out_tokens):
            if array is not None:
                array.flags.writeable = False

    def rates(self, window_s: float | None = None, series: str = "") -> Rates:
        """The same in windows: of 10 minutes, or of one for a trace of less than a day. D is measured as the variance
        over the mean of 5-second counts within each window, weighted by its rate, since that is what `counts` puts in.
        What wanders from window to window is in the rates. An empty trace has one empty window."""
        first, last = (float(self.t_s[0]), float(self.t_s[-1])) if len(self.t_s) else (0.0, 0.0)
        window_s = window_s or (600.0 if last - first >= DAY_S else 60.0)
        start_s = first // window_s * window_s
        windows = int((last - start_s) // window_s) + 1
        binned = np.bincount(((self.t_s - start_s) // window_s).astype(np.int64), minlength=windows)
        return Rates(
            series=series,
            window_s=window_s,
            start_s=start_s,
            rates=binned / window_s,
            dispersion=_dispersion(self.t_s - start_s, window_s),
            origin_s=self.origin_s,
            source=self.source,
        )


def overdispersion(rates: Floats, cv: Floats) -> float:
    """D of clients' windows: the rate-weighted mean of min(cv, 10)^2; 1 where nothing came."""
    total = float(rates.sum())
    return float((rates * np.minimum(cv, CV_CAP) ** 2).sum()) / total if total > 0 else 1.0


def _dispersion(t_s: Floats, window_s: float) -> float:
    """The first and the last window are left out where there are others: the trace covers them in part."""
    ticks = max(2, round(window_s / DISPERSION_TICK_S))
    tick_s = window_s / ticks
    windows = int(t_s[-1] // window_s) + 1 if len(t_s) else 0
    if not windows:
        return 1.0
    at = np.minimum((t_s // tick_s).astype(np.int64), windows * ticks - 1)
    binned = np.bincount(at, minlength=windows * ticks).reshape(windows, ticks)
    inner = binned[1:-1] if windows > 2 else binned
    mean, variance = inner.mean(axis=1), inner.var(axis=1, ddof=1)
    capped = np.minimum(variance, CV_CAP**2 * mean)
    return float(capped.sum() / mean.sum()) if mean.sum() > 0 else 1.0


def join(history: Rates, rates: Rates) -> Rates:
    """Both as one; where both have a window, that of `rates` stands. D is weighted by their requests; single clients
    are not kept. Logs with wall times are put on the clock of the earlier one. ConfigError E121 where the windows
    differ, the clocks cannot be compared, or more than a day lies between."""
    if (history.origin_s is None) != (rates.origin_s is None):
        raise _cannot_join(history, rates, "one has wall times, the other a clock of its own")
    origin_s = None
    if history.origin_s is not None and rates.origin_s is not None:
        origin_s = min(history.origin_s, rates.origin_s)
        history, rates = _moved(history, origin_s), _moved(rates, origin_s)
    window_s, start_s = rates.window_s, min(history.start_s, rates.start_s)
    if history.window_s != window_s or (history.start_s - rates.start_s) % window_s:
        raise _cannot_join(history, rates, f"windows of {history.window_s:g} s beside {window_s:g} s, or shifted ones")
    if max(history.start_s - rates.end_s, rates.start_s - history.end_s) > DAY_S:
        raise _cannot_join(history, rates, "more than a day lies between them")
    both = np.full(round((max(history.end_s, rates.end_s) - start_s) / window_s), np.nan)
    for part in (history, rates):
        at = round((part.start_s - start_s) / window_s)
        both[at : at + len(part.rates)] = part.rates
    gap = np.isnan(both)
    weights = np.array([history.rates.sum(), rates.rates.sum()])
    spread = np.array([history.dispersion, rates.dispersion])
    return replace(
        rates,
        start_s=start_s,
        rates=bridged(both, gap),
        dispersion=float((weights * spread).sum() / weights.sum()) if weights.sum() else 1.0,
        filled=history.filled + rates.filled + int(gap.sum()),
        clients=None,
        client_names=(),
        origin_s=origin_s,
    )


def _moved(rates: Rates, origin_s: float) -> Rates:
    return replace(rates, start_s=rates.start_s + (rates.origin_s or 0.0) - origin_s, origin_s=origin_s)


def _cannot_join(history: Rates, rates: Rates, why: str) -> ConfigError:
    what = f"{history.source.path} cannot be the history of {rates.source.path}"
    return ConfigError(what, why=why, code="E121", fix="pass a --history of the same format and series")


def bridged(values: Floats, holes: NDArray[np.bool_]) -> Floats:
    """A copy whose holes are filled linearly from the nearest others; at an end, with the nearest one."""
    if not holes.any() or holes.all():
        return values.copy()
    at = np.arange(len(values))
    return np.where(holes, np.interp(at, at[~holes], values[~holes]), values)


def capacity(rates: Rates, days: Sequence[int], quantile: float = 0.999, replicas: float = 40.0) -> float:
    """Requests/s of one replica in the goal's world: that quantile of the rates of the windows that begin on these days
    (linear between order statistics), divided by `replicas`. ConfigError E124 where no window does, or none has any."""
    begins = ((rates.start_s + np.arange(len(rates.rates)) * rates.window_s) // DAY_S).astype(np.int64)
    chosen = rates.rates[np.isin(begins, list(days))]
    if not len(chosen) or not chosen.any():
        raise no_such_days(rates, f"no request in days {_span(days)}")
    return float(np.quantile(chosen, quantile)) / replicas


def no_such_days(rates: Rates, what: str) -> ConfigError:
    return ConfigError(
        f"{rates.source.path or rates.series}: {what}",
        why=f"it has days {_span(rates.days)}; a day is t_s // 86400",
        code="E124",
        fix="choose --from, --to and --tune within them, or add the days with --history",
    )


def _span(days: Sequence[Any]) -> str:
    return f"{min(days)} to {max(days)}" if len(days) else "(none)"
