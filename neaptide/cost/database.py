"""The ledger's database: SQLite in the state directory, or PostgreSQL by URL. What differs between them stays here.

SQLite runs in WAL with synchronous=FULL: a committed batch survives power loss, readers never wait for the writer.
Write transactions start with BEGIN IMMEDIATE: one that began by reading could otherwise not be upgraded beside another
writer, whatever the busy timeout.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from neaptide.errors import StorageError

BUSY_TIMEOUT_MS = 10_000


class Database:
    """An engine and its transactions. Every failure of the database comes out as StorageError."""

    def __init__(self, engine: sa.Engine, path: Path | None) -> None:
        self.engine = engine
        self.path = path  # of the SQLite file; None for PostgreSQL
        self.label = str(path) if path else engine.url.set(query={}).render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the database."""
        with self._explained(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is committed at the end of the block and rolled back if it raises."""
        with self._explained(), self.engine.connect() as connection:
            connection = connection.execution_options(neaptide_write=True)
            with connection.begin():
                yield connection

    def insert_new(self, connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
        """Rows whose primary key is there already are left as they are."""
        if rows:
            connection.execute(self._insert(table).on_conflict_do_nothing(), rows)

    def add_up(self, connection: sa.Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
        """Adds the other columns to those of the row with the same primary key, which is made if absent."""
        self.merge(connection, table, rows, add=[c.name for c in table.columns if not c.primary_key])

    def merge(
        self,
        connection: sa.Connection,
        table: sa.Table,
        rows: Sequence[dict[str, Any]],
        *,
        add: Sequence[str] = (),
        put: Sequence[str] = (),
    ) -> None:
        """Makes rows; where one with the same primary key is there, adds to its columns `add` and sets its columns
        `put`, and the others stay as they are."""
        if rows:
            statement = self._insert(table)
            changes = {name: table.c[name] + statement.excluded[name] for name in add}
            changes |= {name: statement.excluded[name] for name in put}
            keys = list(table.primary_key.columns)
            connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changes), rows)

    def among(self, column: sa.Column[str], values: Sequence[str]) -> sa.ColumnElement[bool]:
        """`column IN values` as one statement whatever their number: SQLite's driver keeps the last 128 statements, and
        one with 1,000 parameters takes 170 KiB."""
        if self.path:
            listed = sa.func.json_each(msgspec.json.encode(values).decode()).table_valued("value")
            return column.in_(sa.select(listed.c.value))
        return column == sa.any_(sa.literal(values, postgresql.ARRAY(sa.Text)))

    def close(self) -> None:
        self.engine.dispose()

    def _insert(self, table: sa.Table) -> sqlite.Insert:
        make: Callable[[sa.Table], Any] = sqlite.insert if self.path else postgresql.insert
        statement: sqlite.Insert = make(table)  # the two share the methods used here
        return statement

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.SQLAlchemyError as e:
            reason = str(getattr(e, "orig", None) or e).strip()
            raise StorageError(
                f"the ledger {self.label}: {reason}",
                why="usage waits in the journal meanwhile; nothing is lost",
                fix="free disk space" if "full" in reason else "see that the database can be reached and written",
                code="E510",
            ) from e


def connect(url: str, default: Path) -> Database:
    """The database of `ledger.url`; "" means SQLite at `default`, created 0600. Nothing is migrated yet."""
    if not url or url.startswith("sqlite"):
        path = Path(sa.make_url(url).database or default) if url else default
        return Database(_sqlite(path), path)
    if not url.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        raise StorageError(
            f"ledger.url: {url.partition(':')[0]} is not a database we know",
            why="the ledger is kept in SQLite or PostgreSQL",
            fix="write it as ledger.url: postgresql://user@host/name, or leave it out",
            code="E515",
        )
    if importlib.util.find_spec("psycopg") is None:
        raise StorageError(
            "ledger.url names PostgreSQL, and its driver is not installed",
            fix='pip install "neaptide[postgres]"',
            code="E512",
        )
    return Database(_postgresql(url), None)


def _sqlite(path: Path) -> sa.Engine:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its WAL the same mode
    except OSError as e:
        raise StorageError(f"the ledger {path}: {e.strerror}", fix=f"make {path.parent} writable", code="E510") from e
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        hide_parameters=True,  # no key's digest in a log
        connect_args={"timeout": BUSY_TIMEOUT_MS / 1000},
    )
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by _begin, not guessed by the driver
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")


def _begin(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("neaptide_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _postgresql(url: str) -> sa.Engine:
    parsed = sa.make_url(url).set(drivername="postgresql+psycopg")
    return sa.create_engine(
        parsed,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=3,
        max_overflow=2,
        # A server that has vanished must not hold the ledger's thread: it is an error, and tried again.
        connect_args={"connect_timeout": 10, "tcp_user_timeout": 30_000},
    )
