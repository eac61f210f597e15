"""Backup of the state directory: one tar.gz with a manifest; made while everything runs, verified before restoring.

In it: the ledger (SQLite's online backup), journal segments, keys' pepper, default key, admin tokens, the audit log and
the configuration in force. Not in it: run/, log/, cache/, backup/, and a PostgreSQL ledger, which has pg_dump.

The journal is copied before the ledger: a record is then in the copied journal, or the copied ledger has taken it, or
both, and intake is idempotent. The other order could miss a segment that is removed in between.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from neaptide import __version__
from neaptide.clock import mono_s, wall_s
from neaptide.control.port import BackupReport
from neaptide.errors import ConfigError, NeaptideError, StorageError

FORMAT = 1
MANIFEST = "manifest.json"
LEDGER = "ledger.db"
# A gateway's table is told anew at every start.
KEPT = ("key", "admin-token", "admins.json", "pepper", "config.json", "epoch")
DIRECTORIES = ("journal", "audit")
AUTHORITY = "ca"  # of `neaptide ca`: never in a backup, kept where it lies
MAX_MANIFEST = 16 << 20
MAX_FILES = 100_000


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str  # relative to the state directory
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    version: str  # of the Neaptide that wrote it
    made_wall_s: float
    files: tuple[Entry, ...]


def create(state: Path, out: Path | None = None) -> BackupReport:
    """A new archive at `out`, or state/backup/neaptide-<UTC time>.tar.gz, 0600, whole or not at all. Blocks: call it
    off the loop. StorageError when a file cannot be read or the disk is full; ConfigError where no state is."""
    began = mono_s()
    if not state.is_dir() or not any((state / name).exists() for name in (*KEPT, LEDGER)):
        raise ConfigError(f"{state} is not a state directory", code="E111", fix="pass --state DIR")
    target = out or state / "backup" / f"neaptide-{_stamp()}.tar.gz"
    if target.exists():
        raise StorageError(f"{target} exists already", code="E521", fix="choose another --out, or remove it")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _clear_after_the_killed(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".backup-{os.getpid()}-") as work:
            files = _snapshot(state, Path(work) / "files")
            _pack(Path(work) / "files", files, Path(work) / "archive")
            os.link(Path(work) / "archive", target)  # fails rather than replaces
    except (OSError, sqlite3.Error) as e:
        raise StorageError(f"the backup to {target} failed: {e}", code="E522", fix="neaptide doctor") from e
    notes = () if (state / LEDGER).exists() else (f"no {LEDGER} here: back a PostgreSQL ledger up with pg_dump",)
    return _report(target, len(files), began, notes)


def verify(archive: Path) -> BackupReport:
    """Reads every byte: checksums, nothing missing, nothing extra, and SQLite's own check of the ledger. StorageError
    E520 names the first thing that is wrong."""
    began = mono_s()
    with tempfile.TemporaryDirectory(prefix="neaptide-verify-") as work:
        manifest = _unpack(archive, Path(work))
        _check_ledger(Path(work), archive)
    return _report(archive, len(manifest.files), began, (f"written by neaptide {manifest.version}",))


def restore(archive: Path, state: Path) -> BackupReport:
    """Verify, then put the archive's files in `state`. What stood there is moved aside, never deleted; of it
    ca/ is kept in place, too. StorageError when something runs there."""
    began = mono_s()
    state = state.absolute()
    state.parent.mkdir(parents=True, exist_ok=True)
    with _stopped(state), tempfile.TemporaryDirectory(dir=state.parent, prefix=".restore-") as work:
        fresh = Path(work) / "state"
        fresh.mkdir(mode=0o700)
        manifest = _unpack(archive, fresh)
        _check_ledger(fresh, archive)
        notes = []
        if (state / AUTHORITY).is_dir():
            shutil.copytree(state / AUTHORITY, fresh / AUTHORITY, symlinks=True)
        if state.exists() and any(state.iterdir()):
            aside = state.with_name(f"{state.name}.before-{_stamp()}")
            state.rename(aside)
            notes.append(f"what stood there is in {aside}")
        elif state.exists():
            state.rmdir()
        fresh.rename(state)
    if (state / AUTHORITY).is_dir():
        notes.append(f"{AUTHORITY}/ was kept")  # the configuration may name its certificates
    notes.append("admin tokens and API keys that were revoked since the backup are good again: revoke them anew")
    return _report(archive, len(manifest.files), began, tuple(notes))


# --- writing ----------------------------------------------------------------------------------------------------------


def _clear_after_the_killed(parent: Path) -> None:
    """Half-made work of backups whose process is gone."""
    for left in parent.glob(".backup-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left)


def _snapshot(state: Path, into: Path) -> list[Entry]:
    """Copies of what belongs into a backup; journal first, then the ledger, the rest last: an epoch copied before the
    ledger could be given again to a journal that the ledger has already read from."""
    into.mkdir(mode=0o700)
    journal = [p for p in sorted((state / "journal").rglob("*")) if p.is_file() and not p.is_symlink()]
    for path in journal:
        copy = into / path.relative_to(state)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a segment the ledger has taken was removed meanwhile
            shutil.copyfile(path, copy)
    if (state / LEDGER).exists():
        _copy_ledger(state / LEDGER, into / LEDGER)
    _copy_audit(state / "audit", into / "audit")
    for path in (state / name for name in KEPT if (state / name).is_file()):
        shutil.copyfile(path, into / path.name)
    found = sorted(p for p in into.rglob("*") if p.is_file())
    return [_entry(p, into) for p in found]


def _copy_audit(source: Path, target: Path) -> None:
    """The lines and, before them, their head: a log that is longer than its head is whole. Intents stay, the one of
    this backup among them."""
    for path in (*source.glob("head.json"), *sorted(source.glob("*.jsonl"))):
        target.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the oldest may be dropped meanwhile
            shutil.copyfile(path, target / path.name)


def _copy_ledger(source: Path, target: Path) -> None:
    """SQLite's online backup: consistent while others write."""
    with contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)) as db:
        with contextlib.closing(sqlite3.connect(target)) as copy:
            db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, no -wal beside it


