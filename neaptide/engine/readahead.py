"""Weights on their way from the disk while the processes that will map them still start.

The kernel keeps what was read until the memory is needed, so a model that ran lately costs nothing here; one that did
not is read in large pieces now instead of page by page when the engine touches it. Only what fits into the memory that
is available: of more, the end would push out the beginning.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from neaptide.engine.memory import available_bytes

WEIGHTS = "*.bin"


def read_ahead(sources: Sequence[str]) -> threading.Thread:
    """Ask for the weights of these model directories, in a thread: to ask takes as long as the disk's queue is full.
    Whatever keeps a file from being read is the engine's to tell."""
    thread = threading.Thread(target=_ask, args=(sources,), name="readahead", daemon=True)
    thread.start()
    return thread


def _ask(sources: Sequence[str]) -> None:
    room = available_bytes()
    for path in (p for source in sources if source for p in sorted(Path(source).glob(WEIGHTS))):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                room -= os.fstat(fd).st_size
                if room >= 0:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)
