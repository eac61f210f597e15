"""`neaptide logs` reads the access log through rotations, filters it and follows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from neaptide.cli.logs import Tail
from neaptide.types import Attempt, Usage
from tests.cli_run import cli, environment


def line(n: int, status: int = 200, model: str = "guide") -> str:
    row = {"at": 1_760_000_000.0 + n, "id": f"r{n}", "peer": "127.0.0.1", "method": "POST", "path": "/v1/x"}
    return json.dumps({**row, "status": status, "model": model, "outcome": "ok", "ttft_s": 0.012}) + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Seven requests over three files, the oldest in .2, and a line that a crash tore."""
    path = tmp_path / "log" / "access.jsonl"
    path.parent.mkdir()
    path.with_name("access.jsonl.2").write_text(line(0) + line(1, 429))
    path.with_name("access.jsonl.1").write_text(line(2, 500, "small") + '{"at":17\n' + line(3))
    path.write_text(line(4, 404) + line(5, 503) + line(6) + '{"at":176')
    return path


def ids(log: Path, *args: str) -> list[str]:
    done = cli("logs", "--json", *args, "--state", str(log.parent.parent))
    assert done.returncode == 0, done.stderr
    return [json.loads(row)["id"] for row in done.stdout.splitlines()]


def test_all_files_are_read_oldest_first_without_torn_lines(log: Path) -> None:
    assert ids(log) == [f"r{n}" for n in range(7)]


def test_only_the_last_lines_are_shown(log: Path) -> None:
    assert ids(log, "-n", "2") == ["r5", "r6"]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("429", ["r1"]), ("4xx", ["r1", "r4"]), ("400-503", ["r1", "r2", "r4", "r5"]), ("5xx", ["r2", "r5"])],
)
def test_a_status_or_a_range_of_them_is_picked(log: Path, status: str, expected: list[str]) -> None:
    assert ids(log, "--status", status) == expected


def test_model_and_time_pick_too(log: Path) -> None:
    assert ids(log, "--model", "small") == ["r2"]
    assert ids(log, "--since", "1760000005", "-n", "1") == ["r5", "r6"]


@pytest.mark.parametrize("status", ["abc", "4x", "xx", "4-"])
def test_a_status_that_is_none_exits_2(log: Path, status: str) -> None:
    assert cli("logs", "--status", status, "--state", str(log.parent.parent)).returncode == 2


def test_people_get_one_readable_line_a_request(log: Path) -> None:
    shown = cli("logs", "-n", "1", "--state", str(log.parent.parent)).stdout
    assert "  200  POST  /v1/x  guide  ok  ttft 12 ms  r6" in shown


def test_a_generation_is_shown_from_the_usage_that_its_line_holds(tmp_path: Path) -> None:
    usage = Usage(
        request_id="01R", model="guide", route="chat.completions", started_wall_s=1_760_000_000.0, status=200,
        ttft_s=0.014, duration_s=0.037, output_tokens=42, attempts=(Attempt(replica="guide-0", tokens=42),),
    )  # fmt: skip
    log = tmp_path / "log" / "access.jsonl"
    log.parent.mkdir()
    log.write_bytes(msgspec.json.encode({"peer": "127.0.0.1", "usage": usage}) + b"\n")
    shown = cli("logs", "--status", "2xx", "--model", "guide", "--state", str(tmp_path)).stdout
    assert "200  POST  /v1/chat/completions  guide  ok" in shown
    assert "ttft 14 ms  duration 37 ms  42 tokens  01R" in shown
    told = json.loads(cli("logs", "--json", "--state", str(tmp_path)).stdout)
    assert (told["outcome"], told["replica"], told["path"]) == ("ok", "guide-0", "/v1/chat/completions")


def test_no_log_yet_says_why(tmp_path: Path) -> None:
    done = cli("logs", "--state", str(tmp_path))
    assert (done.returncode, "access_log is off" in done.stderr) == (2, True)


def test_following_survives_a_rotation(log: Path) -> None:
    command = [sys.executable, "-m", "neaptide.cli", "logs", "-f", "-n", "1", "--json"]
    following = subprocess.Popen(
        [*command, "--state", str(log.parent.parent)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert following.stdout is not None
        seen = [json.loads(following.stdout.readline())["id"]]
        with log.open("a") as f:
            f.write('0000007,"id":"torn then whole","status":200}\n')
        seen.append(json.loads(following.stdout.readline())["id"])
        log.replace(log.with_name("access.jsonl.1"))
        log.write_text(line(8))
        seen.append(json.loads(following.stdout.readline())["id"])
    finally:
        following.terminate()
        following.communicate(timeout=10)
    assert seen == ["r6", "torn then whole", "r8"]


def test_what_was_written_just_before_a_rotation_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_text("a\n")
    tail = Tail(path)
    assert list(tail.history()) == [b"a"]
    with path.open("a") as f:
        f.write("b\n")
    os.replace(path, tmp_path / "access.jsonl.1")
    path.write_text("c\n")
    assert list(tail.fresh()) == [b"b", b"c"]
    assert list(tail.fresh()) == []
