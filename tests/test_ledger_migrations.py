"""Opening a ledger: made, copied before it is changed, refused when it is newer than the code."""

import importlib.util
import os
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from neaptide.clock import VirtualClock
from neaptide.cost import migrate, schema
from neaptide.cost.database import Database, connect
from neaptide.cost.ledger import open_ledger
from neaptide.errors import StorageError
from neaptide.journal import Located
from neaptide.types import Usage

CLOCK = VirtualClock(wall_s=1_790_000_000.0)
NEWEST = migrate.revisions()[-1]


def at_revision(path: Path, revision: str) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = ?", (revision,))


def test_the_steps_lead_to_the_tables_that_the_code_works_with(tmp_path: Path) -> None:
    ledger = open_ledger("", tmp_path, CLOCK)
    with ledger.database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
        assert migrate.current(connection) == migrate.revisions()[-1]
        assert MigrationContext.configure(connection).get_current_revision() == migrate.revisions()[-1]
    ledger.close()


def test_a_new_ledger_is_private_durable_and_has_its_default_rows(tmp_path: Path) -> None:
    ledger = open_ledger("", tmp_path, CLOCK)
    with ledger.database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        for table in (schema.organisations, schema.teams, schema.projects):
            assert connection.scalars(sa.select(table.c.id)).all() == ["default"]
    for path in tmp_path.glob("ledger.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ledger.close()
    assert not list(tmp_path.glob("*.bak-*"))  # there was nothing to lose


def test_opening_again_changes_nothing(tmp_path: Path) -> None:
    ledger = open_ledger("", tmp_path, CLOCK)
    ledger.take("j", 1, [Located(0, 9, Usage(request_id="r1"))], 9)
    ledger.close()
    ledger = open_ledger("", tmp_path, CLOCK)
    assert ledger.count() == 1
    ledger.close()
    assert not list(tmp_path.glob("*.bak-*"))


def test_a_ledger_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    open_ledger("", tmp_path, CLOCK).close()
    at_revision(tmp_path / "ledger.db", "9999")
    before = (tmp_path / "ledger.db").read_bytes()
    with pytest.raises(StorageError, match="revision 9999, this version knows up to"):
        open_ledger("", tmp_path, CLOCK)
    assert (tmp_path / "ledger.db").read_bytes() == before


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A ledger whose next step is yet to be run: the steps directory has one more than the ledger knows."""
    open_ledger("", tmp_path, CLOCK).close()
    steps = tmp_path / "migrations"
    subprocess.run(["cp", "-r", str(migrate.HERE), str(steps)], check=True)
    (steps / "versions" / "9000_next.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\n"
        f"revision, down_revision, branch_labels, depends_on = '9000', '{NEWEST}', None, None\n"
        "def upgrade():\n    op.add_column('meta', sa.Column('note', sa.Text()))\n"
    )
    return tmp_path


def test_a_copy_is_made_before_a_step_and_three_are_kept(older: Path) -> None:
    state = older
    database = connect("", state / "ledger.db")
    for i in range(5):
        with closing(sqlite3.connect(state / "ledger.db")) as db, db:
            db.execute("INSERT INTO meta VALUES (?, 'x')", (f"round {i}",))
        copy = migrate.upgrade(database, CLOCK.wall_s() + i, steps=state / "migrations")
        assert copy is not None
        assert copy.name == f"ledger.db.bak-{NEWEST}-20260921T14132{i}Z"
        os.utime(copy, (i, i))
        with closing(sqlite3.connect(copy)) as db:
            assert db.execute("SELECT name FROM meta ORDER BY name").fetchall()[-1] == (f"round {i}",)
            assert "note" not in [column[1] for column in db.execute("PRAGMA table_info(meta)")]
        with closing(sqlite3.connect(state / "ledger.db")) as db, db:
            assert "note" in [column[1] for column in db.execute("PRAGMA table_info(meta)")]
            db.execute("ALTER TABLE meta DROP COLUMN note")
        at_revision(state / "ledger.db", NEWEST)
    kept = sorted(path.name[-3:] for path in state.glob("*.bak-*"))
    assert kept == ["22Z", "23Z", "24Z"]
    assert not list(state.glob("*.part"))
    database.close()


def test_a_step_that_fails_leaves_the_ledger_as_it_was(older: Path) -> None:
    state = older
    step = state / "migrations" / "versions" / "9000_next.py"
    step.write_text(step.read_text() + "    op.execute('SELECT nonsense')\n")
    database = connect("", state / "ledger.db")
    with pytest.raises(StorageError, match="nonsense"):
        migrate.upgrade(database, CLOCK.wall_s(), steps=state / "migrations")
    with database.read() as connection:
        assert migrate.current(connection) == NEWEST
        assert "note" not in [c["name"] for c in sa.inspect(connection).get_columns("meta")]
    database.close()
    open_ledger("", state, CLOCK).close()


def test_a_ledger_of_the_first_schema_keeps_its_rows_through_the_steps_after_it(tmp_path: Path) -> None:
    steps = tmp_path / "migrations"
    subprocess.run(["cp", "-r", str(migrate.HERE), str(steps)], check=True)
    for path in steps.glob("versions/000[2-9]_*.py"):
        path.unlink()
    database = connect("", tmp_path / "ledger.db")
    migrate.upgrade(database, CLOCK.wall_s(), steps=steps)
    with database.write() as connection:
        columns = [c for c in schema.usage.columns if c.name not in ("paid", "cache", "price_millis")]
        values = {c.name: c.type.python_type() for c in columns} | {"request_id": "r1", "attempts": "[]"}
        connection.execute(sa.insert(schema.usage).values(values))
    database.close()
    ledger = open_ledger("", tmp_path, CLOCK)
    (receipt,) = ledger.usage().receipts
    assert (receipt.usage.request_id, receipt.usage.paid) == ("r1", ())
    ledger.close()


def test_a_copy_that_finds_no_room_leaves_no_half_file_and_stops_the_migration(tmp_path: Path) -> None:
    open_ledger("", tmp_path, CLOCK).close()
    target = tmp_path / "gone" / "copy.db"
    with pytest.raises(StorageError, match="cannot be written"):
        migrate.copy_sqlite(tmp_path / "ledger.db", target)
    (tmp_path / "broken.db").write_bytes(b"not a database, by any means" * 100)
    with pytest.raises(StorageError, match="not a database"):
        migrate.copy_sqlite(tmp_path / "broken.db", tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy.db*"))


def test_a_database_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="mysql is not a database we know"):
        open_ledger("mysql://host/db", tmp_path, CLOCK)


@pytest.mark.parametrize("given", ["someone:hunter2@127.0.0.1:1/db", "127.0.0.1:1/db?user=x&password=hunter2"])
def test_a_postgresql_that_cannot_be_reached_says_what_to_do_and_no_password(tmp_path: Path, given: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_ledger(f"postgresql://{given}", tmp_path, CLOCK)
    installed = importlib.util.find_spec("psycopg") is not None
    assert caught.value.code == ("E510" if installed else "E512")
    assert ("can be reached" if installed else 'pip install "neaptide[postgres]"') in caught.value.fix
    assert "hunter2" not in str(caught.value)


def test_a_database_is_named_without_what_its_url_asks_for() -> None:
    engine = sa.create_engine("sqlite:///file:ledger.db?uri=true")  # whatever the kind: it is not opened
    label = Database(engine, None).label
    assert "ledger.db" in label
    assert "uri=true" not in label


def test_a_state_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"ledger\.db"):
        open_ledger("", tmp_path / "file", CLOCK)
    (tmp_path / "ledger.db").write_text("something else entirely, long enough to be read as a header")
    with pytest.raises(StorageError, match="not a database"):
        open_ledger("", tmp_path, CLOCK)


def test_the_steps_are_in_the_package() -> None:
    names = {path.name for path in migrate.HERE.rglob("*.py")}
    assert {"__init__.py", "env.py"} < names
    assert (migrate.HERE / "versions" / "__init__.py").exists()
