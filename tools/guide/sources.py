"""Where the dialogues come from that others wrote: masked, and sorted by what the guide does with them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

DIALOGUES = Path(__file__).parent / "data" / "dialogues.jsonl.gz"
ASSISTANTS = ("taskmaster3", "taskmaster4", "star", "multiwoz", "crosswoz", "kdconv", "xrisawoz", "chatterbot")
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
    # Answers to whatever begins like a question about something: they took "What is Neaptide?" for small talk.
    "know you personally",
    "并不了解你",
    "I can't tell one way",
    "无论用何种办法",
    "I really couldn't say",
    "无法作出判断",
    "get some rest",
    "得到休息",
    "Maybe a snack",
    "吃点小吃",
    "biological concept",
    "这个属性并不适用",
    "aim for efficiency",
    "力争高效",
    "Noted.",
    "知道了。",
)


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
