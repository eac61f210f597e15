"""The audit log on the disk: audit/ of the state directory, 0700, its files 0600.

0000000001.jsonl ...   lines, oldest first, each file named after its first line's number; at most KEPT_FILES
open-ID.json           the intent of a change that is under way, written before it and removed after its line
head.json              number and hash of the last line, so that a log whose end is missing shows

One process writes (control), from one thread. Everything is synced before a call returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from neaptide.clock import Clock
from neaptide.control.chain import (
    DROPPED,
    LOST,
    MENDED,
    AuditQuery,
    AuditRow,
    Head,
    Verdict,
    check,
    hashed,
    parsed,
    sealed,
)
from neaptide.errors import StorageError
from neaptide.fleet.state import write_private

FILE_BYTES = 8 << 20
KEPT_FILES = 16
HEAD = "head.json"
MAX_LINE = 1 << 16  # bytes; ours are under 4 KB
log = logging.getLogger("neaptide.control")


class AuditLog:
    """Appends lines. Opening it mends what a kill has left: a line that was cut off is cut away, an intent without a
    line becomes one with the outcome `unknown`; lines of the log's own say so."""

    def __init__(
        self, directory: Path, clock: Clock, *, file_bytes: int = FILE_BYTES, kept_files: int = KEPT_FILES
    ) -> None:
        self._directory, self._clock = directory, clock
        self._file_bytes, self._kept_files = file_bytes, kept_files
        self._fd, self._bytes, self._path = -1, 0, directory / _name(1)
        self._head = Head()
        self._waiting: list[AuditRow] = []  # lines that a full disk has kept out
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._resume()
        except OSError as e:
            raise _unwritable(directory, e) from e
        with contextlib.suppress(StorageError):  # they wait, and so does every change
            self._flush()

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, row: AuditRow) -> None:
        """Before a change: its intent is on the disk when this returns. StorageError E550 when it cannot be, or when
        an earlier line still waits for room: then the change must not be made."""
        self._flush()
        try:
            write_private(self._intent(row), msgspec.json.encode(row).decode())
            self._sync_directory()
        except OSError as e:
            raise _unwritable(self._directory, e) from e

    def end(self, row: AuditRow) -> None:
        """After it: the line, in the intent's place. Where the disk has no room by now, the line waits."""
        self._waiting.append(row)
        with contextlib.suppress(StorageError):
            self._flush()

    def add(self, row: AuditRow) -> None:
        """A line without an intent. StorageError E550, and there is none."""
        self._flush()
        self._write(row)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        while self._waiting:
            self._write(self._waiting[0])
            row = self._waiting.pop(0)
            with contextlib.suppress(OSError):  # at the next start it is found to have its line
                self._intent(row).unlink(missing_ok=True)

    def _write(self, row: AuditRow) -> None:
        line, head = sealed(row, self._head)
        try:
            if self._fd < 0:
                self._open(self._path)
            if self._bytes and self._bytes + len(line) > self._file_bytes:
                self._open(self._directory / _name(head.n))
                self._drop_oldest()
                line, head = sealed(row, self._head)
            self._append(line, head)
        except OSError as e:
            raise _unwritable(self._directory, e) from e

    def _append(self, line: bytes, head: Head) -> None:
        """OSError, and the file is as it was; it is opened anew for the next line."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):  # else opening it cuts the rest away
                os.ftruncate(self._fd, self._bytes)
            self.close()
            raise
        self._bytes += len(line)
        self._head = head
        try:
            write_private(self._directory / HEAD, msgspec.json.encode(head).decode())
        except OSError as e:  # the line is safe; only its loss would not show
            log.warning("%s is behind: %s", self._directory / HEAD, e.strerror)

    def _open(self, path: Path) -> None:
        self.close()
        self._path = path
        _mend(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._bytes = os.fstat(self._fd).st_size
        self._sync_directory()

    def _drop_oldest(self) -> None:
        """Files past the number that is kept. A line tells of them before they go."""
        files = segments(self._directory)
        gone = files[: -self._kept_files]
        if not gone:
            return
        last = _last_line(gone[-1])
        row = parsed(last)
        if row is not None:
            told = AuditRow(at_wall_s=self._clock.wall_s(), action=DROPPED, object=f"lines to {row.n}",
                            before=str(row.n), after=hashed(last))  # fmt: skip
            self._append(*sealed(told, self._head))
        for path in gone:
            path.unlink()

    def _intent(self, row: AuditRow) -> Path:
        return self._directory / f"open-{row.request}.json"

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        for left in self._directory.glob(".*.*"):
            left.unlink()  # half-written files of the killed
        files = segments(self._directory)
        cut = _mend(files[-1]) if files else 0
        last = next((line for path in reversed(files) if (line := _last_line(path))), b"")
        row, known = parsed(last), head_of(self._directory)
        if last:
            self._head = Head(row.n if row else known.n, hashed(last))
        if files:
            self._path = files[-1]
        if cut:
            self._own(MENDED, f"{cut} bytes of a line that was cut off")
        if known.n > self._head.n or (known.n == self._head.n and known != self._head):
            self._own(LOST, f"lines to {known.n}", str(known.n), known.hash)
        self._settle()

    def _own(self, action: str, about: str, before: str = "", after: str = "") -> None:
        """A line of the log's own, once there is room."""
        row = AuditRow(at_wall_s=self._clock.wall_s(), action=action, object=about, before=before, after=after)
        self._waiting.append(row)

    def _settle(self) -> None:
        """Intents of changes during which control was killed."""
        for path in sorted(self._directory.glob("open-*.json")):
            row = parsed(path.read_bytes())
            if row is not None and not self._has(row.request):
                self._waiting.append(msgspec.structs.replace(row, outcome="unknown"))
            else:
                path.unlink()  # it has its line, or was cut off: then the change was not begun

    def _has(self, request: str) -> bool:
        needle = b'"request":' + msgspec.json.encode(request)
        return any(needle in path.read_bytes() for path in reversed(segments(self._directory)))


