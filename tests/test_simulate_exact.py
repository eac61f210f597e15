"""The token-exact engine: by hand where it is small, by its invariants elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neaptide.simulate.engine import Book, Traits
from neaptide.simulate.exact import Exact
from neaptide.simulate.kv import Memory
from neaptide.simulate.steps import Linear
from tests.engine_runs import Row, chat, check_served_once, requests, rows, served, traits, ttft

SECOND = Linear(base_s=1.0)  # every step takes one
PLAIN = Traits(step=SECOND, max_batch=4, chunk_tokens=10, kv_tokens=None, prefix_block_tokens=0)


def run(setup: Traits, *asked: Row) -> Book:
    return served(Exact, setup, requests(asked))[0]


def test_the_step_that_ends_the_prompt_gives_the_first_token_and_each_next_one_another() -> None:
    book = run(PLAIN, (0.5, 10, 3))
    assert (book.first_s, book.finish_s) == ([1.5], [3.5])


def test_a_long_prompt_takes_a_step_a_chunk() -> None:
    assert run(PLAIN, (0.0, 25, 1)).first_s == [3.0]


def test_who_comes_while_a_step_runs_joins_at_its_end() -> None:
    book = run(PLAIN, (0.0, 10, 4), (0.1, 5, 2), (0.9, 4, 1))
    assert book.first_s == [1.0, 2.0, 2.0]
    assert book.finish_s == [4.0, 3.0, 2.0]


def test_prompts_share_a_step_in_the_order_of_the_line_and_decoding_goes_on_beside_them() -> None:
    book = run(PLAIN, (0.0, 1, 9), (0.1, 15, 1), (0.2, 4, 1), (0.3, 2, 1))
    # Of ten tokens one is the first request's. The others: 9 of 15; 6 of 15, 3 of 4; 1 of 4, 2
    assert book.first_s == [1.0, 3.0, 4.0, 4.0]
    assert book.finish_s[0] == 9.0


def test_prompts_wait_while_those_who_decode_need_the_whole_chunk() -> None:
    full = Traits(step=SECOND, max_batch=4, chunk_tokens=2, kv_tokens=None, prefix_block_tokens=0)
    book = run(full, (0.0, 1, 5), (0.1, 1, 3), (0.2, 2, 1))
    # From 2 to 4 both tokens are theirs; the third one's prompt takes a token in each of the next two steps.
    assert book.first_s == [1.0, 2.0, 6.0]
    assert book.finish_s[:2] == [5.0, 4.0]


def test_the_batch_holds_no_more_than_it_may_and_who_waits_comes_first_in_first_out() -> None:
    book = run(PLAIN, *[(0.0, 1, 3)] * 4, (0.1, 1, 1), (0.2, 1, 1))
    assert book.first_s == [1.0, 2.0, 2.0, 2.0, 4.0, 5.0]


def test_a_step_takes_as_long_as_batch_context_and_chunk_say() -> None:
    step = Linear(base_s=1.0, request_s=0.1, token_s=0.01, prefill_token_s=0.001)
    book = run(Traits(step=step, kv_tokens=None), (0.0, 20, 3))
    first_s = 1 + 0.02
    assert book.first_s == [pytest.approx(first_s)]
    assert book.finish_s == [pytest.approx(first_s + (1 + 0.1 + 0.21) + (1 + 0.1 + 0.22))]


def test_who_was_admitted_last_is_computed_anew_when_memory_runs_out() -> None:
    tight = Traits(
        step=SECOND, max_batch=4, chunk_tokens=100, kv_tokens=20, kv_block_tokens=1, headroom=0.0, prefix_block_tokens=0
    )  # fmt: skip
    book, engine = served(Exact, tight, requests([(0.0, 8, 8), (0.0, 8, 8)]))
    # The second one begins a step later. After three tokens of the first and two of the second there are 11 + 10.
    assert book.preempted == [0, 1]
    assert book.finish_s[0] == 8.0
    assert book.made == [0, 2]
    assert book.first_s[1] == 2.0  # it is not taken back
    assert book.finish_s[1] == 8.0 + 6  # its prompt and two tokens again, which gives the third, then five more
    assert engine.memory.used == 0


def test_where_the_whole_answer_must_fit_the_next_one_waits_and_nobody_is_computed_anew() -> None:
    tight = Traits(
        step=SECOND, chunk_tokens=100, kv_tokens=24, kv_block_tokens=8, headroom=0.0, prefix_block_tokens=0,
        admit="answer",
    )  # fmt: skip
    book = run(tight, (0.0, 8, 8), (0.0, 8, 8), (0.0, 4, 4))
    assert book.preempted == [0, 0, 0]
    assert book.first_s == [1.0, 9.0, 9.0]  # of three blocks they need two, two and one


def test_nobody_is_admitted_whose_prompt_and_headroom_do_not_fit_beside_the_others() -> None:
    roomy = Traits(step=SECOND, kv_tokens=20, kv_block_tokens=1, headroom=0.25, prefix_block_tokens=0)
    assert run(roomy, (0.0, 10, 2), (0.1, 4, 1)).first_s == [1.0, 2.0]
    assert run(roomy, (0.0, 10, 2), (0.1, 5, 1)).first_s == [1.0, 3.0]  # 11 and 5 and a headroom of 5
    assert run(roomy, (0.0, 19, 2)).first_s == [1.0]  # alone it needs no headroom


def test_a_request_that_could_never_fit_is_refused_and_does_not_block_the_line() -> None:
    book = run(Traits(step=SECOND, kv_tokens=160, prefix_block_tokens=0), (0.0, 150, 12), (0.1, 150, 11))
    assert np.isnan(book.first_s[0])
    assert np.isnan(book.finish_s[0])
    assert book.first_s[1] == 1.1


@given(rows(), traits(step=Linear(base_s=0.1, request_s=0.01, token_s=1e-4, prefill_token_s=1e-3)))
@settings(max_examples=60, deadline=None)
def test_everybody_is_served_once_and_memory_comes_back(asked: list[Row], setup: Traits) -> None:
    book, engine = served(Exact, setup, requests(asked))
    check_served_once(book, engine)
    assert engine.memory.used == 0


@given(rows(), traits(step=Linear(base_s=0.1, token_s=1e-4, prefill_token_s=1e-3)))
@settings(max_examples=60, deadline=None)
def test_memory_never_holds_more_than_there_is_and_no_step_more_than_a_chunk(asked: list[Row], setup: Traits) -> None:
    book = Book(requests(asked), 1, 1)
    engine = Exact(setup, book)
    waiting = list(range(len(asked)))
    while waiting or engine.in_flight:
        now_s = min(engine.end_s, book.arrived_s[waiting[0]] if waiting else float("inf"))
        ids = [waiting.pop(0)] if waiting and book.arrived_s[waiting[0]] == now_s else []
        engine.run(ids, [now_s] * len(ids), now_s)
        assert 0 <= engine.memory.used <= engine.memory.total
        assert engine.memory.free >= 0
        assert engine.in_flight - engine.waiting <= setup.max_batch
    most = setup.step.step_s(setup.max_batch, setup.kv_tokens or 0, setup.chunk_tokens)
    assert engine.longest_s <= most


@given(rows(), st.integers(1, 6), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_first_tokens_come_in_the_order_of_arrival(asked: list[Row], batch: int, chunk: int) -> None:
    setup = Traits(step=SECOND, max_batch=batch, chunk_tokens=chunk, kv_tokens=None, prefix_block_tokens=0)
    first_s = run(setup, *asked).first_s
    assert first_s == sorted(first_s)


def test_a_smaller_chunk_makes_shorter_steps_and_longer_waits_for_the_first_token() -> None:
    asked = chat(200, 8.0, 1, prompt=3000.0)
    found = [served(Exact, Traits(chunk_tokens=chunk), asked) for chunk in (256, 4096)]
    assert found[0][1].longest_s < 0.5 * found[1][1].longest_s
    assert np.median(ttft(found[0][0])) > np.median(ttft(found[1][0]))


# ------------------------------------------------------------------------------------------------- prefixes


def test_a_prompt_whose_blocks_are_known_is_shorter_and_its_last_token_always_computed() -> None:
    setup = Traits(step=Linear(base_s=1.0, prefill_token_s=0.001), kv_tokens=10_000, chunk_tokens=5000)
    asked = requests([(0.0, 1024, 2), (10.0, 1024, 2), (20.0, 1500, 2)], [[1, 2], [1, 2], [1, 2]])
    book, engine = served(Exact, setup, asked)
    assert book.cached == [0, 512, 1024]
    assert ttft(book) == pytest.approx([1 + 1.024, 1 + 0.512, 1 + 0.476])
    assert engine.memory.used == 1024  # stays behind for the next one


def test_blocks_are_known_only_when_they_have_been_computed() -> None:
    setup = Traits(step=SECOND, chunk_tokens=512, kv_tokens=10_000)
    asked = requests([(0.0, 1030, 5), (0.5, 1030, 5), (9.0, 1030, 5)], [[1, 2], [1, 2], [1, 2]])
    book, _ = served(Exact, setup, asked)
    assert book.cached == [0, 0, 1024]  # the second begins in the step that ends the first one's prompt


def test_prefixes_that_nobody_uses_make_room_the_oldest_first() -> None:
    memory = Memory(4 * 512, 512)
    memory.take(1024)
    held = memory.share([1, 2])
    memory.release(held)
    memory.take(512)
    memory.release(memory.share([3]))
    assert memory.known([1, 2]) == 2
    memory.hold([1])
    memory.take(2 * 512)  # 2 has not been used for longer than 3
    assert (memory.known([1]), memory.known([2]), memory.known([3])) == (1, 0, 1)
    memory.take(512)
    assert memory.known([3]) == 0
    assert (memory.used, memory.free) == (4 * 512, 0)
    memory.give(3 * 512)
    memory.release([1])
    assert (memory.private, memory.used, memory.free) == (0, 512, 4 * 512)


def test_prefix_hits_shorten_the_wait_for_the_first_token() -> None:
    asked = chat(300, 6.0, 3, prompt=3000.0, users=10)
    with_hits, _ = served(Exact, Traits(), asked)
    without, _ = served(Exact, Traits(prefix_block_tokens=0), asked)
    assert sum(with_hits.cached) > 0.3 * sum(with_hits.prompt)
    assert ttft(with_hits).mean() < 0.7 * ttft(without).mean()


def test_a_replica_that_goes_gives_back_who_was_not_done_with_what_it_had_made() -> None:
    book = Book(requests([(0.0, 10, 9), (0.1, 15, 3), (0.2, 5, 3)]), 1, 1)
    engine = Exact(PLAIN, book)
    engine.run(range(3), book.arrived_s, 2.5)  # the second one's prompt is half done
    assert engine.drop(2.5) == [0, 1, 2]
    assert book.made == [2, 0, 0]
    assert engine.in_flight == 0
    other = Exact(PLAIN, book)
    other.run((0,), (10.0,), 1e9)
    assert (book.first_s[0], book.finish_s[0]) == (1.0, 10 + 2 + 6)  # twelve tokens anew take two chunks
