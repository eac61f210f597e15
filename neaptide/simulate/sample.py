"""Single requests from rates: as many in each tick as `counts` draws, evenly within it, with lengths from quantiles.

A request's client is drawn by the clients' rates of its window, its lengths between the quantiles that the client had
then, prompt and answer apart. What is drawn depends on the seed and the day, never on the stretch that was asked for.
"""

from __future__ import annotations

import numpy as np

from neaptide.simulate.arrivals import DAY_S, Floats, Ints, Rates, Requests, Tokens
from neaptide.simulate.counts import counts

PLACES, LENGTHS = 10, 11  # streams of their own, beside those of `counts`


def sample(
    rates: Rates, seed: int, from_s: float | None = None, to_s: float | None = None, tick_s: float = 5.0
) -> Requests:
    """Those of [from_s, to_s), by default of all the trace, in the order of their arrival. Without token quantiles they
    have no lengths. ConfigError E124 where the trace has no such time."""
    from_s, to_s = rates.start_s if from_s is None else from_s, rates.end_s if to_s is None else to_s
    days = [_day(rates, seed, day, tick_s) for day in range(int(from_s // DAY_S), int(np.ceil(to_s / DAY_S)))]
    t_s, asked, answered = (np.concatenate(column) for column in zip(*days))
    inside = slice(*np.searchsorted(t_s, [from_s, to_s]))
    known = rates.tokens is not None
    return Requests(
        t_s=t_s[inside].copy(),
        in_tokens=asked[inside].copy() if known else None,
        out_tokens=answered[inside].copy() if known else None,
        origin_s=rates.origin_s,
        source=rates.source,
    )


def _day(rates: Rates, seed: int, day: int, tick_s: float) -> tuple[Floats, Ints, Ints]:
    """All that the trace has of this day: times, prompt tokens, answer tokens."""
    from_s, to_s = max(day * DAY_S, rates.start_s), min((day + 1) * DAY_S, rates.end_s)
    from_s, to_s = np.ceil(from_s / tick_s) * tick_s, np.floor(to_s / tick_s) * tick_s
    drawn = counts(rates, tick_s, seed, from_s, to_s)
    begins = np.repeat(from_s + np.arange(len(drawn)) * tick_s, drawn)
    t_s = np.sort(begins + _stream(seed, day, PLACES).random(len(begins)) * tick_s)
    if rates.tokens is None:
        return t_s, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    random = _stream(seed, day, LENGTHS)
    row = _rows(rates, rates.tokens, t_s, random)
    levels, asked, answered = rates.tokens.levels, rates.tokens.input, rates.tokens.output
    return t_s, _between(levels, asked, row, random), _between(levels, answered, row, random)


def _rows(rates: Rates, tokens: Tokens, t_s: Floats, random: np.random.Generator) -> Ints:
    """The row of `tokens` for each request: its client's last one that has begun, else its first; any row of all where
    clients are not told apart, or this one has none."""
    found = random.integers(0, len(tokens.client), len(t_s))
    if rates.clients is None:
        return found
    client = _clients(rates, t_s, random)
    order = np.lexsort((tokens.t_s, tokens.client))
    keys = tokens.client[order] * 2.0**32 + tokens.t_s[order]
    at = np.maximum(np.searchsorted(keys, client * 2.0**32 + t_s, side="right") - 1, 0)
    after = np.minimum(at + 1, len(order) - 1)
    last, first = order[at], order[after]
    found = np.where(tokens.client[first] == client, first, found)
    found = np.where(tokens.client[last] == client, last, found)
    return found


def _clients(rates: Rates, t_s: Floats, random: np.random.Generator) -> Ints:
    """Who asks, drawn by the rates of each request's window."""
    clients = np.asarray(rates.clients)
    numbers = np.array([int(float(name)) for name in rates.client_names])
    window = np.clip(((t_s - rates.start_s) // rates.window_s).astype(np.int64), 0, clients.shape[1] - 1)
    share = random.random(len(t_s))
    found = np.zeros(len(t_s), dtype=np.int64)
    for at in np.unique(window):
        here = window == at
        edges = np.cumsum(clients[:, at])
        place = np.searchsorted(edges, share[here] * edges[-1], side="right")
        found[here] = numbers[np.minimum(place, len(numbers) - 1)]
    return found


def _between(levels: Floats, table: Floats, row: Ints, random: np.random.Generator) -> Ints:
    """Tokens at an even level, linear between those of the table; below the first one, that one."""
    level = np.maximum(random.random(len(row)), levels[0])
    right = np.clip(np.searchsorted(levels, level), 1, len(levels) - 1)
    share = (level - levels[right - 1]) / (levels[right] - levels[right - 1])
    low, high = table[row, right - 1], table[row, right]
    tokens: Ints = np.maximum(np.rint(low + share * (high - low)), 1).astype(np.int64)
    return tokens


def _stream(seed: int, day: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(day, purpose)))
