"""The cells that all gateways of a host count in: a memfd that the supervisor makes and each of them maps.

    header   seats and rows ever used, rows taken over by others, where to look for the next of these, a flag a seat
    rows     gateway/quota.py's, in the order of coming

`with counters:` is a gateway's turn. Its seat is a lock on one byte, which the kernel lets go of when the process ends;
`free_dead` empties the column of one that is gone. Locks are of the open file (flock, OFD): each Counters has its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import time
from hashlib import blake2b

from neaptide.errors import ProcessError
from neaptide.gateway.quota import FLIGHT, ID, ROW, SEATS, Cells, clear, is_idle

ROWS = 1 << 15  # keys and tenants with limits that can be counted within a minute
TAKEN, USED, REPLACED, NEXT, FLAGS = range(5)  # of the header
HEADER = FLAGS + SEATS
SIZE = 8 * (HEADER + ROWS * ROW)  # bytes; memory is taken row by row, as they are used
YIELDS, NAPS, NAP_S = 20, 500, 0.0005  # while another has its turn, which takes microseconds where it is let run
LOOKS = 256  # at rows that may be idle, when all are used
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def create() -> int:
    """The descriptor of new cells, for `Counters` in any process that inherits it."""
    fd = os.memfd_create("neaptide-counters", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    return fd


class Counters:
    """`fd`: of `create`, and this process's to keep; None: cells of this process alone. ProcessError E306 where all
    seats are taken."""

    __slots__ = ("_at", "_fd", "_held", "_ids", "_map", "_patient", "_replaced", "_synced", "cells", "seat")

    def __init__(self, fd: int | None = None) -> None:
        # Opened anew: an inherited descriptor would share its locks with the other heirs.
        self._fd = None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(-1 if self._fd is None else self._fd, SIZE)
        self.cells: Cells = memoryview(self._map).cast("q")
        self._held, self._patient = False, True
        self._ids: dict[str, int] = {}  # by name
        self._at: dict[int, int] = {}  # by id
        self._synced = self._replaced = 0  # of USED and REPLACED
        self.seat = self._sit()

    # --- turns

    def __enter__(self) -> Cells:
        if self._fd is None:
            return self.cells
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._held = self._patient = True
        except BlockingIOError:
            self._held = self._patient = self._patient and self._wait(self._fd)
        return self.cells

    def __exit__(self, *_: object) -> None:
        if self._held and self._fd is not None:
            self._held = False
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _wait(self, fd: int) -> bool:
        """Whether the turn came. A gateway that was stopped in its own must not stop the others: they go on without
        turns, and wait for none, until one is free at once."""
        for tries in range(YIELDS + NAPS):
            os.sched_yield() if tries < YIELDS else time.sleep(NAP_S)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        return False

    # --- seats

    @property
    def seats(self) -> int:
        """That somebody may sit on."""
        taken: int = self.cells[TAKEN]
        return taken

    def free_dead(self) -> int:
        """Nothing of gateways that are gone is in flight any more. How many there were."""
        if self._fd is None:
            return 0
        freed = 0
        for seat in range(self.seats):
            if seat != self.seat and self.cells[FLAGS + seat] and self._lock(seat, fcntl.F_WRLCK):
                with self:
                    self._empty(seat)
                self._lock(seat, fcntl.F_UNLCK)
                freed += 1
        return freed

    def close(self) -> None:
        """Leave the seat; the cells are nobody's here after it."""
        with self as cells:
            self._empty(self.seat)
        cells.release()
        self._map.close()
        if self._fd is not None:
            os.close(self._fd)

    def _sit(self) -> int:
        for seat in range(SEATS):
            if self._fd is None or self._lock(seat, fcntl.F_WRLCK):
                with self as cells:
                    self._empty(seat)
                    cells[FLAGS + seat], cells[TAKEN] = 1, max(cells[TAKEN], seat + 1)
                return seat
        raise ProcessError(f"{SEATS} gateways count in the same limits already", code="E306", fix="lower `gateways`")

    def _empty(self, seat: int) -> None:
        for at in range(HEADER, HEADER + self.cells[USED] * ROW, ROW):
            if self.cells[at + FLIGHT + seat]:
                self.cells[at + FLIGHT + seat] = 0
        self.cells[FLAGS + seat] = 0

    def _lock(self, seat: int, kind: int) -> bool:
        assert self._fd is not None  # noqa: S101  (whoever has no descriptor has no neighbours)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, seat, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    # --- rows; all of these in a turn

    def id_of(self, name: str) -> int:
        """What stands in the row of `name`."""
        found = self._ids.get(name)
        if found is None:
            if len(self._ids) >= 2 * ROWS:
                self._ids.clear()
            digest = blake2b(name.encode(), digest_size=8).digest()
            found = self._ids[name] = int.from_bytes(digest) >> 1 or 1
        return found

    def row(self, id: int, now: float) -> int | None:
        """Where `id` is counted: its row, a new one, or that of somebody of whom nothing counts any more. None where
        there is none of these."""
        at = self._at.get(id)
        if at is not None and self.cells[at + ID] == id:
            return at
        self._sync()
        at = self._at.get(id)
        if at is None or self.cells[at + ID] != id:
            at = self._new(now)
            if at is None:
                return None
            clear(self.cells, at, id)
            self._at[id] = at
        return at

    def _sync(self) -> None:
        """Learn the rows that others have added."""
        cells = self.cells
        if cells[REPLACED] != self._replaced:
            self._replaced, self._synced = cells[REPLACED], 0
            self._at.clear()
        for number in range(self._synced, cells[USED]):
            at = HEADER + number * ROW
            self._at[cells[at + ID]] = at
        self._synced = cells[USED]

    def _new(self, now: float) -> int | None:
        cells = self.cells
        if cells[USED] < ROWS:
            cells[USED] += 1
            return HEADER + (cells[USED] - 1) * ROW
        for _ in range(LOOKS):
            number = cells[NEXT] = (cells[NEXT] + 1) % ROWS
            at = HEADER + number * ROW
            if is_idle(cells, at, now):
                cells[REPLACED] += 1
                return at
        return None
