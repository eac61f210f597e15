"""A backup is whole, consistent and private, or it is not there; a restore puts back exactly what was in it."""

import asyncio
import fcntl
import gzip
import io
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from neaptide.clock import RealClock
from neaptide.control import backup
from neaptide.control.keys import KeyStore
from neaptide.cost.intake import Intake
from neaptide.cost.ledger import open_ledger
from neaptide.errors import NeaptideError, StorageError
from neaptide.journal import MAX_RECORD, Journal, encode
from neaptide.types import Begin, Usage

PEPPER = "ab" * 32


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory at rest, with something of everything."""
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    files = {"key": "sk-" + "k" * 43, "admin-token": "t", "pepper": PEPPER, "config.json": "{}", "epoch": "7\n"}
    for name, text in files.items():
        (root / name).write_text(text)
        (root / name).chmod(0o600)
    for name in ("run", "log", "cache"):
        (root / name).mkdir()
        (root / name / "not-in-a-backup").write_text("x" * 1000)
    journal = root / "journal" / "gateway-0-7"
    journal.mkdir(parents=True)
    (journal / "00000001.log").write_bytes(encode(Usage(request_id="r2")) + bytes(5000))
    ledger = open_ledger("", root, RealClock())
    KeyStore(ledger, PEPPER, RealClock()).create("ci")
    ledger.close()
    return root


def content(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def keys(root: Path) -> list[str]:
    ledger = open_ledger("", root, RealClock())
    names = [k.name for k in KeyStore(ledger, PEPPER, RealClock()).list()]
    ledger.close()
    return names


def test_what_is_restored_is_what_was_backed_up(state: Path, tmp_path: Path) -> None:
    expected = len(content(state)) - 3  # run/, log/, cache/
    report = backup.create(state, tmp_path / "b.tar.gz")
    assert report.files == expected
    assert stat.S_IMODE((tmp_path / "b.tar.gz").stat().st_mode) == 0o600
    assert backup.verify(tmp_path / "b.tar.gz").sha256 == report.sha256

    backup.restore(tmp_path / "b.tar.gz", tmp_path / "new")
    there = content(tmp_path / "new")
    for name, data in content(state).items():
        if not name.startswith(("run/", "log/", "cache/", "ledger.db")):
            assert there.pop(name) == data
    assert list(there) == ["ledger.db"]
    assert keys(tmp_path / "new") == ["ci"]
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    for path in filter(Path.is_file, (tmp_path / "new").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_a_backup_made_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Everything recorded before it began is in it once: in the ledger, in the journal, or in both."""
    root = tmp_path / "state"
    (root / "journal").mkdir(parents=True)
    (root / "pepper").write_text(PEPPER)
    ledger = open_ledger("", root, RealClock())
    stop = threading.Event()

    def take() -> None:
        intake = Intake(ledger, root / "journal", RealClock())
        while not stop.is_set():
            intake.pull()
            intake.remove_taken(0.0)

    async def body() -> int:
        taking = asyncio.get_running_loop().run_in_executor(None, take)
        journal = Journal(root / "journal" / "gateway-0-1", 16 * MAX_RECORD, asyncio.get_running_loop())
        made, before, written = None, 0, 0
        while made is None or not made.done():
            journal.begin(Begin(request_id=f"r{written:06}"))
            journal.end(Usage(request_id=f"r{written:06}", error="x" * 100))
            written += 1
            await asyncio.sleep(0)
            if written == 800:
                before = written
                made = asyncio.get_running_loop().run_in_executor(None, backup.create, root, tmp_path / "b.tar.gz")
        await made
        stop.set()
        await taking
        await journal.close()
        return before

    before = asyncio.run(body())
    ledger.close()
    backup.restore(tmp_path / "b.tar.gz", tmp_path / "new")
    ledger = open_ledger("", tmp_path / "new", RealClock())
    intake = Intake(ledger, tmp_path / "new" / "journal", RealClock())
    for journal in intake.dead():
        intake.close_dead(journal, {})
    found: Counter[str] = Counter()
    cursor = None
    while True:
        page = ledger.usage(cursor=cursor, limit=1000)
        found.update(r.usage.request_id for r in page.receipts if r.usage.outcome == "ok")
        cursor = page.cursor
        if cursor is None:
            break
    assert set(found.values()) == {1}
    assert {f"r{i:06}" for i in range(before)} <= set(found)
    assert ledger.count() - sum(found.values()) <= 1  # a request cut in two by the copy is lost, and says so
    ledger.close()


