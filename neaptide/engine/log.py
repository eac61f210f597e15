"""A process's log: one JSON object a line, to a file that is rotated once it is full, or to stderr."""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from neaptide.clock import wall_s

MAX_FILE_BYTES = 8 << 20
MAX_LINE_BYTES = 4096
_encode = msgspec.json.Encoder(enc_hook=str).encode


class Log:
    """`path` "" = stderr. Keeps the file and one predecessor (PATH.1); each begins with `head` where one is given.
    Never raises for want of space: a process must not die of its log; what was not written is counted in `lost`."""

    def __init__(self, path: str, *, head: dict[str, Any] | None = None, **always: Any) -> None:
        self._path, self._head, self._always = path, head, always
        self._fd, self._size = 2, 0
        self.lost = 0
        if path:
            self._open()
        elif head is not None:
            self._append(_encode(head))

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        short = {k: v[:1024] if isinstance(v, str) else v for k, v in fields.items()}
        line = _encode({"t": round(wall_s(), 3), "level": level, "event": event, **self._always, **short})
        if len(line) > MAX_LINE_BYTES:
            line = _encode({"t": round(wall_s(), 3), "level": level, "event": event, "cut": len(line)})
        self._append(line)

    def _append(self, line: bytes) -> None:
        try:
            if self._path and self._size + len(line) > MAX_FILE_BYTES:
                self._rotate()
            self._size += os.write(self._fd, line + b"\n")
        except OSError:
            self.lost += 1

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        except OSError as e:
            print(f"log {self._path}: {e}; writing to stderr", file=sys.stderr)
            self._path = ""
        if self._head is not None and not self._size:
            self._append(_encode(self._head))

    def _rotate(self) -> None:
        os.replace(self._path, f"{self._path}.1")
        os.close(self._fd)
        self._open()
