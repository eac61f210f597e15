"""Weights are asked for before the engine needs them, and only as far as memory goes."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from neaptide.engine.memory import available_bytes
from neaptide.engine.readahead import read_ahead
from tests.traffic import wait_for

SIZE = 2 << 20


def weights(directory: Path) -> Path:
    """Two files, on the disk and nowhere else; skips where the file system keeps them in memory all the same."""
    directory.mkdir()
    for name in ("model.bin", "tokenizer.json"):
        path = directory / name
        path.write_bytes(os.urandom(SIZE))
        with path.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(path):
            pytest.skip("this file system keeps what was written")
    return directory / "model.bin"


def is_cached(path: Path) -> bool:
    """Whether all of it lies in memory. Reading would tell too, and bring it there."""
    with path.open("rb") as f, mmap.mmap(f.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        told = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(SIZE), pages)
        del first  # the map cannot be closed while it is pointed into
        assert told == 0
        return all(page & 1 for page in pages)


def test_the_weights_of_a_directory_come_into_memory_and_other_files_are_left_alone(tmp_path: Path) -> None:
    path = weights(tmp_path / "m")
    read_ahead([str(path.parent), "", str(tmp_path / "nowhere")]).join(20)
    wait_for(lambda: is_cached(path), "the weights")
    assert not is_cached(path.parent / "tokenizer.json")


def test_more_than_the_available_memory_is_not_asked_for(tmp_path: Path) -> None:
    path = weights(tmp_path / "m")
    huge = path.parent / "a.bin"  # sorts first; a hole: no disk behind it
    with huge.open("wb") as f:
        f.truncate(available_bytes() * 2)
    read_ahead([str(path.parent)]).join(20)
    assert not is_cached(path)
