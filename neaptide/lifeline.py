"""How a process of ours starts and ends: its spec from stdin, its life bound to the supervisor's pipe.

The only reader of NEAPTIDE_LIFELINE. At EOF of that pipe the supervisor is gone: `on_end` is called once in a thread
(it may ask the loop to say goodbye), and after `last_words_s` the process ends whatever it is doing.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec

VARIABLE = "NEAPTIDE_LIFELINE"
T = TypeVar("T")


def read_spec(kind: type[T]) -> T:
    """The spec on stdin, which is then closed and replaced by /dev/null. Raises msgspec.ValidationError. Where stdin
    ends without one nobody needs this process: it exits with 0."""
    raw = sys.stdin.buffer.read()
    if not raw:
        sys.exit(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return msgspec.json.decode(raw, type=kind)


def log_to(path: str) -> None:
    """stdout and stderr go to this file from now on, at its end."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for standard in (1, 2):
        os.dup2(fd, standard)
    os.close(fd)


def lifeline_fd() -> int | None:
    """The inherited descriptor, to hand on to a child; None when started by hand."""
    value = os.environ.get(VARIABLE)
    return int(value) if value else None


def hold(on_end: Callable[[], None] | None = None, last_words_s: float = 1.0) -> None:
    """Watch the pipe from a daemon thread; a no-op when started by hand."""
    fd = lifeline_fd()
    if fd is None:
        return
    threading.Thread(target=_watch, args=(fd, on_end, last_words_s), name="lifeline", daemon=True).start()


def _watch(fd: int, on_end: Callable[[], None] | None, last_words_s: float) -> None:
    while os.read(fd, 1):  # nobody ever writes; EOF is the message
        pass
    if on_end is not None:
        threading.Timer(last_words_s, os._exit, args=(70,)).start()
        on_end()
    else:
        os._exit(70)


def raise_open_files() -> None:
    """The soft limit to the hard one: every connection is a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
