"""Requests for engines, and what an engine made of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from neaptide.simulate.arrivals import Lists, Requests
from neaptide.simulate.engine import Book, Engine, Traits
from neaptide.simulate.exact import Exact
from neaptide.simulate.fast import Fast

Row = tuple[float, int, int]  # arrival, prompt tokens, answer tokens


def requests(rows: Sequence[Row], prefixes: Sequence[Sequence[int]] | None = None) -> Requests:
    """In the order of their arrival."""
    lists = None
    if prefixes is not None:
        values = np.array([block for blocks in prefixes for block in blocks], dtype=np.int64)
        lists = Lists(values, np.concatenate(([0], np.cumsum([len(blocks) for blocks in prefixes]))))
    t_s, prompt, out = (np.array([row[i] for row in rows]) for i in range(3))
    return Requests(
        t_s=t_s.astype(float), in_tokens=prompt.astype(np.int64), out_tokens=out.astype(np.int64), prefixes=lists
    )  # fmt: skip


def chat(rows: int, rps: float, seed: int, prompt: float = 300.0, out: float = 60.0, users: int = 0) -> Requests:
    """Poisson arrivals with lognormal lengths; `users` of them each have a prompt of their own to begin with."""
    random = np.random.default_rng(seed)
    t_s = np.cumsum(random.exponential(1 / rps, rows))
    prompts = np.maximum(1, random.lognormal(np.log(prompt), 1.0, rows)).astype(int)
    outs = np.maximum(1, random.lognormal(np.log(out), 0.8, rows)).astype(int)
    prefixes = None
    if users:
        who = random.integers(0, users, rows)
        prefixes = [[int(w) * 1000 + k for k in range(p // 512)] for w, p in zip(who, prompts)]
    return requests(list(zip(t_s, prompts, outs)), prefixes)


def served(kind: type[Exact] | type[Fast], traits: Traits, asked: Requests) -> tuple[Book, Exact | Fast]:
    """Everybody is served by one engine."""
    book = Book(asked, 1, 1)
    engine = kind(traits, book)
    engine.run(range(len(book.prompt)), book.arrived_s, 1e9)
    return book, engine


def ttft(book: Book) -> NDArray[np.float64]:
    return np.array(book.first_s) - np.array(book.arrived_s)


def check_served_once(book: Book, engine: Engine) -> None:
    """Everybody finishes, after the first token, which comes after the arrival; nothing is left in the engine."""
    assert engine.in_flight == engine.waiting == 0
    for arrived_s, first_s, finish_s, out in zip(book.arrived_s, book.first_s, book.finish_s, book.out):
        assert arrived_s < first_s <= finish_s
        assert (first_s == finish_s) == (out == 1)


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    gaps = draw(st.lists(st.floats(0, 2), min_size=1, max_size=25))
    return [(at, draw(st.integers(1, 90)), draw(st.integers(1, 40))) for at in np.cumsum(gaps).tolist()]


def traits(**changed: object) -> st.SearchStrategy[Traits]:
    """Small engines: all limits bind now and then. 150 tokens of KV memory hold any one request of `rows`."""
    fields: dict[str, st.SearchStrategy[object]] = {
        "max_batch": st.integers(1, 6),
        "chunk_tokens": st.integers(1, 64),
        "kv_tokens": st.integers(150, 400),
        "kv_block_tokens": st.sampled_from([1, 4, 8]),
        "headroom": st.sampled_from([0.0, 0.1]),
        "admit": st.sampled_from(["prompt", "answer"]),
        "prefix_block_tokens": st.just(0),
    }
    return st.builds(Traits, **fields | {name: st.just(value) for name, value in changed.items()})
