"""What every engine promises, whatever library is behind it. Echo runs in virtual time."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from neaptide.clock import VirtualClock
from neaptide.engine.echo import EchoEngine
from neaptide.engine.log import Log
from neaptide.engine.protocol import Engine, Sampling
from neaptide.engine.steplog import Logged
from neaptide.specs import ReplicaSpec

GUIDE = Path(__file__).parent.parent / "neaptide" / "models" / "guide"
CONTEXT = 512
OPTIONS = {"kv_mib": 4, "max_running": 4, "context_tokens": CONTEXT}
SCRATCH = tempfile.TemporaryDirectory(prefix="neaptide-contract-")
serial = itertools.count(1)
TEXT = b"The tide is the rise and fall of the sea; a neap tide has the smallest range of all. "


def spec(engine: str, options: dict[str, object] | None = None, **fields: object) -> ReplicaSpec:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in (options or OPTIONS).items()}
    source = str(GUIDE) if engine == "openvino" else ""
    return ReplicaSpec(id="e-0", epoch=0, model="e", revision="r", engine=engine, source=source, options=raw, **fields)


def echo(**fields: object) -> EchoEngine:
    clock = VirtualClock()
    return EchoEngine(spec("echo", OPTIONS | {"echo_ttft_ms": 5, "echo_tpot_ms": 2}, **fields), clock, clock.advance)


def openvino(**fields: object) -> Engine:
    module = pytest.importorskip("neaptide.engine.openvino", exc_type=ImportError)
    return module.OpenVinoEngine(spec("openvino", OPTIONS | {"threads": 1, "chunk_tokens": 256}, **fields), {})


def logged(**fields: object) -> Engine:
    return Logged(echo(**fields), Log(f"{SCRATCH.name}/{next(serial)}.steps.jsonl"), VirtualClock())


BUILDERS: dict[str, Callable[..., Engine]] = {"echo": echo, "logged echo": logged, "openvino": openvino}


@pytest.fixture(scope="module", params=BUILDERS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    built = BUILDERS[request.param]()
    yield built
    built.close()


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    cached: int = 0
    logprobs: list[float] | None = None
    error: str = ""


def add(
    engine: Engine, prompt: Sequence[int], *, id: int | None = None, generated: Sequence[int] = (), **sampling: object
) -> int:
    id = next(serial) if id is None else id
    settings = Sampling(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling)
    engine.add(id, list(prompt), list(generated), 0, settings)
    return id


def collect(engine: Engine, answers: dict[int, Answer]) -> None:
    for emission in engine.step():
        answer = answers.setdefault(emission.id, Answer())
        assert not answer.finish, "nothing follows a finish"
        answer.ids += emission.token_ids
        answer.cached += emission.cached_tokens
        answer.finish, answer.error = emission.finish, emission.error
        if emission.logprobs is not None:
            assert len(emission.logprobs) == len(emission.token_ids)
            answer.logprobs = (answer.logprobs or []) + emission.logprobs


def finish_all(engine: Engine) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    for _ in range(10_000):
        if not engine.busy():
            return answers
        collect(engine, answers)
    raise AssertionError("the engine does not come to an end")


def ask(engine: Engine, prompt: Sequence[int], **kwargs: object) -> Answer:
    id = add(engine, prompt, **kwargs)
    return finish_all(engine)[id]


def prompt(tokens: int, salt: int = 0) -> list[int]:
    """Byte ids, so that every engine's vocabulary holds them; no two salts share a first block."""
    return [(salt * 37 + i * 7 + TEXT[i % len(TEXT)]) % 250 + 3 for i in range(tokens)]


def test_an_answer_has_exactly_max_tokens_when_it_may_not_stop(engine: Engine) -> None:
    answer = ask(engine, prompt(20), max_tokens=33)
    assert (len(answer.ids), answer.finish) == (33, "length")


def test_a_greedy_answer_comes_twice_the_same(engine: Engine) -> None:
    assert ask(engine, prompt(20), max_tokens=24).ids == ask(engine, prompt(20), max_tokens=24).ids


