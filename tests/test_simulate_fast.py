"""The fast-forward engine against the exact one: to the last digit where memory does not bind, nearly so elsewhere."""

from __future__ import annotations

import math
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.even import Even, jumping
from neaptide.simulate.exact import Exact
from neaptide.simulate.fast import Fast
from neaptide.simulate.plain import Plain
from neaptide.simulate.steps import Grid, Linear
from tests.engine_runs import Row, chat, check_served_once, requests, rows, served, traits, ttft

# Odd numbers: an arrival at the very end of a step joins in one tier and not in the other, by a rounding.
STEP = Linear(
    base_s=0.1 * 2**0.5,
    request_s=0.0123,
    token_s=1.1e-3,
    prefill_base_s=0.37,
    prefill_token_s=1.3e-3,
    prefill_pair_s=1.7e-5,
)
GRID = Grid(
    batches=(1, 2, 5),
    contexts=(8, 20, 60),
    seconds=((0.1013, 0.1517, 0.4019), (0.1211, 0.2023, 0.5027), (0.2129, 0.4131, 1.0137)),
    prefill_base_s=0.37,
    prefill_token_s=1.3e-3,
)


def test_three_steps_whose_context_grows_are_one_jump_of_the_same_length() -> None:
    step = Linear(base_s=1.0, token_s=0.01)
    book, _ = served(Fast, Traits(step=step, kv_tokens=None), requests([(0.0, 20, 4)]))
    assert book.first_s == [1.0]
    assert book.finish_s == [pytest.approx(1 + 1.21 + 1.22 + 1.23)]


@given(rows(), st.integers(1, 6), st.integers(1, 64), st.sampled_from([STEP, GRID]))
@settings(max_examples=150, deadline=None)
def test_both_tiers_agree_where_memory_does_not_bind(
    asked: list[Row], batch: int, chunk: int, step: Linear | Grid
) -> None:
    setup = Traits(step=step, max_batch=batch, chunk_tokens=chunk, kv_tokens=None, prefix_block_tokens=0)
    fast, engine = served(Fast, setup, requests(asked))
    exact, _ = served(Exact, setup, requests(asked))
    check_served_once(fast, engine)
    assert fast.first_s == pytest.approx(exact.first_s)
    assert fast.finish_s == pytest.approx(exact.finish_s)


@given(rows(), traits(step=STEP))
@settings(max_examples=100, deadline=None)
def test_everybody_is_served_once_when_memory_binds_and_memory_comes_back(asked: list[Row], setup: Traits) -> None:
    book, engine = served(Fast, setup, requests(asked))
    check_served_once(book, engine)
    assert engine.memory.used == 0


@given(rows(), traits(step=STEP, kv_block_tokens=1, headroom=0.0))
@settings(max_examples=100, deadline=None)
def test_memory_counted_in_tokens_is_the_same_in_both(asked: list[Row], setup: Traits) -> None:
    fast, exact = (served(kind, setup, requests(asked))[0] for kind in (Fast, Exact))
    assert fast.preempted == exact.preempted
    assert fast.finish_s == pytest.approx(exact.finish_s)


@given(rows(), traits(step=STEP, admit="answer"))
@settings(max_examples=60, deadline=None)
def test_nobody_is_computed_anew_whose_whole_answer_has_room(asked: list[Row], setup: Traits) -> None:
    for kind in (Fast, Exact):
        book, _ = served(kind, setup, requests(asked))
        assert sum(book.preempted) == 0


