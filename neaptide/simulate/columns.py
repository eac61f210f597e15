"""Rows of any origin as columns, gathered in constant memory a row; what cannot be read is left out and counted."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from neaptide.errors import ConfigError
from neaptide.simulate.arrivals import Floats, Labels, Lists

Columns = dict[str, Floats | Labels | Lists]
Row = tuple[Any, ...]  # one value a column: float, or bytes or str for a label

LABELS = ("model", "client", "tenant")
NUMBERS = ("t_s", "t_ms", "rate_rps", "cv", "in_tok", "out_tok")
MOST_ROWS = 50_000_000  # about 2 GB of columns
MOST_NAMES = 10_000  # a scanned web server's log has paths without end
LONGEST_NAME = 200
OTHER = "(other)"
BAD_SHARE = 0.01
UNREADABLE = (ValueError, OverflowError, TypeError, RecursionError, csv.Error, msgspec.MsgspecError)


class Format(NamedTuple):
    """How a row is read: `parse` gives one value for each of `columns`, or raises one of UNREADABLE."""

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Any], Row]
    wall: bool = False  # t_s is seconds since the epoch


@dataclass(slots=True)
class Tally:
    """Rows read, and which of them were bad."""

    rows: int = 0
    bad: int = 0
    first_bad: str = ""

    def add_bad(self, row: int, why: object, rows: int = 1) -> None:
        self.first_bad = self.first_bad or f"row {row}: {' '.join(str(why).split())[:120]}"
        self.bad += rows


class _Store(Protocol):
    def append(self, value: Any, /) -> None: ...


@dataclass(slots=True)
class _Names:
    """Labels as they grow."""

    codes: array[int] = field(default_factory=lambda: array("i"))
    known: dict[bytes | str, int] = field(default_factory=dict)

    def append(self, name: bytes | str, /) -> None:
        code = self.known.get(name)
        if code is None:
            name = name[:LONGEST_NAME] if len(self.known) < MOST_NAMES else OTHER
            code = self.known.setdefault(name, len(self.known))
        self.codes.append(code)

    def labels(self) -> Labels:
        texts = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in self.known]
        return merged(texts, np.array(self.codes, dtype=np.int64))


def merged(texts: list[str], codes: Any) -> Labels:
    """Labels whose names are all different."""
    names = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    places = np.array([names[text] for text in texts], dtype=np.int64)
    return Labels(tuple(names), places[codes] if len(texts) else codes)


def gather(rows: Iterable[Any], form: Format, path: Path, tally: Tally) -> Columns:
    """The rows that `form` can read; others are counted in `tally`. ConfigError E121 for more than MOST_ROWS."""
    stores: list[_Store] = [_Names() if c in LABELS else array("d") for c in form.columns]
    parse, number = form.parse, 0
    for number, row in enumerate(rows, 1):
        try:
            values = parse(row)
        except UNREADABLE as e:
            tally.add_bad(number, e)
            continue
        for store, value in zip(stores, values, strict=True):
            store.append(value)
        if number >= MOST_ROWS:
            raise too_many(path)
    tally.rows = number
    return {name: _column(store) for name, store in zip(form.columns, stores, strict=True)}


def _column(store: Any) -> Floats | Labels:
    return store.labels() if isinstance(store, _Names) else np.array(store, dtype=np.float64)


def too_many(path: Path) -> ConfigError:
    return ConfigError(f"{path} has more than {MOST_ROWS:,} rows", code="E121", fix="split the file")
