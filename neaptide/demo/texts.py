"""The page's texts in English and Chinese."""

from __future__ import annotations

from markupsafe import Markup

from neaptide.simulate.texts import LANGUAGES, Texts

__all__ = ["LANGUAGES", "both", "catalogue", "say", "texts"]

PAGE = Texts("neaptide.demo", "page.json")
catalogue, texts, both = PAGE.catalogue, PAGE.texts, PAGE.both


def say(key: str, **values: object) -> Markup:
    """The text in both languages; placeholders are escaped with it."""
    return Markup(PAGE.spans(key, **values))  # noqa: S704
