"""Who may go to the engine: slots, KV blocks, the line, and what each request's share of the work was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.engine.answer import QUIET_TOKENS, Answer
from neaptide.engine.prompt import Model, Prepared, load_model
from neaptide.engine.prompt import prepare as prepare_with
from neaptide.engine.protocol import Capacity, Description, Sampling
from neaptide.engine.requests import LOOKAHEAD, SPARE, Admission, Job, Tally, Work
from neaptide.engine.text import Text
from neaptide.engine.tokens import ByteTokenizer
from neaptide.errors import RequestError
from neaptide.link import EndHeader, OpenHeader
from neaptide.wire.chunks import Label
from neaptide.wire.parse import Generation, Prompt


def prepare(model: Model, description: Description, asked: Generation) -> Prepared:
    return prepare_with(model, description, asked, 777)


def describe(max_running: int = 4, kv_tokens: int = 1024, context: int = 512, block: int = 16) -> Description:
    return Description(
        engine="echo", model="m", context_tokens=context, vocab_size=258, max_running=max_running,
        kv_tokens=kv_tokens, kv_block_tokens=block,
    )  # fmt: skip


class Paper:
    """A sink that keeps what it is given."""

    def __init__(self, credit: int = 1 << 20) -> None:
        self.credit = credit
        self.tokens: list[tuple[list[int], bytes]] = []

    def headers(self, pairs: list[tuple[str, str]]) -> None:
        raise AssertionError(pairs)

    def token(self, ids: Sequence[int], data: bytes) -> None:
        self.credit -= 2 + 4 * len(ids) + len(data)
        assert self.credit >= 0, "more than its credit"
        self.tokens.append((list(ids), data))

    def end(self, header: EndHeader, last: bytes) -> None:
        raise AssertionError(header)


def job(id: int, prompt_tokens: int = 16, deadline_in_s: float | None = None) -> Job:
    made = Job(id, OpenHeader(request_id=f"r{id}", route="completions", body_bytes=0, deadline_in_s=deadline_in_s),
               Paper(), 0, 100.0)  # fmt: skip
    made.prepared = Prepared([1] * prompt_tokens, Sampling(max_tokens=16))
    return made


def test_a_request_holds_whole_blocks_of_its_worst_case() -> None:
    admission = Admission(describe(kv_tokens=100))  # six blocks
    admission.enqueue(job(1, 17), 1)
    assert admission.next() is not None
    assert (admission.held_blocks, admission.free_kv_tokens) == (2, 64)


def test_the_line_is_not_overtaken() -> None:
    admission = Admission(describe(kv_tokens=64))
    large, small = job(1, 48), job(2, 1)
    admission.enqueue(job(0, 16), 16)
    assert admission.next() is not None
    admission.enqueue(large, 16)
    admission.enqueue(small, 1)
    assert admission.next() is None


def test_the_engines_own_word_can_only_make_it_stricter() -> None:
    admission = Admission(describe())
    admission.enqueue(job(0), 16)
    first = admission.next()
    assert first is not None
    admission.heard(Capacity(running=1, free_slots=3, free_kv_tokens=16), 0, 0)
    admission.enqueue(job(1), 16)
    assert admission.next() is None
    admission.release(first)
    assert admission.next() is not None, "an idle engine's last word does not block"


def test_what_is_on_its_way_counts_until_the_engine_has_said_so() -> None:
    admission = Admission(describe(max_running=3))
    for i in range(2):
        admission.enqueue(job(i), 16)
        assert admission.next() is not None
    admission.heard(Capacity(running=1, free_slots=2, free_kv_tokens=1024), 2, 1)
    admission.enqueue(job(2), 16)
    assert admission.next() is not None
    admission.enqueue(job(3), 16)
    assert admission.next() is None


def test_expired_requests_are_found_in_the_line() -> None:
    admission = Admission(describe())
    late, patient = job(1, deadline_in_s=5.0), job(2)
    admission.enqueue(late, 16)
    admission.enqueue(patient, 16)
    assert admission.expired(104.9) == []
    assert admission.expired(105.0) == [late]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200), st.booleans()), max_size=60),
    st.integers(1, 5), st.integers(20, 600),
)  # fmt: skip
def test_memory_and_slots_are_never_promised_twice(
    arrivals: list[tuple[int, int, bool]], max_running: int, kv_tokens: int
) -> None:
    admission = Admission(describe(max_running, kv_tokens))
    running: list[Job] = []
    taken: list[int] = []
    for number, (prompt, answer, finishes) in enumerate(arrivals):
        fits_ever = -(-(prompt + answer) // 16) <= admission.total_blocks
        if fits_ever and admission.has_room(0):
            admission.enqueue(job(number, prompt), answer)
        while (started := admission.next()) is not None:
            running.append(started)
            taken.append(started.id)
        if finishes and running:
            admission.release(running.pop(0))
        assert admission.held_blocks == sum(j.kv_blocks for j in running) <= admission.total_blocks
        assert len(running) == admission.running <= max_running
        assert len(admission.waiting) <= LOOKAHEAD + SPARE
        assert admission.slots(0) >= 0
    assert taken == sorted(taken)
    while admission.waiting or running:
        while (started := admission.next()) is not None:
            running.append(started)
        assert running, "the line is stuck over an idle engine"
        admission.release(running.pop(0))


def test_a_share_of_the_work_is_a_difference_of_two_sums() -> None:
    work, one, two = Work(), job(1, 10), job(2, 20)
    one.begin_account(work)
    work.step(1.0, 1)
    two.begin_account(work)
    work.step(1.0, 2)
    one.settle(work)
    two.settle(work)
    assert (one.engine_s, two.engine_s) == (1.5, 0.5)
    assert (one.kv_token_s, two.kv_token_s) == (20.0, 20.0)


def test_a_tally_forgets_the_oldest() -> None:
    tally = Tally(most=2)
    jobs = [job(i) for i in range(3)]
    for each in jobs:
        tally.running(each)
    tally.ended(jobs[2], "stop")
    tally.ended(jobs[0], "stop")
    rows = tally.rows(["r0", "r1", "r2", "other"])
    assert {id: row.done for id, row in rows.items()} == {"r1": False, "r2": True}


# ---------------------------------------------------------------------------------------------------- preparing

ECHO: Model = load_model("echo", "")


def generation(**fields: object) -> Generation:
    return Generation(**{"chat": False, "model": None, "prompt": Prompt(text="x" * 10), **fields})  # type: ignore[arg-type]


def test_the_answer_is_limited_by_client_context_and_memory() -> None:
    limits = {
        prepare(ECHO, describe(context=512), generation(max_tokens=5)).sampling.max_tokens: 5,
        prepare(ECHO, describe(context=512), generation(max_tokens=9999)).sampling.max_tokens: 502,
        prepare(ECHO, describe(context=512), generation()).sampling.max_tokens: 502,
        prepare(ECHO, describe(context=512, kv_tokens=100), generation()).sampling.max_tokens: 86,
        prepare(ECHO, describe(context=9999, kv_tokens=9999), generation()).sampling.max_tokens: 777,
    }
    assert list(limits) == list(limits.values())


def test_a_text_far_beyond_the_context_is_refused_without_tokenising_it() -> None:
    class Untouched(ByteTokenizer):
        longest_token = 4

        def encode(self, text: str, special: bool) -> list[int]:
            raise AssertionError("tokenised")

    model = ECHO._replace(tokenizer=Untouched())
    with pytest.raises(RequestError, match="at least 513 tokens") as caught:
        prepare(model, describe(context=512), generation(prompt=Prompt(text="x" * 513 * 4)))
    assert caught.value.slug == "context_length_exceeded"


def test_the_models_defaults_fill_in_what_the_client_left_open() -> None:
    model = ECHO._replace(defaults={"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05})
    ours = prepare(model, describe(), generation(temperature=0.0, top_p=0.0)).sampling
    assert (ours.temperature, ours.top_k, ours.repetition_penalty) == (0.0, 20, 1.05)
    assert 0 < ours.top_p < 0.001


def test_chat_without_a_template_is_refused_with_a_hint() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        prepare(ECHO._replace(template=None), describe(), generation(chat=True, prompt=Prompt(messages=[{}])))
    assert (caught.value.status, caught.value.slug) == (400, "no_chat_template")
    assert "/v1/completions" in caught.value.body()["error"]["message"]  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------- answers


def answer(sink: Paper, stream: bool) -> Answer:
    tokenizer = ByteTokenizer()
    return Answer(sink, tokenizer, Text(tokenizer.decoder()), Label("r", "m", "v", 1), chat=False, stream=stream,
                  include_usage=False, logprobs=False)  # fmt: skip


@given(st.text(max_size=60), st.lists(st.integers(0, 3000), max_size=30))
def test_whatever_credit_comes_no_token_is_lost_or_doubled(text: str, credits: list[int]) -> None:
    sink = Paper(300)
    out = answer(sink, stream=True)
    ids = list(text.encode("utf-8", "replace"))
    for index, id in enumerate(ids):
        out.push([id])
        if index < len(credits):
            sink.credit += credits[index]
            out.credit_came()
    while not out.drained():
        sink.credit += 1000
        out.credit_came()
    assert [id for told, _ in sink.tokens for id in told] == ids
    assert out.sent == out.output == len(ids)


def test_a_silent_answer_tells_its_ids_in_groups() -> None:
    sink = Paper()
    out = answer(sink, stream=False)
    for _ in range(QUIET_TOKENS * 2 + 1):
        out.push([97])
    assert [len(ids) for ids, _ in sink.tokens] == [QUIET_TOKENS, QUIET_TOKENS]
    assert b"a" * 33 in out.last_bytes("stop", 1, 0)
    assert [len(ids) for ids, _ in sink.tokens][2:] == [1]
    assert all(data == b"" for _, data in sink.tokens)


class Thinker(ByteTokenizer):
    think_open, think_close = 1, 2


def test_reasoning_tokens_are_counted_with_their_brackets() -> None:
    def thinking(prompt: list[int], generated: list[int], *pushed: list[int]) -> Answer:
        tokenizer = Thinker()
        out = Answer(Paper(), tokenizer, Text(tokenizer.decoder()), Label("r", "m", "v", 1), chat=True, stream=False,
                     include_usage=False, logprobs=False, resumed=len(generated))  # fmt: skip
        out.recall(prompt, generated)
        for ids in pushed:
            out.push(ids)
        return out

    assert thinking([9], [], [1, 65], [66, 2, 67]).reasoning == 4
    assert thinking([9, 1], [], [65, 66, 2, 67]).reasoning == 3
    assert thinking([1, 9, 2], [], [65, 66]).reasoning == 0
    resumed = thinking([9], [1, 65], [66, 2, 67])
    assert (resumed.reasoning, resumed.reasoned_before) == (2, 2)
