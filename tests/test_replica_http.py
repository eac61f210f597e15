"""A replica's own HTTP: the official client against it, and the pages that control and Prometheus read."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.replica_process import ReplicaProcess, wait_for

ABORTED = 'vllm:request_success_total{model_name="mirror",finished_reason="abort"}'


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaProcess]:
    options = {"echo_tpot_ms": 2.0, "context_tokens": 50_000}
    replica = ReplicaProcess(tmp_path_factory.mktemp("http"), options=options, http_host="127.0.0.1", http_port=0)
    replica.client().close()
    yield replica
    replica.stop()


@pytest.fixture(scope="module")
def port(replica: ReplicaProcess) -> int:
    lines = [json.loads(line) for line in replica.log().splitlines()]
    return next(int(line["port"]) for line in lines if line["event"] == "listening")


@pytest.fixture
def sdk(port: int) -> Iterator[openai.OpenAI]:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=20)
    yield client
    client.close()


def request(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.request(method, path, raw, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, data


def metric(replica: ReplicaProcess, name: str) -> float:
    """The value of a series; of a name alone, the sum of its series."""
    lines = replica.get("/metrics")[1].decode().splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith(name if "{" in name else name + "{")]
    assert found, name
    return sum(float(value) for _, value in found)


def test_the_official_client_chats(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="mirror", messages=[{"role": "user", "content": "hi"}], max_tokens=8)
    assert answer.choices[0].message.content == "user: hi"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_the_official_client_streams(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="mirror",
        messages=[{"role": "user", "content": "hé"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "user: hé\nassistant: "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text.encode())


def test_the_official_client_completes(sdk: openai.OpenAI) -> None:
    assert sdk.completions.create(model="mirror", prompt="abc").choices[0].text == "abc"
    streamed = sdk.completions.create(model="mirror", prompt="abc", stream=True)
    assert "".join(c.choices[0].text for c in streamed) == "abc"


def test_the_official_client_is_told_what_was_wrong(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="mirror", messages=[{"role": "user", "content": "x"}], n=3)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        sdk.chat.completions.create(model="another", messages=[{"role": "user", "content": "x"}])
    assert [m.id for m in sdk.models.list()] == ["mirror"]


def test_a_long_stream_outlasts_its_credit(port: int) -> None:
    body = {"prompt": "0123456789" * 60, "stream": True, "max_tokens": 600}
    status, headers, data = request(port, "POST", "/v1/completions", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream")
    assert len(data) > 2 * 64 * 1024
    events = [json.loads(e[6:]) for e in data.decode().split("\n\n")[:-2]]
    assert "".join(c["text"] for e in events for c in e["choices"]) == body["prompt"]
    assert data.endswith(b"data: [DONE]\n\n")


def test_unknown_fields_are_named_in_a_warning(port: int) -> None:
    status, headers, _ = request(port, "POST", "/v1/completions", {"prompt": "x", "wat": 1, "user": "u"})
    assert (status, headers["warning"]) == (200, '199 neaptide "ignored: wat"')
    assert len(headers["x-request-id"]) == 32


def test_a_client_that_leaves_frees_its_slot(replica: ReplicaProcess, port: int) -> None:
    for stream in (True, False):
        aborted = metric(replica, ABORTED)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = {"prompt": "x", "max_tokens": 40_000, "ignore_eos": True, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body))
        wait_for(lambda: metric(replica, "vllm:num_requests_running") == 1)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        wait_for(lambda: metric(replica, "vllm:num_requests_running") == 0)
        assert metric(replica, ABORTED) == aborted + 1


def test_tokenize_answers_as_vllm_does(port: int) -> None:
    body = {"model": "mirror", "messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    status, _, data = request(port, "POST", "/tokenize", body)
    assert (status, json.loads(data)["count"]) == (200, len("user: x\n"))


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", {}, 400),
        ("POST", "/v1/chat/completions", b"\xff", {}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Encoding": "gzip"}, 415),
        ("GET", "/v1/chat/completions", None, {}, 405),
        ("POST", "/v1/embeddings", b"{}", {}, 404),
        ("POST", "/v1/completions", b" " * (17 << 20), {}, 413),
    ],
)
def test_every_refusal_has_openais_error_shape(
    port: int, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    got, told, data = request(port, method, path, body, **headers)
    assert got == status
    assert told["content-type"] == "application/json"
    assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_metrics_have_the_names_dashboards_know(replica: ReplicaProcess, sdk: openai.OpenAI) -> None:
    before = metric(replica, "vllm:generation_tokens_total")
    sdk.completions.create(model="mirror", prompt="abcdef")
    text = replica.get("/metrics")[1].decode()
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_sum",
        "vllm:e2e_request_latency_seconds_count", "vllm:request_queue_time_seconds_count", "vllm:prompt_tokens_total",
        "vllm:request_success_total", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total",
        "vllm:cache_config_info", "neaptide_replica_step_seconds_count",
    ):  # fmt: skip
        assert f"\n{name}{{" in text, name
    assert metric(replica, "vllm:generation_tokens_total") == before + 6
    buckets = [x for x in text.splitlines() if x.startswith("vllm:e2e_request_latency_seconds_bucket")]
    counts = [int(line.rsplit(" ", 1)[1]) for line in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == metric(replica, "vllm:e2e_request_latency_seconds_count")


def test_version_says_what_runs(port: int) -> None:
    _, _, data = request(port, "GET", "/version")
    assert set(json.loads(data)) == {"version", "engine", "revision"}
