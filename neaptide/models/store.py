"""A store of models by content (docs/decisions/0028): manifests, where they come from, and how a model gets in.

    ROOT/blobs/ab/abcd...            a file's content, named by its sha256
    ROOT/manifests/NAME/DIGEST.json  a model: its files; DIGEST is the sha256 of this very text
    ROOT/manifests/NAME/latest       the DIGEST pushed last

A directory is a store; so is what a web server shows of one, to read from.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from neaptide.errors import ModelError
from neaptide.models import directory
from neaptide.models.blobs import PIECE_BYTES, Blobs, File, on_disk, read_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
MAX_MANIFEST_BYTES = 1 << 20
SILENT_S = 30.0  # a web server that says nothing for so long is gone
Tell = Callable[[int, int], None]  # bytes done, of so many


class Ref(NamedTuple):
    """NAME or NAME@DIGEST, as it stands behind `store:`."""

    name: str
    digest: str = ""  # "": the one pushed last


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model is made of, files in name order."""

    format: int = 1
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Store(Protocol):
    """Where models come from. ModelError: E231 it cannot be reached, E232 it has no such model or file."""

    def latest(self, name: str) -> str:
        """The digest pushed last under `name`."""

    def manifest(self, ref: Ref) -> bytes:
        """The text whose sha256 is `ref.digest`."""

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        """The file's content from `offset`, in pieces; it may end early."""


def parse_ref(text: str) -> Ref:
    """ModelError E232 for what is no NAME or NAME@DIGEST."""
    name, at, digest = text.partition("@")
    if NAME.fullmatch(name) and (DIGEST.fullmatch(digest) if at else True):
        return Ref(name, digest)
    why = "a name has letters, digits and . _ -, at most 64; a digest is 64 hexadecimal digits"
    raise ModelError(f"{text!r} names no model of a store", why=why, fix="write NAME or NAME@DIGEST", code="E232")


def decode(raw: bytes, digest: str) -> Manifest:
    """The manifest in `raw`, which must be the text that `digest` names. ModelError E233: it is not, or not one of
    ours. It comes from elsewhere and names paths: only plain names pass."""
    if hashlib.sha256(raw).hexdigest() != digest:
        raise _damaged(digest, "its text is not that of its digest")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except ValueError as e:
        raise _damaged(digest, str(e)) from e
    names = {file.name for file in manifest.files}
    sound = all(FILE_NAME.fullmatch(f.name) and DIGEST.fullmatch(f.sha256) and f.size >= 0 for f in manifest.files)
    if manifest.format != 1 or not sound or len(names) < len(manifest.files):
        raise _damaged(digest, "it names what cannot be a model's file, or is of a newer format")
    return manifest


def at(root: str) -> Store:
    """The store at a directory or an http(s) URL."""
    return HttpStore(root) if root.startswith(("http://", "https://")) else DirectoryStore(Path(root))


