"""Chat templates: a model's own Jinja text, run in a sandbox, to turn messages into a prompt.

The template comes with the model, so it is code of a stranger: an immutable sandbox (no attribute tricks, no mutation
of what it is given), and bounds on the template, its output, the iterations of its ranges and the size of what it can
compute in one operation. What templates expect of their
host (tojson, raise_exception, strftime_now, loop controls, the generation tag) is as in Hugging Face transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from neaptide.clock import wall_s
from neaptide.errors import ModelError, RequestError

MAX_TEMPLATE_BYTES = 512 * 1024
MAX_PROMPT_CHARS = 16 << 20
MAX_ITERATIONS = 1_000_000  # over all ranges of one rendering, a second's work
MAX_EXPONENT = 64
ECHO_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ChatTemplate:
    """`render` is pure but for `strftime_now`; safe to call from several threads."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, now_s: Callable[[], float] = wall_s
    ) -> None:
        """`special_tokens`: bos_token, eos_token ... by their names. ModelError when it does not compile."""
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise ModelError(
                f"the chat template has {len(source)} characters",
                why=f"at most {MAX_TEMPLATE_BYTES} bytes are accepted",
                fix="give the model a smaller chat_template.jinja",
                code="E222",
            )
        try:
            self._template = _environment(now_s).from_string(source)
        except jinja2.TemplateSyntaxError as e:
            why = f"line {e.lineno}: {e.message}"
            raise ModelError(
                "the chat template does not compile", why=why, fix="correct chat_template.jinja", code="E223"
            ) from e
        self._special = dict(special_tokens or {})

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """RequestError 400 when the template refuses these messages or fails on them."""
        budget = _Budget()
        known = {
            "range": budget.range,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        out: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**kwargs, **self._special, **known}):
                size += len(piece)
                if size > MAX_PROMPT_CHARS:
                    raise RequestError(
                        400, f"The rendered prompt exceeds {MAX_PROMPT_CHARS} characters.", param="messages"
                    )
                out.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as e:
            raise RequestError(400, f"The model's chat template refused the messages: {e}", param="messages") from e
        except RecursionError as e:
            raise RequestError(400, "The model's chat template recursed too deeply.", param="messages") from e
        return "".join(out)


def no_template() -> RequestError:
    return RequestError(
        400,
        "This model has no chat template, so chat requests cannot be turned into a prompt.",
        slug="no_chat_template",
        param="messages",
        fix="Use /v1/completions with a 'prompt', or add a chat_template.jinja to the model's directory.",
    )


def load_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """From chat_template.jinja, else tokenizer_config.json (`config`); None when the model has neither."""
    path = directory / "chat_template.jinja"
    source: Any = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if not isinstance(source, str) or not source:
        return None
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")
    special = {name: text for name in names if (text := _token_text(config.get(name))) is not None}
    return ChatTemplate(source, special)


def read_json(path: Path) -> dict[str, Any]:
    """A model's JSON file as a dictionary; empty when absent. ModelError when unreadable."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except ValueError as e:
        raise ModelError(f"{path} is not a JSON object", why=str(e), fix="export the model again", code="E224") from e
    return found


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _Budget:
    """`range` for one rendering."""

    def __init__(self) -> None:
        self._left = MAX_ITERATIONS

    def range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise SecurityError(f"more than {MAX_ITERATIONS} iterations")
        return numbers


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox guards attributes; this one also guards against single operations of unbounded size."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= MAX_PROMPT_CHARS and abs(right) <= MAX_EXPONENT):
            raise SecurityError("a power of this size")
        if operator == "*" and (len(str(left)) + 1) * _times(right) > MAX_PROMPT_CHARS:
            raise SecurityError("a product of this size")
        if operator == "*" and (len(str(right)) + 1) * _times(left) > MAX_PROMPT_CHARS:
            raise SecurityError("a product of this size")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\*|\d{4})", left):
            raise SecurityError("a padding of this size")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if isinstance(obj, str) and (attribute in PADDING or (attribute in FORMATS and ":" in obj)):
            return self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)


PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
FORMATS = frozenset({"format", "format_map"})


def _times(value: Any) -> int:
    """How often multiplying with `value` repeats a text or a list."""
    return 0 if isinstance(value, (str, list, tuple, float)) else abs(int(value))


def _environment(now_s: Callable[[], float]) -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
    environment.filters["tojson"] = _to_json
    del environment.filters["center"], environment.filters["format"]  # as PADDING and FORMATS
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.fromtimestamp(now_s()).strftime(text)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Not jinja2's own filter, which escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the model wrote, for training; here it shows as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
