"""A replica's start and ends: drained, killed, orphaned, without its engine."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide import link
from neaptide.engine.life import ENGINE_DIED
from neaptide.link import EndHeader
from tests.link_client import Heard
from tests.replica_process import ReplicaProcess, wait_for

Start = Callable[..., ReplicaProcess]
SLOW = {"echo_tpot_ms": 20.0, "max_running": 1}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ReplicaProcess] = []

    def begin(**kwargs: Any) -> ReplicaProcess:
        started.append(ReplicaProcess(tmp_path, **kwargs))
        return started[-1]

    yield begin
    for replica in started:
        replica.stop()


def ended(heard: Heard) -> EndHeader:
    assert heard.end is not None
    return heard.end


def asked(prompt: str, stream: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "stream": stream}


def running(replica: ReplicaProcess) -> tuple[Any, int, int]:
    """A client with one stream that has begun and one request that waits in the line."""
    client = replica.client()
    begun = client.open(asked("x" * 40), "completions")
    waiting = client.open(asked("y" * 40), "completions")
    client.wait(lambda: client.streams[begun].ids and client.loads[-1].waiting == 1)
    return client, begun, waiting


def test_the_stages_of_a_start_are_measured_and_health_tells_readiness(start: Start) -> None:
    replica = start()
    replica.client().close()
    assert replica.get("/health/ready")[0] == 200
    status, body = replica.get("/health")
    told = json.loads(body)
    assert (status, told["status"]) == (200, "ready")
    assert set(told["stages"]) >= {"spawn_s", "io_import_s", "listening_s", "tokenizer_s", "ready_s"}
    assert json.loads(replica.get("/stages")[1]) == told["stages"]


def test_its_sockets_are_the_owners_alone(start: Start) -> None:
    replica = start()
    replica.client().close()
    for path in (replica.spec.link_path, replica.spec.http_path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_stale_socket_is_replaced(start: Start) -> None:
    first = start()
    first.client().close()
    first.process.kill()
    first.wait()
    assert start().client().hello is not None


def test_sigterm_drains_what_runs_and_hands_back_what_waits(start: Start) -> None:
    replica = start(options=SLOW)
    client, begun, waiting = running(replica)
    replica.process.terminate()
    handed_back = ended(client.finish(waiting))
    assert (handed_back.status, handed_back.retryable, handed_back.error) == (503, True, "draining")
    client.wait(lambda: client.loads[-1].draining)
    assert client.loads[-1].slots == 0
    late = ended(client.call(asked("late"), "completions"))
    assert (late.status, late.retryable) == (503, True)
    assert replica.get("/health/ready")[0] == 503
    heard = client.finish(begun)
    assert (ended(heard).finish, heard.text) == ("stop", "x" * 40)
    assert heard.events[-1] == "[DONE]"
    assert replica.wait() == 0
    assert not Path(replica.spec.link_path).exists()


def test_after_the_grace_what_runs_is_cut_with_an_error(start: Start) -> None:
    replica = start(options=SLOW, grace_s=0.2)
    client, begun, _ = running(replica)
    replica.process.terminate()
    heard = client.finish(begun)
    assert (ended(heard).status, ended(heard).finish, ended(heard).retryable) == (503, "error", False)
    assert heard.events[-1]["error"]["code"] == "draining"
    assert replica.wait() == 0


def test_a_second_sigterm_ends_the_grace(start: Start) -> None:
    replica = start(options=SLOW)
    client, begun, waiting = running(replica)
    replica.process.terminate()
    client.finish(waiting)
    replica.process.terminate()
    assert ended(client.finish(begun)).error == "draining"
    assert replica.wait() == 0


def test_a_killed_engine_ends_every_request_and_the_process(start: Start) -> None:
    replica = start(options=SLOW)
    client, begun, waiting = running(replica)
    whole = client.open(asked("z", stream=False), "completions")
    client.wait(lambda: client.loads[-1].waiting == 2)
    os.kill(replica.engine_pid(), signal.SIGKILL)
    heard = client.finish(begun)
    assert (ended(heard).status, ended(heard).finish, ended(heard).error) == (502, "error", "engine_died")
    assert (ended(heard).retryable, ended(heard).content_type) == (False, "text/event-stream")
    assert ended(heard).output_tokens == len(heard.ids) > 0
    assert heard.events[-1]["error"]["code"] == "engine_died"
    for number in (waiting, whole):
        heard = client.finish(number)
        assert (ended(heard).status, ended(heard).retryable) == (502, True)
        assert heard.body["error"]["code"] == "engine_died"
    assert replica.wait() == ENGINE_DIED
    assert "engine gone" in replica.log()


def test_a_request_that_the_engine_had_but_had_not_answered_is_not_retried(start: Start) -> None:
    replica = start(options={"echo_ttft_ms": 60_000.0})
    client = replica.client()
    number = client.open(asked("poison"), "completions")
    client.wait(lambda: client.loads[-1].running == 1)
    os.kill(replica.engine_pid(), signal.SIGKILL)
    end = ended(client.finish(number))
    assert (end.status, end.retryable, end.content_type) == (502, False, "application/json")


def test_an_engine_that_cannot_load_is_told_with_its_reason(start: Start) -> None:
    replica = start(options={"no_such_option": 1})
    assert replica.process.stderr is not None
    assert replica.wait() not in (0, ENGINE_DIED)
    assert b"no_such_option" in replica.process.stderr.read()
    assert "engine failed" in replica.log()


def test_a_model_without_a_tokenizer_is_told_with_its_fix(start: Start, tmp_path: Path) -> None:
    replica = start(engine="openvino", source=str(tmp_path))
    assert replica.process.stderr is not None
    assert replica.wait() == 1
    told = replica.process.stderr.read().decode()
    assert "E220" in told
    assert "fix" in told


def test_a_directory_that_is_not_there_is_told(start: Start, tmp_path: Path) -> None:
    replica = start(link_path=str(tmp_path / "missing" / "x.link"))
    assert replica.process.stderr is not None
    assert replica.wait() == 1
    assert b"cannot listen on" in replica.process.stderr.read()


def test_it_ends_with_its_lifeline_and_takes_its_engine_along(tmp_path: Path) -> None:
    spec = {
        "id": "e", "epoch": 1, "model": "m", "revision": "r", "engine": "echo", "link_path": str(tmp_path / "l"),
        "http_path": str(tmp_path / "h"),
    }  # fmt: skip
    read_end, write_end = os.pipe()
    environment = {**os.environ, "NEAPTIDE_LIFELINE": str(read_end)}
    process = subprocess.Popen(
        [sys.executable, "-m", "neaptide.engine.replica"],
        stdin=subprocess.PIPE, env=environment, pass_fds=[read_end], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_end)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(spec))
    process.stdin.close()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: (tmp_path / "l").exists() and children.read_text().split())
    engine = int(children.read_text().split()[0])
    os.close(write_end)
    assert process.wait(20) == 70
    wait_for(lambda: not is_alive(engine))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_boot_token_does_not_reach_the_log(start: Start) -> None:
    replica = start(token="s3cret-boot-token")
    client = replica.client(token="s3cret-boot-token")
    assert client.hello is not None
    wrong = replica.client(greet=False)
    wrong.send(0, link.HELLO, b'{"token":"another-s3cret"}')
    wrong.wait(lambda: wrong.closed)
    replica.process.terminate()
    assert replica.wait() == 0
    assert "s3cret" not in replica.log()
