"""A backup is whole, private and checked; a restore takes nothing away and trusts no archive."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import stat
import tarfile
import threading
from pathlib import Path

import pytest

from neaptide.control import backup
from neaptide.errors import ConfigError, StorageError
from neaptide.fleet.state import StateDir
from tests.cli_run import cli


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with a ledger in WAL mode, a journal and what must not be kept."""
    root = tmp_path / "state"
    directory = StateDir(root)
    directory.create()
    for name in ("key", "admin-token", "pepper"):
        directory.secret(root / name)
    directory.next_epoch()
    (root / "config.json").write_text('{"text": "models: {guide: {}}"}')
    segment = root / "journal" / "gateway-0-1" / "00000001.log"
    segment.parent.mkdir()
    segment.write_bytes(b"12345678 B {}\n" + bytes(1 << 20))
    (root / "log" / "access.jsonl").write_text("{}\n")
    with contextlib.closing(sqlite3.connect(root / "ledger.db")) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE usage (id INTEGER PRIMARY KEY, note TEXT)")
        db.executemany("INSERT INTO usage (note) VALUES (?)", [("x" * 100,)] * 500)
        db.commit()
    return root


def rows(state: Path) -> int:
    with contextlib.closing(sqlite3.connect(state / "ledger.db")) as db:
        return int(db.execute("SELECT count(*) FROM usage").fetchone()[0])


def contents(state: Path) -> dict[str, bytes]:
    names = ("key", "admin-token", "pepper", "config.json", "epoch", "journal/gateway-0-1/00000001.log")
    return {name: (state / name).read_bytes() for name in names}


def test_what_was_backed_up_comes_back(state: Path, tmp_path: Path) -> None:
    made = backup.create(state)
    assert stat.S_IMODE(Path(made.path).stat().st_mode) == 0o600
    assert backup.verify(Path(made.path)).sha256 == made.sha256
    backup.restore(Path(made.path), tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == contents(state)
    assert rows(tmp_path / "elsewhere") == 500
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "elsewhere" / "key").stat().st_mode) == 0o600


def test_logs_sockets_and_caches_stay_out(state: Path) -> None:
    with tarfile.open(backup.create(state).path) as tar:
        assert {name.partition("/")[0] for name in tar.getnames()} == {
            "manifest.json", "key", "admin-token", "pepper", "config.json", "epoch", "journal", "ledger.db",
        }  # fmt: skip


def test_a_ledger_that_is_being_written_is_copied_whole(state: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(state / "ledger.db", timeout=30)) as db:
            while not stop.is_set():
                db.executemany("INSERT INTO usage (note) VALUES (?)", [("y" * 100,)] * 20)  # twenty or none
                db.commit()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        made = [backup.create(state, state / f"{n}.tar.gz") for n in range(3)]
    finally:
        stop.set()
        writer.join()
    for report in made:
        target = state.with_name(Path(report.path).stem)
        backup.restore(Path(report.path), target)
        assert rows(target) % 20 == 0


def test_what_stood_there_is_moved_aside(state: Path) -> None:
    made = backup.create(state)
    archive = Path(made.path).replace(state.parent / "kept.tar.gz")
    (state / "key").write_text("another\n")
    report = backup.restore(archive, state)
    (aside,) = state.parent.glob("state.before-*")
    assert (aside / "key").read_text() == "another\n"
    assert str(aside) in report.notes[0]
    assert (state / "key").read_text() != "another\n"


def test_a_running_service_is_not_restored_over(state: Path) -> None:
    made = backup.create(state)
    lock = StateDir(state).lock()
    with pytest.raises(StorageError, match="in use") as refused:
        backup.restore(Path(made.path), state)
    assert refused.value.code == "E523"
    assert lock > 0


def test_an_existing_archive_is_not_overwritten(state: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        backup.create(state, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_text() == "mine"


def test_a_directory_without_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a state directory"):
        backup.create(tmp_path)


def test_a_damaged_ledger_is_found(state: Path) -> None:
    pages = bytearray((state / "ledger.db").read_bytes())
    pages[4096:8192] = b"\xff" * 4096
    (state / "ledger.db").write_bytes(bytes(pages))
    assert backup.quick_check(state / "ledger.db") != ""


@pytest.mark.parametrize("cut", [10, 400, -30])
def test_a_truncated_archive_is_refused_and_nothing_is_restored(state: Path, tmp_path: Path, cut: int) -> None:
    archive = Path(backup.create(state).path)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(StorageError) as refused:
        backup.restore(archive, tmp_path / "new")
    assert refused.value.code == "E520"
    assert not (tmp_path / "new").exists()


def forged(state: Path, tmp_path: Path, name: str, data: bytes, listed: str) -> Path:
    """An archive whose manifest lists `listed` and whose one file is `name`."""
    entry = {"path": listed, "bytes": len(data), "sha256": "0" * 64}
    manifest = json.dumps({"format": 1, "version": "0", "made_wall_s": 0, "files": [entry]}).encode()
    path = tmp_path / "forged.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member, content in (("manifest.json", manifest), (name, data)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("../evil", "../evil"),
        ("/tmp/evil", "/tmp/evil"),
        ("journal/../../evil", "journal/../../evil"),
        ("run/supervisor.sock", "run/supervisor.sock"),
        ("key", "pepper"),
        ("key", "key"),  # its checksum is wrong
    ],
)
def test_a_forged_archive_writes_nothing(state: Path, tmp_path: Path, name: str, listed: str) -> None:
    with pytest.raises(StorageError) as refused:
        backup.restore(forged(state, tmp_path, name, b"evil", listed), tmp_path / "new")
    assert refused.value.code == "E520"
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_links_in_an_archive_are_refused(state: Path, tmp_path: Path) -> None:
    path = tmp_path / "links.tar.gz"
    entry = {"path": "key", "bytes": 0, "sha256": "0" * 64}
    manifest = json.dumps({"format": 1, "version": "0", "made_wall_s": 0, "files": [entry]}).encode()
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("manifest.json")
        info.size = len(manifest)
        tar.addfile(info, io.BytesIO(manifest))
        link = tarfile.TarInfo("key")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(StorageError):
        backup.verify(path)


def test_the_command_line_makes_checks_and_restores(state: Path, tmp_path: Path) -> None:
    archive = tmp_path / "b.tar.gz"
    made = cli("backup", "create", "--out", str(archive), "--state", str(state), "--json")
    assert json.loads(made.stdout)["path"] == str(archive)
    checked = cli("backup", "verify", str(archive), "--json")
    assert json.loads(checked.stdout)["sha256"] == json.loads(made.stdout)["sha256"]
    asked = cli("backup", "restore", str(archive), "--state", str(state), given="n\n")
    assert asked.returncode == 130
    restored = cli("backup", "restore", str(archive), "--state", str(state), "--yes")
    assert (restored.returncode, "restored: 7 files" in restored.stdout) == (0, True)
    archive.write_bytes(b"no archive")
    broken = cli("backup", "verify", str(archive))
    assert (broken.returncode, "error[E520]" in broken.stderr) == (1, True)