# --- reading ----------------------------------------------------------------------------------------------------------


def segments(directory: Path) -> list[Path]:
    """The log's files, oldest first."""
    return sorted(p for p in directory.glob("*.jsonl") if p.stem.isdigit())


def head_of(directory: Path) -> Head:
    """The last line as head.json knows it; Head() where there is none."""
    try:
        return msgspec.json.decode((directory / HEAD).read_bytes(), type=Head)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return Head()


def lines(paths: Iterable[Path]) -> Iterator[bytes]:
    """Whole lines, without newlines. One that is being written, or was cut off, is left out; one longer than MAX_LINE
    comes in pieces, which are no lines of ours."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as f:
            while (line := f.readline(MAX_LINE)) and (line.endswith(b"\n") or len(line) == MAX_LINE):
                yield line.removesuffix(b"\n")


def newest(directory: Path, query: AuditQuery) -> tuple[AuditRow, ...]:
    """The lines that are asked for, newest first."""
    out: list[AuditRow] = []
    for path in reversed(segments(directory)):
        for line in reversed(list(lines([path]))):
            if len(out) >= query.limit:
                return tuple(out)
            row = parsed(line)
            if row is not None and query.asks_for(row):
                out.append(row)
    return tuple(out)


def verify(directory: Path, *heads: Head) -> Verdict:
    """The whole log, against head.json and `heads`; safe while control writes."""
    known = head_of(directory)  # before the lines: what is written meanwhile must not look like more than there is
    return check(lines(segments(directory)), (known, *heads))


def _name(first: int) -> str:
    """Of the file whose first line has this number."""
    return f"{first:010d}.jsonl"


def _mend(path: Path) -> int:
    """Cuts a line without its newline off the end; its bytes. Nothing where there is no such file."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    cut = len(content) - (content.rfind(b"\n") + 1)
    if cut:
        with path.open("rb+") as f:
            f.truncate(len(content) - cut)
            os.fsync(f.fileno())
    return cut


def _last_line(path: Path) -> bytes:
    """b"" of an empty file."""
    return path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]


def _unwritable(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"the audit log in {directory} cannot be written: {error.strerror or error}",
        why="a change that cannot be recorded is not made",
        fix=f"free space on that disk, or see to the permissions of {directory}",
        code="E550",
    )
