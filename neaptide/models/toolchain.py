"""The conversion tools (torch, optimum-intel, nncf) in a virtual environment of their own, made once.

They are 1.5 GB that serving never needs, and they pin a transformers of their own: they stay out of Neaptide's
environment. A Toolchain is what convert() calls; tests hand it another one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from neaptide.errors import ModelError

Report = Callable[[str], None]
Precision = Literal["int4", "int8", "bf16"]
REQUIREMENTS = Path(__file__).parent / "convert-requirements.txt"
# PyPI's torch for Linux carries CUDA; this index adds the CPU build, which pip prefers (2.13.0+cpu > 2.13.0).
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
LAST_LINES = 15
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
SETTINGS = {
    "HF_HUB_OFFLINE": "1",  # the source is a directory; nothing is looked up
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",  # the tracer's warnings are many and not the user's to act on
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}


class Toolchain(Protocol):
    def ready(self, report: Report) -> None:
        """Make the tools usable, installing them if need be. ModelError E209."""

    def export_argv(self, source: Path, out: Path, to: Precision, group_size: int | None) -> list[str]:
        """The command that writes an OpenVINO directory to `out`; `group_size` is for int4."""

    def check_argv(self, out: Path) -> list[str]:
        """The command that loads the result and fails if it cannot."""


class OptimumToolchain:
    """optimum-intel in `root`; the directory's name carries the pins, so a changed pin makes a new one."""

    def __init__(self, root: Path, requirements: Path = REQUIREMENTS, python: str = sys.executable) -> None:
        pins = requirements.read_bytes() + f"{sys.version_info[:2]}".encode()
        self.path = root / f"tools-{hashlib.sha256(pins).hexdigest()[:12]}"
        self._requirements, self._base_python = requirements, python
        self._python = str(self.path / "bin" / "python")

    def ready(self, report: Report) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f"{self.path.name}.lock").open("w") as lock:
            if not _locked(lock.fileno()):
                report("waiting for another conversion that installs the tools")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._complete().is_file():
                self._install(report)

    def export_argv(self, source: Path, out: Path, to: Precision, group_size: int | None) -> list[str]:
        argv = [str(self.path / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source)]
        argv += ["--task", "text-generation-with-past", "--disable-convert-tokenizer"]
        # bf16 has no --weight-format: the export keeps the dtype that the (staged) config.json names.
        argv += [] if to == "bf16" else ["--weight-format", to]
        argv += [] if group_size is None else ["--group-size", str(group_size)]
        return [*argv, str(out)]

    def check_argv(self, out: Path) -> list[str]:
        script = "import openvino, sys; openvino.Core().compile_model(sys.argv[1], 'CPU')"
        return [self._python, "-c", script, str(out / "openvino_model.xml")]

    def _complete(self) -> Path:
        return self.path / "complete"

    def _install(self, report: Report) -> None:
        """A venv cannot be moved once made, so a marker written last tells a whole one from an interrupted one."""
        shutil.rmtree(self.path, ignore_errors=True)
        report(f"making the conversion environment in {self.path} (once, about 1.5 GB)")
        install = [self._python, "-m", "pip", "install", "--no-deps", "--retries", "2", "--progress-bar", "off"]
        install += ["--extra-index-url", CPU_TORCH, "-r", str(self._requirements)]
        probe = "import torch, nncf, openvino, optimum.intel; print('tools ready: torch', torch.__version__)"
        for argv in ([self._base_python, "-m", "venv", str(self.path)], install, [self._python, "-c", probe]):
            code, last = run(argv, report)
            if code != 0:
                raise ModelError(
                    "the conversion environment could not be made",
                    why=last or f"{argv[0]} ended with {code}",
                    fix="check the network or PIP_INDEX_URL, then run the same command again",
                    code="E209",
                )
        self._complete().write_text("ok\n")


def run(argv: Sequence[str], report: Report) -> tuple[int, str]:
    """Run to the end, each output line to `report`; (exit code, the last lines). On any interruption the command's
    whole process group is ended before the exception goes on."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,  # progress bars' \r count as line ends
        errors="replace",
        env={**os.environ, **SETTINGS},
        start_new_session=True,
        preexec_fn=_end_with_parent,  # a conversion has one thread here; nothing else may run between fork and exec
    )
    last: deque[str] = deque(maxlen=LAST_LINES)
    output = process.stdout or ()  # never absent: it is a pipe
    try:
        for line in output:
            if text := line.strip():
                last.append(text[:500])
                report(text[:500])
        return process.wait(), "\n".join(last)
    except BaseException:
        _end_group(process)
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()


def _end_with_parent() -> None:
    """In the child: SIGTERM when its parent is gone, even by SIGKILL, so that no export runs on alone (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_group(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
