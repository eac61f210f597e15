"""Question patterns: one line stands for many questions.

`(a|b|)` picks one alternative (the last one here is empty), not nested; `{slot}` is filled from a word list.
"""

from __future__ import annotations

import random
import re
import string
import tomllib
from pathlib import Path

GROUP = re.compile(r"\(([^()]*)\)")
SLOT = re.compile(r"\{(\w+)\}")
PUNCTUATION = re.compile(r"[\s" + re.escape(string.punctuation) + r"，。？！、；：“”‘’（）《》…·]+")


def expand(pattern: str, rng: random.Random, slots: dict[str, list[str]] | None = None) -> str:
    """One question of the pattern; KeyError for an unknown slot."""
    text = GROUP.sub(lambda m: rng.choice(m.group(1).split("|")), pattern)
    text = SLOT.sub(lambda m: rng.choice((slots or {})[m.group(1)]), text)
    return re.sub(r" {2,}", " ", text).strip()


def fingerprint(text: str) -> str:
    """The text without case, spaces and punctuation: what counts as the same question."""
    return PUNCTUATION.sub("", text).lower()


WORDING = tomllib.loads((Path(__file__).parent / "wording.toml").read_text(encoding="utf-8"))


def reworded(text: str, lang: str, rng: random.Random) -> str:
    """The question with some words exchanged for their synonyms and, at times, a light word lost."""
    for group in WORDING[lang]["synonyms"]:
        present = [w for w in group if _holds(text, w, lang)]
        if present and rng.random() < 0.3:
            text = _swapped(text, max(present, key=len), rng.choice(group), lang)
    if rng.random() < 0.1:
        text = _lightened(text, lang, rng) or text
    return text


def _holds(text: str, word: str, lang: str) -> bool:
    return word in text if lang == "zh" else re.search(rf"\b{re.escape(word)}\b", text) is not None


def _swapped(text: str, old: str, new: str, lang: str) -> str:
    return text.replace(old, new, 1) if lang == "zh" else re.sub(rf"\b{re.escape(old)}\b", new, text, count=1)


def _lightened(text: str, lang: str, rng: random.Random) -> str:
    parts = list(text) if lang == "zh" else text.split(" ")
    light = [i for i, part in enumerate(parts) if part.lower() in WORDING[lang]["light"]]
    if light:
        parts.pop(rng.choice(light))
    return ("" if lang == "zh" else " ").join(parts)


def noisy(text: str, lang: str, rng: random.Random) -> str:
    """The question as people type it: a lead-in, a tail, case, a missing mark, at times a typing slip."""
    before, after = WORDING[lang]["before"], WORDING[lang]["after"]
    text = reworded(text, lang, rng)
    if rng.random() < 0.3:
        text = rng.choice(before) + text
    if rng.random() < 0.2:
        text += rng.choice(after)
    if lang == "en":
        text = _cased(text, rng)
        if rng.random() < 0.12:
            text = _slipped(text, rng)
    if text[-1] not in "?？.。!！":
        text += rng.choice(
            ["", "", "?", "?", "??", ".", "!"] if lang == "en" else ["", "", "", "？", "？", "?", "。", "！"]
        )
    return text


def _cased(text: str, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.45:
        return text[0].upper() + text[1:]
    if draw < 0.75:
        return text.lower()
    return text.upper() if draw < 0.78 else text


def _slipped(text: str, rng: random.Random) -> str:
    """One adjacent swap, lost letter or doubled letter inside a word."""
    spots = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not spots:
        return text
    i = rng.choice(spots)
    slip = rng.choice(("swap", "drop", "double"))
    if slip == "swap":
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + text[i + 1 :] if slip == "drop" else text[:i] + text[i] + text[i:]
