"""The scale-out benchmark: which replica answered is read, not assumed; and its short form, on real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scale_out
from bench.kit import Up


def line(request_id: str, *replicas: str) -> bytes:
    attempts = [{"replica": replica, "tokens": 1} for replica in replicas]
    return json.dumps({"peer": "", "usage": {"request_id": request_id, "attempts": attempts}}).encode() + b"\n"


class Read(scale_out.Answers):
    """Answers that came at these times, as the access log tells of them."""

    def __init__(self, state: Path, **ended_s: float) -> None:
        super().__init__(Up("http://127.0.0.1:1/v1", "", "key", {}, 0.0, state), "echo")
        self._ended_s.update(ended_s)

    def again(self) -> dict[str, float]:
        self._looked_s = 0.0
        self.look()
        return self.first_s


def test_a_replicas_first_answer_counts_and_of_two_tries_the_one_that_answered(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    answers = Read(tmp_path, a=1.0, b=2.0, c=3.0)
    (log / "access.jsonl").write_bytes(line("a", "echo-0") + line("c", "echo-0") + line("b", "echo-1", "echo-2"))
    assert answers.again() == {"echo-0": 1.0, "echo-2": 2.0}


def test_a_line_that_is_still_being_written_is_read_later_and_others_requests_are_not_ours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    answers, whole = Read(tmp_path, a=1.0), line("a", "echo-0")
    path = log / "access.jsonl"
    path.write_bytes(b'{"at": 1.0, "status": 200}\n' + line("the self-test's", "echo-9") + whole[:20])
    assert answers.again() == {}
    path.write_bytes(path.read_bytes() + whole[20:])
    assert answers.again() == {"echo-0": 1.0}


@pytest.mark.timeout(300)
def test_ten_replicas_start_from_zero_and_each_answers_through_the_gateway() -> None:
    found = scale_out.scale_out(10)
    assert list(found["answered_s"]) == ["1", "5", "9", "10"]
    assert 0 < found["answered_s"]["1"] <= found["all_answered_s"]
    assert found["requests"] >= 10
    assert all(found["cpu_s"][kind] > 0 for kind in ("control", "gateway", "replica", "engine"))