def _entry(path: Path, root: Path) -> Entry:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return Entry(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest)


def _pack(root: Path, files: list[Entry], archive: Path) -> None:
    manifest = Manifest(format=FORMAT, version=__version__, made_wall_s=wall_s(), files=tuple(files))
    (root.parent / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    fd = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as raw:
        with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as tar:
            tar.add(root.parent / MANIFEST, MANIFEST)
            for entry in files:
                tar.add(root / entry.path, entry.path)
        raw.flush()
        os.fsync(raw.fileno())


# --- reading ----------------------------------------------------------------------------------------------------------


def _unpack(archive: Path, into: Path) -> Manifest:
    """Every file of the manifest written below `into`, 0600, checked on the way; nothing else is ever written."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            manifest = _manifest(tar, archive)
            expected = {e.path: e for e in manifest.files}
            for member in tar:
                if member.name == MANIFEST:
                    continue
                entry = expected.pop(member.name, None)
                if entry is None or not member.isreg():
                    raise _damaged(archive, f"{member.name} is not in its manifest")
                _write(_open(tar, member), into, entry, archive)
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass  # to the end, where gzip's own checksum stands
    except (tarfile.TarError, zlib.error, OSError, EOFError) as e:
        raise _damaged(archive, str(e)) from e
    if expected:
        raise _damaged(archive, f"{next(iter(expected))} is missing")
    return manifest


def _manifest(tar: tarfile.TarFile, archive: Path) -> Manifest:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MAX_MANIFEST:
        raise _damaged(archive, f"it does not begin with {MANIFEST}")
    try:
        manifest = msgspec.json.decode(_open(tar, first).read(), type=Manifest)
    except ValueError as e:
        raise _damaged(archive, f"{MANIFEST}: {e}") from e
    if manifest.format != FORMAT:
        raise _damaged(archive, f"format {manifest.format}; this version reads format {FORMAT}")
    if len(manifest.files) > MAX_FILES or not all(_inside(e.path) for e in manifest.files):
        raise _damaged(archive, f"{MANIFEST} names paths outside the state directory")
    return manifest


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """The bytes of a regular member."""
    source = tar.extractfile(member)
    if source is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return source


def _inside(path: str) -> bool:
    parts = path.split("/")
    known = path in (*KEPT, LEDGER) or parts[0] in DIRECTORIES
    return known and all(part not in ("", ".", "..") for part in parts)


def _write(source: IO[bytes], into: Path, entry: Entry, archive: Path) -> None:
    target = into / entry.path
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), entry.bytes
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        while part := source.read(min(1 << 20, left + 1)):
            left -= len(part)
            if left < 0:
                break
            digest.update(part)
            out.write(part)
    if left or digest.hexdigest() != entry.sha256:
        raise _damaged(archive, f"{entry.path} differs from its checksum")


def _check_ledger(root: Path, archive: Path) -> None:
    if not (root / LEDGER).exists():
        return
    problem = quick_check(root / LEDGER)
    if problem:
        raise _damaged(archive, f"{LEDGER}: {problem}")


def quick_check(ledger: Path) -> str:
    """What SQLite finds wrong in `ledger`, "" when nothing. Reads it all; safe while others write."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as db:
            told = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as e:
        return str(e)
    return "" if told == ("ok",) else str(told[0] if told else "no answer")


@contextlib.contextmanager
def _stopped(state: Path) -> Iterator[None]:
    """Holds the state directory's lock, so that nothing starts there meanwhile; StorageError when something runs."""
    lock = state / "run" / "lock"
    if not lock.exists():
        yield
        return
    with lock.open("rb+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{state} is in use", why="a backup is restored into a stopped state directory", code="E523",
                fix=f"neaptide down --state {state}",
            ) from None  # fmt: skip
        yield


def _damaged(archive: Path, why: str) -> NeaptideError:
    return StorageError(f"{archive} is not a good backup", why=why, code="E520", fix="use another archive")


def _stamp() -> str:
    return datetime.datetime.fromtimestamp(wall_s(), datetime.UTC).strftime("%Y%m%dT%H%M%S-%f")


def _report(path: Path, files: int, began: float, notes: tuple[str, ...]) -> BackupReport:
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return BackupReport(
        path=str(path.absolute()), bytes=path.stat().st_size, files=files, sha256=digest,
        duration_s=round(mono_s() - began, 3), notes=notes,
    )  # fmt: skip
