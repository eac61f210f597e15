"""Scalable vector graphics, written by hand: elements as text, and the mapping of data to a drawing's units."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

Point = tuple[float, float]
WIDTH, HEIGHT = 880.0, 400.0


def tag(name: str, *children: str, **attributes: object) -> str:
    """One element; `stroke_width=2` becomes stroke-width="2", `class_` class. Children are markup, not text."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{name}{told}>{inside}</{name}>" if inside else f"<{name}{told}/>"


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


class Axis(NamedTuple):
    """Values `low` to `high` on `begin` to `end` of the drawing; `scale` bends them first."""

    low: float
    high: float
    begin: float
    end: float
    scale: Callable[[float], float] = float

    def __call__(self, value: float) -> float:
        low, high = self.scale(self.low), self.scale(self.high)
        share = (self.scale(value) - low) / ((high - low) or 1.0)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def holds(self, value: float) -> bool:
        return min(self.low, self.high) <= value <= max(self.low, self.high)


def path(points: Iterable[Point], **attributes: object) -> str:
    """A line through points of the drawing."""
    d = "".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(points))
    return tag("path", d=d, fill="none", **attributes)


def steps(points: Sequence[Point], base: float | None = None, **attributes: object) -> str:
    """A line that stays level until the next point; down to `base` at both ends where that is given, as an area."""
    if not points:
        return ""
    parts = [f"M{points[0][0]:.1f} {points[0][1] if base is None else base:.1f}"]
    parts += [f"V{points[0][1]:.1f}"] if base is not None else []
    for (_, before), (x, y) in zip(points, points[1:]):  # noqa: RUF007
        parts.append(f"H{x:.1f}" + (f"V{y:.1f}" if f"{y:.1f}" != f"{before:.1f}" else ""))
    parts += [f"V{base:.1f}Z"] if base is not None else []
    return tag("path", d="".join(parts), **({"fill": "none"} if base is None else {}), **attributes)


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round values from `low` to `high`, about so many."""
    span = (high - low) or 1.0
    rough = span / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]
