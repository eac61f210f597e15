"""Where one language's questions and answers are drawn from: the topics, small talk, and what is to be declined."""

from __future__ import annotations

import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.guide.patterns import WORDING, expand, fingerprint, noisy
from tools.guide.sources import ASSISTANTS, DECLINED, LEFT_OUT, TOPIC_OF_REPLY

HERE = Path(__file__).parent
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# The booking demo takes these; they are not declined.
TABLE = re.compile(r"restaurant|\btable\b|reserv|\bbook|dinner|餐|饭|订|吃", re.IGNORECASE)

Turn = tuple[str, str]  # question, answer


def load(name: str) -> dict:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def topics() -> list[dict]:
    """All topics, one file a group."""
    files = sorted((HERE / "topics").glob("*.toml"))
    return [topic for file in files for topic in load(f"topics/{file.name}")["topic"]]


def prompts(*names: str) -> list[dict]:
    """The prompts of list files; a folder stands for its files."""
    found: list[dict] = []
    for name in names:
        path = HERE / name
        for file in sorted(path.glob("*.toml")) if path.is_dir() else [path]:
            found += tomllib.loads(file.read_text(encoding="utf-8"))["prompt"]
    return found


def kept_back() -> set[str]:
    """Fingerprints of the questions that must not be learnt: those of the held-out and development lists but for small
    talk, of which "hello" has no other wording."""
    return {fingerprint(p["text"]) for p in prompts("heldout.toml", "dev") if p["kind"] != "chat"}


class Bank:
    """One language's turns, drawn at random; questions of the held-out and development lists are never drawn."""

    def __init__(self, lang: str, rng: random.Random) -> None:
        self.lang, self.rng = lang, rng
        self.kept_back = kept_back()
        self.dropped = 0  # draws that were on those lists
        self.topics = topics()
        self.weights = [t.get("weight", 1.0) for t in self.topics]
        self.carriers, self.follow = WORDING["carriers"], WORDING["follow"][lang]
        self.unknown = load("unknown.toml")
        self.chat: dict[str, list[str]] = defaultdict(list)  # reply -> questions
        self.borrowed: dict[str, list[str]] = defaultdict(list)  # topic id -> questions
        self.openers: list[str] = []  # of others' tasks: to be declined
        self.texts: list[str] = []  # whole dialogues, for the language alone
        self._replies: list[str] = []

    def fill(self, dialogues: Iterable[tuple[str, str, list[str]]]) -> None:
        """Sort this language's dialogues: small talk, a task's first question, plain text."""
        for source, lang, messages in dialogues:
            if lang == self.lang and len(messages) > 1:
                self._take(source, messages)
        self._replies = sorted(self.chat)

    def _take(self, source: str, messages: list[str]) -> None:
        question, reply = messages[0], messages[1]
        if source == "chitchat_professional":
            if question.startswith("editorial") or any(part in reply for part in LEFT_OUT):
                return
            if reply in TOPIC_OF_REPLY:
                self.borrowed[TOPIC_OF_REPLY[reply]].append(question)
            elif reply in DECLINED:
                self.openers.append(question)
            else:
                self.chat[reply].append(question)
        elif source in ASSISTANTS and self._asks_something(question):
            self.texts.append(" ".join(messages)[: 700 if self.lang == "en" else 260])
            if not TABLE.search(question):
                self.openers.append(question)

    def _asks_something(self, opener: str) -> bool:
        """Long enough to be more than a greeting, which the guide must not decline."""
        if self.lang == "zh":
            return 8 <= len(opener) < 50
        return len(opener) < 120 and len(opener.split()) >= 5

    # --- turns

    def topic(self) -> tuple[dict, Turn]:
        """A topic, a question about it and its answer."""
        topic = self.rng.choices(self.topics, self.weights)[0]
        question = self._fresh(lambda: self._question(topic))
        # A bare "TTFT?" is written in both languages; without a Chinese character the reply is English.
        lang = self.lang if CHINESE.search(question) else "en"
        return topic, (question, self.rng.choice(topic[f"{lang}_answers"]))

    def more(self, topic: dict) -> Turn | None:
        """A question that leans on the answer before, and its answer; None where the topic has none."""
        answers = topic.get(f"{self.lang}_more_answers")
        if not answers:
            return None
        own = _lines(topic[f"{self.lang}_more"])
        pattern = self.rng.choice(own if self.rng.random() < 0.75 else self.follow)
        return self._fresh(lambda: noisy(expand(pattern, self.rng), self.lang, self.rng)), self.rng.choice(answers)

    def declined(self) -> Turn:
        return self._fresh(self._unknown), self.rng.choice(self.unknown[f"{self.lang}_answers"])

    def smalltalk(self) -> Turn:
        reply = self.rng.choice(self._replies)
        return self._fresh(lambda: self.rng.choice(self.chat[reply])), reply

    def _fresh(self, draw: Callable[[], str]) -> str:
        while True:
            question = draw()
            if question.strip() and fingerprint(question) not in self.kept_back:
                return question
            self.dropped += 1

    def _question(self, topic: dict) -> str:
        borrowed = self.borrowed.get(topic["id"])
        if borrowed and self.rng.random() < 0.3:
            return self.rng.choice(borrowed)
        kinds = [kind for kind in "nv" if topic.get(f"{self.lang}_{kind}")]
        if kinds and self.rng.random() < 0.45:
            return noisy(self._carried(topic, self.rng.choice(kinds)), self.lang, self.rng)
        return noisy(expand(self.rng.choice(_lines(topic[self.lang])), self.rng), self.lang, self.rng)

    def _carried(self, topic: dict, kind: str) -> str:
        """A topic's own word in a neutral sentence: the word must decide, not the sentence."""
        carrier = self.rng.choice(self.carriers[f"{self.lang}_{kind}"])
        return expand(carrier, self.rng, {kind: topic[f"{self.lang}_{kind}"]})

    def _unknown(self) -> str:
        if self.rng.random() < 0.2:  # tasks of other assistants: few kinds of them
            return self.rng.choice(self.openers)
        pattern = self.rng.choice(_lines(self.unknown[self.lang]))
        return noisy(expand(pattern, self.rng, self.unknown["slots"][self.lang]), self.lang, self.rng)


def _lines(text: str) -> list[str]:
    return text.strip().split("\n")
