"""The state directory: where everything that outlives a process stands. 0700; secrets 0600.

run/         sockets, lock, up.json, *.crt   journal/   one directory a gateway process
ledger.db    usage, charges, keys            log/       access, decisions, one file a process
config.json  the configuration in force      cache/     calibrations, downloads
audit/       who changed what                admins.json  admin tokens, as hashes
key, admin-token, pepper, epoch
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from neaptide.errors import ConfigError, ProcessError, StorageError

KEEP_LOG_BYTES = 8 << 20


class StateDir:
    """Paths and the few files that every part agrees on. Creating it makes the directories."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.run, self.journal = self.root / "run", self.root / "journal"
        self.log, self.cache = self.root / "log", self.root / "cache"
        self.supervisor_sock, self.control_sock = self.run / "supervisor.sock", self.run / "control.sock"
        self.up_json, self.config_json = self.run / "up.json", self.root / "config.json"
        self.api_leaf, self.admin_leaf = self.run / "api.crt", self.run / "admin.crt"  # the certificates in force
        self.key, self.admin_token, self.pepper = self.root / "key", self.root / "admin-token", self.root / "pepper"
        self.admins, self.audit = self.root / "admins.json", self.root / "audit"

    def create(self) -> None:
        try:
            for path in (self.root, self.run, self.journal, self.log, self.cache):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.chmod(0o700)
        except OSError as e:
            raise StorageError(
                f"the state directory {self.root} cannot be made: {e.strerror}", code="E501", fix="pass --state DIR"
            ) from e

    def lock(self) -> int:
        """Hold the directory for this process; the descriptor must stay open. ProcessError when another holds it."""
        fd = os.open(self.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise ProcessError(
                f"{self.root} is in use by pid {holder}",
                code="E301",
                fix=f"neaptide down --state {self.root}, or pass another --state DIR",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def locked(self) -> bool:
        """Whether a supervisor holds the directory now."""
        with contextlib.suppress(FileNotFoundError), open(self.run / "lock", "rb") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def secret(self, path: Path, make: str = "") -> str:
        """The secret in `path`; made (`make`, or 32 random bytes as hex) on first use, 0600."""
        try:
            return path.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            value = make or secrets.token_hex(32)
            write_private(path, value + "\n")
            return value
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path} cannot be read: {e}", code="E106", fix=f"chmod 600 {path}, or remove it") from e

    def next_epoch(self) -> int:
        """A number larger than any given before in this directory: names journals, fences stale replicas."""
        path = self.root / "epoch"
        last = int(path.read_text()) if path.exists() else 0
        write_private(path, f"{last + 1}\n")
        return last + 1

    def log_file(self, name: str) -> int:
        """An append descriptor of log/<name>.log; a file past KEEP_LOG_BYTES is set aside once."""
        path = self.log / f"{name}.log"
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > KEEP_LOG_BYTES:
                path.replace(path.with_suffix(".log.1"))
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def write_private(path: Path, text: str) -> None:
    """Atomically, 0600, durable: a crash leaves the old file or the new one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    fresh.replace(path)
