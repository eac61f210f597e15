"""Requests a tick, drawn from rates: a Poisson count around a rate that wanders, as much as the trace is overdispersed.

    m = rate(middle of the tick) x tick        the rate is linear between window centres
    s = min(.25, sqrt((D - 1) m) / m)          0 where D <= 1; then the count's variance is about D m
    count ~ Poisson(m exp(s e - s^2 / 2))      e: an AR(1) with a time constant of 60 s and unit variance

A tick's count depends on the seed and the tick's place on the file's clock, never on the stretch that was asked for.
Randomness comes in blocks of about a day, counted from the clock's 0, each with two streams of its own: one for e, one
for the counts; a block is always drawn whole. e runs on over a block's edge: within a block it is the block's own
noise, filtered from 0, plus what decays of the previous block's. A day's decay, e^-1440, is 0 in doubles: nothing older
counts. So rates that agree on a day, half a window around it and their D have the same counts on it.
"""

from __future__ import annotations

import numpy as np

from neaptide.simulate.arrivals import DAY_S, Floats, Ints, Rates, no_such_days

TAU_S = 60.0
LARGEST_SPREAD = 0.25
NEGLIGIBLE = 1e-18  # below a double's resolution beside 1
NOISE, COUNTS, BEFORE = range(3)  # what a stream is for


def counts(rates: Rates, tick_s: float, seed: int, from_s: float | None = None, to_s: float | None = None) -> Ints:
    """Requests in each tick of [from_s, to_s), by default of all the trace. ConfigError E124 where the trace has no
    such time; ValueError where from_s or to_s is not at a tick."""
    from_s, to_s = rates.start_s if from_s is None else from_s, rates.end_s if to_s is None else to_s
    first, end = round(from_s / tick_s), round(to_s / tick_s)
    if abs(first * tick_s - from_s) > 1e-6 or abs(end * tick_s - to_s) > 1e-6:
        raise ValueError(f"{from_s} to {to_s} s does not begin and end at a tick of {tick_s} s")
    if from_s < max(0.0, rates.start_s) or to_s > rates.end_s or from_s >= to_s:
        raise no_such_days(rates, f"no time from {from_s:.0f} to {to_s:.0f} s")
    size = max(1, round(DAY_S / tick_s))
    drawn = [_block(rates, tick_s, seed, block, size) for block in range(first // size, (end - 1) // size + 1)]
    skip = first // size * size
    return np.concatenate(drawn)[first - skip : end - skip]


def _block(rates: Rates, tick_s: float, seed: int, block: int, size: int) -> Ints:
    middles = np.arange(block * size, (block + 1) * size, dtype=np.float64) * tick_s + tick_s / 2
    mean = rates.at(middles) * tick_s
    some = np.maximum(mean, 1e-12)
    spread = np.minimum(LARGEST_SPREAD, np.sqrt(max(rates.dispersion - 1.0, 0.0) * some) / some)
    wandering = mean * np.exp(spread * _wander(tick_s, seed, block, size) - spread**2 / 2)
    return _stream(seed, block, COUNTS).poisson(wandering)


def _wander(tick_s: float, seed: int, block: int, size: int) -> Floats:
    keep = float(np.exp(-tick_s / TAU_S))
    own = _filtered(keep, seed, block, size)
    before = _filtered(keep, seed, block - 1, size)[-1] if block else _stream(seed, 0, BEFORE).standard_normal()
    own += before * keep ** np.arange(1, size + 1)
    return own


def _filtered(keep: float, seed: int, block: int, size: int) -> Floats:
    """y[k] = keep y[k-1] + sqrt(1 - keep^2) z[k] from y[-1] = 0, the reach doubled in ten passes, not a loop."""
    y: Floats = _stream(seed, block, NOISE).standard_normal(size) * np.sqrt(1.0 - keep**2)
    reach, factor = 1, keep
    while reach < size and factor > NEGLIGIBLE:
        y[reach:] += factor * y[:-reach].copy()
        reach, factor = 2 * reach, factor * factor
    return y


def _stream(seed: int, block: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(block, purpose)))
