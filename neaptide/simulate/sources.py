"""What a comparison's arrivals are: a file of any format, or traffic that is made, `synthetic:diurnal,days=9`."""

from __future__ import annotations

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import DAY_S, Rates, Requests
from neaptide.simulate.compare import with_history
from neaptide.simulate.formats import read
from neaptide.simulate.synthetic import synthetic

MADE = "synthetic:"
_NUMBERS = ("mean_rps", "days", "window_s", "noise", "dispersion", "seed")


def arrivals(text: str, series: str | None = None) -> Rates | Requests:
    """A file's, or those of `synthetic:KIND[,NAME=NUMBER...]`. ConfigError E110 where that is not understood, and as
    `formats.read`."""
    return _made(text.removeprefix(MADE)) if text.startswith(MADE) else read(text, series)


def rates(found: Rates | Requests, history: Rates | Requests | None = None, series: str = "") -> Rates:
    """Both as windows of one length, and as one series."""
    window_s = _window_s([part for part in (found, history) if part is not None])
    parts = [part.rates(window_s, series) if isinstance(part, Requests) else part for part in (found, history) if part]
    return with_history(parts[0], parts[1] if len(parts) > 1 else None)


def _window_s(parts: list[Rates | Requests]) -> float:
    """That of the part that has windows; of single requests 10 minutes, or one where none covers a day."""
    for part in parts:
        if isinstance(part, Rates):
            return part.window_s
    spans = [float(part.t_s[-1] - part.t_s[0]) for part in parts if isinstance(part, Requests) and len(part.t_s)]
    return 600.0 if max(spans, default=0.0) >= DAY_S else 60.0


def _made(text: str) -> Rates:
    kind, *given = [word.strip() for word in text.split(",")]
    numbers: dict[str, float] = {}
    for word in given:
        name, _, value = word.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            name = ""
        if name not in _NUMBERS:
            fix = f"{MADE}diurnal,mean_rps=60,days=9; numbers are {', '.join(_NUMBERS)}"
            raise ConfigError(f"--arrivals: {word!r} is not NAME=NUMBER of synthetic traffic", code="E110", fix=fix)
    seed = int(numbers.pop("seed", 0))
    return synthetic(kind, seed=seed, **numbers)
