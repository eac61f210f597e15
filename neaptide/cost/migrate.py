"""Bringing a ledger to this version's schema: a copy first, then all steps in one transaction.

alembic is imported where a step is to be run, which is seldom: importing it takes 80 ms of each start of control.
A step's file name begins with its revision, and the newest sorts last.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from neaptide.cost.database import Database
from neaptide.errors import StorageError

KEPT_COPIES = 3
HERE = Path(__file__).parent / "migrations"

log = logging.getLogger("neaptide.ledger")


def revisions(steps: Path = HERE) -> list[str]:
    """All that this version knows, oldest first; the last is what its code works with."""
    return sorted(path.name.partition("_")[0] for path in (steps / "versions").glob("[0-9]*_*.py"))


def current(connection: sa.Connection) -> str:
    """The revision the database is at; "" for an empty one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return ""
    return str(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() or "")


def upgrade(database: Database, now_s: float, *, steps: Path = HERE) -> Path | None:
    """Brings the schema to the newest of `steps`. The path of the copy made before; None where nothing was to be done,
    or nothing could be lost.

    StorageError where the ledger was written by a newer version. PostgreSQL is not copied here (its DDL is
    transactional: a step that fails leaves nothing behind).
    """
    with database.read() as connection:
        at = current(connection)
    known = revisions(steps)
    if at == known[-1]:
        return None
    if at and at not in known:
        raise StorageError(
            f"the ledger {database.label} is at revision {at}, this version knows up to {known[-1]}",
            why="a newer Neaptide has written it",
            fix="install that version again, or put back a copy: ledger.db.bak-..., `neaptide backup restore`",
            code="E513",
        )
    copy = _copy(database.path, at, now_s) if at and database.path else None
    with database.write() as connection:
        _run(connection, steps)
    return copy


def copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy of a database that others go on writing (SQLite's backup API), synced, mode 0600. Atomic: no
    half file under `target` whatever happens."""
    part = target.with_name(target.name + ".part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(part)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, nothing beside it
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, sqlite3.Error) as e:
        raise StorageError(
            f"{target} cannot be written: {e}", why="the ledger is copied first", fix="free disk space", code="E514"
        ) from e
    finally:
        part.unlink(missing_ok=True)


def _copy(path: Path, revision: str, now_s: float) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    target = path.with_name(f"{path.name}.bak-{revision}-{stamp}")
    copy_sqlite(path, target)
    log.info("the ledger was copied to %s before its migration", target)
    copies = sorted(path.parent.glob(f"{path.name}.bak-*"), key=lambda p: p.stat().st_mtime)
    for old in copies[:-KEPT_COPIES]:
        old.unlink()
    return target


def _run(connection: sa.Connection, steps: Path) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(steps).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
