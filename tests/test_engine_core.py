"""The engine process as its replica meets it: a real process at the other end of a real socketpair."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from neaptide.engine.pipe import Abort, Add, Close, Failed, FromEngine, MessageReader, Ready, Stepped, from_engine, pack
from neaptide.engine.protocol import Emission, Sampling
from neaptide.lifeline import VARIABLE
from neaptide.specs import ReplicaSpec

PATIENCE_S = 30
GREEDY = Sampling(max_tokens=5, temperature=0.0, ignore_eos=True)


class Process:
    """An engine process, the socket to it, and the end of a lifeline."""

    def __init__(self, engine: str, source: str = "", cpus: tuple[int, ...] = (), **options: object) -> None:
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()}
        spec = ReplicaSpec(
            id="e-0", epoch=0, model="e", revision="r", engine=engine, source=source, options=raw, engine_cpus=cpus
        )
        self.sock, theirs = socket.socketpair()
        lifeline, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "neaptide.engine.core", str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), lifeline),
            env=os.environ | {VARIABLE: str(lifeline)},
        )
        theirs.close()
        os.close(lifeline)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(spec))
        self.process.stdin.close()
        self.sock.settimeout(PATIENCE_S)
        self._reader, self._messages = MessageReader(), list[FromEngine]()

    def send(self, *messages: Add | Abort | Close) -> None:
        self.sock.sendall(b"".join(pack(message) for message in messages))

    def receive(self) -> FromEngine | None:
        """The next message; None at the end of the pipe."""
        while not self._messages:
            received = self.sock.recv(1 << 16)
            if not received:
                return None
            self._messages = [from_engine.decode(body) for body in self._reader.feed(received)]
        return self._messages.pop(0)

    def answers(self, *ids: int) -> dict[int, list[Emission]]:
        """All emissions until each of `ids` has finished."""
        told: dict[int, list[Emission]] = {id: [] for id in ids}
        while not all(emissions and emissions[-1].finish for emissions in told.values()):
            step = self.receive()
            assert isinstance(step, Stepped), step
            for emission in step.emissions:
                told.setdefault(emission.id, []).append(emission)
        return told

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.sock.close()
        if self.lifeline >= 0:
            os.close(self.lifeline)


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*args: str, **options: object) -> Process:
        started.append(Process(*args, **options))
        return started[-1]

    yield begin
    for process in started:
        process.end()


@pytest.fixture
def echo(start: Callable[..., Process]) -> Process:
    process = start("echo", max_running=4)
    assert isinstance(process.receive(), Ready)
    return process


def test_it_tells_what_it_is_before_anything_else(start: Callable[..., Process]) -> None:
    ready = start("echo", max_running=4, context_tokens=100).receive()
    assert isinstance(ready, Ready)
    assert (ready.description.engine, ready.description.max_running) == ("echo", 4)
    assert ready.description.context_tokens == 100


def test_requests_sent_together_are_answered_together(echo: Process) -> None:
    echo.send(*(Add(id, list(b"sea"), [], 0, GREEDY) for id in range(1, 9)))
    answers = echo.answers(*range(1, 9))
    for emissions in answers.values():
        assert bytes(token for emission in emissions for token in emission.token_ids) == b"sease"
        assert emissions[-1].finish == "length"


def test_a_step_tells_its_batch_and_what_is_free_after_it(echo: Process) -> None:
    echo.send(*(Add(id, list(b"sea"), [], 0, GREEDY) for id in (1, 2)))
    steps = []
    while not steps or steps[-1].capacity.running:
        steps.append(echo.receive())
        assert isinstance(steps[-1], Stepped)
    assert all(step.batch <= 2 for step in steps)
    assert steps[-1].batch >= 1
    assert steps[-1].capacity.free_slots == 4
    assert all(step.step_s >= 0 for step in steps)


def test_a_refused_request_is_told_alone_and_the_others_go_on(echo: Process) -> None:
    echo.send(Add(1, [65] * 100_000, [], 0, GREEDY), Add(2, list(b"sea"), [], 0, GREEDY))
    answers = echo.answers(1, 2)
    assert [emission.finish for emission in answers[1]] == ["error"]
    assert "100000" in answers[1][0].error
    assert answers[2][-1].finish == "length"


def test_an_abort_cuts_a_long_wait_short(start: Callable[..., Process]) -> None:
    process = start("echo", echo_ttft_ms=3_600_000.0)
    process.receive()
    process.send(Add(1, list(b"sea"), [], 0, GREEDY))
    process.send(Abort(1))
    assert [emission.finish for emission in process.answers(1)[1]] == ["abort"]


def test_close_ends_it_well_even_while_it_works(echo: Process) -> None:
    echo.send(Add(1, list(b"sea"), [], 0, Sampling(max_tokens=8000, ignore_eos=True)), Close())
    assert echo.exit_code() == 0


def test_it_ends_when_its_replica_is_gone(start: Callable[..., Process]) -> None:
    process = start("echo", echo_ttft_ms=3_600_000.0)
    process.receive()
    process.send(Add(1, list(b"sea"), [], 0, GREEDY))
    process.sock.close()
    assert process.exit_code() == 0


def test_it_ends_when_the_supervisor_is_gone(echo: Process) -> None:
    os.close(echo.lifeline)
    echo.lifeline = -1
    assert echo.exit_code() == 70


def test_killed_it_leaves_the_end_of_the_pipe_and_no_process(echo: Process) -> None:
    echo.send(Add(1, list(b"sea"), [], 0, Sampling(max_tokens=8000, ignore_eos=True)))
    assert isinstance(echo.receive(), Stepped)
    echo.process.send_signal(signal.SIGKILL)
    assert echo.exit_code() == -signal.SIGKILL
    while echo.receive() is not None:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(echo.process.pid, 0)


def test_what_it_cannot_read_ends_it_with_the_reason(echo: Process) -> None:
    echo.sock.sendall(b"\x01\x00\x00\x00\xc1")
    failed = echo.receive()
    assert isinstance(failed, Failed)
    assert (failed.code, echo.exit_code()) == ("E310", 1)


def test_an_unknown_engine_is_a_configuration_error(start: Callable[..., Process]) -> None:
    process = start("steam")
    failed = process.receive()
    assert isinstance(failed, Failed)
    assert "steam" in failed.what
    assert "openvino" in failed.why
    assert process.exit_code() == 2


def test_an_option_the_engine_does_not_know_is_an_error(start: Callable[..., Process]) -> None:
    for option in ("precision", "spelling"):
        process = start("echo", **{option: "bf16"})
        failed = process.receive()
        assert isinstance(failed, Failed)
        assert option in failed.what
        assert process.exit_code() == 2


def test_it_is_pinned_where_it_is_told_and_says_so_where_it_cannot_be(start: Callable[..., Process]) -> None:
    here = min(os.sched_getaffinity(0))
    process = start("echo", cpus=(here,))
    assert isinstance(process.receive(), Ready)
    assert os.sched_getaffinity(process.process.pid) == {here}
    process = start("echo", cpus=(1000,))
    failed = process.receive()
    assert isinstance(failed, Failed)
    assert "1000" in failed.what
    assert process.exit_code() == 2


def test_a_missing_model_names_the_file_and_the_way_to_get_it(start: Callable[..., Process], tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    process = start("openvino", str(tmp_path))
    failed = process.receive()
    assert isinstance(failed, Failed)
    assert str(tmp_path / "openvino_model.xml") in failed.what
    assert "convert" in failed.fix
    assert process.exit_code() == 1


def test_a_damaged_model_names_the_file(start: Callable[..., Process], tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    config = {
        "num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 9,
        "max_position_embeddings": 64, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    (tmp_path / "openvino_model.xml").write_text("<net></net>")
    (tmp_path / "openvino_model.bin").write_bytes(b"\0" * 64)
    (tmp_path / "tokenizer.json").write_text("{}")
    process = start("openvino", str(tmp_path))
    failed = process.receive()
    assert isinstance(failed, Failed)
    assert (failed.code, process.exit_code()) == ("E202", 1)
    assert "openvino_model.xml" in failed.what