def test_every_token_lies_in_the_vocabulary(engine: Engine) -> None:
    vocabulary = engine.describe().vocab_size
    assert all(0 <= id < vocabulary for id in ask(engine, prompt(20), temperature=2.0, max_tokens=40).ids)


def test_a_seed_makes_a_sampled_answer_repeatable_beside_others(engine: Engine) -> None:
    alone = ask(engine, prompt(20), temperature=1.0, seed=7, max_tokens=12)
    add(engine, prompt(9, salt=5), temperature=1.0)
    id = add(engine, prompt(20), temperature=1.0, seed=7, max_tokens=12)
    assert finish_all(engine)[id].ids == alone.ids


def test_an_aborted_answer_ends_in_the_next_step_and_frees_all_it_held(engine: Engine) -> None:
    before = engine.free()
    id = add(engine, prompt(20), max_tokens=200)
    answers: dict[int, Answer] = {}
    while id not in answers:
        collect(engine, answers)
    assert engine.free().free_kv_tokens <= before.free_kv_tokens - 220
    engine.abort(id)
    assert engine.busy()
    collect(engine, answers)
    assert answers[id].finish == "abort"
    assert (engine.free(), engine.busy()) == (before, False)


def test_aborting_what_is_unknown_changes_nothing(engine: Engine) -> None:
    engine.abort(987_654)
    assert not engine.busy()


def test_an_abort_before_the_first_step_is_told_too(engine: Engine) -> None:
    id = add(engine, prompt(20))
    engine.abort(id)
    answers = finish_all(engine)
    assert (answers[id].finish, answers[id].ids) == ("abort", [])


