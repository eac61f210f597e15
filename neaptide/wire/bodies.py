"""OpenAI's request bodies as typed structures: names, types and ranges, nothing else. parse.py gives them meaning.

Every optional field may be null, as clients send it. Unknown fields are skipped without being built.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class Part(msgspec.Struct):
    type: str = "text"
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Raw] | None = None
    function_call: Any = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class CommonBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Tokens | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    stop: str | list[str] | None = None
    seed: _Seed | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=2.0)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[_Count] | None = None
    response_format: dict[str, Raw] | None = None
    # Read only to be refused when they ask for something.
    n: int | None = None
    best_of: int | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Raw] | None = None
    tool_choice: Any = None
    functions: list[Raw] | None = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None


class ChatBody(CommonBody, kw_only=True):
    messages: list[Message]
    max_completion_tokens: _Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(CommonBody, kw_only=True):
    prompt: str | list[str | int | list[_Count]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
