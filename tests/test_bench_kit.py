"""The benchmark's own programs are tested: a number from a load generator that miscounts is worth nothing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from bench import kit
from neaptide import link

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kit.build("mock", "muxmock", "loadgen", into=tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def mock_port(programs: dict[str, str]) -> Iterator[int]:
    port = kit.free_port()
    with kit.running([programs["mock"], port], core=None, ready=lambda: kit.listening(port), what="the mock"):
        yield port


def run(port: int, mode: str, program: str, **fields: object) -> dict[str, object]:
    # An open loop counts what finds no connection free as an error: on a busy machine many come at once.
    conns = 100 if mode == "open" else 4
    load = kit.Load(
        body=kit.chat("mock", "hi", **fields),
        mode=mode,
        conns=conns,
        warmup_s=0.05,
        duration_s=0.4,
        options={"rate": 200},
    )
    return kit.drive(load, port, core=None, program=program)


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_whole_answers_are_counted_and_timed(mode: str, mock_port: int, programs: dict[str, str]) -> None:
    result = run(mock_port, mode, programs["loadgen"])
    assert result["ok"] > 0
    assert result["err"] == 0
    assert result["lat_ms"]["n"] == result["ok"]
    assert result["cpu_s"]["loadgen"] > 0


@pytest.mark.parametrize("mode", ["stream", "sse"])
def test_tokens_of_a_stream_are_counted_one_by_one(mode: str, mock_port: int, programs: dict[str, str]) -> None:
    result = run(mock_port, mode, programs["loadgen"], stream=True, max_tokens=10)
    assert result["err"] == 0
    assert result["ok"] > 0
    # Each whole answer has ten tokens; streams cut by either end of the window account for the rest.
    assert abs(result["tokens"] - 10 * result["ok"]) <= 2 * 4 * 10
    if mode == "sse":
        assert result["usage_tokens"] == result["usage_chunks"] > 0


def test_a_refusing_server_is_an_error_not_a_fast_answer(programs: dict[str, str]) -> None:
    # Given nothing listening, when the generator runs, then it reports failures and no answer.
    result = run(kit.free_port(), "closed", programs["loadgen"])
    assert result["ok"] == 0
    assert result["err"] > 0


class Gateway:
    """The gateway's end of the link, in blocking calls."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(path)
        self.reader = link.FrameReader()
        self.frames: list[link.Frame] = []

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        self.socket.sendall(link.frame(stream, kind, payload))

    def until(self, wanted: Callable[[link.Frame], bool]) -> list[link.Frame]:
        """Frames up to and with the first wanted one; ConnectionError when the replica closes before."""
        seen: list[link.Frame] = []
        while True:
            while self.frames:
                seen.append(self.frames.pop(0))
                if wanted(seen[-1]):
                    return seen
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError
            self.frames += self.reader.feed(data)


@pytest.fixture
def gateway(programs: dict[str, str], tmp_path: Path) -> Iterator[Gateway]:
    path = str(tmp_path / "mux.link")
    command = [programs["muxmock"], "--token", "boot", "--step-ms", "2", path]
    with kit.running(command, core=None, ready=lambda: Path(path).exists(), what="muxmock"):
        one = Gateway(path)
        yield one
        one.socket.close()


def greet(gateway: Gateway, token: str) -> None:
    gateway.send(0, link.HELLO, msgspec.json.encode(link.Hello(token=token, role="gateway", name="g")))


def opened(gateway: Gateway, body: bytes, *, stream: bool, first: int | None = None) -> None:
    head = link.OpenHeader(
        request_id="r1", route="chat.completions", body_bytes=len(body), stream=stream, include_usage=True
    )
    cut = len(body) if first is None else first
    gateway.send(1, link.OPEN, link.pack_header(head, body[:cut]))
    if cut < len(body):
        gateway.send(1, link.BODY, body[cut:])


def test_the_mock_replica_speaks_the_link(gateway: Gateway) -> None:
    # Given a greeted connection, when a stream is opened, then its tokens come as frames and END tells the usage.
    greet(gateway, "boot")
    (hello,) = gateway.until(lambda f: f.type == link.HELLO)
    told = msgspec.json.decode(hello.payload, type=link.Hello)
    assert (told.version, told.role, told.token) == (link.VERSION, "replica", "boot")
    opened(gateway, b'{"max_tokens": 5, "stream": true}', stream=True)
    frames = gateway.until(lambda f: f.type == link.END)
    tokens = [link.split_token(f.payload) for f in frames if f.type == link.TOKEN]
    head, last = link.split_header(frames[-1].payload)
    end = msgspec.json.decode(head, type=link.EndHeader)
    assert [len(ids) for ids, _ in tokens] == [1] * 5
    assert all(data.startswith(b"data: ") and data.endswith(b"\n\n") for _, data in tokens)
    assert (end.finish, end.output_tokens, end.status) == ("length", 5, 200)
    assert last.endswith(b"data: [DONE]\n\n")
    assert b'"completion_tokens":5' in last


def test_the_mock_replica_takes_a_body_in_pieces_and_answers_whole(gateway: Gateway) -> None:
    greet(gateway, "boot")
    opened(gateway, b'{"messages": []}' * 100, stream=False, first=10)
    head, body = link.split_header(gateway.until(lambda f: f.type == link.END)[-1].payload)
    assert msgspec.json.decode(head, type=link.EndHeader).content_type == "application/json"
    assert msgspec.json.decode(body)["usage"]["completion_tokens"] == 42


def test_the_mock_replica_stops_at_the_end_of_its_credit_until_more_comes(gateway: Gateway) -> None:
    greet(gateway, "boot")
    opened(gateway, b'{"max_tokens": 1000, "stream": true}', stream=True)
    sent = 0

    def used_up(f: link.Frame) -> bool:
        nonlocal sent
        sent += len(f.payload) if f.type == link.TOKEN else 0
        return sent > link.CREDIT_BYTES - 400

    gateway.until(used_up)
    assert sent <= link.CREDIT_BYTES
    gateway.send(1, link.CREDIT, link.pack_credit(10_000))
    gateway.until(lambda f: f.type == link.TOKEN)
    gateway.send(1, link.ABORT)
    head, _ = link.split_header(gateway.until(lambda f: f.type == link.END)[-1].payload)
    assert msgspec.json.decode(head, type=link.EndHeader).finish == "abort"


def test_the_mock_replica_closes_on_a_wrong_boot_token(gateway: Gateway) -> None:
    greet(gateway, "somebody else's")
    with pytest.raises((ConnectionError, OSError)):
        gateway.until(lambda f: True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["startup", "gateway", "link", "soak", "scale-out", "truth"])
def test_a_benchmark_runs_from_end_to_end(name: str) -> None:
    # What it measures in a second means nothing; that it starts, drives, stops and writes its file does.
    command = [sys.executable, "-m", "bench", "--quick", name]
    done = subprocess.run(command, cwd=kit.ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written to bench/results/" in done.stdout
