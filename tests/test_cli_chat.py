"""`neaptide chat` against a real SSE endpoint: one question, a conversation at a terminal, and what can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.admin_fake import FakeControl, admin_server, write_state
from tests.cli_run import cli, environment

WAIT_S = 20.0


class Endpoint(ThreadingHTTPServer):
    """An OpenAI endpoint that says what it was asked, word by word; `asked` keeps the bodies."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.hold = threading.Event()  # set: the answer to "wait" goes on
        self.left = threading.Event()  # a client left in the middle

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: object) -> None:
        pass

    def _json(self, status: int, body: object) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "guide"}, {"id": "second"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers.get("authorization", ""))
        question = body["messages"][-1]["content"]
        if question == "refuse":
            self._json(429, {"error": {"message": "too many", "type": "rate_limit_error", "code": "overloaded"}})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-neaptide-request-id", "req-1")
        if question in ("hit", "shared", "stale", "miss"):
            self.send_header("x-neaptide-cache", question)
        self.end_headers()
        try:
            self._stream(question, body)
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def _stream(self, question: str, body: dict[str, Any]) -> None:
        if question == "wait":
            self._delta("begun")
            while not self.server.hold.wait(0.02):
                self._event({"choices": []})
        if question == "escape":
            self._delta("\x1b]0;owned\x07plain")
        for word in ("You ", "asked: ", question):
            self._delta(word)
        if question == "break":
            self._event({"error": {"message": "the replica died", "type": "api_error", "code": "replica_lost"}})
            return
        if question == "cut":
            return
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
            self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _delta(self, text: str) -> None:
        self._event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    def _event(self, event: object) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.hold.set()
    server.shutdown()
    thread.join()
    server.server_close()


def state_of(endpoint: Endpoint, tmp_path: Path) -> Path:
    write_state(tmp_path / "state", endpoint.url, "http://127.0.0.1:9/")
    return tmp_path / "state"


