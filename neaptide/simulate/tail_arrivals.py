"""Single requests of small models: each client of a trace as a model of its own, drawn from its rates.

A client's requests are drawn as `sample` draws a trace's, with its own overdispersion and a stream of its own: what one
has depends on the seed and its name, never on who stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from neaptide.errors import ConfigError
from neaptide.simulate import tables
from neaptide.simulate.arrivals import DAY_S, Floats, Rates, overdispersion
from neaptide.simulate.parquet import read_parquet
from neaptide.simulate.sample import sample

_COLUMNS = ("model", "client", "rate_rps", "cv")


@dataclass(frozen=True, slots=True)
class Model:
    """One small model: its rates (their dispersion is its own) and its name."""

    name: str
    rates: Rates

    def requests(self, seed: int, from_s: float, to_s: float) -> Floats:
        """Times of arrival in [from_s, to_s), sorted."""
        own = int(np.random.SeedSequence(seed, spawn_key=(crc32(self.name.encode()),)).generate_state(1)[0])
        return sample(self.rates, own, from_s, to_s).t_s


def small(rates: Rates, below_rps: float, days: tuple[int, int]) -> tuple[Model, ...]:
    """The clients whose mean over these days (inclusive) is under `below_rps`, in the trace's order; one that asks for
    nothing on those days is one of them. ConfigError E121 where the trace has no clients, E124 where none is small."""
    if rates.clients is None:
        what = f"{rates.source.path or rates.series}: no clients to take as models"
        raise ConfigError(what, code="E121", fix="pass rates with a column `client`")
    from_s, to_s = rates.span(*days)
    first, end = (round((t_s - rates.start_s) / rates.window_s) for t_s in (from_s, to_s))
    chosen = np.flatnonzero(rates.clients[:, first:end].mean(axis=1) < below_rps)
    if not len(chosen):
        what = f"{rates.source.path or rates.series}: no client is under {below_rps:g} requests/s"
        raise ConfigError(what, code="E124", fix="raise the limit")
    dispersion = dispersions(rates)
    names = [rates.client_names[at] for at in chosen]
    return tuple(
        _model(rates, name, rates.clients[at].copy(), dispersion.get(name, 1.0))
        for name, at in zip(names, chosen.tolist(), strict=True)
    )


def dispersions(rates: Rates) -> dict[str, float]:
    """D of each client by name, as `overdispersion` has it, from the file; empty where that has no cv."""
    path = Path(rates.source.path)
    if not rates.source.format.startswith("ServeGen"):
        return {}
    _, columns = read_parquet(path, _COLUMNS)
    names, rps, cv = tables.label(columns, "client"), tables.number(columns, "rate_rps"), tables.number(columns, "cv")
    series = tables.label(columns, "model")
    mine = series.codes == series.names.index(rates.series)
    return {
        name: overdispersion(rps[here], cv[here])
        for code, name in enumerate(names.names)
        if (here := mine & (names.codes == code)).any()
    }


def _model(rates: Rates, name: str, rps: Floats, dispersion: float) -> Model:
    return Model(name, replace(rates, rates=rps, dispersion=dispersion, clients=None, client_names=(), tokens=None))


def busy(models: Sequence[Model], days: tuple[int, int]) -> np.ndarray:
    """[models, windows] bool: whether anything came in a window of these days."""
    from_s, to_s = models[0].rates.span(*days)
    start_s, window_s = models[0].rates.start_s, models[0].rates.window_s
    first, end = (round((t_s - start_s) / window_s) for t_s in (from_s, to_s))
    found: np.ndarray = np.stack([model.rates.rates[first:end] > 0 for model in models])
    return found


def warm_from_s(rates: Rates, from_s: float) -> float:
    """A day before the reported ones, where the trace has it: what runs then is there when they begin."""
    return max(rates.start_s, from_s - DAY_S)
