"""The request for the rest of an answer: another replica goes on from the text that is out.

vLLM and SGLang continue the last message of a chat where `continue_final_message` says so; a completion goes on from
its prompt. What an answer depends on beyond its text (the state of a seed or a grammar, penalties that count) is not in
the text: so fields are taken that are known to have no memory, others only where they say what their absence says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

FREE = frozenset(
    (
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("min_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "stop", "stop_token_ids", "ignore_eos"),
        *("logit_bias", "bad_words", "tools", "parallel_tool_calls", "chat_template", "chat_template_kwargs"),
        *("add_special_tokens", "continue_final_message", "add_generation_prompt", "user", "metadata", "store"),
        *("service_tier", "safety_identifier", "prompt_cache_key", "priority", "request_id"),
    )
)
NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),  # of a completion, 0 asks for some
    "top_logprobs": (0,),
    "echo": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "skip_special_tokens": (True,),
}
LIMITS = ("max_tokens", "max_completion_tokens")

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def rest(body: bytes, chat: bool, text: str, tokens: int) -> bytes | None:
    """`body` asking for what follows `text`, which has about `tokens` tokens; None where the rest cannot be had so.
    Of no text at all, the rest is the answer."""
    if not text:
        return body
    try:
        fields = _fields(body)
        if not all(_forgetful(name, value, fields) for name, value in fields.items()) or _begins_stop(fields, text):
            return None
        _shorten(fields, tokens)
        goes_on = _chat(fields, text) if chat else _completion(fields, text)
    except (ValueError, TypeError, KeyError):  # a replica has taken what we cannot read
        return None
    return _encode(fields) if goes_on else None


def _forgetful(name: str, raw: msgspec.Raw, fields: dict[str, msgspec.Raw]) -> bool:
    """Whether the next token depends on this field by the text alone."""
    if name in FREE:
        return True
    value = _decode(raw)
    if value is None:
        return True
    if name == "seed":  # without chance it says nothing
        return "temperature" in fields and _decode(fields["temperature"]) == 0
    return any(value == it and isinstance(value, bool) == isinstance(it, bool) for it in NEUTRAL.get(name, ()))


def _begins_stop(fields: dict[str, msgspec.Raw], text: str) -> bool:
    """Whether `text` ends inside a stop string: who goes on would not see that it became one."""
    stop = _decode(fields["stop"]) if "stop" in fields else None
    stops = [stop] if isinstance(stop, str) else stop or []
    return any(text.endswith(it[:n]) for it in stops for n in range(1, len(it)))


def _shorten(fields: dict[str, msgspec.Raw], tokens: int) -> None:
    """The limits, less what has come. ValueError where nothing is left."""
    for name in (*LIMITS, "min_tokens"):
        limit = _decode(fields[name]) if name in fields else None
        if limit is None:
            continue
        if name in LIMITS and limit <= tokens:
            raise ValueError(f"{name} is reached")
        fields[name] = msgspec.Raw(_encode(max(0, limit - tokens)))


def _chat(fields: dict[str, msgspec.Raw], text: str) -> bool:
    """With a last message that is to be continued; one that the client began so already becomes longer."""
    messages = msgspec.json.decode(fields["messages"], type=list[msgspec.Raw])
    last = _fields(messages[-1]) if messages else {}
    if "role" in last and _decode(last["role"]) == "assistant":
        begun = _decode(last["content"]) if "content" in last else None
        continues = "continue_final_message" in fields and _decode(fields["continue_final_message"]) is True
        if not continues or not isinstance(begun, str):
            return False
        messages[-1] = msgspec.Raw(_encode({**last, "content": begun + text}))
    else:
        messages.append(msgspec.Raw(_encode({"role": "assistant", "content": text})))
    fields["messages"] = msgspec.Raw(_encode(messages))
    fields["continue_final_message"], fields["add_generation_prompt"] = msgspec.Raw(b"true"), msgspec.Raw(b"false")
    return True


def _completion(fields: dict[str, msgspec.Raw], text: str) -> bool:
    prompt = _decode(fields["prompt"]) if "prompt" in fields else None
    if not isinstance(prompt, str):  # ids, or several at once
        return False
    fields["prompt"] = msgspec.Raw(_encode(prompt + text))
    return True
