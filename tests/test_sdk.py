"""The real openai client against the whole service: what an application's developer does on the first day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest

from tests.conftest import Service
from tests.traffic import usage_rows, wait_for

ASK = [{"role": "user", "content": "hello tide"}]


@pytest.fixture
def client(echo_service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=echo_service.api, api_key=echo_service.key, max_retries=0)


def test_a_chat_completion_carries_text_finish_and_usage(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=ASK, max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_a_stream_gives_the_same_text_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="echo", messages=ASK, max_tokens=12, temperature=0)
    chunks = list(client.chat.completions.create(model="echo", messages=ASK, max_tokens=12, temperature=0, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert all(c.usage is None for c in chunks), "no usage chunk for a client that did not ask"


def test_a_stream_ends_with_a_usage_chunk_when_asked(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="echo",
            messages=ASK,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_completions_answer_a_plain_prompt_streaming_and_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="abcdef", max_tokens=6, temperature=0)
    parts = client.completions.create(model="echo", prompt="abcdef", max_tokens=6, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in parts if c.choices) == whole.choices[0].text == "abcdef"


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="one two three", max_tokens=40, stop=[" t"])
    assert answer.choices[0].text == "one"
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["echo"]


def test_the_async_client_runs_many_requests_at_once(echo_service: Service) -> None:
    async def story() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=echo_service.api, api_key=echo_service.key) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(model="echo", prompt=f"number {i:03d}", max_tokens=10, temperature=0)
                    for i in range(50)
                )
            )
        return [a.choices[0].text for a in answers]

    assert asyncio.run(story()) == [f"number {i:03d}" for i in range(50)]


def test_the_async_client_streams(echo_service: Service) -> None:
    async def story() -> str:
        async with openai.AsyncOpenAI(base_url=echo_service.api, api_key=echo_service.key) as client:
            stream = await client.completions.create(model="echo", prompt="streamed", max_tokens=8, stream=True)
            return "".join([c.choices[0].text async for c in stream if c.choices])

    assert asyncio.run(story()) == "streamed"


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
def test_what_is_wrong_or_not_possible_is_refused_with_its_parameter(
    client: openai.OpenAI, change: dict, error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "echo", "messages": ASK, **change})
    assert caught.value.param == param
    assert caught.value.response.headers["x-request-id"]


def test_a_wrong_key_is_an_authentication_error(echo_service: Service) -> None:
    client = openai.OpenAI(base_url=echo_service.api, api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model="echo", messages=ASK)


def test_a_prompt_longer_than_the_context_is_a_clear_refusal(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="x" * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"


def test_fields_nobody_knows_are_ignored_with_a_warning_header(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="echo", messages=ASK, max_tokens=2, extra_body={"sparkle": 1}
    )
    assert "sparkle" in raw.headers["warning"]
    assert raw.parse().choices


def test_a_client_that_times_out_leaves_and_is_recorded(serve: Callable[..., Service]) -> None:
    service = serve("models:\n  echo: {engine: echo, options: {echo_tpot_ms: 50}}\n")
    client = openai.OpenAI(base_url=service.api, api_key=service.key, max_retries=0, timeout=0.5)
    with pytest.raises(openai.APIError):
        client.chat.completions.create(model="echo", messages=ASK, max_tokens=400, extra_body={"ignore_eos": True})
    (row,) = wait_for(lambda: usage_rows(service), "the row")
    assert row["outcome"] in ("aborted", "timeout", "refused")
    assert row.get("output_tokens", 0) < 400


def test_an_alias_answers_under_the_name_that_was_asked(serve: Callable[..., Service]) -> None:
    service = serve("models:\n  echo: {engine: echo, aliases: [gpt-4o-mini]}\n")
    client = openai.OpenAI(base_url=service.api, api_key=service.key)
    assert {m.id for m in client.models.list()} >= {"echo", "gpt-4o-mini"}
    assert client.completions.create(model="gpt-4o-mini", prompt="ab", max_tokens=2).choices[0].text == "ab"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4o", prompt="ab", max_tokens=2)
