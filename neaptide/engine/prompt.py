"""A request's text made ready for the engine: template, tokens, limits, sampling defaults. Pure and thread-safe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from neaptide.engine.protocol import Description, Sampling
from neaptide.engine.template import ECHO_TEMPLATE, ChatTemplate, load_template, no_template, read_json
from neaptide.engine.tokens import ByteTokenizer, Tokenizer, load_tokenizer
from neaptide.errors import RequestError
from neaptide.wire.parse import Generation, Prompt

LEAST_TOP_P = 1e-6  # OpenAI accepts 0; samplers want a positive nucleus


class Model(NamedTuple):
    """What the I/O process knows of a model. `defaults`: generation_config.json."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: dict[str, Any]


class Prepared(NamedTuple):
    prompt_ids: list[int]
    sampling: Sampling


def load_model(engine: str, source: str) -> Model:
    """From the model's directory; echo needs none. ModelError when files are missing or broken."""
    if engine == "echo":
        return Model(ByteTokenizer(), ChatTemplate(ECHO_TEMPLATE), {})
    directory = Path(source)
    config = read_json(directory / "tokenizer_config.json")
    defaults = read_json(directory / "generation_config.json")
    return Model(load_tokenizer(directory), load_template(directory, config), defaults)


def encode(model: Model, prompt: Prompt, most_tokens: int | None = None) -> list[int]:
    """The prompt's token ids. RequestError 400 for a chat without a template, and for a text that cannot have as few
    as `most_tokens`: tokenising megabytes only to refuse them takes seconds."""
    if prompt.ids is not None:
        return prompt.ids
    special = prompt.messages is None and prompt.add_special_tokens  # a template writes its own
    text = _text(model, prompt)
    if most_tokens is not None and len(text) > most_tokens * model.tokenizer.longest_token:
        at_least = len(text) // model.tokenizer.longest_token
        raise _too_long(most_tokens, f"at least {at_least}", "prompt" if prompt.messages is None else "messages")
    return model.tokenizer.encode(text, special)


def _text(model: Model, prompt: Prompt) -> str:
    if prompt.messages is None:
        return prompt.text or ""
    if model.template is None:
        raise no_template()
    return model.template.render(prompt.messages, prompt.add_generation_prompt, **prompt.template_kwargs)


def _too_long(context_tokens: int, tokens: object, param: str) -> RequestError:
    message = (
        f"This model's maximum context length is {context_tokens} tokens. "
        f"However, your {param} resulted in {tokens} tokens, which leaves none for the answer."
    )
    return RequestError(400, message, slug="context_length_exceeded", param=param)


def prepare(model: Model, description: Description, asked: Generation, default: int) -> Prepared:
    """`default`: max_tokens where the client gives no limit.

    RequestError 400 when the prompt is empty, unknown, or too long for the context or the KV memory."""
    ids = encode(model, asked.prompt, description.context_tokens)
    param = "messages" if asked.chat else "prompt"
    if not ids:
        raise RequestError(400, f"'{param}' is empty: it has no tokens.", param=param)
    if asked.prompt.ids is not None and (largest := max(ids)) >= description.vocab_size:
        raise RequestError(400, f"Token id {largest} is not in a vocabulary of {description.vocab_size}.", param=param)
    max_tokens = _answer_tokens(description, asked, default, len(ids), param)
    return Prepared(ids, _sampling(model.defaults, asked, max_tokens))


def _answer_tokens(description: Description, asked: Generation, default: int, prompt_tokens: int, param: str) -> int:
    """The client's limit, or a default, cut to what context (and, for the default, KV memory) leaves."""
    room = description.context_tokens - prompt_tokens
    if room < 1:
        raise _too_long(description.context_tokens, prompt_tokens, param)
    kv_room = whole_blocks(description.kv_tokens, description.kv_block_tokens) - prompt_tokens
    limit = min(max(kv_room, 1), default) if asked.max_tokens is None else asked.max_tokens
    room = min(room, limit)
    if room > kv_room:
        message = (
            f"{prompt_tokens} prompt tokens and up to {room} generated ones can never fit this replica's KV memory "
            f"of {description.kv_tokens} tokens."
        )
        raise RequestError(400, message, slug="kv_memory_exceeded", param=param, fix="Ask for fewer tokens.")
    return room


def whole_blocks(tokens: int, block: int) -> int:
    """`tokens` of memory, counted in blocks that fit whole."""
    return tokens // block * block


def _sampling(defaults: dict[str, Any], asked: Generation, max_tokens: int) -> Sampling:
    def chosen(name: str, otherwise: float) -> float:
        value = getattr(asked, name)
        value = defaults.get(name) if value is None else value
        return otherwise if not isinstance(value, (int, float)) or isinstance(value, bool) else value

    return Sampling(
        max_tokens=max_tokens,
        temperature=chosen("temperature", 1.0),
        top_p=max(chosen("top_p", 1.0), LEAST_TOP_P),
        top_k=int(chosen("top_k", 0)),
        seed=asked.seed,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        min_tokens=min(asked.min_tokens, max_tokens),
        ignore_eos=asked.ignore_eos,
        logprobs=asked.logprobs,
        stop_token_ids=asked.stop_token_ids,
        json_schema=asked.json_schema,
    )
