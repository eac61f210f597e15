"""Prepares the training conversations: topics, small talk and questions to decline, in English and Chinese.

    python -m tools.guide.data --out DIR [--count N] [--seed N]

Writes DIR/samples.jsonl: one conversation a line, `{"kind", "lang", "messages": [{"role", "content"}]}`; the role
"text" marks plain text to learn the language from. Phone numbers and street addresses of the dialogue sources are
masked; questions of the held-out and development lists are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.guide.patterns import expand, fingerprint, noisy

HERE = Path(__file__).parent
DIALOGUES = HERE / "data" / "dialogues.jsonl.gz"
SHARES = {"topic": 0.68, "unknown": 0.18, "chat": 0.14}  # of the turns
PLAIN = 0.08  # of the conversations are plain dialogue text: it teaches the language, not the replies
ASSISTANTS = ("taskmaster3", "taskmaster4", "star", "multiwoz", "crosswoz", "kdconv", "xrisawoz", "chatterbot")
SYSTEMS = [
    "You are a helpful assistant.",
    "You are the guide to Neaptide.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "请简短回答。",
]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
PHONE = re.compile(r"(?<!\d)(?:\+?\d{1,3}[-\s])?(?:\(?0?\d{2,4}\)?[-\s]?)?\d{3,4}[-\s]?\d{4}(?!\d)")
EN_ADDRESS = re.compile(
    r"\b\d{1,5}(?:-\d+)?\s+(?:[A-Z][\w'.]*\s+){1,4}(?:Street|St|Road|Rd|Avenue|Ave|Lane|Drive|Way|Close|Blvd)\b\.?"
)
ZH_ADDRESS = re.compile(
    r"[\u4e00-\u9fff]{2,12}(?:区|县|市|镇)[\u4e00-\u9fffA-Za-z\d]{1,20}?(?:路|街|道|巷|胡同|村)[\u4e00-\u9fff]{0,3}\d*(?:号|弄)?"
)

# Small-talk replies of the source that would contradict the guide: their questions take the topic's reply instead.
TOPIC_OF_REPLY = {
    "I don't have a name.": "identity",
    "People created me.": "identity",
    "I'm digital. In other words, I'm not human.": "identity",
    "I'm here to answer your questions and help out.": "capabilities",
    "Just standing by, ready to help.": "capabilities",
    "Hello.": "hello",
    "Hi.": "hello",
    "Hello there.": "hello",
    "Good morning.": "hello",
    "Good evening.": "hello",
    "You're welcome.": "thanks",
    "Glad you're pleased!": "thanks",
    "Goodbye.": "bye",
    "Good night.": "bye",
    "我没有姓名。": "identity",
    "人类创造了我。": "identity",
    "我是数字人。换言之，我并非真正的人类。": "identity",
    "我可以解答你的问题并提供帮助。": "capabilities",
    "待命中，随时准备提供帮助。": "capabilities",
    "你好。": "hello",
    "早上好。": "hello",
    "晚上好。": "hello",
    "再见。": "bye",
    "晚安。": "bye",
}
DECLINED = {
    "I don't know.",
    "I don't really have an opinion about that.",
    "I wouldn’t know how to advise about this.",
    "I couldn't speak to that with any authority.",
    "Sorry, I don't understand.",
    "我不知道。",
    "抱歉，我回答不了。",
    "我对这个话题真没什么看法。",
    "我在这方面提供不了建议。",
    "我对这方面的事情没有发言权。",
}
LEFT_OUT = (
    "热线",
    "gotten lost",
    "professional relationship",
    "被使用者",
    "I have one answer",
    "只有一个答案",
    "我没有家庭",
)

Turn = tuple[str, str]
Draw = Callable[[], Turn]


def masked(text: str) -> str:
    """The text with phone numbers and street addresses replaced."""
    text = PHONE.sub("[phone]", text)
    return ZH_ADDRESS.sub("[地址]", EN_ADDRESS.sub("[address]", text))


def dialogues() -> Iterator[tuple[str, str, list[str]]]:
    """(source, language, messages), masked."""
    with gzip.open(DIALOGUES, "rt", encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            yield entry["s"], entry["l"], [masked(m) for m in entry["m"]]


class Bank:
    """Where turns are drawn from, for one language."""

    def __init__(self, lang: str, rng: random.Random) -> None:
        self.lang, self.rng = lang, rng
        self.heldout = {fingerprint(p["text"]) for name in ("heldout.toml", "dev.toml") for p in load(name)["prompt"]}
        self.topics = load("topics.toml")["topic"]
        self.words = load("words.toml")
        self.unknown = load("unknown.toml")
        self.chat: dict[str, list[str]] = defaultdict(list)  # reply -> questions
        self.borrowed: dict[str, list[str]] = defaultdict(list)  # topic id -> questions
        self.openers: list[str] = []
        self.weights = [t.get("weight", 1.0) for t in self.topics]
        self.texts: list[str] = []  # whole dialogues, for the language alone
        self.dropped = 0

    def take(self, source: str, messages: list[str]) -> None:
        """One dialogue of this language: small talk joins the chat, a task's first question the unknown."""
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
            self.openers.append(question)
            self.texts.append(" ".join(messages)[: 700 if self.lang == "en" else 260])

    def _asks_something(self, opener: str) -> bool:
        """Long enough to be more than a greeting, which the guide must not decline."""
        if self.lang == "zh":
            return 8 <= len(opener) < 50
        return len(opener) < 120 and len(opener.split()) >= 5

    def topic(self) -> Turn:
        topic = self.rng.choices(self.topics, self.weights)[0]
        borrowed = self.borrowed.get(topic["id"])
        if borrowed and self.rng.random() < 0.3:
            question = self.rng.choice(borrowed)
        elif topic["id"] in self.words and self.rng.random() < 0.5:
            question = noisy(self._carried(self.words[topic["id"]]), self.lang, self.rng)
        else:
            question = noisy(expand(self._line(topic[self.lang]), self.rng), self.lang, self.rng)
        # A bare "TTFT?" is written in both languages; without a Chinese character the reply is English.
        lang = self.lang if CHINESE.search(question) else "en"
        return question, self.rng.choice(topic[f"{lang}_answers"])

    def _carried(self, words: dict[str, list[str]]) -> str:
        kind = self.rng.choice("nv")
        carrier = self.rng.choice(self.words["carriers"][f"{self.lang}_{kind}"])
        return expand(carrier, self.rng, {kind: words[f"{self.lang}_{kind}"]})

    def declined(self) -> Turn:
        if self.rng.random() < 0.45:
            question = self.rng.choice(self.openers)
        else:
            pattern = self._line(self.unknown[self.lang])
            filled = expand(pattern, self.rng, self.unknown["slots"][self.lang])
            question = noisy(filled, self.lang, self.rng)
        return question, self.rng.choice(self.unknown[f"{self.lang}_answers"])

    def smalltalk(self) -> Turn:
        reply = self.rng.choice(self._replies)
        return self.rng.choice(self.chat[reply]), reply

    def ready(self) -> None:
        self._replies = sorted(self.chat)

    def turn(self) -> tuple[str, Turn]:
        """(kind, (question, reply)) by SHARES; a held-out question is drawn again."""
        kind = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        draw: Draw = {"topic": self.topic, "unknown": self.declined, "chat": self.smalltalk}[kind]
        turn = draw()
        while fingerprint(turn[0]) in self.heldout or not turn[0].strip():
            self.dropped += 1
            turn = draw()
        return kind, turn

    def _line(self, lines: str) -> str:
        return self.rng.choice(lines.strip().split("\n"))


def load(name: str) -> dict:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def conversation(banks: dict[str, Bank], rng: random.Random) -> dict:
    """One to four turns, mostly one; the language may change between turns, as bilingual users do."""
    lang = first = rng.choice(["en", "zh"])
    if rng.random() < PLAIN:
        text = rng.choice(banks[lang].texts)
        return {"kind": "text", "lang": lang, "messages": [{"role": "text", "content": text}]}
    messages, kinds = [], []
    if rng.random() < 0.12:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choices([1, 2, 3, 4], [0.62, 0.2, 0.12, 0.06])[0]):
        kind, (question, reply) = banks[lang].turn()
        kinds.append(kind)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        lang = lang if rng.random() < 0.9 else ("zh" if lang == "en" else "en")
    return {"kind": kinds[0], "lang": first, "messages": messages}


def prepare(out: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    banks = {lang: Bank(lang, rng) for lang in ("en", "zh")}
    for source, lang, messages in dialogues():
        if len(messages) > 1:
            banks[lang].take(source, messages)
    for bank in banks.values():
        bank.ready()
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
    parser.add_argument("--count", type=int, default=70_000, help="conversations; one epoch of a short run")
    parser.add_argument("--seed", type=int, default=20261120)
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
