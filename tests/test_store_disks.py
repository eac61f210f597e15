"""The weight store on disks that are full, that fill under way, or across which no file can have two names. Each is a
real file system of its own: a tmpfs, for which a machine without root is skipped loudly."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neaptide.errors import ModelError
from neaptide.models.blobs import File
from neaptide.models.cache import Cache
from neaptide.models.store import DirectoryStore, Ref, push
from tests.test_models_sources import model_directory, quiet
from tests.test_models_store import BIN, GIB, content, fails, untold

Mount = Callable[[Path, str], Path]
HALF = 1_500_000  # bytes: half of the model's weights


@pytest.fixture
def mount() -> Iterator[Mount]:
    """mount(path, options) puts a tmpfs there; it goes with the test."""
    mounted: list[Path] = []

    def at(path: Path, options: str) -> Path:
        path.mkdir(parents=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"DISK-FULL NOT TESTED: mounting a tmpfs needs root: {made.stderr.strip()}")
        mounted.append(path)
        return path

    yield at
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    inner = DirectoryStore(tmp_path / "store")
    push(model_directory(tmp_path / "one"), "one", inner, untold)
    return inner


class Rival:
    """A store whose weights are read while somebody else takes the rest of the disk they go to."""

    def __init__(self, inner: DirectoryStore, disk: Path) -> None:
        self.inner, self.disk, self.offsets = inner, disk, list[int]()

    def latest(self, name: str) -> str:
        return self.inner.latest(name)

    def manifest(self, ref: Ref) -> bytes:
        return self.inner.manifest(ref)

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        whole = b"".join(self.inner.read(file, offset))
        if file.name != BIN:
            yield whole
            return
        self.offsets.append(offset)
        if not offset:
            fill(self.disk, leave=HALF)
        yield whole[:HALF]
        yield whole[HALF:]


def fill(disk: Path, leave: int = 0) -> Path:
    """Takes every free block, but for so many bytes."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return disk / "filler"


def partials(root: Path) -> list[int]:
    """Sizes of what is half here."""
    return [path.stat().st_size for path in root.glob("blobs/*/.*.partial")]


def unfinished(root: Path) -> list[str]:
    """Files on their way to another name that nobody is bringing any more."""
    return [p.name for p in root.rglob(".*") if p.is_file() and not p.name.endswith(".partial")]


def is_full(error: ModelError) -> bool:
    return "No space left" in error.what and "disk is full" in error.why and "goes on" in error.fix


def test_a_push_to_a_full_disk_is_no_model_and_goes_on_when_there_is_room(tmp_path: Path, mount: Mount) -> None:
    source, disk = model_directory(tmp_path / "one"), mount(tmp_path / "disk", "size=6m")
    store, filler = DirectoryStore(disk / "store"), fill(disk, leave=HALF)
    assert is_full(fails("E234", lambda: push(source, "one", store, untold)))
    fails("E232", lambda: store.latest("one"))
    (kept,) = partials(store.root)
    assert 0 < kept < 3_000_000
    filler.unlink()
    pushed = push(source, "one", store, untold)
    assert content(Cache(tmp_path / "cache", GIB).pull(store, pushed.ref, quiet, untold)) == content(source)
    assert partials(store.root) == unfinished(disk) == []


def test_a_limit_on_the_size_of_files_is_told_as_a_disk_without_room(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from neaptide.errors import ModelError
from neaptide.models.blobs import on_disk
place = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    with on_disk(place), place.open("wb", 0) as file:
        file.write(bytes(10))
        file.write(bytes(1))
except ModelError as e:
    print(e.code, e.why)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "weights.bin")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("E234 the disk is full"), done.stderr


def test_a_disk_that_fills_while_a_model_comes_keeps_what_came(
    tmp_path: Path, store: DirectoryStore, mount: Mount
) -> None:
    disk = mount(tmp_path / "disk", "size=6m")
    cache, rival = Cache(disk / "cache", GIB), Rival(store, disk)
    assert is_full(fails("E234", lambda: cache.pull(rival, Ref("one"), quiet, untold)))
    (kept,) = partials(cache.root)
    assert [entry.whole for entry in cache.entries()] == [False]
    (disk / "filler").unlink()
    assert content(cache.pull(rival, Ref("one"), quiet, untold)) == content(tmp_path / "one")
    assert rival.offsets == [0, kept]
    assert kept >= HALF - 65536


def test_a_model_that_is_here_starts_from_a_disk_that_is_full(
    tmp_path: Path, store: DirectoryStore, mount: Mount
) -> None:
    disk = mount(tmp_path / "disk", "size=6m")
    cache = Cache(disk / "cache", GIB)
    path = cache.pull(store, Ref("one"), quiet, untold)
    fill(disk)
    (entry,) = cache.entries()
    os.utime(cache.root / "manifests" / "one" / f"{entry.digest}.json", (1, 1))
    assert cache.pull(store, Ref("one"), quiet, untold) == path
    assert cache.entries()[0].used_wall_s > 1  # it counts as used


@pytest.mark.parametrize("options", ["size=6m", "size=6m,nr_inodes=12"])
def test_a_disk_without_room_for_another_name_is_told_and_left_clean(
    tmp_path: Path, store: DirectoryStore, mount: Mount, options: str
) -> None:
    disk = mount(tmp_path / "disk", options)
    cache = Cache(disk / "cache", GIB)
    cache.root.mkdir()
    if "nr_inodes" in options:
        with contextlib.suppress(OSError):
            for n in range(100):
                (disk / f"{n}").touch()
    else:
        fill(disk)
    assert is_full(fails("E234", lambda: cache.pull(store, Ref("one"), quiet, untold)))
    assert unfinished(cache.root) == []


def test_where_no_file_can_have_two_names_a_model_is_a_copy_made_once(
    tmp_path: Path, store: DirectoryStore, mount: Mount
) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    other = mount(cache.root / "models", "size=6m")  # so that a link from blobs to models is one across file systems
    path = cache.pull(store, Ref("one"), quiet, untold)
    assert content(path) == content(tmp_path / "one")
    assert path.stat().st_dev == other.stat().st_dev != cache.root.stat().st_dev
    copy = (path / BIN).stat()
    assert (copy.st_nlink, copy.st_mode & 0o777) == (1, 0o444)
    assert cache.pull(store, Ref("one"), quiet, untold) == path
    assert (path / BIN).stat().st_ino == copy.st_ino
    os.truncate(path / BIN, 10)
    assert content(cache.pull(store, Ref("one"), quiet, untold)) == content(tmp_path / "one")
    assert cache.prune(0) > 3_000_000
    assert list(other.iterdir()) == []


def test_a_copy_that_finds_no_room_is_told_and_leaves_nothing_half(
    tmp_path: Path, store: DirectoryStore, mount: Mount
) -> None:
    cache = Cache(tmp_path / "cache", GIB)
    other = mount(cache.root / "models", "size=2m")
    assert is_full(fails("E234", lambda: cache.pull(store, Ref("one"), quiet, untold)))
    assert not any(path.name == BIN for path in other.rglob("*"))
    assert unfinished(other) == []
    subprocess.run(["mount", "-o", "remount,size=6m", other], check=True)
    assert content(cache.pull(store, Ref("one"), quiet, untold)) == content(tmp_path / "one")