@given(rows(), traits(step=STEP), st.floats(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_replica_that_goes_has_made_the_same_tokens_in_both(asked: list[Row], setup: Traits, after_s: float) -> None:
    made = []
    for kind in (Fast, Exact):
        book = Book(requests(asked), 1, 1)
        engine = kind(without_memory(setup), book)
        ids = [id for id, at in enumerate(book.arrived_s) if at <= after_s]
        engine.run(ids, [book.arrived_s[id] for id in ids], after_s)
        lost = engine.drop(after_s)
        made.append((sorted(lost), book.made, engine.in_flight))
    assert made[0] == made[1]


@given(rows(), st.integers(1, 6), st.floats(0, 60))
@settings(max_examples=150, deadline=None)
def test_where_every_step_takes_as_long_the_even_engine_says_the_same(
    asked: list[Row], batch: int, after_s: float
) -> None:
    setup = Traits(step=Linear(base_s=0.1 * 2**0.5), max_batch=batch, chunk_tokens=10_000, kv_tokens=None)
    books = []
    for kind in (Even, Fast, Exact):
        book = Book(requests(asked), 1, 1)
        assert jumping(setup, book) is Even
        engine, other = kind(setup, book), kind(setup, book)
        ids = [id for id, at in enumerate(book.arrived_s) if at <= after_s]
        engine.run(ids, [book.arrived_s[id] for id in ids], after_s)
        assert engine.in_flight == sum(math.isnan(book.finish_s[id]) for id in ids)
        ids = sorted(engine.drop(after_s)) + list(range(len(ids), len(asked)))  # another one takes over
        other.run(ids, [max(after_s, book.arrived_s[id]) for id in ids], 1e9)
        books.append(book)
    for book in books[:2]:
        assert book.made == books[2].made
        assert book.first_s == pytest.approx(books[2].first_s)
        assert book.finish_s == pytest.approx(books[2].finish_s)


def test_the_even_engine_is_for_steps_that_nothing_changes() -> None:
    book = Book(chat(10, 1.0, 1), 1, 1)
    even = Traits(step=Linear(base_s=0.1), chunk_tokens=10**9, kv_tokens=None)
    assert jumping(even, book) is Even
    for changed, kind in (
        ({"step": Linear(base_s=0.1, token_s=1e-6)}, Plain), ({"chunk_tokens": 100}, Plain),
        ({"step": GRID}, Fast), ({"kv_tokens": 10_000}, Fast),
    ):  # fmt: skip
        assert jumping(msgspec.structs.replace(even, **changed), book) is kind


@given(rows(), st.integers(1, 6), st.integers(1, 64), st.sampled_from((STEP, Linear(base_s=0.3))), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_the_plain_engine_says_the_same_to_the_last_digit_in_pieces_of_any_length(
    asked: list[Row], batch: int, chunk: int, step: Linear, piece: int
) -> None:
    setup = Traits(step=step, max_batch=batch, chunk_tokens=chunk, kv_tokens=None)
    asked = [(at_s + turn * 7.3, prompt, out) for turn in range(4) for at_s, prompt, out in asked]
    asked.sort()
    fast, _ = served(Fast, setup, requests(asked))
    book = Book(requests(asked), 1, 1)
    engine = Plain(setup, book)
    for first in range(0, len(asked), piece):
        times = book.arrived_s[first : first + piece]
        engine.run(range(first, first + len(times)), times, times[-1])
    engine.run((), (), 1e9)
    check_served_once(book, engine)
    assert (book.first_s, book.finish_s) == (fast.first_s, fast.finish_s)


@given(rows(), st.integers(1, 6), st.integers(1, 64), st.floats(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_plain_replica_that_goes_has_made_the_same_tokens(
    asked: list[Row], batch: int, chunk: int, after_s: float
) -> None:
    setup = Traits(step=STEP, max_batch=batch, chunk_tokens=chunk, kv_tokens=None)
    asked = sorted(asked * 8)
    made = []
    for kind in (Fast, Plain):
        book = Book(requests(asked), 1, 1)
        engine = kind(setup, book)
        ids = [id for id, at in enumerate(book.arrived_s) if at <= after_s]
        engine.run(ids, [book.arrived_s[id] for id in ids], after_s)
        made.append((engine.drop(after_s), book.made, engine.in_flight))
    assert made[0] == made[1]


def without_memory(setup: Traits) -> Traits:
    return Traits(step=setup.step, max_batch=setup.max_batch, chunk_tokens=setup.chunk_tokens, kv_tokens=None)


@pytest.mark.parametrize(
    ("name", "setup", "users", "loads"),
    [
        ("roomy", Traits(), 0, (10.0, 40.0, 60.0)),
        ("memory binds", Traits(kv_tokens=20_000), 0, (30.0, 45.0, 60.0)),
        ("prefixes", Traits(kv_tokens=100_000), 40, (10.0, 30.0, 45.0)),
    ],
)
def test_fast_is_within_three_percent_of_exact_at_the_99th_percentile_in_the_median_of_three_draws(
    name: str, setup: Traits, users: int, loads: tuple[float, ...]
) -> None:
    for rps in loads:
        apart = []
        for seed in (5, 6, 7):
            asked = chat(1200, rps, seed, prompt=500.0, out=120.0, users=users)
            fast, exact = (served(kind, setup, asked)[0] for kind in (Fast, Exact))
            for book in (fast, exact):
                assert not np.isnan(book.finish_s).any()
            apart.append(np.quantile(ttft(fast), 0.99) / np.quantile(ttft(exact), 0.99) - 1)
            assert np.sum(fast.cached) == pytest.approx(np.sum(exact.cached), rel=0.03)
        assert np.median(np.abs(apart)) <= 0.03, apart
        assert max(np.abs(apart)) <= 0.06, apart


@given(rows(), traits(step=STEP, prefix_block_tokens=16), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_shared_prefixes_come_back_and_never_crowd_out_more_than_there_is(
    asked: list[Row], setup: Traits, random: Random
) -> None:
    """Each prompt begins like one of two others, as far as it goes, and ends on its own."""
    prefixes = [
        [random.randrange(2) * 100 + block if block < 3 else 1000 * row + block for block in range(prompt // 16)]
        for row, (_, prompt, _) in enumerate(asked)
    ]
    for kind in (Fast, Exact):
        book = Book(requests(asked, prefixes), 1, 1)
        engine = kind(setup, book)
        for id, at_s in enumerate(book.arrived_s):
            engine.run((id,), (at_s,), at_s)
            rounding = setup.max_batch * setup.kv_block_tokens if kind is Fast else 0
            assert engine.memory.used <= engine.memory.total + rounding
        engine.run((), (), 1e9)
        check_served_once(book, engine)
        assert engine.memory.private == 0
        assert engine.memory.free == engine.memory.total  # what stays behind would go for whoever needs it
        assert all(cached < prompt for cached, prompt in zip(book.cached, book.prompt))


def test_memory_binds_in_the_run_above() -> None:
    book, _ = served(Fast, Traits(kv_tokens=20_000), chat(1200, 60.0, 7, prompt=500.0, out=120.0))
    assert sum(book.preempted) > 20


def test_running_in_pieces_is_running_at_once() -> None:
    asked = chat(400, 30.0, 5)
    whole, _ = served(Fast, Traits(kv_tokens=20_000), asked)
    book = Book(asked, 1, 1)
    engine = Fast(Traits(kv_tokens=20_000), book)
    for id, at_s in enumerate(book.arrived_s):
        engine.run((id,), (at_s,), at_s)
        engine.run((), (), at_s + 0.001)
    engine.run((), (), 1e9)
    assert book.finish_s == pytest.approx(whole.finish_s)