def test_one_question_prints_the_answer_alone(endpoint: Endpoint, tmp_path: Path) -> None:
    done = cli("chat", "hello", "there", "--state", str(state_of(endpoint, tmp_path)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "You asked: hello there\n", "")
    assert endpoint.keys == ["Bearer sk-test-key"]
    assert endpoint.asked[0]["model"] == "guide"


def test_a_question_may_come_from_a_pipe(endpoint: Endpoint, tmp_path: Path) -> None:
    done = cli("chat", "--state", str(state_of(endpoint, tmp_path)), given="什么是首字延迟?")
    assert done.stdout == "You asked: 什么是首字延迟?\n"


def test_an_empty_pipe_is_no_question(endpoint: Endpoint, tmp_path: Path) -> None:
    assert cli("chat", "--state", str(state_of(endpoint, tmp_path)), given="").returncode == 2


def test_json_carries_the_measured_numbers_and_the_cost(endpoint: Endpoint, tmp_path: Path) -> None:
    control = FakeControl(tmp_path / "state", endpoint.url)
    with admin_server(control):
        done = cli("chat", "hi", "--json", "--state", str(control.state))
    told = json.loads(done.stdout)
    assert (told["text"], told["finish"], told["request_id"]) == ("You asked: hi", "stop", "req-1")
    assert (told["prompt_tokens"], told["cached_tokens"], told["output_tokens"]) == (10, 4, 3)
    assert 0 < told["ttft_s"] <= told["duration_s"]
    assert told["tpot_s"] >= 0
    assert (told["amount_nanos"], told["currency"]) == (6 * 1000 + 4 * 500 + 3 * 2000, "CNY")


@pytest.mark.parametrize(("how", "share"), [("hit", 0.1), ("shared", 0.1), ("stale", 0.1), ("miss", 1)])
def test_an_answer_told_from_the_cache_costs_what_the_ledger_charges_for_it(
    endpoint: Endpoint, tmp_path: Path, how: str, share: float
) -> None:
    control = FakeControl(tmp_path / "state", endpoint.url)
    with admin_server(control):
        told = json.loads(cli("chat", how, "--json", "--state", str(control.state)).stdout)
    assert told["cache"] == how
    assert told["amount_nanos"] == round((6 * 1000 + 4 * 500 + 3 * 2000) * share)


def test_options_reach_the_server(endpoint: Endpoint, tmp_path: Path) -> None:
    args = ["--model", "second", "--system", "be short", "--max-tokens", "7", "--temperature", "0"]
    cli("chat", "hi", *args, "--state", str(state_of(endpoint, tmp_path)))
    (body,) = endpoint.asked
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("second", 7, 0)
    assert body["messages"] == [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]


def test_another_endpoint_needs_no_state_and_takes_its_key_from_the_environment(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    done = cli("chat", "hi", "--url", endpoint.url, cwd=tmp_path, OPENAI_API_KEY="sk-elsewhere")
    assert (done.returncode, done.stdout) == (0, "You asked: hi\n")
    assert endpoint.keys == ["Bearer sk-elsewhere"]


def test_a_key_on_the_command_line_works_with_a_warning(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-in-a-file\n")
    open_key = cli("chat", "hi", "--url", endpoint.url, "--key", "sk-open")
    hidden = cli("chat", "hi", "--url", endpoint.url, "--key", f"file:{tmp_path}/key")
    assert "env:NAME" in open_key.stderr
    assert hidden.stderr == ""
    assert endpoint.keys == ["Bearer sk-open", "Bearer sk-in-a-file"]


def test_a_refusal_exits_4_with_the_servers_words(endpoint: Endpoint) -> None:
    done = cli("chat", "refuse", "--url", endpoint.url)
    assert done.returncode == 4
    assert done.stderr.splitlines()[0] == "error[E610]: too many"
    assert "429 overloaded" in done.stderr


def test_an_answer_that_breaks_off_exits_1(endpoint: Endpoint) -> None:
    done = cli("chat", "break", "--url", endpoint.url)
    assert (done.returncode, "error[E611]: the replica died" in done.stderr) == (1, True)


def test_a_stream_that_ends_without_done_exits_3(endpoint: Endpoint) -> None:
    done = cli("chat", "cut", "--url", endpoint.url)
    assert (done.returncode, "error[E404]" in done.stderr) == (3, True)


def test_nobody_at_the_url_exits_3() -> None:
    done = cli("chat", "hi", "--url", "http://127.0.0.1:1/v1")
    assert (done.returncode, "error[E401]: no server answers at http://127.0.0.1:1/v1" in done.stderr) == (3, True)


def test_a_url_that_is_none_exits_2() -> None:
    assert cli("chat", "hi", "--url", "localhost:8000").returncode == 2


def test_control_characters_of_a_model_do_not_reach_the_terminal(endpoint: Endpoint) -> None:
    shown = cli("chat", "escape", "--url", endpoint.url).stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "plain" in shown


def test_ctrl_c_ends_a_one_shot_answer_and_leaves_the_server(endpoint: Endpoint) -> None:
    command = [sys.executable, "-m", "neaptide.cli", "chat", "wait", "--url", endpoint.url]
    asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert asking.stdout is not None
    assert asking.stdout.read(5) == "begun"
    asking.send_signal(signal.SIGINT)
    asking.communicate(timeout=WAIT_S)
    assert asking.returncode == 130
    assert endpoint.left.wait(WAIT_S)


class Terminal:
    """A conversation at a pseudo terminal."""

    def __init__(self, *args: str) -> None:
        self._fd, far = os.openpty()
        command = [sys.executable, "-m", "neaptide.cli", "chat", *args]
        self._process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, start_new_session=True, env=environment(TERM="dumb")
        )
        os.close(far)
        self.shown = ""

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def until(self, text: str) -> str:
        """What came up to and with `text`; the rest is kept."""
        end = time.monotonic() + WAIT_S
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            self.shown += os.read(self._fd, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        while True:
            try:
                if not os.read(self._fd, 4096):
                    break
            except OSError:  # the other end is closed
                break
        os.close(self._fd)
        return self._process.wait(WAIT_S)


def test_a_conversation_keeps_its_messages_and_shows_numbers(endpoint: Endpoint, tmp_path: Path) -> None:
    control = FakeControl(tmp_path / "state", endpoint.url)
    with admin_server(control):
        talk = Terminal("--state", str(control.state))
        greeting = talk.until("you> ")
        assert "demo model" in greeting
        assert "\n  · " in greeting.replace("\r", "")  # something to begin with
        talk.type("first\n")
        numbers = talk.until("you> ")
        talk.type("second\n")
        talk.until("you> ")
        talk.type("/reset\n")
        talk.until("you> ")
        talk.type("third\n")
        talk.until("you> ")
        talk.type("/quit\n")
        assert talk.end() == 0
    assert "You asked: first" in numbers
    assert "TTFT " in numbers
    assert "10 + 3 tokens" in numbers
    assert "CNY 0.000014" in numbers
    assert [[m["content"] for m in body["messages"]] for body in endpoint.asked] == [
        ["first"],
        ["first", "You asked: first", "second"],
        ["third"],
    ]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(endpoint: Endpoint) -> None:
    talk = Terminal("--url", endpoint.url)
    talk.until("you> ")
    talk.type("wait\n")
    talk.until("begun")
    talk.interrupt()
    assert "stopped" in talk.until("you> ")
    assert endpoint.left.wait(WAIT_S)
    talk.type("again\n")
    assert "You asked: again" in talk.until("you> ")
    talk.type("\x04")
    assert talk.end() == 0


def test_a_failed_answer_does_not_end_the_conversation(endpoint: Endpoint) -> None:
    talk = Terminal("--url", endpoint.url)
    talk.until("you> ")
    talk.type("refuse\n")
    assert "error[E610]" in talk.until("you> ")
    talk.type("/model second\n")
    assert "* second" in talk.until("you> ")
    talk.type("/model nobody\n")
    assert "no model 'nobody'" in talk.until("you> ")
    talk.type("/help\n")
    assert "/reset" in talk.until("you> ")
    talk.type("hi\n")
    talk.until("you> ")
    talk.type("/quit\n")
    assert talk.end() == 0
    assert endpoint.asked[-1]["model"] == "second"
