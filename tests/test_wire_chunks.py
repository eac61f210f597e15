"""Answers in OpenAI's shapes: SSE framing to the byte, and objects that the official client's models accept."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from neaptide.errors import RequestError
from neaptide.wire import chunks
from neaptide.wire.chunks import Label, Logprob, Tokens

LABEL = Label("abc", 'm"odel', "rev-1", 1_700_000_000)
TOKENS = Tokens(prompt=5, output=7, cached=4, reasoning=2)


def events(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    parts = data[:-2].split(b"\n\n")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part[6:]) for part in parts]


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_what_the_official_client_reads(chat: bool) -> None:
    stream = chunks.stream(LABEL, chat=chat, include_usage=True)
    data = stream.opening + stream.content("Hé\n") + stream.finish("stop") + stream.usage(TOKENS)
    read: Any = ChatCompletionChunk if chat else Completion
    parsed = [read.construct(**event) for event in events(data)]  # as the client does
    assert {p.id for p in parsed} == {"chatcmpl-abc" if chat else "cmpl-abc"}
    assert {p.object for p in parsed} == {"chat.completion.chunk" if chat else "text_completion"}
    assert {(p.model, p.system_fingerprint, p.created) for p in parsed} == {('m"odel', "rev-1", 1_700_000_000)}
    *head, usage = parsed
    texts = [(p.choices[0].delta.content if chat else p.choices[0].text) for p in head]
    assert texts == (["", "Hé\n", None] if chat else ["Hé\n", ""])
    assert [p.choices[0].finish_reason for p in head] == [None] * (len(head) - 1) + ["stop"]
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens, usage.usage.total_tokens) == (5, 7, 12)
    assert usage.usage.prompt_tokens_details.cached_tokens == 4
    assert usage.usage.completion_tokens_details.reasoning_tokens == 2


def test_the_role_comes_first_and_the_finish_chunk_has_an_empty_delta() -> None:
    stream = chunks.stream(LABEL, chat=True, include_usage=False)
    first, last = events(stream.opening + stream.finish("length"))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert "usage" not in first


def test_chunks_before_the_usage_chunk_carry_null_usage_when_it_was_asked_for() -> None:
    for chat in (True, False):
        stream = chunks.stream(LABEL, chat=chat, include_usage=True)
        assert [e["usage"] for e in events(stream.content("x") + stream.finish("stop"))] == [None, None]


@given(st.text())
def test_any_text_survives_the_framing(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    for chat in (True, False):
        stream = chunks.stream(LABEL, chat=chat, include_usage=False)
        (event,) = events(stream.content(text))
        choice = event["choices"][0]
        assert (choice["delta"]["content"] if chat else choice["text"]) == text


def test_logprobs_of_a_chat_are_entries_with_bytes() -> None:
    stream = chunks.stream(LABEL, chat=True, include_usage=False)
    entries = [Logprob("h", -0.5, b"h"), Logprob("\ufffd", float("-inf"), b"\xc3")]
    (event,) = events(stream.content("h", entries))
    parsed = ChatCompletionChunk.model_validate(event, strict=True)
    assert parsed.choices[0].logprobs is not None
    content = parsed.choices[0].logprobs.content
    assert content is not None
    assert [(c.token, c.logprob, c.bytes, c.top_logprobs) for c in content] == [
        ("h", -0.5, [104], []), ("\ufffd", chunks.LOWEST_LOGPROB, [0xC3], []),
    ]  # fmt: skip


def test_logprobs_of_a_completion_count_offsets_across_chunks() -> None:
    stream = chunks.stream(LABEL, chat=False, include_usage=False)
    one = events(stream.content("abc", [Logprob("ab", -1.0, b"ab"), Logprob("c", -2.0, b"c")]))[0]
    two = events(stream.content("d", [Logprob("d", -3.0, b"d")]))[0]
    assert one["choices"][0]["logprobs"]["text_offset"] == [0, 2]
    assert two["choices"][0]["logprobs"] == {
        "tokens": ["d"], "token_logprobs": [-3.0], "top_logprobs": None, "text_offset": [3],
    }  # fmt: skip


def test_whole_answers_are_what_the_official_client_reads() -> None:
    body = json.loads(chunks.answer(LABEL, "hi", "stop", TOKENS, chat=True, logprobs=[Logprob("hi", -1.0, b"hi")]))
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert (parsed.choices[0].message.content, parsed.choices[0].finish_reason) == ("hi", "stop")
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == 12
    body = json.loads(chunks.answer(LABEL, "hi", "length", TOKENS, chat=False))
    text = Completion.model_validate(body, strict=True)
    assert (text.choices[0].text, text.choices[0].finish_reason, text.object) == ("hi", "length", "text_completion")


def test_tokenized_counts_its_tokens() -> None:
    assert json.loads(chunks.tokenized([3, 4], 128)) == {"count": 2, "max_model_len": 128, "tokens": [3, 4]}


def test_an_error_is_one_event_without_done() -> None:
    error = RequestError(502, "gone", slug="engine_died")
    (event,) = events(chunks.error_event(error))
    assert event == {"error": {"message": "gone", "type": "api_error", "param": None, "code": "engine_died"}}
    assert json.loads(chunks.error_body(error)) == event
