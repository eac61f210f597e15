"""The replica's strict reading of a request body: OpenAI chat/completions and completions, and vLLM's /tokenize.

A body becomes one `Generation` or `Tokenization`, or a RequestError 400 with `param`. What the engine cannot do is
refused, never dropped; fields nobody here knows are ignored and named in `ignored` for a Warning header. All bounds
that do not need the tokenizer or the engine's sizes are checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec
from msgspec import Raw

from neaptide.errors import RequestError
from neaptide.wire.bodies import ChatBody, CommonBody, CompletionBody, Message, Part, TokenizeBody

MAX_STOPS = 16
MAX_STOP_CHARS = 128  # a held-back tail is at most this long; it also bounds the matching work a token
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32
MAX_STOP_IDS = 64
MAX_MESSAGES = 4096  # some chat templates look at every pair
MAX_TEMPLATE_KWARGS = 16
MAX_WARNING_BYTES = 512
ROLES = frozenset({"system", "developer", "user", "assistant"})

T = TypeVar("T")


class Abilities(NamedTuple):
    """What the engine says it can do, as far as a body can ask for it (engine Description)."""

    logprobs: int = 0  # most alternatives a token
    json_schema: bool = False


# Fields that clients send as a matter of course and that change no answer of ours: no warning for them.
HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "request_id", "priority"}
    | {"prompt_cache_key", "prompt_cache_retention", "skip_special_tokens", "spaces_between_special_tokens"}
)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of `messages` (for the chat template), `text` and `ids` is set."""

    messages: list[dict[str, str]] | None = None
    text: str | None = None
    ids: list[int] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True  # of `text` only: a rendered chat carries its own
    template_kwargs: dict[str, Any] = {}


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A request for tokens. None means that the client left it to us (model defaults, the rest of the context)."""

    chat: bool
    model: str | None
    prompt: Prompt
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None  # None = none, 0 = of the chosen token, n = of the n likeliest too
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    json_schema: str | None = None
    ignored: tuple[str, ...] = ()


class Tokenization(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None
    prompt: Prompt
    ignored: tuple[str, ...] = ()


_fields = msgspec.json.Decoder(dict[str, Raw])
_chat = msgspec.json.Decoder(ChatBody)
_completion = msgspec.json.Decoder(CompletionBody)
_tokenize = msgspec.json.Decoder(TokenizeBody)


def parse_chat(body: bytes, can: Abilities = Abilities()) -> Generation:  # noqa: B008 (immutable)
    """Raises RequestError 400 with `param`."""
    ignored, raw = _read(body, _chat)
    _refuse_common(raw)
    if raw.top_logprobs and not raw.logprobs:
        _refuse("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    prompt = Prompt(
        messages=_messages(raw.messages),
        add_generation_prompt=raw.add_generation_prompt is not False,
        template_kwargs=_template_kwargs(raw.chat_template_kwargs),
    )
    logprobs = (raw.top_logprobs or 0) if raw.logprobs else None
    limit = raw.max_completion_tokens if raw.max_completion_tokens is not None else raw.max_tokens
    return _generation(raw, prompt, limit, _logprobs(logprobs, "top_logprobs", can), can, ignored, chat=True)


def parse_completion(body: bytes, can: Abilities = Abilities()) -> Generation:  # noqa: B008 (immutable)
    """Raises RequestError 400 with `param`."""
    ignored, raw = _read(body, _completion)
    _refuse_common(raw)
    if raw.echo:
        _refuse("echo", "'echo' is not supported: the answer holds generated text alone.")
    if raw.suffix:
        _refuse("suffix", "'suffix' is not supported.")
    prompt = _completion_prompt(raw.prompt)
    return _generation(raw, prompt, raw.max_tokens, _logprobs(raw.logprobs, "logprobs", can), can, ignored, chat=False)


def parse_tokenize(body: bytes) -> Tokenization:
    """Raises RequestError 400 with `param`."""
    ignored, raw = _read(body, _tokenize)
    if (raw.prompt is None) == (raw.messages is None):
        _refuse("prompt", "Give either 'prompt' or 'messages'.")
    prompt = Prompt(
        messages=None if raw.messages is None else _messages(raw.messages),
        text=raw.prompt,
        add_generation_prompt=raw.add_generation_prompt is not False,
        add_special_tokens=raw.add_special_tokens is not False,
        template_kwargs=_template_kwargs(raw.chat_template_kwargs),
    )
    return Tokenization(model=raw.model, prompt=prompt, ignored=ignored)


def warning_header(ignored: Iterable[str]) -> str:
    """RFC 7234's Warning value that names the ignored fields, at most 512 bytes of printable ASCII; "" for none."""
    names = [clean for name in ignored if (clean := re.sub(r"[^A-Za-z0-9_.\-]", "", name)[:64])]
    if not names:
        return ""
    start, shown = '199 neaptide "ignored: ', ""
    for name in names:
        longer = f"{shown}, {name}" if shown else name
        if len(start) + len(longer) + len(', ..."') > MAX_WARNING_BYTES:
            return f'{start}{shown}, ..."'
        shown = longer
    return f'{start}{shown}"'


