"""Why a model has the count it has: reasons as facts, and the sentences that say them in English and Chinese.

Plans, choices and the decision journal hold facts (types.Reason: a name and its numbers); words are made here, when
somebody reads. To tell of something new, write it under a name in reasons.json, in both languages with the same
placeholders, and add reason(NAME, ...) where it is decided. NAME.one is said instead where n is 1. Reasons of one
choice follow each other: a text that brings no comma, bracket or space of its own is set off by a semicolon.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from neaptide.types import Choice, Reason

LANGUAGES = ("en", "zh")
SIGNS = {"CNY": "¥", "USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}


def reason(name: str, of: str = "", **facts: int | float | str) -> Reason:
    """Facts are finite; fractions are kept to a millionth. `of`: the model or replica that a plan's reason is about."""
    return Reason(name, {k: round(float(v), 6) if isinstance(v, float) else v for k, v in facts.items()}, of)


def words(why: Reason, language: str = "en") -> str:
    """One reason; KeyError for a name of another release."""
    said = _text(why.name, language, **why.facts)
    return _text("about", language, of=why.of, said=said) if why.of else said


def phrase(why: Sequence[Reason], language: str = "en") -> str:
    """Several, as one phrase; KeyError as `words`."""
    said = ""
    for text in (words(one, language) for one in why):
        said += _text("joint", language) + text if said and text[0].isalnum() else text
    return said


def sentence(choice: Choice, language: str = "en") -> str:
    """The choice in words. One of an older journal, or with a reason of another release, says its English sentence."""
    try:
        return _sentence(choice, language) if choice.why else choice.sentence
    except KeyError:
        return choice.sentence


def price(amount: float, currency: str) -> str:
    """1.5 -> ¥1.50; a currency without a sign is named."""
    sign = SIGNS.get(currency) or (f"{currency} " if currency else "")
    digits = 2 if amount >= 0.1 or amount <= 0 else 1 - math.floor(math.log10(amount))  # two that count
    return f"{sign}{amount:,.{digits}f}"


def _sentence(choice: Choice, language: str) -> str:
    before, after = choice.before, choice.after
    name = "stay" if before == after else "grow" if after > before else "shrink"
    model = f"{choice.model} ({', '.join(choice.members)})" if choice.members else choice.model
    why, serves, money = phrase(choice.why, language), choice.numbers["capacity_rps"], _money(choice, language)
    return _text(name, language, model=model, before=before, n=after, why=why, serves=serves, money=money)


def _money(choice: Choice, language: str) -> str:
    """Of what stays, or of the change; "" where no price is known."""
    stays = choice.before == choice.after
    amount = choice.cost_per_hour if stays else choice.cost_change_per_hour
    if not amount:
        return ""
    name = "cost" if stays else "cost.more" if amount > 0 else "cost.less"
    return _text(name, language, price=price(abs(amount), choice.currency))


@functools.cache
def _catalogue() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return found


def _text(name: str, language: str, **values: int | float | str) -> str:
    texts = _catalogue()
    found = texts.get(f"{name}.one") if values.get("n") == 1 else None
    return (found or texts[name])[language].format(**values)
