"""Rates without a file: shapes that stand for a kind of traffic, seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import DAY_S, Floats, Rates, Source

Kind = Literal["steady", "diurnal", "burst", "ramp", "on-off", "flash-crowd"]
Shape = Callable[[Floats, float, np.random.Generator], Floats]  # (middles, window, randomness) -> rates, any mean


def synthetic(
    kind: str,
    *,
    mean_rps: float = 10.0,
    days: float = 1.0,
    window_s: float = 60.0,
    noise: float = 0.05,
    dispersion: float = 1.0,
    seed: int = 0,
) -> Rates:
    """`days` from time 0, whose mean is `mean_rps`. Each window is multiplied by lognormal noise of that standard
    deviation. ConfigError E110 for a kind there is none of."""
    if kind not in SHAPES:
        raise ConfigError(f"{kind!r} is no synthetic traffic", code="E110", fix=f"one of {', '.join(get_args(Kind))}")
    random = np.random.default_rng(seed)
    middles = np.arange(max(1, round(days * DAY_S / window_s)), dtype=np.float64) * window_s + window_s / 2
    rates = SHAPES[kind](middles, window_s, random)
    rates = rates * np.exp(noise * random.standard_normal(len(rates)))
    return Rates(
        series=kind,
        window_s=window_s,
        start_s=0.0,
        rates=rates * mean_rps / rates.mean(),
        dispersion=dispersion,
        source=Source(kind, "synthetic", len(rates)),
    )


def _steady(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    return np.ones_like(t_s)


def _diurnal(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    """A day that peaks at 15:00 at four times its night; days 5 and 6 of a week have 0.6 of the others."""
    rates: Floats = 1.0 + 0.6 * np.cos(2 * np.pi * (t_s / DAY_S - 15 / 24))
    rates[t_s // DAY_S % 7 >= 5] *= 0.6
    return rates


def _burst(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    """On average every three hours four times the usual, for 5 to 30 minutes; at least once."""
    rates = np.ones_like(t_s)
    span_s = t_s[-1] + window_s / 2
    for begin in random.uniform(0, span_s, max(1, random.poisson(span_s / (3 * 3600)))):
        rates[(t_s >= begin) & (t_s < begin + max(window_s, random.uniform(300, 1800)))] = 4.0
    return rates


def _ramp(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    """From a fifth of the mean to nine fifths."""
    rates: Floats = 0.2 + 1.6 * t_s / (t_s[-1] + window_s / 2)
    return rates


def _on_off(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    """Nothing at all for an hour, then something for an hour: both exponential in length; something first."""
    span_s = t_s[-1] + window_s
    edges = np.cumsum(np.maximum(window_s, random.exponential(3600.0, int(span_s / window_s) + 2)))
    return np.where(np.searchsorted(edges, t_s, side="right") % 2 == 0, 1.0, 0.0)


def _flash_crowd(t_s: Floats, window_s: float, random: np.random.Generator) -> Floats:
    """Once, in the middle half: within one window ten times the usual, halved every half hour."""
    span_s = t_s[-1] + window_s / 2
    since = t_s - random.uniform(0.25, 0.75) * span_s
    rates: Floats = 1.0 + np.where(since >= 0, 9.0 * np.exp2(-np.maximum(since, 0.0) / 1800.0), 0.0)
    return rates


SHAPES: dict[str, Shape] = {
    "steady": _steady,
    "diurnal": _diurnal,
    "burst": _burst,
    "ramp": _ramp,
    "on-off": _on_off,
    "flash-crowd": _flash_crowd,
}
