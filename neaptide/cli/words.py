"""User-facing texts in English and Chinese: one catalogue, words.json, {key: {"en": ..., "zh": ...}}.

Texts are written in each language, not translated word by word; placeholders ({name}) are the same in both. A key
that is missing is a KeyError here and a failing test. Error messages of NeaptideError stay English: they are searched
for and pasted into reports.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

LANGUAGES = ("en", "zh")
_catalogue: dict[str, dict[str, str]] = {}
_language = "en"


def use(language: str) -> None:
    """Speak `language` from now on; call before a verb's module is imported, its help is built then."""
    global _language
    _language = language if language in LANGUAGES else "en"


def language() -> str:
    return _language


def wanted(flag: str | None) -> str:
    """The language to speak: --lang, NEAPTIDE_LANG, or the locale's; English unless one says zh."""
    if flag:
        return flag
    for name in ("NEAPTIDE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def say(key: str, **values: object) -> str:
    """The text of `key`, placeholders filled."""
    text = catalogue()[key][_language]
    return text.format(**values) if values else text


def catalogue() -> dict[str, dict[str, str]]:
    if not _catalogue:
        _catalogue.update(json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8")))
    return _catalogue
