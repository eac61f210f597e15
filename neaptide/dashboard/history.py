"""What the page remembers: 15 minutes by the second, 24 hours by the minute, in bounded memory.

A row costs 8 bytes a field and model. Rates of a row cover the last SMOOTH_S seconds, so that single requests make a
line and not a comb; the sums behind them are exact.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from neaptide.dashboard.live import FIELDS, NAN, Tick, Window, joined, rounded, row, shown, together

Span = Literal["15m", "24h"]
SECONDS, MINUTES = 900, 1440
SMOOTH_S = 10
TILE_S = 60
ALL = ""  # the pseudo-model that is all of them
Rows = dict[str, "array[float]"]  # array takes no subscript on Python 3.11


class History:
    """`note` each second; models that are configured no more fade out with their rows."""

    def __init__(self) -> None:
        self._rings: dict[Span, deque[tuple[float, Rows]]] = {
            "15m": deque(maxlen=SECONDS),
            "24h": deque(maxlen=MINUTES),
        }
        self._last: deque[dict[str, Tick]] = deque(maxlen=TILE_S)
        self._minute: list[dict[str, Tick]] = []
        self._minute_began_s = NAN

    def note(self, wall_s: float, models: Mapping[str, Tick], everything: Window | None) -> None:
        """One second of every model; `everything` is the window of all their rows."""
        now = {**models, ALL: together(models, everything)}
        self._last.append(now)
        self._rings["15m"].append((wall_s, _rows(list(self._last)[-SMOOTH_S:], cost_now=True)))
        if not self._minute_began_s <= wall_s < self._minute_began_s + 60:
            if self._minute:
                self._rings["24h"].append((self._minute_began_s, _rows(self._minute)))
            self._minute, self._minute_began_s = [], math.floor(wall_s / 60) * 60.0
        self._minute.append(now)

    def newest(self) -> dict[str, Any]:
        """The last second, and what the tiles show: the last minute."""
        if not self._last:
            return {"t": None, "now": {}, "minute": {}}
        wall_s, rows = self._rings["15m"][-1]
        minute = _rows(list(self._last), cost_now=True)
        return {
            "t": round(wall_s, 3),
            "now": {m: shown(r) for m, r in rows.items()},
            "minute": {m: shown(r) for m, r in minute.items()},
        }

    def columns(self, span: Span, since_s: float = -math.inf) -> dict[str, Any]:
        """{"t": [wall s], "models": {model: [a list for each of FIELDS]}} of the rows after `since_s`, oldest first."""
        kept = [(t, rows) for t, rows in self._rings[span] if t > since_s]
        models = dict.fromkeys(m for _, rows in kept for m in rows)
        blank = array("d", [NAN] * len(FIELDS))
        columns = {m: [shown(c) for c in zip(*(rows.get(m, blank) for _, rows in kept))] for m in models}
        return {"t": [round(t, 3) for t, _ in kept], "models": columns}


def _rows(parts: list[dict[str, Tick]], cost_now: bool = False) -> Rows:
    """The models of the last part, over all parts in which they were. `cost_now`: what the replicas cost at the end,
    not their mean."""
    sums = {m: joined([p[m] for p in parts if m in p]) for m in parts[-1]}
    if cost_now:
        for model, last in parts[-1].items():
            sums[model].replica_cost = last.replica_cost / last.span_s * sums[model].span_s
    spends = [t.window.spend_per_hour for m, t in sums.items() if m != ALL and t.fleet.remote and t.window]
    told = [s for s in spends if not math.isnan(s)]
    remote = sum(told) if told else NAN
    return {m: array("d", map(rounded, row(t, remote if m == ALL else NAN))) for m, t in sums.items()}