def test_kv_is_held_in_whole_blocks_and_returned(engine: Engine) -> None:
    description, before = engine.describe(), engine.free()
    assert (before.free_kv_tokens, before.kv_usage, before.running) == (description.kv_tokens, 0.0, 0)
    block = description.kv_block_tokens
    id = add(engine, prompt(20), max_tokens=block)
    held = before.free_kv_tokens - engine.free().free_kv_tokens
    assert held == -(-(20 + block) // block) * block
    assert finish_all(engine)[id].finish == "length"
    assert engine.free() == before


def test_requests_beyond_what_is_free_wait_and_all_finish(engine: Engine) -> None:
    ids = [add(engine, prompt(200, salt), max_tokens=6) for salt in range(40)]
    assert (engine.free().free_slots, engine.free().free_kv_tokens) == (0, 0)
    waiting = ids[-1]
    engine.abort(waiting)
    answers = finish_all(engine)
    assert {answers[id].finish for id in ids[:-1]} == {"length"}
    assert all(len(answers[id].ids) == 6 for id in ids[:-1])
    assert answers[waiting].finish == "abort"
    assert engine.free().free_kv_tokens == engine.describe().kv_tokens


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(engine: Engine) -> None:
    assert engine.describe().context_tokens == CONTEXT
    assert len(ask(engine, prompt(CONTEXT - 1), max_tokens=5).ids) == 1
    with pytest.raises(ValueError, match=str(CONTEXT)):
        add(engine, prompt(CONTEXT))
    assert not engine.busy()


def test_the_same_id_cannot_be_added_twice(engine: Engine) -> None:
    id = add(engine, prompt(20))
    with pytest.raises(ValueError, match="already"):
        add(engine, prompt(20), id=id)
    assert len(finish_all(engine)[id].ids) == 8


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = ask(engine, prompt(20), max_tokens=16).ids
    stop = whole[-1]
    expected = whole[: whole.index(stop)]
    for ignore_eos in (True, False):
        answer = ask(engine, prompt(20), max_tokens=16, stop_token_ids=(stop,), ignore_eos=ignore_eos)
        if not ignore_eos and len(answer.ids) < len(expected):
            continue  # its own end of sequence came first
        assert (answer.ids, answer.finish) == (expected, "stop")


def test_min_tokens_holds_back_every_stop(engine: Engine) -> None:
    first = ask(engine, prompt(20), max_tokens=4).ids[0]
    answer = ask(engine, prompt(20), max_tokens=40, min_tokens=30, stop_token_ids=(first,), ignore_eos=False)
    assert len(answer.ids) >= 30
    assert len(ask(engine, prompt(20), max_tokens=9, min_tokens=9).ids) == 9


def test_generated_ids_are_continued_counted_and_not_repeated(engine: Engine) -> None:
    whole = ask(engine, prompt(20), max_tokens=30).ids
    rest = ask(engine, prompt(20), generated=whole[:12], max_tokens=30)
    assert (len(rest.ids), rest.finish) == (18, "length")
    assert rest.ids[0] == whole[12], "greedy continues where it was"
    done = ask(engine, prompt(20), generated=whole, max_tokens=30)
    assert (done.ids, done.finish) == ([], "length")


def test_the_second_run_of_a_prompt_finds_its_blocks_cached(engine: Engine) -> None:
    block = engine.describe().kv_block_tokens
    long = prompt(5 * block, salt=99)
    assert ask(engine, long, max_tokens=2).cached == 0
    assert 3 * block <= ask(engine, long, max_tokens=2).cached < len(long)
    assert ask(engine, long[: 2 * block] + prompt(block, salt=98), max_tokens=2).cached == 2 * block


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_prefix_cache_that_is_off_says_so_and_finds_nothing(build: Callable[..., Engine]) -> None:
    engine = build(prefix_cache="off")
    assert not engine.describe().prefix_cache
    assert [ask(engine, prompt(100), max_tokens=2).cached for _ in range(2)] == [0, 0]
    engine.close()


def test_log_probabilities_come_one_a_token_when_asked_for(engine: Engine) -> None:
    told = ask(engine, prompt(20), logprobs=0).logprobs
    assert told is not None
    assert len(told) == 8
    assert all(p <= 0 for p in told)
    assert ask(engine, prompt(20)).logprobs is None


def test_a_grammar_that_describe_does_not_offer_is_refused(engine: Engine) -> None:
    assert not engine.describe().json_schema
    with pytest.raises(ValueError, match="grammar"):
        add(engine, prompt(20), json_schema='{"type": "object"}')


def test_more_tokens_than_the_context_leaves_are_cut_to_what_it_leaves(engine: Engine) -> None:
    answer = ask(engine, prompt(CONTEXT - 20), max_tokens=10_000)
    assert (len(answer.ids), answer.finish) == (20, "length")


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-40},
        {"temperature": 1e30},
        {"temperature": 1.0, "top_p": 1e-30},
        {"temperature": 1.0, "top_k": 1 << 62},
        {"temperature": 1.0, "seed": -(1 << 70)},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 1e30},
        {"min_tokens": 1 << 40},
        {"max_tokens": 0},
        {"stop_token_ids": (1 << 29,)},
    ],
    ids=str,
)
def test_extreme_sampling_is_served_or_refused_and_never_ends_the_engine(
    engine: Engine, extreme: dict[str, object]
) -> None:
    try:
        assert ask(engine, prompt(20), **extreme).finish == "length"
    except ValueError:
        assert not engine.busy()
    assert len(ask(engine, prompt(20)).ids) == 8


def test_a_storm_of_shared_prefixes_and_aborts_loses_nobody_and_no_block(engine: Engine) -> None:
    dice, answers, asked, aborted = random.Random(7), dict[int, Answer](), dict[int, int](), set[int]()
    for _ in range(250):
        if dice.random() < 0.6:
            start = prompt(dice.choice((40, 64, 100, 170)), salt=dice.randrange(3))
            wanted = dice.randrange(1, 40)
            id = add(engine, start + prompt(dice.randrange(1, 50), salt=dice.randrange(9)), max_tokens=wanted)
            asked[id] = wanted
        if asked and dice.random() < 0.3:
            id = dice.choice(list(asked))
            if not answers.get(id, Answer()).finish:
                aborted.add(id)
            engine.abort(id)
        if engine.busy():
            collect(engine, answers)
    while engine.busy():
        collect(engine, answers)
    for id, wanted in asked.items():
        assert (answers[id].finish == "abort") == (id in aborted)
        assert id in aborted or (len(answers[id].ids), answers[id].finish) == (wanted, "length")
    assert (engine.free().free_kv_tokens, engine.free().running) == (engine.describe().kv_tokens, 0)
