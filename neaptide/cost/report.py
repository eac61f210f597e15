"""Questions to the ledger: single requests by the page, sums by anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import sqlalchemy as sa

from neaptide.cost import schema
from neaptide.cost.rows import HOUR_S, MODEL_KNOWN, SUMS, text, usage_of
from neaptide.errors import RequestError
from neaptide.types import Usage

By = Literal["tenant", "project", "key", "model", "outcome", "day"]
MAX_PAGE = 1000
KINDS = {
    "ok": "ok",
    "refused": "refused",
    "aborted": "aborted",
    "error": "failed",
    "timeout": "failed",
    "lost": "failed",
}
NAMES = ("tenant", "project", "key", "model", "outcome")


class UsageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """None and "" do not filter. Wall seconds, since <= started < until."""

    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    model: str | None = None
    outcome: str | None = None
    since_s: float | None = None
    until_s: float | None = None


class Receipt(NamedTuple):
    """A request and its charge at list prices; None where nothing was charged."""

    usage: Usage
    amount_nanos: int | None


class Page(NamedTuple):
    """`cursor` fetches the next page; None after the last."""

    receipts: tuple[Receipt, ...]
    cursor: str | None


class Total(msgspec.Struct, kw_only=True):
    """Sums over the requests of one `name` (a model, a tenant ..., a day as 2026-03-14, UTC)."""

    name: str
    requests: int = 0
    ok: int = 0
    refused: int = 0
    aborted: int = 0
    failed: int = 0  # error, timeout, lost
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    output_tokens: int = 0
    amount_nanos: int = 0


def page(connection: sa.Connection, where: UsageFilter, cursor: str | None, limit: int) -> Page:
    """Newest first (by start, then id), at most `limit` (<= MAX_PAGE) receipts, of requests before `cursor`.
    RequestError 400 for a cursor that is none of ours."""
    limit = max(1, min(limit, MAX_PAGE))
    table, charges = schema.usage, schema.charges
    order = (table.c.started_wall_s, table.c.request_id)
    query = (
        sa.select(table, charges.c.amount_nanos.label("amount_nanos"))
        .join_from(table, charges, charges.c.request_id == table.c.request_id, isouter=True)
        .where(*_named(table.c.model, where), *_between(where.since_s, where.until_s))
        .order_by(*(column.desc() for column in order))
        .limit(limit + 1)
    )
    if where.outcome and where.outcome != "ok":
        query = query.where(schema.NOT_OK)  # as the index says it
    if cursor:
        query = query.where(sa.tuple_(*order) < sa.tuple_(*_place(cursor)))
    rows = [row._asdict() for row in connection.execute(query)]
    receipts = tuple(Receipt(usage_of(row), row["amount_nanos"]) for row in rows[:limit])
    if len(rows) <= limit:
        return Page(receipts, None)
    last = receipts[-1].usage
    return Page(receipts, f"{last.started_wall_s!r}~{last.request_id}")


def _place(cursor: str) -> tuple[float, str]:
    started, _, request_id = cursor.partition("~")
    try:
        place = (float(started), text(request_id))
    except ValueError:
        place = (math.nan, "")
    if not math.isfinite(place[0]):
        raise RequestError(400, f"{cursor!r} is not a cursor of ours.", param="cursor", slug="invalid_cursor")
    return place


def totals(connection: sa.Connection, by: By, where: UsageFilter) -> tuple[Total, ...]:
    """By name, ascending."""
    found: dict[str, Total] = {}
    for query in _queries(by, where):
        for row in connection.execute(query):
            fields = row._asdict()
            name = _day(fields["name"]) if by == "day" else fields["name"]
            total = found.setdefault(name, Total(name=name))
            kind = KINDS[fields["outcome"]]
            setattr(total, kind, getattr(total, kind) + int(fields["requests"]))
            for column in SUMS:
                setattr(total, column, getattr(total, column) + int(fields[column]))
    return tuple(found[name] for name in sorted(found))


def _queries(by: By, where: UsageFilter) -> Iterator[sa.Select[Any]]:
    """Together they see each request of the filter once."""
    first = None if where.since_s is None else math.ceil(where.since_s / HOUR_S)
    last = None if where.until_s is None else math.floor(where.until_s / HOUR_S)
    if first is not None and last is not None and first >= last:
        yield _over_rows(by, where, where.since_s, where.until_s)
        return
    yield _over_hours(by, where, first, last)
    if first is not None and where.since_s != first * HOUR_S:
        yield _over_rows(by, where, where.since_s, first * HOUR_S)
    if last is not None and where.until_s != last * HOUR_S:
        yield _over_rows(by, where, last * HOUR_S, where.until_s)


def _over_hours(by: By, where: UsageFilter, first: int | None, last: int | None) -> sa.Select[Any]:
    """From hour `first` up to, not including, `last`."""
    table = schema.hourly
    name: sa.ColumnElement[Any] = table.c.hour // 24 if by == "day" else table.c[by]
    sums = [sa.func.sum(table.c[c]).label(c) for c in SUMS]
    query = sa.select(name.label("name"), table.c.outcome, *sums)
    query = query.where(*(table.c[n] == v for n in NAMES if (v := getattr(where, n))))
    if first is not None:
        query = query.where(table.c.hour >= first)
    if last is not None:
        query = query.where(table.c.hour < last)
    return query.group_by(sa.text("1"), table.c.outcome)


def _over_rows(by: By, where: UsageFilter, since_s: float | None, until_s: float | None) -> sa.Select[Any]:
    """As the hourly sums would show them."""
    table, charges = schema.usage, schema.charges
    hidden = sa.and_(table.c.outcome == "refused", table.c.status.not_in(MODEL_KNOWN))
    model = sa.case((hidden, ""), else_=table.c.model)
    name: sa.ColumnElement[Any] = model if by == "model" else table.c[by] if by != "day" else _day_number()
    columns = {c: table.c[c] for c in SUMS if c in table.c}
    sums = [sa.func.count().label("requests")]
    sums += [sa.func.sum(column).label(c) for c, column in columns.items()]
    sums += [sa.func.coalesce(sa.func.sum(charges.c.amount_nanos), 0).label("amount_nanos")]
    return (
        sa.select(name.label("name"), table.c.outcome, *sums)
        .join_from(table, charges, charges.c.request_id == table.c.request_id, isouter=True)
        .where(*_named(model, where), *_between(since_s, until_s))
        .group_by(sa.text("1"), table.c.outcome)
    )


def _day_number() -> sa.ColumnElement[Any]:
    return sa.cast(sa.func.floor(schema.usage.c.started_wall_s / (24 * HOUR_S)), sa.BigInteger)


def _named(model: sa.ColumnElement[str], where: UsageFilter) -> list[sa.ColumnElement[bool]]:
    columns: dict[str, sa.ColumnElement[str]] = {n: schema.usage.c[n] for n in NAMES} | {"model": model}
    return [columns[n] == v for n in NAMES if (v := getattr(where, n))]


def _between(since_s: float | None, until_s: float | None) -> list[sa.ColumnElement[bool]]:
    started = schema.usage.c.started_wall_s
    after = [] if since_s is None else [started >= since_s]
    return after if until_s is None else [*after, started < until_s]


def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(int(number) * 24 * HOUR_S))
