"""What goes back to the client: OpenAI's answer objects and their SSE framing.

A stream's constant bytes are built once, so that one token's event costs one JSON string encode and one concatenation.
Every builder of a stream returns whole `data: ...\\n\\n` events; the caller joins them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from neaptide.errors import RequestError

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI sends this value

_encode = msgspec.json.Encoder().encode


class Logprob(NamedTuple):
    """One generated token as a logprobs block shows it."""

    token: str
    logprob: float
    raw: bytes


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of a usage object; `output` includes `reasoning`, `prompt` includes `cached`."""

    prompt: int
    output: int
    cached: int = 0
    reasoning: int = 0


class Label(NamedTuple):
    """What every object of one answer carries. `fingerprint` is the revision; `created_s` whole seconds (wall)."""

    request_id: str
    model: str
    fingerprint: str
    created_s: int


class Stream(Protocol):
    """The events of one streamed answer, in order: opening, content ..., finish, usage if asked for, DONE."""

    opening: bytes

    def content(self, text: str, logprobs: Sequence[Logprob] = ()) -> bytes: ...
    def finish(self, reason: str) -> bytes: ...
    def usage(self, tokens: Tokens) -> bytes: ...


class ChatStream:
    """chat.completion.chunk events; `opening` is the role chunk."""

    __slots__ = ("_head", "_mid", "_tail", "opening")

    def __init__(self, label: Label, include_usage: bool = False) -> None:
        self._head = _stream_head(f"chatcmpl-{label.request_id}", "chat.completion.chunk", label)
        usage = b',"usage":null' if include_usage else b""
        self._mid = self._head + b'"choices":[{"index":0,"delta":{"content":'
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self.opening = self._mid.replace(b'{"content":', b'{"role":"assistant","content":') + b'""' + self._tail

    def content(self, text: str, logprobs: Sequence[Logprob] = ()) -> bytes:
        if not logprobs:
            return self._mid + _encode(text) + self._tail
        block = _encode(chat_logprobs(logprobs))
        return self._mid + _encode(text) + self._tail.replace(b'"logprobs":null', b'"logprobs":' + block, 1)

    def finish(self, reason: str) -> bytes:
        tail = self._tail.replace(b'"finish_reason":null', b'"finish_reason":' + _encode(reason), 1)
        return self._head + b'"choices":[{"index":0,"delta":{' + tail

    def usage(self, tokens: Tokens) -> bytes:
        return _usage_event(self._head, tokens)


class TextStream:
    """text_completion events; there is no opening chunk."""

    __slots__ = ("_head", "_mid", "_offset", "_tail", "opening")

    def __init__(self, label: Label, include_usage: bool = False) -> None:
        self._head = _stream_head(f"cmpl-{label.request_id}", "text_completion", label)
        usage = b',"usage":null' if include_usage else b""
        self._mid = self._head + b'"choices":[{"index":0,"text":'
        self._tail = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._offset = 0  # characters of text told so far, for logprobs' text_offset
        self.opening = b""

    def content(self, text: str, logprobs: Sequence[Logprob] = ()) -> bytes:
        if not logprobs:
            return self._mid + _encode(text) + self._tail
        block = _encode(text_logprobs(logprobs, self._offset))
        self._offset += sum(len(entry.token) for entry in logprobs)
        return self._mid + _encode(text) + self._tail.replace(b'"logprobs":null', b'"logprobs":' + block, 1)

    def finish(self, reason: str) -> bytes:
        tail = self._tail.replace(b'"finish_reason":null', b'"finish_reason":' + _encode(reason), 1)
        return self._mid + b'""' + tail

    def usage(self, tokens: Tokens) -> bytes:
        return _usage_event(self._head, tokens)


def stream(label: Label, *, chat: bool, include_usage: bool) -> Stream:
    return ChatStream(label, include_usage) if chat else TextStream(label, include_usage)


def _stream_head(id: str, kind: str, label: Label) -> bytes:
    return b"data: " + _encode(_envelope(id, kind, label))[:-1] + b","


def _usage_event(head: bytes, tokens: Tokens) -> bytes:
    return head + b'"choices":[],"usage":' + _encode(usage_object(tokens)) + b"}\n\n"


def _envelope(id: str, kind: str, label: Label) -> dict[str, Any]:
    return {
        "id": id,
        "object": kind,
        "created": label.created_s,
        "model": label.model,
        "system_fingerprint": label.fingerprint,
    }


# -------------------------------------------------------------------------------------------------- whole answers


def answer(
    label: Label, text: str, finish: str, tokens: Tokens, *, chat: bool, logprobs: Sequence[Logprob] | None = None
) -> bytes:
    """The body of a non-streaming answer. `logprobs` None = not asked for."""
    choice: dict[str, Any] = {"index": 0}
    if chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = None if logprobs is None else chat_logprobs(logprobs)
    else:
        choice["text"] = text
        choice["logprobs"] = None if logprobs is None else text_logprobs(logprobs)
    choice["finish_reason"] = finish
    id, kind = ("chatcmpl-", "chat.completion") if chat else ("cmpl-", "text_completion")
    body = _envelope(f"{id}{label.request_id}", kind, label)
    return _encode({**body, "choices": [choice], "usage": usage_object(tokens)})


def usage_object(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.output,
        "total_tokens": tokens.prompt + tokens.output,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }


def chat_logprobs(entries: Sequence[Logprob]) -> dict[str, Any]:
    return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}


def _chat_logprob(entry: Logprob) -> dict[str, Any]:
    logprob = max(entry.logprob, LOWEST_LOGPROB)
    return {"token": entry.token, "logprob": logprob, "bytes": list(entry.raw), "top_logprobs": []}


def text_logprobs(entries: Sequence[Logprob], offset: int = 0) -> dict[str, Any]:
    """`offset`: characters of the answer's text before the first of these tokens."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in entries],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def tokenized(ids: Sequence[int], max_model_len: int) -> bytes:
    return _encode({"count": len(ids), "max_model_len": max_model_len, "tokens": list(ids)})


def model_list(lengths: Mapping[str, int], created_s: int) -> bytes:
    """`lengths`: the context of each model, in tokens."""
    entry = {"object": "model", "created": created_s, "owned_by": "neaptide"}
    rows = [{"id": model, **entry, "max_model_len": tokens} for model, tokens in lengths.items()]
    return _encode({"object": "list", "data": rows})


# --------------------------------------------------------------------------------------------------------- errors


def error_body(error: RequestError) -> bytes:
    return _encode(error.body())


def error_event(error: RequestError) -> bytes:
    """The last event of a stream that failed after it began; no DONE follows it."""
    return b"data: " + error_body(error) + b"\n\n"
