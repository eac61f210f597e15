"""Several models in one replica process: each with its own room and answers, one load, one start and one end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide import models
from neaptide.engine.life import ENGINE_DIED
from neaptide.specs import MemberSpec
from tests.link_client import Heard, LinkClient
from tests.replica_process import ReplicaProcess

Start = Callable[..., ReplicaProcess]


def member(model: str, **options: Any) -> MemberSpec:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()}
    return MemberSpec(model=model, revision=f"{model}-r1", options=raw)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ReplicaProcess] = []

    def begin(*members: MemberSpec, **fields: Any) -> ReplicaProcess:
        started.append(ReplicaProcess(tmp_path, model="tail", members=members, **fields))
        return started[-1]

    yield begin
    for replica in started:
        replica.stop()


def asked(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "stream": True, **more}


def open_at(client: LinkClient, model: str, prompt: str, **more: Any) -> int:
    return client.open(asked(prompt, **more), "completions", model=model)


def ended(heard: Heard) -> tuple[int, str]:
    assert heard.end is not None
    return heard.end.status, heard.end.error


def test_each_model_answers_under_its_own_name_and_revision_over_one_connection(start: Start) -> None:
    client = start(member("one"), member("two")).client()
    numbers = {model: [open_at(client, model, f"{model} {n}") for n in range(4)] for model in ("one", "two")}
    for model, opened in numbers.items():
        for n, number in enumerate(opened):
            heard = client.finish(number)
            assert heard.text == f"{model} {n}"
            assert {e["model"] for e in heard.events if e != "[DONE]"} == {model}
            assert {e["system_fingerprint"] for e in heard.events if e != "[DONE]"} == {f"{model}-r1"}
    assert client.tally("r1", "r5").keys() == {"r1", "r5"}


def test_a_model_that_is_not_here_and_none_at_all_are_refused_with_what_is(start: Start) -> None:
    client = start(member("one"), member("two")).client()
    assert ended(client.finish(open_at(client, "three", "x"))) == (404, "model_not_found")
    unnamed = client.finish(open_at(client, "", "x"))
    assert ended(unnamed) == (400, "no_model")
    assert "one, two" in unnamed.body["error"]["message"]


def test_a_full_model_leaves_the_other_its_room_and_the_load_is_of_both(start: Start) -> None:
    slow = {"echo_tpot_ms": 50.0, "max_running": 1}
    client = start(member("slow", **slow), member("free", max_running=8)).client()
    held = [open_at(client, "slow", "s" * 200) for _ in range(5)]
    client.wait(lambda: client.loads[-1].rooms.get("slow") == 0)
    assert client.loads[-1].rooms["free"] == 10
    assert (client.loads[-1].running, client.loads[-1].waiting) == (1, 4)
    assert client.loads[-1].slots == 10
    assert client.finish(open_at(client, "free", "past")).text == "past"
    assert client.finish(open_at(client, "slow", "one too many")).end.status == 429  # type: ignore[union-attr]
    for number in held:
        assert client.streams[number].end is None


def test_models_that_wait_for_the_clock_do_not_wait_for_each_other(start: Start) -> None:
    client = start(member("slow", echo_ttft_ms=600_000.0), member("quick", echo_tpot_ms=1.0)).client()
    stuck = open_at(client, "slow", "x")
    client.wait(lambda: client.loads[-1].running == 1)
    assert client.finish(open_at(client, "quick", "q" * 50)).text == "q" * 50
    assert client.streams[stuck].end is None


def test_a_request_that_one_model_cannot_serve_is_refused_to_it_alone(start: Start) -> None:
    client = start(member("small", context_tokens=16), member("large", context_tokens=64)).client()
    assert ended(client.finish(open_at(client, "small", "x" * 40)))[1] == "context_length_exceeded"
    assert client.finish(open_at(client, "large", "x" * 40)).text.startswith("x")


def test_over_http_the_body_names_the_model(start: Start) -> None:
    replica = start(member("one", context_tokens=50), member("two"))
    replica.client().close()
    listed = json.loads(replica.get("/v1/models")[1])["data"]
    assert [(m["id"], m["max_model_len"]) for m in listed] == [("one", 50), ("two", 8192)]
    status, body = replica.post("/v1/completions", {"model": "two", "prompt": "tide"})
    assert (status, json.loads(body)["choices"][0]["text"]) == (200, "tide")
    assert replica.post("/v1/completions", {"model": "three", "prompt": "tide"})[0] == 404
    assert b"no_model" in replica.post("/v1/completions", {"prompt": "tide"})[1]
    about = json.loads(replica.get("/about")[1])
    assert about["members"]["one"]["context_tokens"] == 50
    assert about["description"]["kv_tokens"] == sum(m["kv_tokens"] for m in about["members"].values())
    metrics = replica.get("/metrics")[1].decode()
    assert metrics.count("# TYPE vllm:generation_tokens_total counter") == 1
    assert 'vllm:generation_tokens_total{model_name="two"} 4' in metrics
    assert 'vllm:generation_tokens_total{model_name="one"} 0' in metrics


def test_one_death_ends_the_requests_of_all_models(start: Start) -> None:
    replica = start(member("one", echo_tpot_ms=20.0), member("two", echo_tpot_ms=20.0))
    client = replica.client()
    numbers = [open_at(client, model, "x" * 400) for model in ("one", "two")]
    client.wait(lambda: all(client.streams[n].ids for n in numbers))
    os.kill(replica.engine_pid(), signal.SIGKILL)
    for number in numbers:
        assert ended(client.finish(number)) == (502, "engine_died")
    assert replica.wait() == ENGINE_DIED


def test_a_drain_waits_for_the_streams_of_every_model(start: Start) -> None:
    replica = start(member("one", echo_tpot_ms=20.0), member("two", echo_tpot_ms=20.0))
    client = replica.client()
    numbers = [open_at(client, model, "y" * 40) for model in ("one", "two")]
    client.wait(lambda: all(client.streams[n].ids for n in numbers))
    replica.process.terminate()
    client.wait(lambda: client.loads[-1].draining)
    for number in numbers:
        assert client.finish(number).text == "y" * 40
    assert replica.wait() == 0


def test_a_model_that_cannot_load_keeps_the_whole_replica_from_starting_and_is_named(start: Start) -> None:
    replica = start(member("one"), member("two", no_such_option=1))
    assert replica.process.stderr is not None
    assert replica.wait() not in (0, ENGINE_DIED)
    assert b"options of 'two'" in replica.process.stderr.read()


def test_models_that_do_not_fit_in_memory_together_are_refused_before_any_is_loaded(start: Start) -> None:
    guide = str(Path(models.__file__).parent / "guide")
    raw = {"kv_mib": msgspec.Raw(b"8"), "chunk_tokens": msgspec.Raw(b"256")}
    small = MemberSpec(model="small", revision="r", source=guide, options=raw)
    vast = MemberSpec(model="vast", revision="r", source=guide, options=raw | {"kv_mib": msgspec.Raw(b"1000000000")})
    replica = start(small, vast, engine="openvino")
    assert replica.process.stderr is not None
    assert replica.wait(60) not in (0, ENGINE_DIED)
    told = replica.process.stderr.read().decode()
    assert "error[E213]: the models of pool 'tail' need" in told
    assert "take vast out of pools.tail.models" in told
    assert '"loaded"' not in replica.log()
