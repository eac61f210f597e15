"""The TLS of one listener while it runs: renewed as its files change, kept where what came is no good."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
from collections.abc import Iterable
from pathlib import Path

from neaptide.errors import ConfigError
from neaptide.tls.context import Leaf, serving
from neaptide.tls.settings import ListenTls

log = logging.getLogger("neaptide.tls")

POLL_S = 2.0  # how often `poll` is to be called
DAY_S = 86_400.0
LOW_DAYS = 14.0
Signature = tuple[tuple[int, int, int], ...]


def signature(paths: Iterable[str]) -> Signature:
    """What changes when a file does: mtime, size, inode; zeros for one that is not there."""
    out = []
    for path in paths:
        try:
            seen = os.stat(path)
            out.append((seen.st_mtime_ns, seen.st_size, seen.st_ino))
        except OSError:
            out.append((0, 0, 0))
    return tuple(out)


class Settling:
    """Tells of each change once, when it has been left alone for a look: a certificate and its key are two files."""

    def __init__(self, seen: Signature) -> None:
        self._taken = self._last = seen

    def is_due(self, seen: Signature) -> bool:
        settled, self._last = seen == self._last, seen
        if not settled or seen == self._taken:
            return False
        self._taken = seen
        return True


class Served:
    """`context` is what the next handshake is to use. `place` is what logs call the listener; `told`: a file that is
    to hold the certificate in force, for the verbs of this host."""

    def __init__(self, tls: ListenTls, place: str, told: str = "") -> None:
        """ConfigError E130 to E132."""
        self.tls, self.place = tls, place
        self._told = told
        self._settling = Settling(signature(tls.paths()))
        self.context: ssl.SSLContext
        self.leaf: Leaf
        self.context, self.leaf = serving(tls)
        self.refused = ""  # why what lies in the files now is not in force
        self._warn_s = 0.0
        self._tell()

    def days_left(self, now_s: float) -> float:
        """Below zero once it has expired."""
        return (self.leaf.not_after_s - now_s) / DAY_S

    def poll(self, now_s: float) -> None:
        """Look at the files, and at the date; `now_s`: wall seconds."""
        if self._settling.is_due(signature(self.tls.paths())):
            self._renew(now_s)
        left_days = self.days_left(now_s)
        if left_days < LOW_DAYS and now_s >= self._warn_s:
            self._warn_s = now_s + DAY_S
            what = f"expires in {left_days:.1f} days" if left_days > 0 else "has expired"
            log.warning("%s: the certificate %s %s; put a new one into %s", self.place, self.leaf.subject, what,
                        self.tls.cert)  # fmt: skip

    def _renew(self, now_s: float) -> None:
        try:
            context, leaf = serving(self.tls)
            if leaf.not_after_s <= now_s < self.leaf.not_after_s:
                raise ConfigError(f"{self.tls.cert} has expired", code="E131", fix="put a new one there")
        except ConfigError as e:
            self.refused = e.what
            log.error("%s: the new certificate is not taken: %s; the one before stays in force. %s", self.place, e.what,
                      e.fix)  # fmt: skip
            return
        self.context, self.leaf, self.refused, self._warn_s = context, leaf, "", 0.0
        log.info("%s: new connections get the certificate %s", self.place, leaf.subject)
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            return
        draft = Path(f"{self._told}.{os.getpid()}")
        try:
            draft.write_text(self.leaf.pem + "\n", encoding="ascii")
            draft.replace(self._told)
        except OSError as e:  # our own verbs will not trust it; nobody else looks there
            log.warning("%s cannot be written: %s", self._told, e.strerror or e)
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
