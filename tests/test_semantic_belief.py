"""What judges have said, and what may be served after it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.cache.belief import AUDITED, Belief, Near

Curve = Callable[[Near], float]
NEAREST = Near(0.98, 0.4, 0.9)


def near(rng: random.Random) -> Near:
    return Near(rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.3), rng.random())


def logistic(gain: float, threshold: float) -> Curve:
    return lambda seen: 1 / (1 + math.exp(-gain * (seen.similarity - threshold)))


def served(truth: Curve, error: float, seed: int, questions: int = 500) -> tuple[int, int]:
    """Hits, and how many of them are wrong, where what is not served is judged."""
    rng, belief = random.Random(seed), Belief(error)
    hits = wrong = 0
    for _ in range(questions):
        seen = near(rng)
        right = rng.random() < truth(seen)
        if belief.serves(seen) and rng.random() >= AUDITED:
            hits += 1
            wrong += not right
        else:
            belief.saw(seen, right)
    return hits, wrong


@pytest.mark.parametrize(
    ("truth", "error", "some"),
    [
        (logistic(40, 0.8), 0.05, True),
        (logistic(40, 0.8), 0.2, True),
        (logistic(15, 0.7), 0.1, True),
        (lambda seen: 0.99 if seen.lead > 0.15 else 0.3, 0.1, True),  # a step: no logistic curve
        (lambda seen: 0.0 if seen.similarity > 0.95 else 0.97, 0.1, True),  # the nearest are traps
        (lambda seen: 0.7, 0.1, False),  # nothing tells them apart
        (lambda seen: 0.0, 0.2, False),
    ],
)
def test_no_more_hits_are_wrong_than_may_be(truth: Curve, error: float, some: bool) -> None:
    # Given judges who know the truth, when many deployments learn, then their hits together stay within the error;
    # three standard errors are chance's.
    runs = [served(truth, error, seed) for seed in range(6)]
    hits, wrong = sum(run[0] for run in runs), sum(run[1] for run in runs)
    assert wrong <= error * hits + 3 * math.sqrt(error * max(hits, 1))
    assert (hits > 50) == some


def test_a_few_observations_never_serve() -> None:
    # Given none, or fewer right ones than could tell the error from nothing, then nothing is served.
    for error in (0.02, 0.05, 0.1, 0.2):
        belief = Belief(error)
        assert not belief.serves(NEAREST)
        for _ in range(int(2.6 / error) - 2):
            belief.saw(NEAREST, True)
            assert not belief.serves(NEAREST)


def test_right_ones_alone_come_to_be_served() -> None:
    # Given nobody was ever wrong, which has no finite likeliest curve, then the belief stays finite and serves at last.
    belief = Belief(0.05)
    for _ in range(300):
        belief.saw(NEAREST, True)
    assert 0.0 < belief.wrong(NEAREST) < 0.05
    assert belief.serves(NEAREST)


def test_wrong_ones_end_the_serving() -> None:
    belief = Belief(0.1)
    for _ in range(100):
        belief.saw(NEAREST, True)
    assert belief.serves(NEAREST)
    for _ in range(60):
        belief.saw(NEAREST, False)
    assert not belief.serves(NEAREST)


def test_a_curve_that_was_wrong_where_it_was_sure_is_not_believed() -> None:
    # Given a belief that would serve, when what it would serve turns out wrong, then the trial ends it even where the
    # curve, which still thinks of the rest, does not.
    rng, belief = random.Random(3), Belief(0.1)
    for _ in range(400):
        seen = near(rng)
        belief.saw(seen, rng.random() < (0.5 if seen.shared > 0.5 else 0.97))
        if belief.wrong(seen) <= 0.1 < belief.trial:
            assert not belief.serves(seen)
            return
    pytest.fail("the curve was never sure")


SEEN = st.builds(Near, st.floats(0.6, 1.0), st.floats(0.0, 0.5), st.floats(0.0, 1.0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SEEN, st.booleans()), max_size=25), st.randoms(use_true_random=False))
def test_the_order_of_what_was_seen_does_not_matter_to_the_curve(
    seen: list[tuple[Near, bool]], rng: random.Random
) -> None:
    one, other = Belief(0.1), Belief(0.1)
    for observation in seen:
        one.saw(*observation)
    for observation in rng.sample(seen, len(seen)):
        other.saw(*observation)
    assert one.wrong(NEAREST) == pytest.approx(other.wrong(NEAREST), abs=1e-3)  # the fit ends where a step is small
    assert 0.0 <= one.wrong(NEAREST) <= 1.0


def test_the_oldest_observations_are_forgotten() -> None:
    belief, young = Belief(0.1, remembered=50), Belief(0.1)
    for _ in range(80):
        belief.saw(NEAREST, False)
    for _ in range(50):
        belief.saw(NEAREST, True)
        young.saw(NEAREST, True)
    assert belief.wrong(NEAREST) == pytest.approx(young.wrong(NEAREST), abs=1e-4)
    assert belief.count == 130
