"""Tables and units for people. rich is imported only when a terminal is painted; a pipe gets plain aligned text."""

from __future__ import annotations

import datetime
import sys
import unicodedata
from collections.abc import Sequence

import click

from neaptide.cli.session import colours

Rows = Sequence[Sequence[str]]
PAINT = {"ready": "green", "ok": "green", "fail": "red", "dead": "red", "warn": "yellow", "starting": "yellow"}
PAINT |= {"draining": "yellow", "standby": "yellow", "aborted": "yellow"}
PAINT |= {"error": "red", "lost": "red", "timeout": "red"}


def table(title: str, headers: Sequence[str], rows: Rows) -> None:
    """One table on stdout. Cells are plain text; a known state word is coloured on a terminal."""
    if colours():
        _rich(title, headers, rows)
    else:
        click.echo("\n".join(plain(title, headers, rows)))


def plain(title: str, headers: Sequence[str], rows: Rows) -> list[str]:
    """Aligned columns two spaces apart, no trailing blanks; CJK counts two cells."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(cells(line[i]) for line in lines) for i in range(len(headers))]
    out = [title] if title else []
    for line in lines:
        out.append("  ".join(text + " " * (w - cells(text)) for text, w in zip(line, widths)).rstrip())
    return out


def cells(text: str) -> int:
    """How many terminal cells `text` takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _rich(title: str, headers: Sequence[str], rows: Rows) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*headers, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(cell, style=PAINT.get(cell, "")) for cell in row))
    Console(file=sys.stdout, highlight=False).print(drawn)


def paint(text: str, colour: str, *, bold: bool = False, dim: bool = False) -> str:
    """`text` in ANSI colour on a terminal, as it is elsewhere."""
    return click.style(text, fg=colour or None, bold=bold or None, dim=dim or None) if colours() else text


def size(n: int | None) -> str:
    """Bytes in binary units: 5.8 MiB."""
    if n is None:
        return "-"
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"


def count(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


def span(seconds: float | None) -> str:
    """A duration with three significant digits or so: 12 ms, 1.42 s, 3 m 20 s, 2 h 5 m, 3 d 4 h."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours < 1:
        return f"{minutes} m {int(seconds % 60)} s"
    return f"{hours} h {minutes % 60} m" if days < 1 else f"{days} d {hours % 24} h"


def moment(wall_s: float) -> str:
    """Local time, to the second; "-" for a time that is not known."""
    return datetime.datetime.fromtimestamp(wall_s).isoformat(" ", "seconds") if wall_s else "-"


def money(nanos: int | None, currency: str) -> str:
    """Nano-units as a decimal, digits kept down to a millionth: CNY 0.001234."""
    if nanos is None:
        return "-"
    sign, nanos = ("-" if nanos < 0 else ""), abs(nanos)
    whole, rest = divmod(nanos, 10**9)
    digits = f"{rest:09d}"[:6].rstrip("0")
    if nanos and not whole and not digits:
        return f"{currency} {sign}<0.000001"
    return f"{currency} {sign}{whole:,}.{digits.ljust(2, '0')}"
