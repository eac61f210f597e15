"""The report's texts in English and Chinese: both stand in the page, and the page's language shows one of them."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable
from importlib.resources import files

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # as the command line says it, as HTML does


@functools.cache
def catalogue() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(files("neaptide.simulate").joinpath("report.json").read_text("utf-8"))
    return found


def texts(key: str, **values: object) -> dict[str, str]:
    """By language, placeholders filled."""
    return {name: text.format(**values) for name, text in catalogue()[key].items()}


def both(element: Callable[[str, str], str], key: str, **values: object) -> str:
    """`element(language, text)` for each language, as markup."""
    found = texts(key, **values)
    return "".join(element(LANGUAGES[name], html.escape(found[name], quote=False)) for name in LANGUAGES)


def spans(key: str, **values: object) -> str:
    return both(lambda lang, text: f'<span lang="{lang}">{text}</span>', key, **values)
