"""Shared fixtures: a real service on free ports, in a directory of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
ECHO = "models:\n  echo: {engine: echo}\n"
START_S = 60


class Service:
    """A running `neaptide up -d`."""

    def __init__(self, config: Path, state: Path, info: dict[str, Any]) -> None:
        self.config, self.state, self.info = config, state, info
        self.api, self.admin, self.key = info["api"], info["admin"], info["key"]

    @property
    def pids(self) -> dict[str, list[int]]:
        return self.info["pids"]

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The CLI against this service."""
        return neaptide(*args, "--state", str(self.state), check=check)


def neaptide(*args: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neaptide.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S + 30, cwd=cwd)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def started(root: Path, text: str, *more: str, name: str = "s") -> Service:
    """`neaptide up -d` with this configuration, in `root`."""
    config, state = root / f"{name}.yaml", root / name
    config.write_text(text, encoding="utf-8")
    args = ("up", "-d", "-f", str(config), "--state", str(state), "--port", "0", "--json", *more)
    return Service(config, state, json.loads(neaptide(*args).stdout))


def stop(state: Path) -> None:
    neaptide("down", "--state", str(state), "--grace-s", "10", check=False)


@contextmanager
def serving(root: Path, text: str) -> Iterator[Service]:
    """One service for many tests that only ask it questions."""
    service = started(root, text)
    yield service
    stop(service.state)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A suite started in the background finds SIGINT ignored, and a child would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services from a configuration text; stops them all afterwards."""
    running: list[Path] = []

    def start(text: str = ECHO, *more: str, name: str = "s") -> Service:
        running.append(tmp_path / name)
        return started(tmp_path, text, *more, name=name)

    yield start
    for state in running:
        stop(state)


@pytest.fixture(scope="session")
def echo_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One echo service for all tests that only ask it questions."""
    with serving(tmp_path_factory.mktemp("echo"), ECHO) as service:
        yield service


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    out: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            out += [child, *descendants(child)]
    return out


os.environ.setdefault("NO_COLOR", "1")

# Machines that run tests are shared: how long an example takes says nothing about it.
settings.register_profile("neaptide", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("neaptide")
