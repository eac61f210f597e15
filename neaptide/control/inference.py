"""The inference API as documents describe it: structs for OpenAPI, and the routes. Served by gateways, not here.

These structs describe; the replica's strict parser decides. A test holds their fields against the parser's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

Tokens = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Body(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base: absent and null mean the model's default. Fields that are not listed are ignored, and named in a Warning
    header."""


class TextPart(Body, kw_only=True):
    """A part of a message's content: text only."""

    text: str
    type: Literal["text"] = "text"


class Message(Body, kw_only=True):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None


class StreamOptions(Body, kw_only=True):
    """How a stream ends."""

    include_usage: bool | None = None


class JsonSchema(Body, kw_only=True):
    """A JSON schema for the answer, at most 64 KB and 32 levels deep."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(Body, kw_only=True):
    """What form the answer takes, where the model's engine can hold it to one."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationRequest(Body, kw_only=True):
    """What chat and completion requests share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    response_format: ResponseFormat | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | float | bool | None] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions: one prompt, as text or token ids."""

    prompt: str | list[int]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class TokenizeRequest(Body, kw_only=True):
    """POST /tokenize: a prompt, or messages that the chat template turns into one."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, str | float | bool | None] | None = None


class Told(msgspec.Struct, kw_only=True):
    """Base of the answers."""


class PromptDetails(Told, kw_only=True):
    """Of prompt_tokens."""

    cached_tokens: int


class CompletionDetails(Told, kw_only=True):
    """Of completion_tokens."""

    reasoning_tokens: int


class UsageObject(Told, kw_only=True):
    """What the request used; what it is billed by."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class AnswerMessage(Told, kw_only=True):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: str | None


class ChatChoice(Told, kw_only=True):
    """The one answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Told, kw_only=True):
    """A whole chat answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageObject


class Delta(Told, kw_only=True, omit_defaults=True):
    """The next piece."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(Told, kw_only=True):
    """A piece of the one answer."""

    index: int
    delta: Delta
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(Told, kw_only=True, omit_defaults=True):
    """One `data:` event of a stream; the last event is `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageObject | None = None


class TextChoice(Told, kw_only=True):
    """The one continuation, or a piece of it."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Told, kw_only=True, omit_defaults=True):
    """A continuation; streams send the same object in pieces."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageObject | None = None


class ModelEntry(Told, kw_only=True, omit_defaults=True):
    """One model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(Told, kw_only=True):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelEntry]


class Health(Told, kw_only=True):
    """Whether the gateway has what it needs to serve."""

    status: Literal["ready", "starting"]


class Version(Told, kw_only=True):
    """What runs."""

    version: str


class Tokenized(Told, kw_only=True):
    """The token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]


class OpenAIError(Told, kw_only=True):
    """OpenAI's error fields; `code` is stable and machine-readable."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorBody(Told, kw_only=True):
    """Every error answer; in a stream that breaks, an event of this form."""

    error: OpenAIError


class Service(NamedTuple):
    """One operation of the inference API."""

    id: str
    method: str
    path: str
    answer: Any  # a struct (JSON), or str (plain text)
    body: Any = None
    chunk: Any = None  # the struct of a stream's events
    open: bool = False  # needs no key
    unready: bool = False  # 503 with the same answer while it starts
    errors: tuple[int, ...] = ()


_GENERATION_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 502, 503, 504, 507)
SERVICES = (
    Service("listModels", "GET", "/v1/models", ModelList, errors=(401, 403)),
    Service("getModel", "GET", "/v1/models/{model}", ModelEntry, errors=(401, 403, 404)),
    Service(
        "createChatCompletion",
        "POST",
        "/v1/chat/completions",
        ChatCompletion,
        ChatCompletionRequest,
        ChatCompletionChunk,
        errors=_GENERATION_ERRORS,
    ),
    Service(
        "createCompletion",
        "POST",
        "/v1/completions",
        Completion,
        CompletionRequest,
        Completion,
        errors=_GENERATION_ERRORS,
    ),
    Service("tokenize", "POST", "/tokenize", Tokenized, TokenizeRequest, errors=_GENERATION_ERRORS),
    Service("getHealth", "GET", "/health", Health, open=True),
    Service("getReady", "GET", "/health/ready", Health, open=True, unready=True),
    Service("getVersion", "GET", "/version", Version, open=True),
    Service("getMetrics", "GET", "/metrics", str, open=True),
)
# name, JSON schema; "header.<name>" is the text in the catalogue.
HEADERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("x-neaptide-priority", {"enum": ["low", "normal", "high"]}),
    ("x-neaptide-deadline-ms", {"type": "integer", "minimum": 1}),
    ("x-neaptide-conversation", {"type": "string"}),
    ("x-neaptide-revision", {"type": "string", "minLength": 1, "maxLength": 160}),
    ("x-neaptide-cache", {"enum": ["yes", "no"]}),
    ("x-neaptide-degrade", {"enum": ["yes", "no"]}),
    ("x-request-id", {"type": "string", "minLength": 1, "maxLength": 128}),
    ("traceparent", {"type": "string"}),
)
