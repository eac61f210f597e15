"""What is kept of a stream of text, what its rest is asked with, and how the rest is brought into line."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.gateway.record import Timing
from neaptide.gateway.relay import Relay
from neaptide.gateway.seam import Seam, sendable
from neaptide.gateway.transcript import FOLD_BYTES, TEXT_BYTES, Transcript
from neaptide.gateway.upstream import AnswerHead, Failure
from neaptide.wire.peek import Peek
from neaptide.wire.rest import rest

DONE = b"data: [DONE]\n\n"
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def event(content: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": {**delta, **more.pop("delta", {})}, "finish_reason": more.pop("finish", None)}]
    return b"data: %b\n\n" % json.dumps({"id": "a", "created": 1, "model": "x", "choices": choices, **more}).encode()


def of(*events: bytes) -> Transcript:
    transcript = Transcript()
    for one in events:
        transcript.keep(one)
    transcript.fold()
    return transcript


class Exchange:
    """What a relay gives to its exchange."""

    def __init__(self) -> None:
        self.call = SimpleNamespace(route="chat.completions")
        self.asked = Peek("m", True, None, None)
        self.key = self.handle = None
        self.body, self.ids = b"", bytearray()
        self.sent_s = self.deadline_s = self.state_s = 0.0
        self.timing = Timing()
        self.told, self.ended = b"", False
        self.failures: list[str] = []

    def on_head(self, head: AnswerHead) -> bool:
        return True

    def on_body(self, data: bytes, now: float) -> None:
        assert not self.ended
        assert data.endswith(b"\n\n"), "a client never holds half an event"
        self.told += data

    def on_end(self, data: bytes, now: float) -> None:
        self.told += data
        self.ended = True

    def on_failure(self, failure: Failure) -> None:
        assert not self.ended
        self.failures.append(failure.slug)


def part(exchange: Exchange, transcript: Transcript, raw: bytes, sizes: list[int], dies: bool) -> None:
    """One replica's stream, in reads of these sizes."""
    relay = Relay(cast(Any, exchange), transcript)
    relay.on_head(AnswerHead(events=True))
    for size in sizes:
        if raw[:size]:
            relay.on_body(raw[:size], 1.0)
        raw = raw[size:]
    if dies:
        relay.on_failure(Failure("replica_broke_off", "died"))
    else:
        relay.on_end(raw, 2.0)


def parsed(told: bytes) -> list[dict[str, Any]]:
    return [json.loads(e[6:]) for e in told.split(b"\n\n") if e and e != b"data: [DONE]"]


def content(told: bytes) -> str:
    return "".join(c["delta"].get("content") or "" for e in parsed(told) for c in e["choices"])


words = st.lists(st.text('ab \né😀"[]', min_size=1, max_size=3), max_size=12)
reads = st.lists(st.integers(1, 90), max_size=60)


@given(words, words, reads, reads)
def test_wherever_the_bytes_of_a_stream_end_its_text_and_its_rest_are_the_whole(
    before: list[str], after: list[str], first: list[int], second: list[int]
) -> None:
    exchange, transcript = Exchange(), Transcript()
    begin = event("", delta={"role": "assistant"})
    raw = begin + b"".join(map(event, before))
    part(exchange, transcript, raw, first, dies=True)
    assert exchange.failures == ["replica_broke_off"]
    have = content(exchange.told)
    assert transcript.text == have
    assert exchange.told == raw[: len(exchange.told)]
    whole = "".join(before) + "".join(after)
    left = whole[len(sendable(have, chat=True)) :]
    counted = event(usage={"prompt_tokens": 99, "completion_tokens": len(left)})
    rest = begin + b"".join(map(event, left)) + event(finish="stop") + counted
    began = bool(exchange.told)
    part(exchange, transcript, rest.replace(b'"id": "a"', b'"id": "b"') + DONE, second, dies=False)
    assert exchange.ended
    assert content(exchange.told) == whole
    events = parsed(exchange.told)
    assert {e["id"] for e in events} == {"a" if began else "b"}
    assert sum("role" in e["choices"][0]["delta"] for e in events) == 1
    assert exchange.told.count(DONE) == sum("usage" in e for e in events) == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 9))
