"""Reading OpenAI bodies: what is taken, what is refused, and that nothing else ever comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.errors import RequestError
from neaptide.wire.parse import (
    HARMLESS,
    MAX_SCHEMA_BYTES,
    MAX_WARNING_BYTES,
    Abilities,
    parse_chat,
    parse_completion,
    parse_tokenize,
    warning_header,
)

HELLO = [{"role": "user", "content": "hello"}]
GRAMMAR = Abilities(json_schema=True)


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": HELLO, **fields}).encode()


def completion(**fields: Any) -> bytes:
    return json.dumps({"prompt": "hello", **fields}).encode()


def refused(parse: Any, body: bytes, *args: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, *args)
    assert caught.value.status == 400
    assert caught.value.body()["error"]["type"] == "invalid_request_error"
    return caught.value


def read(parse: Any, body: bytes, *args: Any) -> Any:
    """What was read, or None when it was refused properly."""
    try:
        return parse(body, *args)
    except RequestError as e:
        if e.status != 400 or not e.what:
            raise
        return None


def test_a_full_chat_body_is_read() -> None:
    asked = parse_chat(
        chat(
            model="m", stream=True, stream_options={"include_usage": True}, max_completion_tokens=7, max_tokens=9,
            temperature=0, top_p=0.5, top_k=-1, stop="END", seed=-1, presence_penalty=1, frequency_penalty=-2,
            repetition_penalty=1.1, min_tokens=2, ignore_eos=True, stop_token_ids=[3], logprobs=True,
        )
    )  # fmt: skip
    assert (asked.chat, asked.model, asked.stream, asked.include_usage) == (True, "m", True, True)
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (7, 0.0, 0.5, 0)
    assert (asked.stop, asked.seed, asked.presence_penalty, asked.frequency_penalty) == (("END",), 2**63 - 1, 1.0, -2.0)
    assert (asked.repetition_penalty, asked.min_tokens, asked.ignore_eos) == (1.1, 2, True)
    assert (asked.stop_token_ids, asked.logprobs, asked.ignored) == ((3,), 0, ())
    assert asked.prompt.messages == HELLO


def test_what_the_client_left_out_stays_open() -> None:
    asked = parse_chat(chat(temperature=None, max_tokens=None, stop=None, n=1, tools=[], logit_bias={}))
    assert asked.temperature is asked.top_p is asked.top_k is asked.max_tokens is asked.logprobs is None
    assert (asked.stop, asked.stream, asked.include_usage) == ((), False, False)


def test_text_parts_are_joined_and_developer_speaks_as_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = parse_chat(chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None}]))
    assert asked.prompt.messages == [{"role": "system", "content": "ab"}, {"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 129}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"seed": 2**63}, "seed"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "text"}, "response_format"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 4097}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ],
)
def test_what_is_wrong_or_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(parse_chat, chat(**fields)).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_a_completion_refuses_by_name(fields: dict[str, Any], param: str) -> None:
    assert refused(parse_completion, completion(**fields)).param == param


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [("a", "a", None), (["a"], "a", None), ([1, 2], None, [1, 2]), ([[1, 2]], None, [1, 2])],
)
def test_a_prompt_is_one_string_or_one_list_of_ids(prompt: Any, text: str | None, ids: list[int] | None) -> None:
    asked = parse_completion(completion(prompt=prompt, echo=False, suffix="", best_of=1, logprobs=0))
    assert (asked.prompt.text, asked.prompt.ids, asked.logprobs, asked.chat) == (text, ids, 0, False)


def test_alternatives_are_given_as_far_as_the_engine_tells_them() -> None:
    body = chat(logprobs=True, top_logprobs=2)
    assert parse_chat(body, Abilities(logprobs=2)).logprobs == 2
    assert refused(parse_chat, body, Abilities(logprobs=1)).param == "top_logprobs"


def test_tokenize_takes_a_prompt_or_messages() -> None:
    assert parse_tokenize(b'{"prompt":"x","add_special_tokens":false}').prompt.add_special_tokens is False
    assert parse_tokenize(chat(add_generation_prompt=False)).prompt.add_generation_prompt is False
    assert refused(parse_tokenize, b"{}").param == "prompt"
    assert refused(parse_tokenize, chat(prompt="x")).param == "prompt"


def test_a_schema_passes_where_the_engine_has_a_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    body = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert json.loads(parse_chat(body, GRAMMAR).json_schema or "") == schema
    assert parse_chat(chat(response_format={"type": "json_object"}), GRAMMAR).json_schema == '{"type":"object"}'
    assert parse_chat(chat(response_format={"type": "text"})).json_schema is None


def test_a_schema_is_bounded_in_size_and_depth() -> None:
    def asked(schema: Any) -> bytes:
        return chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})

    deep: Any = {}
    for _ in range(40):
        deep = {"properties": {"a": deep}}
    assert "nested deeper" in refused(parse_chat, asked(deep), GRAMMAR).what
    assert "larger than" in refused(parse_chat, asked({"d": "x" * MAX_SCHEMA_BYTES}), GRAMMAR).what
    assert "larger than" in refused(parse_chat, asked({"d": "x" * 4 * MAX_SCHEMA_BYTES}), GRAMMAR).what
    assert refused(parse_chat, asked([1]), GRAMMAR).param == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b'{"messages":[}', b"\xff",
        b'{"messages":[{"role":"user","content":"\xff"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'{"unknown":"\xff","messages":[]}',
        b'{"messages":[{"role":"user"}],"temperature":NaN}', b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"tool_choice":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b',"messages":[]}',
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_in_utf8_is_refused(body: bytes) -> None:
    refused(parse_chat, body)


def test_unknown_fields_are_named_and_routine_ones_are_not() -> None:
    routine = dict.fromkeys(HARMLESS - {"stream"}, "x")
    asked = parse_chat(chat(zeta=1, alpha={"deep": [1]}, nothing=None, **routine))
    assert asked.ignored == ("zeta", "alpha")
    assert warning_header(asked.ignored) == '199 neaptide "ignored: zeta, alpha"'


@given(st.lists(st.text(max_size=80), max_size=60))
def test_the_warning_header_is_always_safe_to_send(names: list[str]) -> None:
    value = warning_header(names)
    assert len(value) <= MAX_WARNING_BYTES
    assert value == "" or (value.startswith('199 neaptide "ignored: ') and value.endswith('"'))
    assert value.isascii()
    assert value.count('"') in (0, 2)
    assert not set(value) & set("\r\n\0\\")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KNOWN = ["messages", "prompt", "temperature", "top_p", "stop", "n", "tools", "logprobs", "top_logprobs", "max_tokens"]
KNOWN += ["response_format", "stream_options", "seed", "echo", "suffix", "logit_bias", "stop_token_ids", "best_of"]
KNOWN += ["chat_template_kwargs", "tool_choice"]


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=5), json_values, max_size=6),
    st.booleans(),
    st.sampled_from([parse_chat, parse_completion]),
)
def test_any_json_object_is_read_or_refused_and_nothing_else(
    fields: dict[str, Any], complete: bool, parse: Any
) -> None:
    if complete:
        fields = {**fields, "messages": HELLO, "prompt": "hello"}
    asked = read(parse, json.dumps(fields).encode(), GRAMMAR)
    if asked is not None:
        assert asked.temperature is None or 0 <= asked.temperature <= 2
        assert asked.max_tokens is None or asked.max_tokens >= 1
        assert len(asked.stop) <= 16


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_and_nothing_else(body: bytes) -> None:
    for parse in (parse_chat, parse_completion, parse_tokenize):
        read(parse, body)
