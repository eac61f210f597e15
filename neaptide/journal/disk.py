"""What the journal asks of a disk: space taken ahead, one writer, and a sentence for people when there is no room."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from neaptide.errors import StorageError
from neaptide.journal.reader import LOCK_NAME

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK_TRIES = 50  # 10 ms apart: a reader that asks who writes holds the lock for microseconds

log = logging.getLogger("neaptide.journal")


class Spare(NamedTuple):
    """A preallocated segment without a number yet: it gets one when writing comes to it."""

    fd: int
    path: Path


def describe(error: OSError, directory: Path, wanted_bytes: int) -> str:
    """One line for people: which disk, what is free there, what was wanted."""
    if error.errno not in FULL:
        return f"the journal in {directory} cannot be written: {error.strerror or error}"
    mount = directory.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    stat = os.statvfs(mount)
    free = stat.f_bavail * stat.f_frsize
    return f"the disk at {mount} is full: {free} bytes free, the journal needs {wanted_bytes}"


def storage_error(error: OSError, directory: Path, wanted_bytes: int) -> StorageError:
    return StorageError(
        describe(error, directory, wanted_bytes), why="the journal preallocates its segments", code="E541"
    )


def lock(directory: Path) -> int:
    """Holds the journal for this process until it ends, however it ends."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            time.sleep(0.01)
    os.close(fd)
    raise StorageError(
        f"another process writes {directory}",
        why="a journal has one writer",
        fix="start the gateway with an epoch of its own",
        code="E542",
    )


def allocate(path: Path, size: int) -> Spare:
    """A file whose blocks are there; nothing is left behind when the disk has no room for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.close(fd)
        os.unlink(path)
        raise
    return Spare(fd, path)


def discard(spare: Spare) -> None:
    os.close(spare.fd)
    spare.path.unlink(missing_ok=True)


def sync(fd: int, dir_fd: int | None) -> None:
    os.fdatasync(fd)
    if dir_fd is not None:
        os.fsync(dir_fd)


def sync_and_close(fd: int) -> None:
    try:
        os.fdatasync(fd)
    except OSError as e:
        log.error("journal fdatasync of a full segment fails: %s", e)
    finally:
        os.close(fd)


def release_space(directory: Path, segment: Path) -> None:
    """Gives back what a dead writer preallocated and never wrote: its spares and the NULs at its last segment's end (a
    gateway that dies at every start would else keep 8 MiB a start until the retention). The segment's age stays. Does
    nothing while somebody writes."""
    with open(directory / LOCK_NAME, "ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        for spare in directory.glob("spare-*.tmp"):
            spare.unlink()
        with open(segment, "rb+", buffering=0) as file:
            before = os.fstat(file.fileno())
            end = _content_end(file.fileno(), before.st_size)
            if end < before.st_size:
                file.truncate(end)
                os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))


def _content_end(fd: int, size: int) -> int:
    """Where the NULs begin that run to the end."""
    while size:
        start = max(0, size - (1 << 20))
        kept = len(os.pread(fd, size - start, start).rstrip(b"\0"))
        if kept:
            return start + kept
        size = start
    return 0