def test_usage_counts_each_token_once(parts: list[int], prompt: int) -> None:
    transcript = of(event("", delta={"role": "assistant"}))
    for tokens in parts:
        seam = Seam(transcript, chat=True)
        for _ in range(tokens):
            transcript.keep(seam.adapt(event(" w")))
        transcript.fold()
    seam = Seam(transcript, chat=True)
    counted = {
        "prompt_tokens": prompt + sum(parts),
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 999},
    }
    told = json.loads(seam.adapt(event(" w", usage=counted))[6:])["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (prompt, sum(parts) + 2)
    assert told["total_tokens"] == prompt + sum(parts) + 2
    assert told["prompt_tokens_details"] == {"cached_tokens": prompt}


def test_what_is_kept_is_bounded_and_what_is_too_long_is_given_up() -> None:
    transcript, most = Transcript(), 0
    for _ in range(TEXT_BYTES // 50):
        transcript.keep(event("é" * 20))
        most = max(most, transcript._raw_bytes + len(transcript._text))
        assert transcript._raw_bytes <= FOLD_BYTES
    assert transcript.usable
    assert most <= TEXT_BYTES + FOLD_BYTES
    for _ in range(TEXT_BYTES // 50):
        transcript.keep(event("é" * 20))
    transcript.fold()
    assert (transcript.usable, transcript.text, transcript._raw) == (False, "", [])


@pytest.mark.parametrize(
    "more",
    [
        event(delta={"tool_calls": [{"index": 0}]}), event(delta={"reasoning_content": "so"}),
        event(delta={"reasoning": "so"}), event(delta={"refusal": "no"}), event(delta={"audio": {"id": "1"}}),
        event("x", error={"message": "bad", "code": 400}), b"data: {\n\n",
        b'data: {"choices":[{"delta":{"content":[]}}]}\n\n',
        b'data: {"choices":[{"index":1,"delta":{"content":"x"}}]}\n\n', b'data: {"choices":[{},{}]}\n\n',
    ],
)  # fmt: skip
def test_what_is_more_than_one_text_is_given_up(more: bytes) -> None:
    assert not of(event("a"), more).usable


@pytest.mark.parametrize(
    "harmless",
    [
        event(delta={"tool_calls": [], "reasoning_content": None, "refusal": None}), b": ping\n\n",
        event("", delta={"role": "assistant"}), b'data: {"choices":[],"prompt_filter_results":[]}\r\n\r\n',
        b"5d\r\n" + event("") + b"\r\n", b'data: {"choices":[{"delta":null}],"error":null}\n\n',
    ],
)  # fmt: skip
def test_what_says_nothing_is_read_over(harmless: bytes) -> None:
    transcript = of(event("a"), harmless, event("b"))
    assert (transcript.usable, transcript.text) == (True, "ab")


def test_a_replica_that_counts_as_it_goes_is_believed() -> None:
    told = [event("ab", usage={"completion_tokens": 5}), event("c")]
    assert of(*told).tokens == 6


# --- what the rest is asked with


def asked(text: str = "so far", tokens: int = 2, chat: bool = True, **fields: Any) -> dict[str, Any] | None:
    body = rest(json.dumps({**BODY, **fields}).encode(), chat, text, tokens)
    return None if body is None else json.loads(body)


def test_a_chat_gets_a_last_message_and_its_limits_are_less_what_came() -> None:
    limits: dict[str, Any] = {"max_tokens": 9, "max_completion_tokens": 8, "min_tokens": 1}
    body = asked(**limits, temperature=0.7, logit_bias={"5": 1})
    assert body == {
        **BODY, "temperature": 0.7, "logit_bias": {"5": 1},
        "max_tokens": 7, "max_completion_tokens": 6, "min_tokens": 0,
        "messages": [*BODY["messages"], {"role": "assistant", "content": "so far"}],
        "continue_final_message": True, "add_generation_prompt": False,
    }  # fmt: skip


def test_a_message_that_the_client_began_becomes_longer() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Sure, ", "name": "n"}]
    body = asked(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert body is not None
    assert body["messages"] == [messages[0], {**messages[1], "content": "Sure, so far"}]
    assert asked(messages=messages) is None


def test_of_no_text_the_rest_is_the_answer_whatever_it_depends_on() -> None:
    assert asked("", 0, seed=3, n=2) == {**BODY, "seed": 3, "n": 2}


FORGETFUL = [
    {"n": 1}, {"n": None}, {"best_of": 1}, {"seed": 3, "temperature": 0}, {"presence_penalty": 0.0}, {"user": "u"},
    {"response_format": {"type": "text"}}, {"tools": [{"type": "function"}], "tool_choice": "auto"}, {"echo": False},
    {"stop": "as far"}, {"stop": ["x", "o f"]}, {"stop": None}, {"guided_json": None}, {"logprobs": False},
]  # fmt: skip
REMEMBERING = [
    {"n": 2}, {"best_of": 3}, {"seed": 3}, {"seed": 3, "temperature": 0.1}, {"presence_penalty": 0.1}, {"echo": True},
    {"frequency_penalty": -1}, {"repetition_penalty": 1.2}, {"logprobs": True}, {"logprobs": 0}, {"mirostat": 2},
    {"response_format": {"type": "json_object"}}, {"guided_json": {}}, {"tool_choice": "required"}, {"max_tokens": 2},
    {"stop": "far out"}, {"stop": ["x", "rest"]}, {"stop": 5}, {"max_tokens": "9"}, {"messages": "x"},
    {"skip_special_tokens": False},
]  # fmt: skip


@pytest.mark.parametrize("fields", FORGETFUL)
def test_where_the_text_says_all_the_rest_can_be_had(fields: dict[str, Any]) -> None:
    assert asked(**fields) is not None


@pytest.mark.parametrize("fields", REMEMBERING)
def test_where_the_text_does_not_say_all_it_cannot(fields: dict[str, Any]) -> None:
    assert asked(**fields) is None


@pytest.mark.parametrize("prompt", [["a"], [1, 2], None])
def test_a_completion_goes_on_from_one_text_only(prompt: Any) -> None:
    assert asked(chat=False, prompt="hello ") == {**BODY, "prompt": "hello so far"}
    assert asked(chat=False, prompt=prompt) is None


@given(
    st.dictionaries(st.text(max_size=6), st.none() | st.text(max_size=4), max_size=3), st.text(min_size=1, max_size=9)
)
def test_whatever_a_client_sends_the_rest_is_valid_json_or_nothing(odd: dict[str, Any], text: str) -> None:
    body = rest(msgspec.json.encode({**BODY, **odd}), True, text, 1)
    assert body is None or json.loads(body)["messages"][-1]["content"] == text
