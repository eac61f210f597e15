"""Reasons are facts; their words stand in one catalogue, in both languages, and old facts keep their sentences."""

from __future__ import annotations

import ast
import json
import re
import string
from pathlib import Path

import msgspec
import pytest

from neaptide.control import reasons
from neaptide.control.decisions import Line
from neaptide.control.reasons import phrase, price, reason, sentence, words
from neaptide.types import Choice, Reason

CONTROL = Path(reasons.__file__).parent
CATALOGUE: dict[str, dict[str, str]] = json.loads((CONTROL / "reasons.json").read_text(encoding="utf-8"))
FRAMES = {"stay", "grow", "shrink", "cost", "cost.more", "cost.less", "about", "joint"}


def choice(*why: Reason, before: int = 1, after: int = 2, **told: object) -> Choice:
    facts: dict[str, object] = {"model": "m", "action": "hold", "sentence": "as it was said", "currency": "CNY"}
    facts |= {"numbers": {"capacity_rps": 4.0}, "before": before, "after": after, "why": why}
    return Choice(**{**facts, **told})  # type: ignore[arg-type]


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_reason_has_words_in_both_languages_with_the_same_facts() -> None:
    for name, texts in CATALOGUE.items():
        assert set(texts) == set(reasons.LANGUAGES), name
        assert fields(texts["en"]) == fields(texts["zh"]), name
        assert not re.search(r"[一-鿿]", texts["en"]), name
        if name.endswith(".one"):
            assert name.removesuffix(".one") in CATALOGUE, name


def test_every_reason_that_is_given_is_in_the_catalogue_and_none_is_left_over() -> None:
    given, families = set(), set()
    for path in CONTROL.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reason":
                texts = ast.walk(node.args[0])
                said = [n.value for n in texts if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                (families if isinstance(node.args[0], ast.JoinedStr) else given).update(said)
    known = {name.removesuffix(".one") for name in CATALOGUE} - FRAMES
    assert given - known == set()
    assert {name for name in known - given if not name.startswith(tuple(families))} == set()


def test_reasons_follow_each_other_and_bring_their_own_commas_or_get_a_semicolon() -> None:
    why = (reason("wants", policy="hpa", count=7, rate=1.0, flight=20.0), reason("clamp.max", n=4))
    assert phrase(why) == "hpa wants 7 for 1.0 requests/s and 20 in flight, but max is 4"
    assert phrase(why, "zh") == "hpa 要 7 个副本，当前每秒 1.0 个请求、20 个处理中，但 max 是 4"
    assert phrase((reason("nothing"), reason("stale.silent"))).count("; ") == 2
    assert "；" in phrase((reason("set", n=1), reason("more_over", most=3.5)), "zh")


def test_one_is_said_as_one() -> None:
    assert words(reason("waits", n=1)) == "1 request waiting and no replica there or starting"
    assert words(reason("waits", n=2)).startswith("2 requests")
    assert sentence(choice(reason("set", n=1), before=1, after=1)).startswith("m: 1 replica stays: ")


def test_a_plans_reason_names_what_it_is_about() -> None:
    assert words(reason("stuck", of="m-0")) == "m-0: stop, it never got ready and counts as dead"
    assert words(reason("stuck", of="m-0"), "zh") == "m-0：停止：始终没有就绪，按失败计"


@pytest.mark.parametrize(
    ("before", "after", "amounts", "english", "chinese"),
    [
        (2, 2, (6.4, 0.0), "m: 2 replicas stay: set to 2; ¥6.40/h", "m：2 个副本不变：手动设为 2 个；每小时 ¥6.40"),
        (1, 2, (6.4, 3.2), "m: 1 to 2 replicas: set to 2, one replica serves 4.0; +¥3.20/h",
         "m：副本由 1 个增至 2 个：手动设为 2 个；单副本每秒可处理 4.0 个请求；每小时多花 ¥3.20"),
        (3, 1, (3.2, -6.4), "m: 3 to 1 replica: set to 1, one replica serves 4.0; -¥6.40/h",
         "m：副本由 3 个减至 1 个：手动设为 1 个；单副本每秒可处理 4.0 个请求；每小时省下 ¥6.40"),
        (1, 0, (0.0, 0.0), "m: 1 to 0 replicas: set to 0, one replica serves 4.0",
         "m：副本由 1 个减至 0 个：手动设为 0 个；单副本每秒可处理 4.0 个请求"),
    ],
)  # fmt: skip
def test_a_choice_is_a_sentence_with_numbers_and_money_in_either_language(
    before: int, after: int, amounts: tuple[float, float], english: str, chinese: str
) -> None:
    cost, change = amounts
    of = choice(reason("set", n=after), before=before, after=after, cost_per_hour=cost, cost_change_per_hour=change)
    assert sentence(of) == english
    assert sentence(of, "zh") == chinese


def test_a_choice_of_an_older_journal_or_another_release_says_what_was_written_then() -> None:
    assert sentence(choice(), "zh") == "as it was said"
    assert sentence(choice(reason("not.invented.yet", n=3)), "zh") == "as it was said"
    assert sentence(choice(Reason("set", {})), "zh") == "as it was said"


def test_a_line_that_was_written_before_there_were_facts_is_still_read() -> None:
    written = {"model": "m", "action": "hold", "before": 1, "after": 1, "sentence": "m: 1 replica stays: hpa wants 1"}
    plan = {"reasons": ["m: hold, 1 missing"], "choices": [written]}
    raw = {"wall_s": 1.0, "snapshot": {"now_s": 1.0, "deployments": [], "replicas": []}, "carry": {}, "plan": plan,
           "carry_after": {}}  # fmt: skip
    line = msgspec.json.decode(json.dumps(raw), type=Line)
    assert [sentence(c, "zh") for c in line.plan.choices] == ["m: 1 replica stays: hpa wants 1"]


def test_what_a_person_wrote_is_said_as_it_is() -> None:
    assert words(reason("set.by", n=1, by="{n} %s")) == "set to 1 by {n} %s"


def test_small_prices_keep_two_digits_that_count() -> None:
    assert [price(x, "CNY") for x in (12.0, 0.5, 0.0123, 0.0)] == ["¥12.00", "¥0.50", "¥0.012", "¥0.00"]
    assert price(3.0, "CHF") == "CHF 3.00"
