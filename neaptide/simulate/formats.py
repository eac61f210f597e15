"""Reads arrivals from a file. What it is, is told by what it holds, not by its name; gzip is seen through.

Parquet         ServeGen client rates (token quantiles beside them are joined), Mooncake, requests or rates by t_s
SQLite          Neaptide's ledger, read only
JSON            `neaptide usage --rows --json`, or a list of what JSON lines may be
lines           JSON lines, LiteLLM's request log, nginx's access log, CSV
"""

from __future__ import annotations

import gzip
import re
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from io import BufferedReader
from pathlib import Path
from urllib.parse import quote

import msgspec

from neaptide.errors import ConfigError
from neaptide.simulate import logs, tables
from neaptide.simulate.arrivals import Rates, Requests, Source
from neaptide.simulate.columns import LABELS, NUMBERS, UNREADABLE, Columns, Format, Tally, gather
from neaptide.simulate.parquet import read_parquet

LONGEST_LINE = 16 << 20  # a log with whole prompts; what is longer comes as several bad lines
LARGEST_DOCUMENT = 256 << 20  # JSON that is no lines must be held whole
TRIED_LINES = 20  # a rotated log may begin in the middle of a line
KNOWN = (
    "Parquet (ServeGen client rates, Mooncake, or columns t_s, in_tok, out_tok), CSV or JSON lines with t_s, "
    "an nginx access log, a LiteLLM request log, `neaptide usage --rows --json`, or the ledger"
)
_WANTED = (*NUMBERS, *LABELS, "hash_ids", "dist")
_ENDS_BADLY = (OSError, EOFError, zlib.error)  # gzip.BadGzipFile is an OSError


class _Page(msgspec.Struct):
    rows: list[msgspec.Raw]
    next: str | None = None


def read(path: str | Path, series: str | None = None) -> Rates | Requests:
    """The arrivals of a file. `series` picks one model (of an access log: one path). Rows that cannot be read are left
    out and counted in `.source`.

    ConfigError: E120 not to be read, or of no known format; E121 its content is not sound, or more than 1 % of its rows
    are bad; E122 several series and none chosen, or no such series; E123 Parquet without pyarrow."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(16)
        if magic.startswith(b"PAR1"):
            return _parquet(path, series)
        if magic == b"SQLite format 3\0":
            return _ledger(path, series)
        return _text(path, series)
    except _ENDS_BADLY as e:
        raise ConfigError(
            f"{path} cannot be read",
            why=getattr(e, "strerror", None) or str(e),
            code="E120",
            fix="pass --arrivals FILE",
        ) from e


def _unknown(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: arrivals of no known format", why=why, code="E120", fix=f"pass {KNOWN}")


def _parquet(path: Path, series: str | None) -> Rates | Requests:
    names, columns = read_parquet(path, _WANTED)
    return _noun(path, names, columns, Tally(rows=tables.row_count(columns)), series, "")


def _noun(
    path: Path, names: tuple[str, ...], columns: Columns, tally: Tally, series: str | None, container: str
) -> Rates | Requests:
    kind = tables.shape(names)
    if kind is None:
        raise _unknown(path, f"its columns are {', '.join(names[:20])}")
    columns = tables.sound(columns, path, tally)
    source = Source(str(path), f"{container} {kind.name}".strip(), tally.rows, tally.bad, tally.first_bad)
    if not kind.rates:
        return tables.requests(columns, source, series, wall=False)
    rates = tables.rates(columns, source, series, kind.collected)
    return tables.with_tokens(rates, _quantiles(path)) if kind.collected else rates


def _quantiles(path: Path) -> tuple[Path, Columns] | None:
    """ServeGen's token quantiles, where they lie beside its client rates."""
    beside = path.with_name(path.name.replace("client_rates", "token_quantiles"))
    if beside == path or not beside.is_file():
        return None
    return beside, read_parquet(beside, tables.TOKEN_COLUMNS)[1]


def _ledger(path: Path, series: str | None) -> Requests:
    tally = Tally()
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as connection:
            rows = connection.execute(f"SELECT {logs.LEDGER_COLUMNS} FROM usage")  # noqa: S608 - a constant
            columns = gather(rows, logs.LEDGER, path, tally)
    except sqlite3.Error as e:
        raise ConfigError(
            f"{path} is not a ledger that can be read", why=str(e), code="E120",
            fix="pass ledger.db of the state directory, or a copy of it",
        ) from e  # fmt: skip
    return _logged(path, logs.LEDGER, columns, tally, series)


def _logged(path: Path, form: Format, columns: Columns, tally: Tally, series: str | None) -> Requests:
    columns = tables.sound(columns, path, tally)
    source = Source(str(path), form.name, tally.rows, tally.bad, tally.first_bad)
    return tables.requests(columns, source, series, form.wall)


# --------------------------------------------------------------------------------------------------- text


def _text(path: Path, series: str | None) -> Rates | Requests:
    first = next(_lines(path), b"")
    if re.match(rb'\s*(\[|\{\s*($|"rows"))', first):
        return _document(path, series)
    for number, line in enumerate(_lines(path)):
        if form := logs.recognise(line):
            tally = Tally()
            return _logged(path, form, gather(_lines(path), form, path, tally), tally, series)
        if number + 1 == TRIED_LINES:
            break
    return _csv(path, first, series)


def _csv(path: Path, first: bytes, series: str | None) -> Rates | Requests:
    try:
        header = tuple(name.strip() for name in logs.cells(first))
    except UNREADABLE:
        header = ()
    if tables.shape(header) is None or len(set(header)) < len(header):
        raise _unknown(path, f"its first line is {first[:80].decode('utf-8', 'replace').strip()!r}")
    rows, tally = _lines(path), Tally()
    next(rows)
    columns = gather(rows, logs.table(list(header)), path, tally)
    return _noun(path, header, columns, tally, series, "CSV")


def _document(path: Path, series: str | None) -> Requests:
    with _opened(path) as file:
        text = file.read(LARGEST_DOCUMENT + 1)
    if len(text) > LARGEST_DOCUMENT:
        raise ConfigError(
            f"{path} is a JSON document of more than {LARGEST_DOCUMENT >> 20} MiB", code="E121",
            fix="pass JSON lines, or for usage the ledger itself",
        )  # fmt: skip
    try:
        page = msgspec.json.decode(text, type=_Page | list[msgspec.Raw])
    except UNREADABLE as e:
        raise _unknown(path, f"its JSON cannot be read: {e}") from e
    rows = page.rows if isinstance(page, _Page) else page
    form = next((f for row in rows[:TRIED_LINES] if (f := logs.recognise(bytes(row)))), None)
    if form is None:
        raise _unknown(path, "its JSON holds no rows of requests")
    if isinstance(page, _Page) and page.next:
        form = form._replace(name=f"{form.name} (not all of it: --limit)")
    tally = Tally()
    return _logged(path, form, gather(map(bytes, rows), form, path, tally), tally, series)


def _lines(path: Path) -> Iterator[bytes]:
    """Those that are not blank, without a byte order mark."""
    with _opened(path) as file:
        line = file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
        while line:
            if not line.isspace():
                yield line
            line = file.readline(LONGEST_LINE)


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")
