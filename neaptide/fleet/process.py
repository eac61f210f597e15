"""A child process: started from a spec on stdin, tied to our lifeline, watched by pidfd.

Children get an environment of their own: what Python and the native libraries need, never the operator's secrets (those
are resolved by control from the configuration).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import msgspec

from neaptide import lifeline
from neaptide.clock import mono_s, wall_s

PASSED = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LD_PRELOAD", "USER", "LOGNAME")
PREFIXES = ("LC_", "PYTHON", "OMP_", "OV_", "OPENVINO_", "TBB_", "MALLOC_", "COVERAGE_", "SSL_")


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start. `document` goes to stdin, of a spare later; `opaque` is kept for whoever asked, and listed back
    after a restart."""

    kind: str  # control | gateway | replica | spare
    id: str
    epoch: int
    module: str
    document: msgspec.Raw = msgspec.Raw(b"null")
    args: tuple[str, ...] = ()
    spare: str = ""  # of a replica: the spare that becomes it, if that still runs
    fds: tuple[int, ...] = ()
    full_environment: bool = False
    opaque: dict[str, str] = {}


class ChildStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A child as told to control."""

    kind: str
    id: str
    epoch: int
    pid: int
    started_mono_s: float
    started_wall_s: float
    opaque: dict[str, str] = {}
    exit_code: int | None = None  # negative: killed by that signal


class Child:
    """A running process of ours; `on_exit(child)` is called once, in the loop, with `exit_code` set."""

    def __init__(self, spec: ChildSpec, popen: subprocess.Popen[bytes], on_exit: Callable[[Child], None]) -> None:
        self.spec, self.pid, self.exit_code = spec, popen.pid, None
        self.started_mono_s, self.started_wall_s = mono_s(), wall_s()
        self.gone = asyncio.Event()
        self._popen, self._on_exit = popen, on_exit
        self._pidfd = os.pidfd_open(popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    exit_code: int | None

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exit_code = self._popen.wait()
        self.gone.set()
        self._on_exit(self)

    def become(self, spec: ChildSpec) -> bool:
        """A spare turns into what `spec` says; False when it has just died."""
        if self._popen.stdin is None or self.exit_code is not None:
            return False
        try:
            with self._popen.stdin as stdin:
                stdin.write(bytes(spec.document))
        except BrokenPipeError:
            return False
        self.spec, self.started_mono_s, self.started_wall_s = spec, mono_s(), wall_s()
        return True

    def signal(self, number: int = signal.SIGTERM) -> None:
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def end(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL once `grace_s` has passed. Returns when it is gone."""
        self.signal()
        try:
            await asyncio.wait_for(self.gone.wait(), grace_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.gone.wait()

    def status(self) -> ChildStatus:
        s = self.spec
        return ChildStatus(
            kind=s.kind,
            id=s.id,
            epoch=s.epoch,
            pid=self.pid,
            started_mono_s=self.started_mono_s,
            started_wall_s=self.started_wall_s,
            opaque=s.opaque,
            exit_code=self.exit_code,
        )


def start(spec: ChildSpec, lifeline_fd: int, log_fd: int, cwd: str, on_exit: Callable[[Child], None]) -> Child:
    """Start `spec`; must run inside the loop that will watch it. OSError when the process cannot be made."""
    popen = subprocess.Popen(
        [*command(spec.module), *spec.args],
        stdin=subprocess.PIPE,
        stdout=log_fd,
        stderr=log_fd,
        cwd=cwd,
        env={**environment(os.environ, spec.full_environment), lifeline.VARIABLE: str(lifeline_fd)},
        pass_fds=(lifeline_fd, *spec.fds),
        start_new_session=True,  # a Ctrl-C in the terminal is the supervisor's to translate, not every child's
    )
    if popen.stdin is not None and spec.kind != "spare":
        with contextlib.suppress(BrokenPipeError), popen.stdin as stdin:  # it died at once: its exit tells
            stdin.write(bytes(spec.document))
    return Child(spec, popen, on_exit)


def command(module: str) -> Sequence[str]:
    """-P: the working directory is no place to import from."""
    return [sys.executable, "-P", "-m", module]


def environment(full: Mapping[str, str], everything: bool) -> dict[str, str]:
    if everything:
        return dict(full)
    return {k: v for k, v in full.items() if k in PASSED or k.startswith(PREFIXES)}
