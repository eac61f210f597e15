"""The questions that the semantic cache is measured on: two sets, each question with the answer that it wants.

- alike: questions.txt: groups of look-alikes, 753 phrasings of 315 questions, written for this. Adversarial: most
  of what is near wants another answer
- support: what people ask of one product: the patterns that the guide model is taught with (tools/guide/topics), one
  question a pattern, the topic as its answer. Topics are asked about unequally: the one of rank r keeps
  r^-1/3 of its patterns (Zipf's r^-1 would leave 400 questions)
"""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import NamedTuple

from tools.guide.patterns import expand

LINES = Path(__file__).parent / "questions.txt"
TOPICS = Path(__file__).parents[2] / "tools" / "guide" / "topics"
SMALL_TALK = "talk"


class Asked(NamedTuple):
    text: str
    answer: int  # the same for questions that want the same one
    group: int  # of look-alikes


def alike(path: Path = LINES) -> list[Asked]:
    asked, answer = [], 0
    for group, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.startswith("#"):
            continue
        for part in line.split("||"):
            asked += [Asked(text.strip(), answer, group) for text in part.split("|")]
            answer += 1
    return asked


def support(folder: Path = TOPICS) -> list[Asked]:
    files = [path for path in sorted(folder.glob("*.toml")) if path.stem != SMALL_TALK]
    topics = [topic for path in files for topic in tomllib.loads(path.read_text(encoding="utf-8"))["topic"]]
    rng = random.Random(0)
    rng.shuffle(topics)
    asked: dict[str, Asked] = {}  # two patterns may make the same question
    for answer, topic in enumerate(topics):
        patterns = [line.strip() for line in topic["en"].splitlines() if line.strip() and "{" not in line]
        for pattern in rng.sample(patterns, round(len(patterns) * (answer + 1) ** (-1 / 3))):
            text = expand(pattern, rng)
            asked.setdefault(text, Asked(text, answer, answer))
    return list(asked.values())