class DirectoryStore:
    """Implements Store on a directory, and takes models in."""

    def __init__(self, root: Path) -> None:
        self.root, self.blobs = root, Blobs(root)
        self._manifests = root / "manifests"

    def latest(self, name: str) -> str:
        return _digest(self._text(self._manifests / name / "latest", name), name)

    def manifest(self, ref: Ref) -> bytes:
        return self._text(self.manifest_path(ref), f"{ref.name}@{ref.digest}")

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        try:
            yield from read_file(self.blobs.path(file.sha256), offset)
        except FileNotFoundError:
            raise _absent(f"content of {file.name}", str(self.root)) from None
        except OSError as e:
            raise _unreachable(str(self.root), f"{file.name}: {e.strerror}") from e

    def manifest_path(self, ref: Ref) -> Path:
        return self._manifests / ref.name / f"{ref.digest}.json"

    def refs(self) -> list[Ref]:
        """Every model here, in name order, the newest of a name first."""
        found = [p for p in self._manifests.glob("*/*.json") if DIGEST.fullmatch(p.stem)]
        found.sort(key=lambda p: (p.parent.name, -p.stat().st_mtime))
        return [Ref(p.parent.name, p.stem) for p in found]

    def put(self, name: str, raw: bytes) -> Ref:
        """Take in a manifest whose files are here, or are about to come. The latest of its name is another matter."""
        ref = Ref(name, hashlib.sha256(raw).hexdigest())
        _write(self.manifest_path(ref), raw)
        return ref

    def set_latest(self, ref: Ref) -> None:
        _write(self._manifests / ref.name / "latest", f"{ref.digest}\n".encode())

    def _text(self, path: Path, what: str) -> bytes:
        try:
            with path.open("rb") as content:
                return content.read(MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            if not self.root.is_dir():
                raise _unreachable(str(self.root), "there is no such directory") from None
            raise _absent(what, str(self.root)) from None
        except OSError as e:
            raise _unreachable(str(self.root), e.strerror or str(e)) from e


class HttpStore:
    """Implements Store over http(s): plain GETs, a Range where a download goes on."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def latest(self, name: str) -> str:
        return _digest(self._small(f"manifests/{name}/latest", name), name)

    def manifest(self, ref: Ref) -> bytes:
        return self._small(f"manifests/{ref.name}/{ref.digest}.json", f"{ref.name}@{ref.digest}")

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        """Asks again when the connection breaks, as long as each connection brings something."""
        path, came = f"blobs/{file.sha256[:2]}/{file.sha256}", 1
        while came and offset < file.size:
            came = 0
            try:
                for piece in self._stream(path, offset, file.name):
                    came += len(piece)
                    offset += len(piece)
                    yield piece
            except (OSError, http.client.HTTPException) as e:
                if not came:
                    raise _unreachable(self._url, f"{file.name}: {e}") from e

    def _small(self, path: str, what: str) -> bytes:
        try:
            return _at_most(MAX_MANIFEST_BYTES, self._stream(path, 0, what))
        except (OSError, http.client.HTTPException) as e:
            raise _unreachable(self._url, str(e)) from e

    def _stream(self, path: str, offset: int, what: str) -> Iterator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        asked = urllib.request.Request(f"{self._url}/{path}", headers=headers)  # noqa: S310  (http or https: see `at`)
        try:
            with urllib.request.urlopen(asked, timeout=SILENT_S) as answer:  # noqa: S310
                skip = 0 if answer.status == 206 else offset  # a server that knows no ranges sends all of it
                while piece := answer.read(PIECE_BYTES):
                    yield piece[skip:]
                    skip = max(0, skip - len(piece))
        except urllib.error.HTTPError as e:
            with e:
                if e.code in (404, 410):
                    raise _absent(what, self._url) from e
                raise


class Pushed(NamedTuple):
    ref: Ref
    manifest: Manifest
    new_bytes: int  # that the store did not have


def push(source: Path, name: str, store: DirectoryStore, tell: Tell) -> Pushed:
    """Put the model in `source` into `store` and make it the latest of `name`. `tell` hears of bytes twice: read, then
    copied. ModelError: E201-E203 no model there, E232 no name, E233 a file changed meanwhile, E234 the store's disk."""
    parse_ref(name)
    directory.read(source)
    paths = list(directory.files(source))
    total, done = 2 * sum(path.stat().st_size for path in paths), 0

    def came(count: int) -> None:
        nonlocal done
        done += count
        tell(min(done, total), total)

    manifest = Manifest(files=tuple(_hashed(path, came) for path in paths))
    new = [file for file in manifest.files if not store.blobs.has(file)]
    for file in new:
        store.blobs.add(file, lambda file, offset: read_file(source / file.name, offset), came)
    ref = store.put(name, msgspec.json.encode(manifest))
    store.set_latest(ref)
    tell(total, total)
    return Pushed(ref, manifest, sum(file.size for file in new))


def _hashed(path: Path, came: Callable[[int], None]) -> File:
    digest, size = hashlib.sha256(), 0
    for piece in read_file(path):
        digest.update(piece)
        size += len(piece)
        came(len(piece))
    if not FILE_NAME.fullmatch(path.name):
        why = "letters, digits and . _ -, at most 128"
        raise ModelError(f"{path.name!r} is no name of a model's file", why=why, fix="rename it", code="E202")
    return File(path.name, digest.hexdigest(), size)


def _write(path: Path, raw: bytes) -> None:
    """What is there already is only marked as of now: a model that is here starts from a full disk, too."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with on_disk(path):
        if path.is_file() and path.read_bytes() == raw:
            with contextlib.suppress(PermissionError):  # another user's, in a directory of both: it is replaced
                path.touch()
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_bytes(raw)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)


def _at_most(most: int, pieces: Iterator[bytes]) -> bytes:
    """What comes, but no more than `most` bytes: the rest is not read."""
    came = b""
    for piece in pieces:
        came += piece
        if len(came) > most:
            break
    return came[:most]


def _digest(raw: bytes, name: str) -> str:
    text = raw.decode("ascii", "replace").strip()
    if not DIGEST.fullmatch(text):
        raise _damaged(name, "its `latest` holds no digest")
    return text


def _damaged(what: str, why: str) -> ModelError:
    return ModelError(
        f"the manifest of {what} is damaged", why=why, fix="push the model again: neaptide models push", code="E233"
    )


def _absent(what: str, root: str) -> ModelError:
    return ModelError(
        f"the store at {root} has no {what}",
        fix="neaptide models stored lists what it has; neaptide models push DIR NAME puts a model in",
        code="E232",
    )


def _unreachable(root: str, why: str) -> ModelError:
    fix = "see that it is mounted or served and may be read, or correct store.root in neaptide.yaml"
    return ModelError(f"the store at {root} cannot be read", why=why, fix=fix, code="E231")
