"""The access log: JSON lines, written by a thread, rotated by size. The loop only appends to a bounded list."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec

from neaptide.types import Usage

log = logging.getLogger("neaptide.gateway")
ROTATE_BYTES = 64 << 20
KEEP = 3
QUEUE_AT_MOST = 50_000  # lines; past it lines are dropped and counted


class Line(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One answered request. No bodies, no keys: `key` is the key's id."""

    at: float  # wall, seconds
    id: str
    peer: str
    method: str
    path: str
    status: int
    key: str = ""
    duration_s: float = 0.0
    client: str = ""  # whom its certificate names, with mTLS


class UsageLine(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One request that got to a model: its row, as the journal encoded it where it did, so that nothing is built or
    encoded twice."""

    peer: str
    usage: Usage | msgspec.Raw
    client: str = ""


class AccessLog:
    """`add` from the loop, `flush` now and then from the loop; encoding and writing happen in the thread.
    `dropped` counts lines lost to a slow or full disk: an access log never holds up a request."""

    def __init__(self, path: str, rotate_bytes: int = ROTATE_BYTES, keep: int = KEEP) -> None:
        self._path = Path(path)
        self._rotate_bytes, self._keep = rotate_bytes, keep
        self._lines: list[Line | UsageLine] = []
        self._handed: list[Line | UsageLine] = []
        self._wake = threading.Condition()
        self._closed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def add(self, line: Line | UsageLine) -> None:
        if len(self._lines) < QUEUE_AT_MOST:
            self._lines.append(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Hand what has gathered to the thread."""
        if not self._lines:
            return
        with self._wake:
            if len(self._handed) >= QUEUE_AT_MOST:
                self.dropped += len(self._lines)
            else:
                self._handed += self._lines
                self._wake.notify()
        self._lines = []

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is left; returns when it is written, or after `timeout_s`."""
        self.flush()
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        encode = msgspec.json.Encoder().encode_lines
        complained = False
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._handed or self._closed)
                batch, self._handed = self._handed, []
                if not batch and self._closed:
                    return
            try:
                self._write(encode(batch))
                complained = False
            except OSError as e:
                self.dropped += len(batch)
                if not complained:
                    log.warning("the access log %s cannot be written: %s", self._path, e)
                    complained = True

    def _write(self, data: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size + len(data) > self._rotate_bytes:
            self._rotate()
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as file:
            file.write(data)

    def _rotate(self) -> None:
        for n in range(self._keep - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{n}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{n + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
