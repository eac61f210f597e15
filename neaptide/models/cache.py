"""What this node keeps of a store: blobs, fetched once, and a directory of links to them for every model in use.

    CACHE/blobs, CACHE/manifests   as in a store: what has been fetched
    CACHE/models/NAME-DIGEST12/    the model's files, hard links to blobs: what an engine opens

A model that nobody uses goes when room is needed, the one that was asked for longest ago first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from neaptide.errors import ModelError
from neaptide.models.blobs import File, on_disk
from neaptide.models.hold import free, hold, release
from neaptide.models.store import DirectoryStore, Manifest, Ref, Store, Tell, decode


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the cache."""

    name: str
    digest: str
    size: int  # bytes of all its files; those shared with other models are counted for each
    used_wall_s: float  # when it was asked for last
    in_use: bool
    whole: bool  # all files are here


class Cache:
    """The cache under `root`, at most `most_bytes` of blobs. Safe to use from many processes at once."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root, self.most_bytes = root, most_bytes
        self._kept = DirectoryStore(root)
        self._blobs = self._kept.blobs

    def pull(self, store: Store, ref: Ref, report: Callable[[str], None], tell: Tell, *, verify: bool = False) -> Path:
        """The directory of `ref`, fetched as far as it is not here; `report` gets lines, `tell` bytes of what must
        come. `verify` reads what is here and fetches again what is damaged.

        ModelError: E231 the store cannot be reached, E232 it has no such model, E233 damaged there, E234 no room.
        """
        found, raw = self._manifest(store, ref, report)
        manifest, path = decode(raw, found.digest), self.path(found)
        with on_disk(self.root):
            if verify:
                for file in manifest.files:
                    self._blobs.verify(file)
            held = self._reserve(found, raw, is_latest=not ref.digest)
            try:
                self._fetch(store, [file for file in manifest.files if not self._blobs.has(file)], tell)
                self._link(path, manifest)
            finally:
                release(held)
        return path

    def path(self, ref: Ref) -> Path:
        return self.root / "models" / f"{ref.name}-{ref.digest[:12]}"

    def entries(self) -> list[Entry]:
        """Every model here, the one that was asked for longest ago first."""
        return sorted((self._entry(ref, m) for ref, m in self._models().items()), key=lambda e: e.used_wall_s)

    def used_bytes(self) -> int:
        """Of blobs, each counted once, those on their way included."""
        return sum(self._blobs.sizes().values())

    def prune(self, most_bytes: int) -> int:
        """Let go of unused models until at most `most_bytes` are left; the bytes freed."""
        with on_disk(self.root), self._alone():
            before = self.used_bytes()
            self._sweep()
            for entry in self.entries():
                if self.used_bytes() <= most_bytes:
                    break
                self._evict(entry)
            return before - self.used_bytes()

    # -- inside ------------------------------------------------------------------------------------------------

    def _manifest(self, store: Store, ref: Ref, report: Callable[[str], None]) -> tuple[Ref, bytes]:
        """A pinned one that is here needs no store; of a name alone, this node's last one serves while it is away."""
        if not ref.digest:
            try:
                ref = Ref(ref.name, store.latest(ref.name))
            except ModelError as e:
                if e.code != "E231" or (last := self._last(ref.name)) is None:
                    raise
                report(f"{e.what}; going on with {ref.name}@{last.digest[:12]}, the last one seen here")
                ref = last
        kept = self._manifest_here(ref)
        return ref, store.manifest(ref) if kept is None else kept

    def _reserve(self, ref: Ref, raw: bytes, *, is_latest: bool) -> int | None:
        """Room for it and a hold on it, to be released. Its manifest and the hold come before its files, so that nobody
        takes them for left over."""
        with self._alone():
            self._kept.put(ref.name, raw)
            if is_latest:
                self._kept.set_latest(ref)
            self.path(ref).mkdir(parents=True, exist_ok=True)
            held = hold(self.path(ref))
            try:
                self._make_room(ref)
            except BaseException:
                release(held)
                raise
            return held

    def _last(self, name: str) -> Ref | None:
        with contextlib.suppress(ModelError):
            ref = Ref(name, self._kept.latest(name))
            return ref if self._manifest_here(ref) is not None else None
        return None

    def _manifest_here(self, ref: Ref) -> bytes | None:
        """None for one that is not here, or damaged: it is asked for again."""
        with contextlib.suppress(ModelError):
            raw = self._kept.manifest(ref)
            decode(raw, ref.digest)
            return raw
        return None

    def _models(self) -> dict[Ref, Manifest]:
        found = {ref: self._manifest_here(ref) for ref in self._kept.refs()}
        return {ref: decode(raw, ref.digest) for ref, raw in found.items() if raw is not None}

    def _entry(self, ref: Ref, manifest: Manifest) -> Entry:
        with free(self.path(ref)) as is_free:
            return Entry(
                name=ref.name,
                digest=ref.digest,
                size=manifest.size,
                used_wall_s=self._kept.manifest_path(ref).stat().st_mtime,
                in_use=not is_free,
                whole=all(map(self._blobs.has, manifest.files)),
            )

    def _fetch(self, store: Store, missing: list[File], tell: Tell) -> None:
        total = sum(file.size for file in missing)
        done = total - sum(map(self._blobs.lacks_bytes, missing))

        def came(count: int) -> None:
            nonlocal done
            done += count
            tell(min(done, total), total)

        for file in missing:
            self._blobs.add(file, store.read, came)
        if total:
            tell(total, total)  # another process may have brought some of it

    def _link(self, path: Path, manifest: Manifest) -> None:
        """A name for each blob in the model's directory; a copy where the file system has no hard links."""
        for file in manifest.files:
            blob, place = self._blobs.path(file.sha256), path / file.name
            if _same(blob, place):
                continue
            fresh = path / f".{file.name}.{os.getpid()}.{threading.get_ident()}"
            fresh.unlink(missing_ok=True)
            try:
                _name(blob, fresh)
                fresh.replace(place)
            finally:  # a copy that found no room, or another's link to the same file, which stays beside `place`
                fresh.unlink(missing_ok=True)

    def _make_room(self, ref: Ref) -> None:
        """For all that the manifests here name: downloads under way are reckoned with, since theirs came first."""
        self._sweep()
        for entry in self.entries():
            if self._fits():
                return
            if (entry.name, entry.digest) != ref:
                self._evict(entry)
        need = sum(map(self._blobs.lacks_bytes, self._models()[ref].files))
        if need and not self._fits():
            self._kept.manifest_path(ref).unlink()
            raise ModelError(
                f"{ref.name} needs {need >> 20} MiB more in the node's cache {self.root}",
                why=f"{self.used_bytes() >> 20} of {self.most_bytes >> 20} MiB are taken by what is in use, "
                f"and its disk has {shutil.disk_usage(self.root).free >> 20} MiB free",
                fix="raise store.cache_gib, free some space, or name another disk as store.cache",
                code="E234",
            )

    def _fits(self) -> bool:
        files = {file.sha256: file for m in self._models().values() for file in m.files}.values()
        lacking = sum(map(self._blobs.lacks_bytes, files))
        return sum(f.size for f in files) <= self.most_bytes and lacking <= shutil.disk_usage(self.root).free

    def _evict(self, entry: Entry) -> None:
        """Nothing happens where somebody uses it."""
        ref = Ref(entry.name, entry.digest)
        with free(self.path(ref)) as is_free:
            if is_free:
                self._kept.manifest_path(ref).unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what no manifest names any more; a directory that is still held stays, and with it its content."""
        models = self._models()
        self._blobs.keep_only({file.sha256 for m in models.values() for file in m.files})
        named = {self.path(ref) for ref in models}
        strays = (path for path in (self.root / "models").glob("*") if path.is_dir() and path not in named)
        for path in strays:  # a plain file there is nobody's model: it stays
            with free(path) as is_free:
                if is_free:
                    shutil.rmtree(path)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time decides what is kept; downloads go on beside it."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _name(blob: Path, fresh: Path) -> None:
    try:
        os.link(blob, fresh)
    except OSError:
        shutil.copy2(blob, fresh)


def _same(blob: Path, place: Path) -> bool:
    """A link to the blob, or a copy made of it (which keeps its time)."""
    with contextlib.suppress(FileNotFoundError):
        one, other = blob.stat(), place.stat()
        return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)
    return False
