"""A replica over its link: a real process, the echo engine, and what a gateway says to it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from neaptide import link
from neaptide.link import EndHeader
from tests.link_client import Heard, LinkClient
from tests.replica_process import ReplicaProcess, wait_for

Start = Callable[..., ReplicaProcess]
SLOW = {"echo_tpot_ms": 20.0}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[ReplicaProcess] = []

    def begin(**kwargs: Any) -> ReplicaProcess:
        started.append(ReplicaProcess(tmp_path, **kwargs))
        return started[-1]

    yield begin
    for replica in started:
        replica.stop()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaProcess]:
    """One replica without latencies, for the tests that leave it as it was."""
    replica = ReplicaProcess(tmp_path_factory.mktemp("quick"), options={"context_tokens": 200_000, "max_running": 8})
    yield replica
    replica.stop()


@pytest.fixture
def client(quick: ReplicaProcess) -> Iterator[LinkClient]:
    client = quick.client()
    yield client
    client.close()


def ended(heard: Heard) -> EndHeader:
    assert heard.end is not None
    return heard.end


def text(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, **fields}


# ---------------------------------------------------------------------------------------------------- the protocol


def test_hello_tells_who_it_is_and_what_its_engine_can_do(client: LinkClient) -> None:
    hello = client.hello
    assert hello is not None
    assert (hello.role, hello.name, hello.epoch, hello.token) == ("replica", "echo-0", 3, "boot")
    assert hello.describe is not None
    assert json.loads(bytes(hello.describe["context_tokens"])) == 200_000
    client.wait(lambda: client.loads)
    assert client.loads[0].slots == 8 + 2


@pytest.mark.parametrize(
    "first",
    [
        link.frame(0, link.HELLO, b'{"token":"wrong"}'),
        link.frame(0, link.HELLO, b'{"token":"boot","version":2}'),
        link.frame(0, link.HELLO, b"not json"),
        link.frame(1, link.HELLO, b'{"token":"boot"}'),
        link.frame(0, link.TALLY, b"[]"),
        struct.pack("<IIB", link.MAX_FRAME + 1, 0, link.HELLO),
    ],
)
def test_who_does_not_greet_properly_is_cut_off(quick: ReplicaProcess, first: bytes) -> None:
    stranger = quick.client(greet=False)
    stranger.send_raw(first)
    stranger.wait(lambda: stranger.closed)
    assert stranger.hello is None
    stranger.close()


def opened(body_bytes: int, body: bytes = b"") -> bytes:
    return link.pack_header(link.OpenHeader(request_id="x", route="completions", body_bytes=body_bytes), body)


@pytest.mark.parametrize(
    "frames",
    [
        struct.pack("<IIB", link.MAX_FRAME + 1, 1, link.OPEN),
        link.frame(1, link.OPEN, b"\x05"),
        link.frame(1, link.OPEN, link.pack_header(link.Hello())),
        link.frame(1, link.OPEN, opened(3, b"four")),
        link.frame(2, link.OPEN, opened(9)) + link.frame(1, link.OPEN, opened(9)),
        link.frame(1, link.OPEN, opened(9)) + link.frame(1, link.CREDIT, b"\0"),
        link.frame(1, link.TOKEN, b""),
        link.frame(0, 99, b""),
    ],
)
def test_a_broken_protocol_closes_the_connection_and_no_other(
    quick: ReplicaProcess, client: LinkClient, frames: bytes
) -> None:
    broken = quick.client()
    broken.send_raw(frames)
    broken.wait(lambda: broken.closed)
    broken.close()
    assert ended(client.call(text("still here"), "completions")).status == 200


# ---------------------------------------------------------------------------------------------------- answers


def test_a_stream_brings_ids_text_finish_usage_and_done(client: LinkClient) -> None:
    body = {"messages": [{"role": "user", "content": "héllo"}], "stream": True}
    heard = client.call({**body, "stream_options": {"include_usage": True}, "odd": 1, "model": "any alias"})
    prompt = "user: héllo\nassistant: "
    assert heard.text == prompt
    assert bytes(heard.ids).decode() == prompt
    end = ended(heard)
    assert (end.status, end.finish, end.content_type) == (200, "stop", "text/event-stream")
    assert end.prompt_tokens == end.output_tokens == len(prompt.encode())
    assert heard.headers == [["Warning", '199 neaptide "ignored: odd"']]
    first, *_, finish, usage, done = heard.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == end.output_tokens
    assert done == "[DONE]"
    assert {e["model"] for e in heard.events[:-1]} == {"mirror"}
    assert {e["system_fingerprint"] for e in heard.events[:-1]} == {"rev-1"}


def test_a_whole_answer_comes_with_end_and_its_ids_in_groups(client: LinkClient) -> None:
    prompt = "0123456789" * 10
    heard = client.call(text(prompt), "completions")
    assert heard.data == b""
    assert bytes(heard.ids).decode() == prompt
    assert heard.frames <= 100 // 16 + 1
    assert heard.body["choices"][0]["text"] == prompt
    assert heard.body["usage"]["total_tokens"] == 200
    assert ended(heard).content_type == "application/json"


def test_a_long_body_comes_in_parts_and_is_read_in_a_thread(client: LinkClient) -> None:
    prompt = "word " * 20_000
    heard = client.call(text(prompt, max_tokens=5), "completions", part=7_000)
    assert (ended(heard).prompt_tokens, ended(heard).finish) == (100_000, "length")
    assert heard.body["choices"][0]["text"] == "word "


def test_tokenize_counts(client: LinkClient) -> None:
    heard = client.call({"prompt": "abc"}, "tokenize")
    assert heard.body == {"count": 3, "max_model_len": 200_000, "tokens": [97, 98, 99]}


def test_a_stop_string_ends_the_answer_and_frees_the_slot(client: LinkClient) -> None:
    prompt = "one two STOP three" + " more" * 1000
    heard = client.call(text(prompt, stop=["zzz", "STOP"], stream=True, max_tokens=5000), "completions")
    assert heard.text == "one two "
    assert heard.events[-2]["choices"][0]["finish_reason"] == "stop"
    assert ended(heard).finish == "stop"
    client.wait(lambda: client.loads[-1].running == 0)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_logprobs_come_with_their_tokens(client: LinkClient, chat: bool, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "é"}]} if chat else {"prompt": "é"}
    asked = {"logprobs": True} if chat else {"logprobs": 0}
    heard = client.call({**body, **asked, "stream": stream}, "chat.completions" if chat else "completions")
    choices = [c for e in (heard.events[:-1] if stream else [heard.body]) for c in e["choices"]]
    blocks = [c["logprobs"] for c in choices if c["logprobs"]]
    assert sum(len(b["content"] if chat else b["tokens"]) for b in blocks) == ended(heard).output_tokens


def test_token_ids_make_a_prompt_too(client: LinkClient) -> None:
    heard = client.call({"prompt": [257, 104, 105]}, "completions")
    assert heard.body["choices"][0]["text"] == "hi"
    assert client.call({"prompt": [999]}, "completions").body["error"]["param"] == "prompt"


# ---------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("stream", [True, False])
def test_a_resumed_answer_continues_and_counts_its_own_tokens(client: LinkClient, stream: bool) -> None:
    prompt = "abcdéfgh"
    have = list(prompt.encode()[:5])  # half of the é
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    heard = client.call(
        {"prompt": prompt, "stream": stream, "stream_options": {"include_usage": True}}, "completions",
        generated_ids=have, emitted_chars=4,
    )  # fmt: skip
    told = heard.text if stream else heard.body["choices"][0]["text"]
    assert told == "éfgh"
    assert ended(heard).output_tokens == len(heard.ids) == 4
    usage = heard.events[-2]["usage"] if stream else heard.body["usage"]
    assert usage["completion_tokens"] == 9
    begun = client.call(body, generated_ids=[117], emitted_chars=1)
    assert stream is False or all("role" not in c["delta"] for e in begun.events[:-1] for c in e["choices"])


@pytest.mark.parametrize("part", [1, 3, 8, 1 << 19])
def test_the_ids_of_a_resume_may_come_in_any_number_of_frames(client: LinkClient, part: int) -> None:
    prompt = "abcdéfgh"
    have = prompt.encode()[:5]  # half of the é
    body = struct.pack("<5I", *have) + json.dumps(text(prompt, stream=True)).encode()
    heard = client.call(body, "completions", part=part, stream=True, resumed=5, emitted_chars=None)
    assert heard.text == "éfgh"
    assert bytes(heard.ids) == prompt.encode()[5:]
    assert (ended(heard).status, ended(heard).output_tokens) == (200, 4)


def test_a_resume_with_nothing_left_ends_at_once(client: LinkClient) -> None:
    heard = client.call(text("abc", max_tokens=2), "completions", generated_ids=[97, 98], emitted_chars=1)
    assert (ended(heard).finish, ended(heard).output_tokens) == ("length", 0)
    assert heard.body["choices"][0]["text"] == "b"


@pytest.mark.parametrize("header", [{"generated_ids": [-1]}, {"generated_ids": [258]}, {"emitted_chars": -1}])
def test_a_resume_from_what_this_model_cannot_have_said_is_refused(client: LinkClient, header: dict[str, Any]) -> None:
    heard = client.call(text("abc"), "completions", **header)
    assert (ended(heard).status, ended(heard).error) == (400, "impossible_resume")


# ---------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_served_is_refused_with_its_reason(client: LinkClient) -> None:
    refused = client.call(text("x", n=2), "completions")
    assert (ended(refused).status, ended(refused).finish, ended(refused).retryable) == (400, "error", False)
    assert refused.body["error"]["param"] == "n"
    assert ended(client.call(b"{", "completions")).status == 400
    assert ended(client.call(text("x"), "embeddings")).status == 404
    assert ended(client.call(text(""), "completions")).status == 400  # fmt: skip


def test_a_prompt_beyond_the_context_is_refused_and_a_long_answer_clipped(start: Start) -> None:
    client = start(options={"context_tokens": 64}).client()
    refused = client.call(text("x" * 64), "completions")
    assert (ended(refused).status, ended(refused).error) == (400, "context_length_exceeded")
    assert "64 tokens" in refused.body["error"]["message"]
    clipped = client.call(text("x" * 60, max_tokens=1000, ignore_eos=True), "completions")
    assert (ended(clipped).output_tokens, ended(clipped).finish) == (4, "length")
    default = client.call(text("x" * 10, ignore_eos=True), "completions")
    assert ended(default).output_tokens == 54


def test_what_can_never_fit_the_kv_memory_is_refused(start: Start) -> None:
    client = start(options={"kv_mib": 1, "context_tokens": 100_000}).client()  # 1024 tokens of KV
    refused = client.call(text("x" * 500, max_tokens=600), "completions")
    assert (ended(refused).status, ended(refused).error) == (400, "kv_memory_exceeded")
    default = client.call(text("x" * 500, ignore_eos=True), "completions")
    assert ended(default).output_tokens == 1024 - 500


# ---------------------------------------------------------------------------------------------------- waiting


def test_a_full_replica_lets_a_few_wait_in_order_and_refuses_the_rest(start: Start) -> None:
    client = start(options={"max_running": 1, **SLOW}).client()
    numbers = [client.open(text(f"{i}" * 20, max_tokens=20), "completions") for i in range(7)]
    heard = [client.finish(n) for n in numbers]
    assert [ended(h).status for h in heard] == [200] * 5 + [429] * 2
    assert all(ended(h).retryable and ended(h).error == "replica_full" for h in heard[5:])
    assert [ended(h).queued_s for h in heard[:5]] == sorted(ended(h).queued_s for h in heard[:5])
    assert any(load.slots == 0 and load.waiting == 4 and load.running == 1 for load in client.loads)
    client.wait(lambda: client.loads[-1].slots == 3)


def test_kv_memory_alone_makes_requests_wait(start: Start) -> None:
    client = start(options={"kv_mib": 1, **SLOW}).client()  # 1024 tokens
    numbers = [client.open(text("x" * 20, max_tokens=580, stop_token_ids=[]), "completions") for _ in range(2)]
    client.wait(lambda: any(load.running == 1 and load.waiting == 1 for load in client.loads))
    assert [ended(client.finish(n)).status for n in numbers] == [200, 200]
    assert not any(load.running == 2 for load in client.loads)


def test_a_deadline_that_passes_in_the_line_is_a_504(start: Start) -> None:
    client = start(options={"max_running": 1, "echo_tpot_ms": 1000.0}).client()
    running = client.open(text("x" * 50), "completions")
    waiting = client.call(text("y"), "completions", deadline_in_s=0.3)
    assert (ended(waiting).status, ended(waiting).retryable) == (504, False)
    client.send(running, link.ABORT)
    assert ended(client.finish(running)).finish == "abort"


# ---------------------------------------------------------------------------------------------------- leaving


def test_an_abort_is_answered_with_counts_and_frees_the_slot(start: Start) -> None:
    client = start(options=SLOW).client()
    number = client.open(text("x" * 1000, stream=True), "completions")
    client.wait(lambda: len(client.streams[number].ids) >= 3)
    client.send(number, link.ABORT)
    heard = client.finish(number)
    end = ended(heard)
    assert (end.finish, heard.last) == ("abort", b"")
    assert end.output_tokens == len(heard.ids) >= 3
    assert end.engine_s > 0
    assert end.kv_token_s > 0
    client.wait(lambda: client.loads[-1].running == 0)
    client.send(number, link.ABORT)  # crossed the END: ignored
    client.send(number, link.CREDIT, link.pack_credit(1))
    assert ended(client.call(text("next"), "completions")).status == 200


def test_an_abort_before_the_body_is_complete_ends_the_stream(client: LinkClient) -> None:
    client.streams[1] = Heard()
    client.send(1, link.OPEN, opened(10, b"{"))
    client.send(1, link.ABORT)
    assert ended(client.finish(1)).finish == "abort"


def test_a_lost_connection_aborts_its_requests(start: Start) -> None:
    replica = start(options=SLOW)
    watcher, leaver = replica.client(), replica.client()
    numbers = [leaver.open(text("x" * 1000, stream=True), "completions") for _ in range(3)]
    leaver.wait(lambda: all(leaver.streams[n].ids for n in numbers))
    watcher.wait(lambda: watcher.loads[-1].running == 3)
    leaver.close()
    watcher.wait(lambda: watcher.loads[-1].running == 0)
    assert watcher.tally("r1")["r1"]["finish"] == "abort"


# ---------------------------------------------------------------------------------------------------- credit


def test_past_its_credit_a_stream_coalesces_and_loses_nothing(start: Start) -> None:
    client = start(options={"context_tokens": 20_000}).client()
    other = text("y" * 50, stream=True)
    prompt = "0123456789" * 300
    number = client.open(text(prompt, stream=True, max_tokens=3000), "completions")
    heard = client.streams[number]
    assert ended(client.call(other, "completions")).finish == "stop"
    wait_for(lambda: client.tally("r1")["r1"]["output_tokens"] == 3000)  # the engine is done, the reader far behind
    assert heard.end is None
    assert 0 < len(heard.data) <= link.CREDIT_BYTES
    frames, before = heard.frames, len(heard.ids)
    client.send(number, link.CREDIT, link.pack_credit(link.CREDIT_BYTES))
    client.finish(number, credit=False)
    assert heard.text == prompt
    assert bytes(heard.ids).decode() == prompt
    assert heard.frames - frames < (3000 - before) / 10


def test_a_reader_that_stalls_is_aborted(start: Start) -> None:
    client = start(stall_s=0.3, options={"context_tokens": 100_000, "echo_tpot_ms": 0.05}).client()
    number = client.open(text("x" * 2000, stream=True, max_tokens=60_000, ignore_eos=True), "completions")
    heard = client.finish(number, credit=False)
    end = ended(heard)
    assert (end.finish, end.error) == ("abort", "stalled")
    assert len(heard.data) + 6 * len(heard.ids) <= link.CREDIT_BYTES
    client.wait(lambda: client.loads[-1].running == 0)


def test_a_body_larger_than_may_be_held_is_refused_before_it_comes(client: LinkClient) -> None:
    client.streams[1] = Heard()
    client.send(1, link.OPEN, opened(17 << 20, b"{"))
    assert ended(client.finish(1)).status == 413


# ---------------------------------------------------------------------------------------------------- accounts


def test_a_tally_tells_running_and_ended_requests(start: Start) -> None:
    replica = start(options=SLOW)
    client, control = replica.client(), replica.client()
    number = client.open(text("x" * 1000, stream=True), "completions", request_id="long")
    client.wait(lambda: len(client.streams[number].ids) >= 2)
    assert ended(client.call(text("abc"), "completions", request_id="short")).status == 200
    rows = control.tally("long", "short", "never")
    assert set(rows) == {"long", "short"}
    assert (rows["short"]["done"], rows["short"]["finish"], rows["short"]["output_tokens"]) == (True, "stop", 3)
    assert rows["long"]["done"] is False
    assert rows["long"]["output_tokens"] >= 2
    client.send(number, link.ABORT)
    client.finish(number)
    assert control.tally("long")["long"]["finish"] == "abort"


def test_step_time_is_shared_out_and_cached_tokens_are_told(start: Start) -> None:
    client = start(options=SLOW).client()
    prompt = "the same beginning of everything "
    alone = ended(client.call(text(prompt, max_tokens=20), "completions"))
    assert alone.cached_tokens == 0
    numbers = [client.open(text(prompt, max_tokens=20), "completions") for _ in range(4)]
    ends = [ended(client.finish(n)) for n in numbers]
    assert all(end.cached_tokens == 32 for end in ends)
    assert 0 < sum(end.engine_s for end in ends) < 3 * alone.engine_s
    assert all(end.kv_token_s > 0 for end in ends)


def test_load_is_told_when_it_changes(start: Start) -> None:
    replica = start(options=SLOW)
    client = replica.client()
    number = client.open(text("x" * 400, stream=True), "completions")
    client.wait(lambda: client.loads and client.loads[-1].running == 1 and client.loads[-1].step_s > 0)
    busy = client.loads[-1]
    assert busy.free_kv_tokens < client.loads[0].free_kv_tokens
    client.send(number, link.ABORT)
    client.finish(number)
    client.wait(lambda: client.loads[-1].running == 0)
    assert client.loads[-1].free_kv_tokens == client.loads[0].free_kv_tokens
    wait_for(lambda: b"num_requests_running" in replica.get("/metrics")[1])
