"""Lines that somebody else wrote, one request each: access logs, request logs, tables as text.

A request is an arrival whatever became of it. Where a line tells both, the time is that of the arrival, not of the end.

nginx       `combined`, times with an offset. nginx writes a line when the answer is over: where `$request_time` follows
            (`0.123`, `rt=0.123`), it is taken off; without it, times are those of the ends. The model is the path.
LiteLLM     StandardLoggingPayload as version 1.x logs it (docs.litellm.ai/docs/proxy/logging_spec; times in epoch
            seconds), and rows of its spend logs (times as ISO 8601, UTC where no offset stands). Token counts stand at
            the top or under `usage`.
Neaptide    rows of `neaptide usage --rows --json`, or bare Usage records.
CSV, JSON   t_s (seconds, not negative), and any of in_tok, out_tok, model, tenant; CSV names them in its first line,
            and has rates instead with t_s and rate_rps, and any of model, client, cv.
"""

from __future__ import annotations

import csv
import datetime
import functools
import re
from collections.abc import Callable
from typing import Annotated

import msgspec

from neaptide.simulate.columns import LABELS, NUMBERS, Format, Row

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]

# Possessive quantifiers: a line of quotes and backslashes takes no longer than others.
_REST = rb'[^"\\]*+(?:\\.[^"\\]*+)*+"'
_ACCESS = re.compile(
    rb"\S+ \S+ [^\[]*+\[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    rb'"(?:[A-Z]++ ([^\s?"\\]*+))?%b \d{3} (?:\d++|-)(?: "%b "%b(.*))?\s*' % (_REST, _REST, _REST)
)
_REQUEST_TIME = re.compile(rb'(?:^|[\s"=])(\d+\.\d{3})(?=$|[\s"])')
_MONTHS = {m: i for i, m in enumerate(b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}
_SPEND, _USAGE = ("t_s", "in_tok", "out_tok", "model"), ("t_s", "in_tok", "out_tok", "model", "tenant")


class _Tokens(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class _LiteLLM(_Tokens, kw_only=True):
    startTime: float | str  # their name
    model: str | None = None
    usage: _Tokens | None = None


class _Usage(msgspec.Struct):
    request_id: str
    started_wall_s: float
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    model: str = ""
    tenant: str = "default"


class _UsageRow(msgspec.Struct):
    usage: _Usage


class _Plain(msgspec.Struct):
    t_s: float
    in_tok: Count | None = None
    out_tok: Count | None = None
    model: str | None = None
    tenant: str | None = None


_litellm = msgspec.json.Decoder(_LiteLLM)
_usage = msgspec.json.Decoder(_Usage)
_usage_row = msgspec.json.Decoder(_UsageRow)
_plain = msgspec.json.Decoder(_Plain)


def recognise(line: bytes) -> Format | None:
    """The format of a log by one of its lines; None for a line of none."""
    if line.lstrip().startswith(b"{"):
        return _of_object(line)
    return Format("nginx access log", ("t_s", "model"), access, wall=True) if _ACCESS.fullmatch(line) else None


def _of_object(line: bytes) -> Format | None:
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if "startTime" in keys:
        return Format("LiteLLM request log", _SPEND, litellm, wall=True)
    if "started_wall_s" in keys:
        return Format("Neaptide usage records", _USAGE, lambda b: _used(_usage.decode(b)), wall=True)
    if "usage" in keys and "amount_nanos" in keys:
        return Format("Neaptide usage export", _USAGE, lambda b: _used(_usage_row.decode(b).usage), wall=True)
    if "t_s" in keys and "rate_rps" not in keys:
        columns = tuple(name for name in _USAGE if name in keys)
        return Format("JSON lines", columns, functools.partial(plain, columns))
    return None


def access(line: bytes) -> Row:
    found = _ACCESS.fullmatch(line)
    if not found:
        raise ValueError("not nginx's combined format")
    stamp, path, rest = found.groups()
    took = _REQUEST_TIME.search(rest) if rest else None
    return _wall_of(stamp) - (float(took[1]) if took else 0.0), path or b""


@functools.lru_cache(maxsize=16)
def _wall_of(stamp: bytes) -> float:
    """Epoch seconds of `10/Oct/2000:13:55:36 -0700`; neighbouring lines share it."""
    month = _MONTHS.get(stamp[3:6])
    if month is None:
        raise ValueError(f"no month {stamp[3:6]!r}")
    day, year, hour, minute, second = (int(stamp[i:j]) for i, j in ((0, 2), (7, 11), (12, 14), (15, 17), (18, 20)))
    offset = datetime.timedelta(hours=int(stamp[22:24]), minutes=int(stamp[24:26])) * (
        -1 if stamp[21:22] == b"-" else 1
    )
    return (datetime.datetime(year, month, day, hour, minute, second, tzinfo=datetime.UTC) - offset).timestamp()


def litellm(line: bytes) -> Row:
    row = _litellm.decode(line)
    counts = row if row.prompt_tokens is not None else row.usage or row
    start_s = _iso_s(row.startTime) if isinstance(row.startTime, str) else row.startTime
    return start_s, float(counts.prompt_tokens or 0), float(counts.completion_tokens or 0), row.model or ""


def _iso_s(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _used(row: _Usage) -> Row:
    return row.started_wall_s, float(row.prompt_tokens), float(row.output_tokens), row.model, row.tenant


def plain(columns: tuple[str, ...], line: bytes) -> Row:
    row = _plain.decode(line)
    values = tuple(getattr(row, name) for name in columns)
    if None in values:
        raise ValueError(f"no {columns[values.index(None)]}")
    return values


def ledger(row: Row) -> Row:
    """A row of the ledger's table `usage`, in the order of LEDGER_COLUMNS."""
    at, prompt, output, model, tenant = row
    return float(at), float(prompt), float(output), str(model), str(tenant)


LEDGER = Format("Neaptide ledger", _USAGE, ledger, wall=True)
LEDGER_COLUMNS = "started_wall_s, prompt_tokens, output_tokens, model, tenant"


def table(header: list[str]) -> Format:
    """The rows of a CSV with these columns; those it does not know are passed over."""
    names = [name.strip() for name in header]
    known = tuple(name for name in (*NUMBERS, *LABELS) if name in names)
    readers: list[tuple[Callable[[str], float | str], int]] = [
        (_number if name in NUMBERS else str, names.index(name)) for name in known
    ]

    def parse(line: bytes) -> Row:
        fields = cells(line)
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} fields, {len(names)} in the first line")
        return tuple([read(fields[place]) for read, place in readers])

    return Format("CSV", known, parse)


def cells(line: bytes) -> list[str]:
    text = line.decode("utf-8").rstrip("\r\n")
    return next(csv.reader([text], strict=True)) if '"' in text else text.split(",")


def _number(text: str) -> float:
    if "_" in text:  # which Python's float takes
        raise ValueError(f"{text!r} is not a number")
    return float(text)