def _flipped(data: bytes, part: float) -> bytes:
    """One byte changed at or after `part` of the file, so that it unpacks to something else or not at all: in a run of
    zeros another match distance can give the same bytes, which is no damage."""
    for at in range(int(part * (len(data) - 1)), len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            if gzip.decompress(changed) != gzip.decompress(data):
                return changed
        except (OSError, EOFError, zlib.error):
            return changed
    raise AssertionError("no byte matters")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_damaged_archive_is_refused_and_restores_nothing(state: Path, tmp_path: Path, part: float) -> None:
    archive = tmp_path / "b.tar.gz"
    backup.create(state, archive)
    data = archive.read_bytes()
    archive.write_bytes(_flipped(data, part))
    with pytest.raises(StorageError, match="not a good backup"):
        backup.verify(archive)
    with pytest.raises(StorageError):
        backup.restore(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="not a good backup"):
        backup.verify(archive)


def rebuilt(archive: Path, target: Path, extra: tarfile.TarInfo, data: bytes = b"", manifest: bytes = b"") -> None:
    with tarfile.open(archive) as old, tarfile.open(target, "w:gz") as new:
        for member in old:
            source = old.extractfile(member)
            assert source is not None
            if member.name == backup.MANIFEST and manifest:
                member.size = len(manifest)
                source = io.BytesIO(manifest)  # type: ignore[assignment]
            new.addfile(member, source)
        extra.size = len(data)
        new.addfile(extra, io.BytesIO(data))


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "journal/../../outside", "unknown"])
def test_an_archive_cannot_write_where_it_should_not(state: Path, tmp_path: Path, name: str) -> None:
    good = tmp_path / "good.tar.gz"
    backup.create(state, good)
    entry = backup.Entry(path=name, bytes=4, sha256="0" * 64)
    with tarfile.open(good) as tar:
        old = tar.extractfile(backup.MANIFEST)
        assert old is not None
        manifest = msgspec.json.decode(old.read(), type=backup.Manifest)
    named = msgspec.json.encode(msgspec.structs.replace(manifest, files=(*manifest.files, entry)))
    for text in (b"", named):
        rebuilt(good, tmp_path / "bad.tar.gz", tarfile.TarInfo(name), b"evil", text)
        with pytest.raises(StorageError):
            backup.restore(tmp_path / "bad.tar.gz", tmp_path / "new" / "state")
    link = tarfile.TarInfo("journal/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    rebuilt(good, tmp_path / "bad.tar.gz", link)
    with pytest.raises(StorageError):
        backup.restore(tmp_path / "bad.tar.gz", tmp_path / "new" / "state")
    assert list((tmp_path / "new").rglob("*")) == []
    assert not (tmp_path / "outside").exists()


def test_a_restore_moves_aside_what_was_there(state: Path, tmp_path: Path) -> None:
    backup.create(state, tmp_path / "b.tar.gz")
    (state / "epoch").write_text("9\n")
    before = content(state)
    report = backup.restore(tmp_path / "b.tar.gz", state)
    (aside,) = tmp_path.glob("state.before-*")
    assert str(aside) in report.notes[0]
    assert content(aside) == before
    assert (state / "epoch").read_text() == "7\n"


def test_a_restore_keeps_the_certificates_and_says_what_is_good_again(state: Path, tmp_path: Path) -> None:
    backup.create(state, tmp_path / "b.tar.gz")
    (state / "ca").mkdir(mode=0o700)
    (state / "ca" / "gateway.key").write_text("made after the backup")
    (state / "ca" / "gateway.key").chmod(0o600)
    _, kept, again = backup.restore(tmp_path / "b.tar.gz", state).notes
    assert (state / "ca" / "gateway.key").read_text() == "made after the backup"
    assert stat.S_IMODE((state / "ca" / "gateway.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "ca").stat().st_mode) == 0o700
    assert "ca/ was kept" in kept
    assert "revoked since the backup" in again


def test_a_directory_in_use_is_not_restored_into(state: Path, tmp_path: Path) -> None:
    backup.create(state, tmp_path / "b.tar.gz")
    with (state / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = content(state)
        with pytest.raises(StorageError, match="in use"):
            backup.restore(tmp_path / "b.tar.gz", state)
        assert content(state) == before


def test_an_archive_is_never_written_over(state: Path, tmp_path: Path) -> None:
    backup.create(state, tmp_path / "b.tar.gz")
    before = (tmp_path / "b.tar.gz").read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        backup.create(state, tmp_path / "b.tar.gz")
    assert (tmp_path / "b.tar.gz").read_bytes() == before


def test_what_is_no_state_directory_is_not_backed_up(tmp_path: Path) -> None:
    with pytest.raises(NeaptideError, match="not a state directory"):
        backup.create(tmp_path, tmp_path / "b.tar.gz")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"DISK-FULL NOT TESTED: mounting a tmpfs needs root: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def test_a_full_disk_leaves_no_half_archive(state: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="failed"):
        backup.create(state, small_disk / "b.tar.gz")
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_leaves_no_half_restore(state: Path, tmp_path: Path, small_disk: Path) -> None:
    backup.create(state, tmp_path / "b.tar.gz")
    with pytest.raises(StorageError):
        backup.restore(tmp_path / "b.tar.gz", small_disk / "new")
    assert list(small_disk.iterdir()) == []


def test_a_killed_backup_leaves_nothing_that_looks_like_one(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (state / "journal" / "gateway-0-7" / "00000002.log").write_bytes(bytes(range(256)) * 400_000)
    code = "import sys; from pathlib import Path; from neaptide.control import backup; print(1, flush=True);"
    code += "backup.create(Path(sys.argv[1]), Path(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(state), str(out / "b.tar.gz")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not list(out.glob(".backup-*/files/journal")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (out / "b.tar.gz").exists()
    backup.create(state, out / "b.tar.gz")
    assert [p.name for p in out.iterdir()] == ["b.tar.gz"]  # and the next one clears up
