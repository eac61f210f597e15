"""Who uses a model's directory: a shared lock on it, which the kernel ends with the process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def hold(path: Path) -> int | None:
    """Keep the node's cache from evicting `path`, until the descriptor is closed or the process ends. None where the
    file system has no locks: such a directory is served all the same, and is none of a cache's."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    except OSError:
        os.close(fd)
        return None
    return fd


def release(held: int | None) -> None:
    if held is not None:
        os.close(held)


@contextlib.contextmanager
def free(path: Path) -> Iterator[bool]:
    """Whether nobody holds `path`; while the block runs nobody can begin to. A path that is not there is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        yield _taken(fd)
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