# ------------------------------------------------------------------------------------------------------- reading


def _read(body: bytes, decoder: msgspec.json.Decoder[T]) -> tuple[tuple[str, ...], T]:
    """(names of ignored fields, the typed body). Decoded twice: the names cost little, their values are skipped."""
    try:
        body.decode()  # values that the typed decoder skips would otherwise go unchecked
        present = _fields.decode(body)
        typed = decoder.decode(body)
    except RecursionError:
        _refuse(None, "The JSON body is nested too deeply.")
    except UnicodeDecodeError as e:
        _refuse(None, f"The body is not valid UTF-8: {e.reason} at byte {e.start}.")
    except msgspec.ValidationError as e:
        raise _invalid(str(e)) from None
    except msgspec.DecodeError as e:
        _refuse(None, f"The body is not valid JSON: {e}.")
    known = decoder.type.__struct_fields__  # type: ignore[attr-defined]
    ignored = [k for k, v in present.items() if k not in known and k not in HARMLESS and bytes(v) != b"null"]
    return tuple(ignored), typed


def _invalid(text: str) -> RequestError:
    what, _, path = text.partition(" - at `$")
    param = path.rstrip("`").lstrip(".") or None
    if missing := re.search(r"missing required field `(\w+)`", what):
        name = missing[1]
        return RequestError(400, f"Missing required parameter: '{name}'.", param=_join(param, name), kind=None)
    where = f" for '{param}'" if param else ""
    return RequestError(400, f"Invalid value{where}: {what[:1].lower()}{what[1:]}.", param=param)


