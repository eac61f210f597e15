"""The page's texts in English and Chinese: both stand in the page, and its language shows one of them."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable
from importlib.resources import files

from markupsafe import Markup

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # as the command line says it, as HTML does


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(files("neaptide.demo").joinpath("page.json").read_text("utf-8"))
    return found


def texts(key: str, **values: object) -> dict[str, str]:
    """By language, placeholders filled."""
    return {name: text.format(**values) for name, text in catalogue()[key].items()}


def both(element: Callable[[str, str], str], key: str, **values: object) -> str:
    """`element(language, text)` for each language, as markup."""
    found = texts(key, **values)
    return "".join(element(LANGUAGES[name], html.escape(found[name], quote=False)) for name in LANGUAGES)


def say(key: str, **values: object) -> Markup:
    """The text in both languages; placeholders are escaped with it."""
    return Markup(both(lambda lang, text: f'<span lang="{lang}">{text}</span>', key, **values))  # noqa: S704
