"""A page's texts in English and Chinese: both stand in the page, and the page's language shows one of them."""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Callable
from importlib.resources import files

LANGUAGES = {"en": "en", "zh": "zh-CN"}  # as the command line says it, as HTML does


class Texts:
    """Those of one page, read once from a JSON file of `package`: {key: {language: text}}."""

    def __init__(self, package: str, name: str) -> None:
        self._package, self._name = package, name

    @functools.cache  # noqa: B019  (a page's texts live as long as the process)
    def catalogue(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = json.loads(files(self._package).joinpath(self._name).read_text("utf-8"))
        return found

    def texts(self, key: str, **values: object) -> dict[str, str]:
        """By language, placeholders filled."""
        return {name: text.format(**values) for name, text in self.catalogue()[key].items()}

    def both(self, element: Callable[[str, str], str], key: str, **values: object) -> str:
        """`element(language, text)` for each language, as markup."""
        found = self.texts(key, **values)
        return "".join(element(LANGUAGES[name], html.escape(found[name], quote=False)) for name in LANGUAGES)

    def spans(self, key: str, **values: object) -> str:
        """The text in both languages; placeholders are escaped with it."""
        return self.both(lambda lang, text: f'<span lang="{lang}">{text}</span>', key, **values)


REPORT = Texts("neaptide.simulate", "report.json")
catalogue, texts, both, spans = REPORT.catalogue, REPORT.texts, REPORT.both, REPORT.spans
