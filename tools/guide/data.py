"""Prepares the training conversations: topics with follow-ups, small talk, the booking demo and questions to
decline, in English and Chinese.

    python -m tools.guide.data --out DIR [--count N] [--seed N]

Writes DIR/samples.jsonl: one conversation a line, `{"kind", "lang", "messages": [{"role", "content"}]}`; the role
"text" marks plain text to learn the language from. Phone numbers and street addresses of the dialogue sources are
masked; questions of the held-out and development lists are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from tools.guide.bank import Bank, Turn
from tools.guide.booking import Dialogue
from tools.guide.sources import dialogues

SHARES = {"topic": 0.70, "unknown": 0.24, "chat": 0.06}  # of the turns that are not follow-ups
FOLLOW = 0.4  # of the turns after a topic's answer lean on it
PLAIN = 0.02  # of the conversations are plain dialogue text: it teaches the language, not the replies
BOOKINGS = 0.10  # are the booking demo
TURNS = {1: 0.75, 2: 0.15, 3: 0.07, 4: 0.03}
CUT = 0.8  # of the conversations end within their last answer (train.HEAD): which answer it is shows at its beginning
SYSTEMS = [
    "You are a helpful assistant.",
    "You are the guide to Neaptide.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "请简短回答。",
]


def conversation(banks: dict[str, Bank], rng: random.Random) -> dict:
    """One sample; the language may change between turns, as bilingual users do."""
    lang = rng.choices(["en", "zh"], [0.58, 0.42])[0]  # English has more wordings to learn
    draw = rng.random()
    if draw < PLAIN:
        kinds, messages = ["text"], [{"role": "text", "content": rng.choice(banks[lang].texts)}]
    elif draw < PLAIN + BOOKINGS:
        kinds, messages = ["booking"], Dialogue(lang, rng).play()
        if rng.random() < 0.15:
            kinds, messages = _talk(banks, lang, rng, 1, messages)
    else:
        kinds, messages = _talk(banks, lang, rng, rng.choices(list(TURNS), list(TURNS.values()))[0], [])
    if kinds != ["text"] and rng.random() < 0.12:
        messages = [{"role": "system", "content": rng.choice(SYSTEMS)}, *messages]
    cut = kinds[0] not in ("text", "booking") and rng.random() < CUT
    return {"kind": kinds[0], "lang": lang, "cut": cut, "messages": messages}


def _talk(
    banks: dict[str, Bank], lang: str, rng: random.Random, turns: int, messages: list[dict[str, str]]
) -> tuple[list[str], list[dict[str, str]]]:
    """`turns` more turns after `messages`: (their kinds, all messages)."""
    kinds: list[str] = []
    topic: dict | None = None
    for _ in range(turns):
        bank = banks[lang]
        follow = bank.more(topic) if topic is not None and rng.random() < FOLLOW else None
        kind, turn, topic = ("more", follow, topic) if follow else _turn(bank, rng)
        kinds.append(kind)
        messages = [*messages, {"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        if rng.random() < 0.1:
            lang = "zh" if lang == "en" else "en"
    return kinds, messages


def _turn(bank: Bank, rng: random.Random) -> tuple[str, Turn, dict | None]:
    """(kind, (question, answer), the topic if it is one)."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "topic":
        topic, turn = bank.topic()
        return kind, turn, topic
    return kind, bank.declined() if kind == "unknown" else bank.smalltalk(), None


def prepare(out: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    banks = {lang: Bank(lang, rng) for lang in ("en", "zh")}
    found = list(dialogues())
    for bank in banks.values():
        bank.fill(found)
    out.mkdir(parents=True, exist_ok=True)
    kinds: Counter[str] = Counter()
    with (out / "samples.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(count):
            sample = conversation(banks, rng)
            kinds[sample["kind"]] += 1
            lines.write(json.dumps(sample, ensure_ascii=False) + "\n")
    left_out = sum(bank.dropped for bank in banks.values())
    print(f"{count} conversations, first turns {dict(kinds)}; {left_out} draws left out as held-out questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=150_000, help="conversations")
    parser.add_argument("--seed", type=int, default=20261121)
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
