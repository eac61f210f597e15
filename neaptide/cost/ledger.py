"""The ledger: what every request was and what it cost, exactly once.

Synchronous; control calls it from a worker thread. One thread writes; readers may be others (SQLite's WAL lets them).
The journal's position stands in the same transaction as its rows: whatever is read twice after a crash is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from neaptide.clock import Clock
from neaptide.cost import leases, migrate, report, schema
from neaptide.cost.database import Database, connect
from neaptide.cost.meter import charge
from neaptide.cost.prices import PriceBook, PriceList, Rate
from neaptide.cost.report import By, Page, Receipt, Total, UsageFilter
from neaptide.cost.rows import hourly_rows, sound, text, usage_row
from neaptide.journal import Located
from neaptide.types import Begin, Usage

SWEEP_ROWS = 5000  # deleted in one transaction: the writer is held up for some ms, not for a year's worth


__all__ = ["By", "Ledger", "Page", "Position", "Receipt", "Taken", "Total", "UsageFilter", "open_ledger"]


class Position(NamedTuple):
    """How far a journal has been taken: all of the segments before, and `offset` bytes of this one."""

    segment: int
    offset: int


class Taken(NamedTuple):
    """What a batch added. A batch that had been taken before adds nothing."""

    rows: int
    begins: int


class Ledger:
    """Open with open_ledger(). Every method raises StorageError when the database fails; nothing is half done then.

    `on_paid(journal, by budget)`: once what a batch's requests paid from budgets is in the database."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self.database, self._clock = database, clock
        self.on_paid: Callable[[str, Mapping[str, int]], None] | None = None
        self.prices = PriceBook(())
        with database.read() as connection:
            self.prices = _price_book(connection)

    def close(self) -> None:
        self.database.close()

    # -- taking the journal

    def take(self, journal: str, segment: int, records: Sequence[Located], offset: int) -> Taken:
        """Adds what `records` (of one segment, in order) say beyond the kept position, and moves it to `offset`."""
        with self.database.write() as connection:
            at = self._locked_position(connection, journal)
            if (segment, offset) <= at:
                return Taken(0, 0)
            fresh = [r.value for r in records if segment > at.segment or r.end > at.offset]
            begins, ends, closed = _paired(fresh)
            added = self._add(connection, ends)
            paid = leases.spend(self.database, connection, journal, added)
            self._forget_begins(connection, journal, closed)
            self.database.insert_new(connection, schema.open_begins, [_begin_row(journal, b) for b in begins])
            connection.execute(
                schema.journal_offsets.update()
                .where(schema.journal_offsets.c.journal == journal)
                .values(segment=segment, offset=offset, updated_s=self._clock.wall_s())
            )
        if paid and self.on_paid is not None:
            self.on_paid(journal, paid)
        return Taken(len(added), len(begins))

    def position(self, journal: str) -> Position:
        """Where to go on reading; (0, 0) for a journal never seen."""
        with self.database.read() as connection:
            return _position(connection, journal, lock=False) or Position(0, 0)

    def open_begins(self, journal: str) -> tuple[Begin, ...]:
        """Requests of `journal` that have begun and not ended, as far as it has been taken."""
        table = schema.open_begins
        query = sa.select(table.c.begin).where(table.c.journal == journal).order_by(table.c.request_id)
        with self.database.read() as connection:
            return tuple(msgspec.json.decode(row, type=Begin) for row in connection.scalars(query))

    def open_journals(self) -> tuple[str, ...]:
        """Journals that have open begins, by name."""
        column = schema.open_begins.c.journal
        with self.database.read() as connection:
            return tuple(connection.scalars(sa.select(column).distinct().order_by(column)))

    def close_begins(self, journal: str, usages: Iterable[Usage]) -> int:
        """Ends open begins with these rows; those that are not open (any more) are passed over. The rows added."""
        given = {u.request_id: u for u in usages}
        table = schema.open_begins
        with self.database.write() as connection:
            self._locked_position(connection, journal)
            still = set(connection.scalars(sa.select(table.c.request_id).where(table.c.journal == journal)))
            ends = [u for i, u in given.items() if i in still]
            added = self._add(connection, ends)
            self._forget_begins(connection, journal, [u.request_id for u in ends])
        return len(added)

    def _add(self, connection: sa.Connection, usages: Sequence[Usage]) -> Collection[Usage]:
        """Rows, charges and hourly sums of what is not there yet; which these are."""
        unique = {u.request_id: u for u in map(sound, reversed(usages))}  # the first of equals stands
        known = self.database.among(schema.usage.c.request_id, list(unique))
        for request_id in connection.scalars(sa.select(schema.usage.c.request_id).where(known)):
            del unique[request_id]
        rows, charges = [], []
        for usage in reversed(unique.values()):
            prices = self.prices.of(usage.price_version, usage.started_wall_s)
            rows.append(usage_row(usage, prices.version))
            if charged := charge(usage, prices):
                charges.append(msgspec.structs.asdict(charged))
        self.database.insert_new(connection, schema.usage, rows)
        self.database.insert_new(connection, schema.charges, charges)
        amounts = {c["request_id"]: c["amount_nanos"] for c in charges}
        self.database.add_up(connection, schema.hourly, hourly_rows(rows, amounts))
        return unique.values()

    def _locked_position(self, connection: sa.Connection, journal: str) -> Position:
        at = _position(connection, journal, lock=True)
        if at is None:
            first = {"journal": journal, "segment": 0, "offset": 0, "updated_s": self._clock.wall_s()}
            self.database.insert_new(connection, schema.journal_offsets, [first])
            at = _position(connection, journal, lock=True)
        return at or Position(0, 0)

    def _forget_begins(self, connection: sa.Connection, journal: str, ids: Sequence[str]) -> None:
        table = schema.open_begins
        gone = self.database.among(table.c.request_id, list(map(text, ids)))
        connection.execute(table.delete().where(table.c.journal == journal, gone))

    # -- prices

    def set_prices(self, rates: Mapping[str, Rate], currency: str) -> int:
        """The version in force from now on: the latest where nothing has changed, else a new one. The first one also
        prices what came before it."""
        latest = self.prices.latest
        if latest.version and (latest.rates, latest.currency) == (dict(rates), currency):
            return latest.version
        if not latest.version and not rates:
            return 0
        with self.database.write() as connection:
            newest = connection.scalar(sa.select(sa.func.max(schema.price_versions.c.version))) or 0
            since_s = self._clock.wall_s() if newest else 0.0
            version = {"version": newest + 1, "since_s": since_s, "currency": currency}
            connection.execute(schema.price_versions.insert(), [version])
            rows = [{"version": newest + 1, "model": m, **msgspec.structs.asdict(r)} for m, r in rates.items()]
            if rows:
                connection.execute(schema.prices.insert(), rows)
            self.prices = _price_book(connection)
        return newest + 1

    # -- reports

    def usage(self, where: UsageFilter | None = None, *, cursor: str | None = None, limit: int = 100) -> Page:
        """Newest first, at most `limit` (<= MAX_PAGE) receipts a page. RequestError 400 for a foreign cursor."""
        with self.database.read() as connection:
            return report.page(connection, where or UsageFilter(), cursor, limit)

    def totals(self, by: By, where: UsageFilter | None = None) -> tuple[Total, ...]:
        """Sums by name. Whole hours come from the hourly sums, which outlive the rows; the hours that `since_s` and
        `until_s` cut come from the rows."""
        with self.database.read() as connection:
            return report.totals(connection, by, where or UsageFilter())

    def count(self) -> int:
        """Requests ever taken, those forgotten since included."""
        with self.database.read() as connection:
            return int(connection.scalar(sa.select(sa.func.sum(schema.hourly.c.requests))) or 0)

    def forget(self, before_wall_s: float) -> int:
        """Deletes usage rows and charges of requests that started before; the hourly sums stay. How many rows."""
        table = schema.usage
        old = sa.select(table.c.request_id).where(table.c.started_wall_s < before_wall_s).limit(SWEEP_ROWS)
        gone = 0
        while True:
            with self.database.write() as connection:
                ids = list(connection.scalars(old))
                for rows in (schema.charges, table):
                    connection.execute(rows.delete().where(self.database.among(rows.c.request_id, ids)))
            gone += len(ids)
            if len(ids) < SWEEP_ROWS:
                return gone


