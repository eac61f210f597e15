"""Which kept answer a question could be served with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.cache.guards import marks
from neaptide.cache.semantic import FAR, LOOKED_AT, Shelf

SIZE = 4


class Answer:
    """Not a string: two of the same text are two answers."""


def toward(similarity: float) -> npt.NDArray[np.float32]:
    """Of length 1, and so similar to toward(1.0)."""
    return np.array([similarity, np.sqrt(1 - similarity**2), 0, 0], np.float32)


def kept(shelf: Shelf[Answer], similarity: float, text: str = "is it here", answer: Answer | None = None) -> Answer:
    return shelf.keep(toward(similarity), marks(text), answer or Answer()).answer


HERE = toward(1.0)
ASKED = marks("is it here")


def test_an_empty_shelf_and_one_of_far_questions_find_nothing() -> None:
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    assert shelf.find(HERE, ASKED) is None
    kept(shelf, 0.5)
    assert shelf.find(HERE, ASKED) is None


def test_the_nearest_is_found_with_how_it_lies() -> None:
    # Given two questions, when one is asked that is nearer to the second, then that is found, how near it is, how much
    # farther the other lies, and how many of the words it shares.
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    kept(shelf, 0.7)
    nearest = kept(shelf, 0.9, "is it there")
    match = shelf.find(HERE, ASKED)
    assert match is not None
    assert match.entry.answer is nearest
    assert match.near == pytest.approx((0.9, 0.2, 0.5), abs=1e-6)


def test_another_phrasing_of_the_same_question_is_no_rival() -> None:
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    answer = kept(shelf, 0.9)
    kept(shelf, 0.89, "where is it, tell me", answer)
    match = shelf.find(HERE, ASKED)
    assert match is not None
    assert match.near.lead == pytest.approx(0.9 - FAR, abs=1e-6)


def test_what_a_guard_tells_apart_is_neither_found_nor_a_rival() -> None:
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    for similarity in (0.99, 0.98, 0.97):
        kept(shelf, similarity, "is it not here")
    other = kept(shelf, 0.8)
    match = shelf.find(HERE, ASKED)
    assert match is not None
    assert match.entry.answer is other
    assert match.near.lead == pytest.approx(0.8 - FAR, abs=1e-6)


def test_a_question_in_another_language_finds_nothing() -> None:
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    kept(shelf, 1.0)
    assert shelf.find(HERE, marks("在这里吗")) is None


def test_no_more_than_a_few_are_looked_at() -> None:
    shelf: Shelf[Answer] = Shelf(100, SIZE)
    for _ in range(LOOKED_AT):
        kept(shelf, 0.95, "is it 5")
    kept(shelf, 0.9)
    assert shelf.find(HERE, ASKED) is None


def test_what_was_used_longest_ago_leaves_a_full_shelf() -> None:
    shelf: Shelf[Answer] = Shelf(2, SIZE)
    first = kept(shelf, 0.9)
    kept(shelf, 0.95)
    found = [e for e in shelf._entries if e.answer is first]
    shelf.used(found[0])
    kept(shelf, 0.7)
    assert len(shelf) == 2
    match = shelf.find(HERE, ASKED)
    assert match is not None
    assert match.entry.answer is first


def test_an_answer_that_is_dropped_goes_with_all_its_phrasings() -> None:
    shelf: Shelf[Answer] = Shelf(8, SIZE)
    old = kept(shelf, 0.99)
    young = kept(shelf, 0.8)
    kept(shelf, 0.98, answer=old)
    shelf.drop(old)
    assert len(shelf) == 1
    match = shelf.find(HERE, ASKED)
    assert match is not None
    assert match.entry.answer is young
    assert match.near.similarity == pytest.approx(0.8, abs=1e-6)


def test_shelves_know_nothing_of_each_other() -> None:
    one: Shelf[Answer] = Shelf(8, SIZE)
    other: Shelf[Answer] = Shelf(8, SIZE)
    kept(one, 1.0)
    assert other.find(HERE, ASKED) is None


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["keep", "drop", "find"]), st.floats(0.6, 1.0), st.integers(0, 5)), max_size=60),
)
def test_whatever_is_kept_and_dropped_the_nearest_is_found_and_the_bound_holds(
    cap: int, steps: list[tuple[str, float, int]]
) -> None:
    # Beside a list that is searched plainly.
    shelf: Shelf[Answer] = Shelf(cap, SIZE)
    answers = [Answer() for _ in range(6)]
    plain: list[tuple[float, Answer]] = []
    for step, similarity, which in steps:
        if step == "keep":
            kept(shelf, similarity, answer=answers[which])
            plain = [*plain, (similarity, answers[which])][-cap:]
        elif step == "drop":
            shelf.drop(answers[which])
            plain = [(s, answer) for s, answer in plain if answer is not answers[which]]
        match = shelf.find(HERE, ASKED)
        assert len(shelf) == len(plain) <= cap
        assert len(shelf._vectors) <= max(cap, 16)
        if plain:
            assert match is not None
            assert match.near.similarity == pytest.approx(max(s for s, _ in plain), abs=1e-5)
