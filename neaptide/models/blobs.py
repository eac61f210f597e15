"""Files by content: blobs/ab/abcd..., named by their sha256, written once and never changed.

A file that is on its way is `.abcd....partial` beside its place. Whoever writes it holds a lock on it: others wait and
find it done. What a broken run leaves is what the next one goes on from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from neaptide.errors import ModelError

PIECE_BYTES = 4 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a model."""

    name: str
    sha256: str  # hex
    size: int


Read = Callable[[File, int], Iterable[bytes]]  # a file's content from an offset, in pieces
Came = Callable[[int], None]  # so many bytes more are here


class Blobs:
    """The blobs under `root`. Safe to use from many processes at once on a file system with locks."""

    def __init__(self, root: Path) -> None:
        self.root = root / "blobs"

    def path(self, sha256: str) -> Path:
        return self.root / sha256[:2] / sha256

    def has(self, file: File) -> bool:
        """Whether it is here, by its size: its content was checked when it came."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(file.sha256).stat().st_size == file.size
        return False

    def lacks_bytes(self, file: File) -> int:
        """How much must still come."""
        if self.has(file):
            return 0
        with contextlib.suppress(FileNotFoundError):
            return max(0, file.size - _partial(self.path(file.sha256)).stat().st_size)
        return file.size

    def add(self, file: File, read: Read, came: Came) -> None:
        """Bring `file` here from where `read` has it. Blocks; waits for another process that brings the same one.

        ModelError: E231 it broke off (what came is kept), E233 its content is not what its name says, E234 no room.
        """
        place = self.path(file.sha256)
        with on_disk(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone(_partial(place)) as out:
                if not self.has(file):
                    _fill(file, out, read, came)
                    os.fsync(out.fileno())
                    _partial(place).replace(place)
                    os.fchmod(out.fileno(), 0o444)
                else:
                    _partial(place).unlink()

    def verify(self, file: File) -> bool:
        """Read it all; a damaged one is removed, so that it is fetched again."""
        place = self.path(file.sha256)
        if not self.has(file):
            return False
        with place.open("rb") as content:
            whole = hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
        if not whole:
            place.unlink(missing_ok=True)
        return whole

    def sizes(self) -> dict[str, int]:
        """sha256 -> bytes on disk, of what is here whole or in part."""
        found: dict[str, int] = {}
        for path in self.root.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                found[_sha256(path)] = path.stat().st_size
        return found

    def keep_only(self, named: set[str]) -> None:
        for path in self.root.glob("??/*"):
            if _sha256(path) not in named:
                path.unlink(missing_ok=True)


def read_file(path: Path, offset: int = 0) -> Iterator[bytes]:
    with path.open("rb") as content:
        content.seek(offset)
        while piece := content.read(PIECE_BYTES):
            yield piece


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """An OSError in the block is told as ModelError E234, with what to do."""
    try:
        yield
    except OSError as e:
        full = e.errno in NO_SPACE
        raise ModelError(
            f"{path} cannot be written: {e.strerror or e}",
            why="the disk is full; what has come is kept" if full else "it must be a directory that we may write",
            fix="free some space and run the same command again: it goes on"
            if full
            else "correct `store` in neaptide.yaml, or the permissions",
            code="E234",
        ) from e


def _partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _sha256(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".partial")


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[BinaryIO]:
    """The file, opened and locked; waits while another has it. Who had it may have renamed or removed it meanwhile:
    then the lock is on a file that is no longer this one."""
    while True:
        with partial.open("a+b") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            if _is_at(out, partial):
                yield out
                return


def _is_at(out: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(out.fileno()), path.stat())
    return False


def _fill(file: File, out: BinaryIO, read: Read, came: Came) -> None:
    begun = out.seek(0, os.SEEK_END)
    if _filled(file, out, read, came):
        return
    if begun:  # perhaps its first part, of a former run, was wrong
        out.truncate(0)
        if _filled(file, out, read, came):
            return
    out.truncate(0)
    raise ModelError(
        f"{file.name} is damaged where it comes from",
        why=f"its content is not that of sha256 {file.sha256}",
        fix=f"remove blobs/{file.sha256[:2]}/{file.sha256} from the store and push the model again",
        code="E233",
    )


def _filled(file: File, out: BinaryIO, read: Read, came: Came) -> bool:
    """Append what is missing; whether the whole has the right digest. ModelError E231 when it ends too early."""
    digest = hashlib.sha256()
    out.seek(0)
    while piece := out.read(PIECE_BYTES):
        digest.update(piece)
    at = out.tell()
    for piece in read(file, at) if at < file.size else ():
        out.write(piece)
        digest.update(piece)
        at += len(piece)
        came(len(piece))
        if at > file.size:
            break
    out.flush()
    if at < file.size:
        raise ModelError(
            f"{file.name} broke off after {at} of {file.size} bytes",
            fix="run the same command again: it goes on from there",
            code="E231",
        )
    return at == file.size and digest.hexdigest() == file.sha256