def open_ledger(url: str, state_dir: Path, clock: Clock) -> Ledger:
    """Connects, copies and migrates where the schema is older, and makes sure of the default organisation.

    `url` is settings.ledger.url: "" is SQLite at state_dir/ledger.db. StorageError for a schema newer than this code.
    """
    database = connect(url, state_dir / "ledger.db")
    try:
        migrate.upgrade(database, clock.wall_s())
        with database.write() as connection:
            _default_rows(database, connection, clock.wall_s())
        return Ledger(database, clock)
    except BaseException:
        database.close()
        raise


def _default_rows(database: Database, connection: sa.Connection, now_s: float) -> None:
    common = {"id": "default", "name": "default", "created_s": now_s}
    within = {**common, "organisation_id": "default"}
    database.insert_new(connection, schema.organisations, [common])
    database.insert_new(connection, schema.teams, [within])
    database.insert_new(connection, schema.projects, [{**within, "team_id": "default"}])


def _position(connection: sa.Connection, journal: str, *, lock: bool) -> Position | None:
    table = schema.journal_offsets
    query = sa.select(table.c.segment, table.c.offset).where(table.c.journal == journal)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return Position(*row) if row else None


def _paired(records: Sequence[Begin | Usage]) -> tuple[list[Begin], list[Usage], list[str]]:
    """(begins left open, ends, ids of ends whose begin came in an earlier batch)."""
    begins: dict[str, Begin] = {}
    ends: list[Usage] = []
    closed: list[str] = []
    for record in records:
        if isinstance(record, Begin):
            begins[record.request_id] = record
        else:
            ends.append(record)
            if begins.pop(record.request_id, None) is None:
                closed.append(record.request_id)
    return list(begins.values()), ends, closed


def _begin_row(journal: str, begin: Begin) -> dict[str, Any]:
    return {"journal": journal, "request_id": text(begin.request_id), "begin": msgspec.json.encode(begin).decode()}


def _price_book(connection: sa.Connection) -> PriceBook:
    versions = connection.execute(sa.select(schema.price_versions)).mappings().all()
    rates: dict[int, dict[str, Rate]] = {row["version"]: {} for row in versions}
    for row in connection.execute(sa.select(schema.prices)).mappings():
        rates[row["version"]][row["model"]] = Rate(row["prompt_nanos"], row["cached_nanos"], row["output_nanos"])
    return PriceBook([PriceList(v["version"], v["since_s"], v["currency"], rates[v["version"]]) for v in versions])
