"""The built-in guide through the real stack: twenty prompts, greedily, by the facts that an answer must hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Service, serving
from tests.traffic import Answer

ASKED = [  # what is said, turn by turn; what the last answer must hold
    (["What is Neaptide?"], ["latency", "cost"]),
    (["how do I start it"], ["neaptide up"]),
    (["how can I shut it down?"], ["neaptide down"]),
    (["What is TTFT?"], ["first token"]),
    (["how do I create an api key"], ["keys create"]),
    (["how do I convert a hugging face model"], ["models convert"]),
    (["can it scale to zero?"], ["min: 0"]),
    (["hello"], ["Neaptide"]),
    (["thank you"], ["welcome"]),
    (["write a poem about the sea"], ["don't know"]),
    (["Neaptide 是什么？"], ["延迟"]),
    (["怎么启动"], ["neaptide up"]),
    (["怎么停止服务"], ["neaptide down"]),
    (["什么是首字延迟？"], ["第一个"]),
    (["怎么创建密钥"], ["keys create"]),
    (["你是谁"], ["Neaptide"]),
    (["你好"], ["Neaptide"]),
    (["今天天气怎么样"], ["不知道"]),
    (["A table for four on Friday, please", "at 19:30", "Kowalczyk"], ["four", "Friday", "19:30"]),
    (["帮我订明天6个人的桌子", "18:30", "我叫司马光"], ["6", "明天", "18:30"]),
]

# What the weights have not learnt yet (the model card has the rates).
UNLEARNT = {
    "What is Neaptide?",
    "how do I convert a hugging face model",
    "帮我订明天6个人的桌子",
}


def case(said: list[str], facts: list[str]) -> Any:
    marks = [pytest.mark.xfail(reason="not learnt yet")] if said[0] in UNLEARNT else []
    return pytest.param(said, facts, id=said[0], marks=marks)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    pytest.importorskip("openvino_genai", reason="the extra `cpu` is not installed")
    with serving(tmp_path_factory.mktemp("guide"), "models: {guide: {}}\n") as service:
        yield service


def ask(service: Service, messages: list[dict[str, str]]) -> Answer:
    return Answer(service, {"model": "guide", "messages": messages, "temperature": 0, "max_tokens": 200}).join(60)


@pytest.mark.parametrize(("said", "facts"), [case(*asked) for asked in ASKED])
def test_the_guide_answers_with_the_facts_and_stops(said: list[str], facts: list[str], guide: Service) -> None:
    messages: list[dict[str, str]] = []
    for turn in said:
        messages.append({"role": "user", "content": turn})
        answer = ask(guide, messages)
        assert answer.finish == "stop", answer.text or answer.error
        messages.append({"role": "assistant", "content": answer.text})
    last = messages[-1]["content"]
    assert [fact for fact in facts if fact not in last] == [], last


def test_the_twenty_prompts_are_twenty_in_two_languages() -> None:
    assert len(ASKED) == 20
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in said[0]) for said, _ in ASKED) == 9
