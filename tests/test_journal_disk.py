"""A disk that is full, slow to take data or broken: new requests are refused, running ones keep their records, and it
recovers by itself. The full disk is a real one (a small tmpfs, which needs root)."""

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neaptide.errors import StorageError
from neaptide.journal import MAX_RECORD, Journal, release_space, scan, segments
from neaptide.types import Begin, Usage

SEGMENT = 16 * MAX_RECORD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for a few segments."""
    mount = tmp_path / "disk"
    mount.mkdir()
    size = 10 * SEGMENT
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"DISK-FULL NOT TESTED: mounting a tmpfs needs root: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


def fill(mount: Path) -> Path:
    """Takes every free block."""
    path = mount / "filler"
    free = os.statvfs(mount)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    return path


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def ids(directory: Path, kind: type) -> list[str]:
    return [
        r.value.request_id
        for segment in segments(directory)
        for r in scan(directory, segment, 0, finished=True, limit=10**6).records
        if type(r.value) is kind
    ]


def test_a_full_disk_refuses_new_requests_and_keeps_room_for_the_running(small_disk: Path) -> None:
    directory = small_disk / "journal"

    async def body() -> list[str]:
        journal = Journal(directory, SEGMENT, asyncio.get_running_loop())
        filler = fill(small_disk)
        running: list[str] = []
        while journal.refusal() is None:
            running.append(f"r{len(running)}")
            journal.begin(Begin(request_id=running[-1]))
            await asyncio.sleep(0)
        refusal = journal.refusal() or ""
        assert str(small_disk) in refusal
        assert "0 bytes free" in refusal
        with pytest.raises(StorageError, match="is full"):
            journal.begin(Begin(request_id="too many"))
        assert len(running) > 5

        sent: list[str] = []
        for name in running:  # each as large as a record gets
            journal.end(Usage(request_id=name, error="\x01" * 5000, model="\x01" * 5000), lambda n=name: sent.append(n))
        await until(lambda: sent == running)
        filler.unlink()
        await until(lambda: journal.refusal() is None)
        journal.begin(Begin(request_id="after"))
        journal.end(Usage(request_id="after"))
        await journal.close()
        return [*running, "after"]

    expected = asyncio.run(body())
    assert ids(directory, Begin) == expected
    assert ids(directory, Usage) == expected


def test_requests_refused_on_a_full_disk_do_not_eat_the_room_kept_for_others(small_disk: Path) -> None:
    directory = small_disk / "journal"

    async def body() -> None:
        journal = Journal(directory, SEGMENT, asyncio.get_running_loop())
        fill(small_disk)
        running = 0
        while journal.refusal() is None:
            journal.begin(Begin(request_id=f"r{running}"))
            running += 1
        answered: list[int] = []
        for i in range(100):
            journal.end(
                Usage(request_id=f"refused{i}", outcome="refused", error="x" * 3000), lambda i=i: answered.append(i)
            )
        for i in range(running):
            journal.end(Usage(request_id=f"r{i}", error="\x01" * 5000, model="\x01" * 5000))
        await until(lambda: answered == list(range(100)))
        await journal.close()
        assert journal.unrecorded == 100
        assert ids(directory, Usage) == [f"r{i}" for i in range(running)]

    asyncio.run(body())


def test_a_journal_on_a_full_disk_says_so_at_its_start(small_disk: Path) -> None:
    (small_disk / "journal").mkdir()
    fill(small_disk)

    async def body() -> None:
        with pytest.raises(StorageError) as caught:
            Journal(small_disk / "journal", SEGMENT, asyncio.get_running_loop())
        assert str(small_disk) in str(caught.value)
        assert caught.value.status == 507

    asyncio.run(body())
    assert list((small_disk / "journal").glob("*.log")) == []


class BrokenDisk:
    """Takes data until told otherwise."""

    def __init__(self) -> None:
        self.broken = False
        self.short = False

    def pwrite(self, fd: int, data: bytes, at: int) -> int:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        return os.pwrite(fd, data[: len(data) // 2] if self.short else data, at)

    def sync(self, fd: int, dir_fd: int | None) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)


@pytest.mark.parametrize("short", [False, True])
def test_records_wait_for_a_disk_that_fails_and_then_takes_them(tmp_path: Path, short: bool) -> None:
    disk = BrokenDisk()

    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop(), pwrite=disk.pwrite)
        disk.broken, disk.short = not short, short
        sent: list[str] = []
        for name in "abc":
            journal.end(Usage(request_id=name), lambda n=name: sent.append(n))
        await until(lambda: journal.refusal() is not None)
        assert sent == []
        disk.broken = disk.short = False
        await until(lambda: sent == ["a", "b", "c"])
        assert journal.refusal() is None
        await journal.close()

    asyncio.run(body())
    assert ids(tmp_path, Usage) == ["a", "b", "c"]


def test_clients_are_not_held_for_ever_and_their_records_are_still_written(tmp_path: Path) -> None:
    disk = BrokenDisk()

    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop(), hold_s=0.0, pwrite=disk.pwrite)
        journal.begin(Begin(request_id="a"))
        await until(lambda: ids(tmp_path, Begin) == ["a"])
        disk.broken = True
        sent: list[int] = []
        journal.end(Usage(request_id="a"), lambda: sent.append(1))
        await until(lambda: sent == [1])
        assert "cannot be written" in (journal.refusal() or "")
        disk.broken = False
        await until(lambda: journal.refusal() is None)
        assert sent == [1]
        await journal.close()

    asyncio.run(body())
    assert ids(tmp_path, Usage) == ["a"]


def test_a_journal_closed_on_a_broken_disk_says_how_much_is_lost(tmp_path: Path) -> None:
    disk = BrokenDisk()

    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop(), pwrite=disk.pwrite)
        sent: list[int] = []
        disk.broken = True
        journal.end(Usage(request_id="a"), lambda: sent.append(1))
        with pytest.raises(StorageError, match="1 records were not written"):
            await journal.close()
        assert sent == [1]

    asyncio.run(body())


def test_a_disk_that_does_not_sync_stops_new_requests_until_it_does(tmp_path: Path) -> None:
    disk = BrokenDisk()

    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop(), sync_s=0.01, sync=disk.sync)
        disk.broken = True
        journal.end(Usage(request_id="a"))
        await until(lambda: "does not take data" in (journal.refusal() or ""))
        disk.broken = False
        await until(lambda: journal.refusal() is None)
        await journal.close()

    asyncio.run(body())


def test_what_a_dead_writer_preallocated_is_given_back_and_nothing_else(tmp_path: Path) -> None:
    async def body() -> None:
        journal = Journal(tmp_path, SEGMENT, asyncio.get_running_loop())
        journal.end(Usage(request_id="a"))
        await until(lambda: ids(tmp_path, Usage) == ["a"])
        segment = tmp_path / "00000001.log"
        release_space(tmp_path, segment)
        assert segment.stat().st_size == SEGMENT  # it is being written
        await journal.close()

    asyncio.run(body())
    segment = tmp_path / "00000001.log"
    written = segment.read_bytes()
    segment.write_bytes(written + bytes(3 << 20))
    (tmp_path / "spare-7.tmp").write_bytes(bytes(SEGMENT))
    os.utime(segment, (5, 5))
    release_space(tmp_path, segment)
    assert segment.read_bytes() == written
    assert segment.stat().st_mtime == 5
    assert not list(tmp_path.glob("spare*"))
    segment.write_bytes(bytes(5000))
    release_space(tmp_path, segment)
    assert segment.stat().st_size == 0
