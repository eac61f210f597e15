"""What a comparison's arrivals are: a file of any format, or traffic that is made, `synthetic:diurnal,days=9`."""

from __future__ import annotations

import math

import numpy as np

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import DAY_S, LONGEST_DAYS, Rates, Requests
from neaptide.simulate.compare import with_history
from neaptide.simulate.formats import read
from neaptide.simulate.synthetic import synthetic

MADE = "synthetic:"
_RANGES = {
    "mean_rps": (1e-3, 1e6),
    "days": (1 / 24, float(LONGEST_DAYS)),
    "window_s": (5.0, 3600.0),
    "noise": (0.0, 2.0),
    "dispersion": (1.0, 100.0),
    "seed": (0.0, 2.0**31),
}


def arrivals(text: str, series: str | None = None) -> Rates | Requests:
    """A file's, or those of `synthetic:KIND[,NAME=NUMBER...]`. ConfigError E110 where that is not understood, and as
    `formats.read`."""
    return _made(text.removeprefix(MADE)) if text.startswith(MADE) else read(text, series)


def rates(found: Rates | Requests, history: Rates | Requests | None = None, series: str = "") -> Rates:
    """Both as windows of one length, and as one series."""
    parts = [part for part in (found, history) if part is not None]
    window_s = _window_s(parts)
    now, *before = [part.rates(window_s, series) if isinstance(part, Requests) else part for part in parts]
    return with_history(now, before[0] if before else None)


def recorded(found: Rates | Requests, history: Rates | Requests | None = None) -> Requests | None:
    """The arrivals' own requests on the clock of `rates`, those of the history before them included; None where either
    has none."""
    if not isinstance(found, Requests) or isinstance(history, Rates):
        return None
    if history is None:
        return found
    origin_s = min(found.origin_s or 0.0, history.origin_s or 0.0)
    later = found.t_s + ((found.origin_s or 0.0) - origin_s)
    before = history.t_s + ((history.origin_s or 0.0) - origin_s)
    t_s = np.concatenate([before[before < later[0]], later]) if len(later) else before
    return Requests(t_s=t_s, origin_s=None if found.origin_s is None else origin_s, source=found.source)


def _window_s(parts: list[Rates | Requests]) -> float:
    """That of the part that has windows; of single requests 10 minutes, or one where none covers a day."""
    for part in parts:
        if isinstance(part, Rates):
            return part.window_s
    spans = [float(part.t_s[-1] - part.t_s[0]) for part in parts if isinstance(part, Requests) and len(part.t_s)]
    return 600.0 if max(spans, default=0.0) >= DAY_S else 60.0


def _made(text: str) -> Rates:
    kind, *given = [word.strip() for word in text.split(",")]
    numbers = {"seed": 0.0} | dict(_number(word) for word in given)
    seed = int(numbers.pop("seed"))
    return synthetic(kind, seed=seed, **numbers)


def _number(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    low, high = _RANGES.get(name, (math.inf, 0.0))
    if not low <= number <= high:
        fix = f"{MADE}diurnal,mean_rps=60,days=9; numbers are {', '.join(_RANGES)}"
        raise ConfigError(f"--arrivals: {word!r} is no NAME=NUMBER of synthetic traffic", code="E110", fix=fix)
    return name, number
