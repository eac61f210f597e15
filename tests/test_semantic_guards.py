"""What two questions must share before their meaning is compared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.cache.guards import difference, marks


def told_apart(one: str, other: str) -> str:
    return difference(marks(one), marks(other))


@pytest.mark.parametrize(
    ("one", "other", "by"),
    [
        ("how do I convert 10 USD", "how do I convert 100 USD", "numbers"),
        ("flights from 3 to 5", "flights from 5 to 3", "numbers"),
        ("what is 1.5 times 2", "what is 15 times 2", "numbers"),
        ("when did world war two end", "when did world war one end", "numbers"),
        ("who won the second game", "who won the third game", "numbers"),
        ("in ten minutes", "in ten hours", "numbers"),
        ("what is the capital of Australia", "what is the capital of Austria", "names"),
        ("pay in USD", "pay in EUR", "names"),
        ("what does `ls -l` print", "what does `ls -a` print", "names"),
        ("explain C", "explain C++", "names"),
        ("what is in /etc/hosts", "what is in /etc/passwd", "names"),
        ('who said "to be"', 'who said "let it be"', "names"),
        ("send 5 to Ann from Bob", "send 5 to Bob from Ann", "names"),
        ("what is 7 + 7", "what is 7 * 7", "names"),
        ("is it safe", "is it unsafe", "negation"),
        ("can I eat it", "can't I eat it", "negation"),
        ("can I eat it", "can\u2019t I eat it", "negation"),
        ("tea with sugar", "tea without sugar", "negation"),
        ("is it legal", "is it illegal", "negation"),
        ("which one is the largest", "which one is the smallest", "opposites"),
        ("turn it on", "turn it off", "opposites"),
        ("upload a file", "download a file", "opposites"),
        ("who did it", "when did it", "opposites"),
        ("什么是容器", "什么是容器", "language"),
        ("is it safe", "это безопасно", "language"),
    ],
)
def test_what_changes_the_answer_is_told_apart(one: str, other: str, by: str) -> None:
    assert told_apart(one, other) == by
    assert told_apart(other, one) == by


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("how do I reset my password", "I forgot my password, what now"),
        ("What is the capital of France?", "what is the capital of France"),
        ("When did World War 2 end", "when did World War two end"),
        ("is it unsafe", "is it not safe"),
        ("don't I need it", "do I not need it"),
        ("where is it. Tell me", "where is it. tell me"),
        ("it's here", "it\u2019s here"),
        ("I pay", "do I pay"),
        ("\uff11\uff10 of them", "10 of them"),  # full-width digits
        ("an important image", "the important image"),  # not `im` + `portant`
    ],
)
def test_what_does_not_change_the_answer_is_let_through(one: str, other: str) -> None:
    assert told_apart(one, other) == ""


LATIN = st.text("".join(chr(c) for c in range(32, 127)) + "\u00e9\u00fc\u2019", max_size=80)


@given(LATIN, LATIN)
def test_a_difference_is_of_both_and_none_is_of_itself(one: str, other: str) -> None:
    assert told_apart(one, other) == told_apart(other, one)
    assert told_apart(one, one) == ""


@given(
    st.sampled_from(["what are {} apples", "sum of 4 and {}", "{}", "page {}.", "is {}% enough", "at {}:30", "v{}"]),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)
def test_another_number_is_always_caught(pattern: str, one: int, other: int) -> None:
    found = told_apart(pattern.format(one), pattern.format(other))
    assert (found == "") == (one == other)


@given(st.text(max_size=100))
def test_any_text_can_be_marked(text: str) -> None:
    found = marks(text)
    assert difference(found, found) == ("language" if found.foreign else "")
