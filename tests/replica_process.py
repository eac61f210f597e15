"""A replica as a real process with the echo engine, for tests."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from neaptide.link import short_path
from neaptide.specs import ReplicaSpec
from tests.link_client import LinkClient

RUN = "import sys; from neaptide import lifeline; from neaptide.engine.replica import run; from neaptide.specs import "
RUN += "ReplicaSpec; sys.exit(run(lifeline.read_spec(ReplicaSpec), stall_s=float(sys.argv[1])))"


class ReplicaProcess:
    """Starts at once; `client()` waits until it is ready (its HELLO is)."""

    def __init__(
        self, directory: Path, stall_s: float = 30.0, options: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in (options or {}).items()}
        settings: dict[str, Any] = {
            "id": "echo-0",
            "epoch": 3,
            "model": "mirror",
            "revision": "rev-1",
            "engine": "echo",
            "token": "boot",
            "link_path": str(directory / "echo.link"),
            "http_path": str(directory / "echo.http"),
            "log_path": str(directory / "echo.log"),
            "options": raw,
        }
        self.spec = ReplicaSpec(**{**settings, **fields})
        argv = [sys.executable, "-c", RUN, str(stall_s)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(self.spec))
        self.process.stdin.close()

    def client(self, **kwargs: Any) -> LinkClient:
        wait_for(lambda: listens(self.spec.link_path) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()
        return LinkClient(self.spec.link_path, **kwargs)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = UnixHTTPConnection(self.spec.http_path)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def post(self, path: str, body: object) -> tuple[int, bytes]:
        connection = UnixHTTPConnection(self.spec.http_path)
        connection.request("POST", path, msgspec.json.encode(body))
        answer = connection.getresponse()
        return answer.status, answer.read()

    def engine_pid(self) -> int:
        children = psutil.Process(self.process.pid).children()
        assert len(children) == 1, children
        return int(children[0].pid)

    def wait(self, timeout_s: float = 20.0) -> int:
        return self.process.wait(timeout_s)

    def log(self) -> str:
        path = Path(self.spec.log_path)
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


class UnixHTTPConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(short_path(self._path))


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(short_path(path)) == 0


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.01)