def _join(path: str | None, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refuse(param: str | None, message: str) -> NoReturn:
    raise RequestError(400, message, param=param)


# ------------------------------------------------------------------------------------------------------- checking


def _refuse_common(raw: CommonBody) -> None:
    for name in ("n", "best_of"):
        value = getattr(raw, name)
        if value is not None and value != 1:
            _refuse(name, f"'{name}' must be 1: one answer a request is what this engine gives, got {value}.")
    for name in ("logit_bias", "tools", "functions", "audio"):
        if getattr(raw, name):
            _refuse(name, f"'{name}' is not supported by this model's engine.")
    for name in ("tool_choice", "function_call"):
        if getattr(raw, name) not in (None, "none", "auto"):
            _refuse(name, f"'{name}' is not supported by this model's engine.")
    if raw.modalities and raw.modalities != ["text"]:
        _refuse("modalities", "Only the modality 'text' is supported.")


def _messages(given: list[Message]) -> list[dict[str, str]]:
    if not given:
        _refuse("messages", "'messages' is empty: at least one message is needed.")
    if len(given) > MAX_MESSAGES:
        _refuse("messages", f"At most {MAX_MESSAGES} messages, got {len(given)}.")
    out = []
    for i, message in enumerate(given):
        if message.role not in ROLES:
            _refuse(
                f"messages[{i}].role", f"Role '{message.role[:32]}' is not one of system, developer, user, assistant."
            )
        if message.tool_calls or message.function_call:
            _refuse(f"messages[{i}].tool_calls", "Tool calls are not supported by this model's engine.")
        # Templates know no "developer"; OpenAI defines it as the successor of "system".
        role = "system" if message.role == "developer" else message.role
        plain = {"role": role, "content": _content(message.content, i)}
        if message.name is not None:
            plain["name"] = message.name
        out.append(plain)
    return out


def _content(content: str | list[Part] | None, i: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for j, part in enumerate(content):
        if part.type != "text":
            _refuse(
                f"messages[{i}].content[{j}].type", f"Content of type '{part.type[:32]}' is not supported: text only."
            )
        if part.text is None:
            _refuse(f"messages[{i}].content[{j}].text", "A text part without its 'text'.")
    return "".join(part.text or "" for part in content)


def _completion_prompt(given: str | list[str | int | list[int]]) -> Prompt:
    if isinstance(given, str):
        return Prompt(text=given)
    if not given:
        _refuse("prompt", "'prompt' is empty.")
    if all(isinstance(x, int) for x in given):
        return Prompt(ids=[_token_id(x) for x in given])
    if len(given) > 1:
        _refuse("prompt", f"{len(given)} prompts in one request are not supported: send one request a prompt.")
    only = given[0]
    if isinstance(only, list):
        if not only:
            _refuse("prompt", "'prompt' is empty.")
        return Prompt(ids=only)
    return Prompt(text=str(only))


def _token_id(x: object) -> int:
    if not isinstance(x, int) or x < 0:
        _refuse("prompt", f"A prompt's token ids are non-negative integers, got {str(x)[:32]}.")
    return x


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
    stops = (given,) if isinstance(given, str) else tuple(given or ())
    if len(stops) > MAX_STOPS:
        _refuse("stop", f"At most {MAX_STOPS} stop strings, got {len(stops)}.")
    if any(not s for s in stops):
        _refuse("stop", "A stop string must not be empty.")
    longest = max((len(s) for s in stops), default=0)
    if longest > MAX_STOP_CHARS:
        _refuse("stop", f"A stop string has at most {MAX_STOP_CHARS} characters, got {longest}.")
    return tuple(dict.fromkeys(stops))


def _logprobs(asked: int | None, param: str, can: Abilities) -> int | None:
    if asked is not None and asked > can.logprobs:
        most = f"at most {can.logprobs}" if can.logprobs else "no"
        _refuse(param, f"This engine tells {most} alternatives a token, {asked} were asked for.")
    return asked


def _template_kwargs(given: dict[str, Any] | None) -> dict[str, Any]:
    given = given or {}
    if len(given) > MAX_TEMPLATE_KWARGS:
        _refuse("chat_template_kwargs", f"At most {MAX_TEMPLATE_KWARGS} entries.")
    for name, value in given.items():
        if not name.isidentifier() or not isinstance(value, (bool, int, float, str, type(None))):
            _refuse("chat_template_kwargs", "Names are identifiers, values are strings, numbers, booleans or null.")
    return given


def _json_schema(given: dict[str, Raw] | None, can: Abilities) -> str | None:
    kind = _plain(given["type"]) if given and "type" in given else None
    if not given or kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        _refuse("response_format.type", "'response_format.type' is one of text, json_object, json_schema.")
    if not can.json_schema:
        _refuse("response_format", f"'response_format' of type {kind} is not supported by this model's engine.")
    if kind == "json_object":
        return '{"type":"object"}'
    wrapper = _plain(given["json_schema"]) if "json_schema" in given else None
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        _refuse("response_format.json_schema.schema", "A JSON schema (an object) is needed here.")
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        _refuse("response_format.json_schema.schema", f"The schema is nested deeper than {MAX_SCHEMA_DEPTH}.")
    text = msgspec.json.encode(schema).decode()
    if len(text) > MAX_SCHEMA_BYTES:
        _refuse("response_format.json_schema.schema", f"The schema is larger than {MAX_SCHEMA_BYTES} bytes.")
    return text


def _plain(raw: Raw) -> Any:
    if len(bytes(raw)) > 2 * MAX_SCHEMA_BYTES:
        _refuse("response_format", f"The schema is larger than {MAX_SCHEMA_BYTES} bytes.")
    return msgspec.json.decode(raw)


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        inner: list[Any] = []
        for x in level:
            inner.extend(x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())
        level = [x for x in inner if isinstance(x, (dict, list))]
    return depth


def _generation(
    raw: CommonBody,
    prompt: Prompt,
    limit: int | None,
    logprobs: int | None,
    can: Abilities,
    ignored: tuple[str, ...],
    chat: bool,
) -> Generation:
    if raw.stop_token_ids and len(raw.stop_token_ids) > MAX_STOP_IDS:
        _refuse("stop_token_ids", f"At most {MAX_STOP_IDS} stop token ids, got {len(raw.stop_token_ids)}.")
    if raw.min_tokens and limit is not None and raw.min_tokens > limit:
        _refuse("min_tokens", f"'min_tokens' ({raw.min_tokens}) exceeds the most tokens allowed ({limit}).")
    stream = bool(raw.stream)
    return Generation(
        chat=chat,
        model=raw.model,
        prompt=prompt,
        stream=stream,
        include_usage=stream and bool(raw.stream_options and raw.stream_options.include_usage),
        max_tokens=limit,
        temperature=raw.temperature,
        top_p=raw.top_p,
        top_k=None if raw.top_k is None else max(raw.top_k, 0),
        seed=None if raw.seed is None else raw.seed % 2**63,
        presence_penalty=raw.presence_penalty or 0.0,
        frequency_penalty=raw.frequency_penalty or 0.0,
        repetition_penalty=raw.repetition_penalty,
        min_tokens=raw.min_tokens or 0,
        ignore_eos=bool(raw.ignore_eos),
        logprobs=logprobs,
        stop=_stops(raw.stop),
        stop_token_ids=tuple(raw.stop_token_ids or ()),
        json_schema=_json_schema(raw.response_format, can),
        ignored=ignored,
    )
