"""What makes two requests the same, what of an answer is kept, and that the store stays within its bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from neaptide import config
from neaptide.errors import ConfigError
from neaptide.gateway.cache import ENTRY_BYTES, MIB, UNTOLD, Cache, identity
from neaptide.gateway.kept import Kept, of_stream, of_whole
from neaptide.gateway.sse import Counts
from neaptide.table import Caching
from tests.gateway_kit import COMPLETION, USAGE, event

SCOPE = ("t", "m", "r", "chat.completions")
DONE = b"data: [DONE]\n\n"


def name(body: dict[str, Any], scope: tuple[str, ...] = SCOPE, *, stream: bool = False) -> bytes:
    found = identity(json.dumps(body).encode(), scope, stream)
    assert found is not None
    return found


def exactly(value: Any) -> Any:
    """Equal for values that are equal as JSON and of one type: 0, 0.0 and false are three."""
    if isinstance(value, dict):
        return frozenset((key, exactly(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return tuple(map(exactly, value))
    return type(value), repr(value)


SCALARS = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from([0.0, -0.0, 0.5, 1.0]) | st.sampled_from("ab")
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2),
    max_leaves=4,
)
BODIES = st.dictionaries(st.sampled_from(["messages", "seed", "unheard_of"]), VALUES, max_size=3)
TRANSPORT = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(UNTOLD, VALUES),
        "stream": st.sampled_from([None, False]),
        "stream_options": st.sampled_from([None, {}, {"include_usage": True}]),
    },
)


@given(BODIES, BODIES, TRANSPORT, TRANSPORT, st.randoms())
@example({"seed": 1}, {"seed": 1.0}, {}, {}, None)
@example({"seed": 1}, {"seed": True}, {}, {}, None)
def test_two_bodies_are_the_same_if_and_only_if_their_json_is_but_for_what_is_about_transport(
    one: dict[str, Any], other: dict[str, Any], how: dict[str, Any], else_: dict[str, Any], chance: Any
) -> None:
    pairs = [*other.items(), *else_.items(), ("temperature", 0)]
    if chance is not None:
        chance.shuffle(pairs)
    same = name({"temperature": 0, **one, **how}) == name(dict(pairs))
    assert same == (exactly(one) == exactly(other))


@pytest.mark.parametrize("scope", [("u", *SCOPE[1:]), ("t", "n", "r", "chat.completions"), ("tm", "", "r", "x")])
def test_tenants_models_revisions_and_routes_are_apart(scope: tuple[str, ...]) -> None:
    assert name({"temperature": 0}) != name({"temperature": 0}, scope)
    assert name({"temperature": 0}) != name({"temperature": 0}, stream=True)


def test_what_else_a_stream_is_asked_to_be_belongs_to_it() -> None:
    plain = {"temperature": 0, "stream_options": {"include_usage": True}}
    assert name(plain) == name({"temperature": 0})
    assert name(plain) != name({"temperature": 0, "stream_options": {"include_usage": True, "more": 1}})


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"temperature":null}', b'{"temperature":0.1}', b'{"temperature":false}', b'{"temperature":"0"}'],
)
def test_an_answer_of_chance_is_kept_only_for_who_wants_that(body: bytes) -> None:
    assert identity(body, SCOPE, False) is None
    assert identity(body, SCOPE, False, wanted=True) is not None


@pytest.mark.parametrize(
    "body", [b'{"temperature":0,"x":1e999}', b'{"temperature":0,"x":"\\ud800"}', b'{"x":' + b"[" * 5000]
)
def test_what_cannot_be_read_exactly_is_nobody_elses(body: bytes) -> None:
    assert identity(body, SCOPE, False, wanted=True) is None


# ------------------------------------------------------------------------------------------------ the store


def answer(size: int = 100) -> Kept:
    return Kept(parts=(b"x" * size, b""), stream=False, counts=Counts(), finish="stop", content_type=b"a/b")


def test_an_answer_is_given_until_its_time_is_up_and_a_stale_one_to_who_takes_it() -> None:
    cache = Cache(Caching(ttl_s=10))
    cache.keep(b"a", answer(), 100.0)
    assert cache.find(b"a", 109.9) is not None
    assert cache.find(b"a", 110.0) is None
    assert cache.find(b"a", 129.0, stale_s=30) is not None
    assert cache.find(b"a", 130.0, stale_s=30) is None
    cache.keep(b"a", answer(), 200.0)
    assert cache.find(b"a", 209.0) is not None
    assert len(cache) == 1


def test_who_was_asked_for_longest_ago_leaves_first() -> None:
    cache = Cache(Caching(ttl_s=10, memory_mib=1))
    for i in range(110):
        assert cache.keep(b"%d" % i, answer(10_000), float(i) / 100)
        assert cache.find(b"0", 2.4) is not None
    assert cache.find(b"1", 2.4) is None
    assert cache.find(b"109", 2.4) is not None


@given(st.lists(st.tuples(st.sampled_from(["keep", "record", "end", "shrink"]), st.integers(0, 40_000)), max_size=60))
def test_its_bytes_stay_within_the_bound_whatever_is_kept_and_recorded(does: list[tuple[str, int]]) -> None:
    cache, recorded, memory = Cache(Caching(ttl_s=10, memory_mib=2)), [0], 2
    for at, (what, size) in enumerate(does):
        if what == "keep":
            kept = cache.keep(b"%d" % at, answer(size), 0.0)
            assert not kept or size < cache.largest
        elif what == "record" and cache.take(size * 16):
            recorded.append(size * 16)
        elif what == "end" and len(recorded) > 1:
            cache.give(recorded.pop())
        elif what == "shrink" and sum(recorded) <= MIB:
            memory = 1
            cache.adopt(Caching(ttl_s=10, memory_mib=1))
        assert sum(recorded) <= cache.held_bytes <= memory * MIB
    for size in recorded:
        cache.give(size)
    assert cache.held_bytes >= len(cache) * ENTRY_BYTES


@pytest.mark.parametrize("wrong", ["ttl_s: -1", "ttl_s: .inf", "memory_mib: 0", "price: 1.1", "price: -0.1"])
def test_settings_that_make_no_sense_are_refused_by_name(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.guide\.cache"):
        config.parse(f"models: {{guide: {{cache: {{{wrong}}}}}}}", "the test")


# ------------------------------------------------------------------------------------------------ what is kept

EVENTS = event("a") + event("b") + event(None, "stop")


def stream(data: bytes, counts: Counts | None = None) -> Kept | None:
    found = of_stream(data, counts)
    if found is None:
        return None
    return Kept(parts=found[0], last=found[1], stream=True, counts=Counts(), finish="stop", content_type=b"")


def read(data: bytes) -> list[dict[str, Any]]:
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    return [json.loads(line.removeprefix(b"data: ")) for line in events]


@pytest.mark.parametrize(
    "data",
    [
        EVENTS + DONE,
        (EVENTS + DONE).replace(b"\n", b"\r\n"),
        b": a comment\n\n" + EVENTS.replace(b"data: ", b"data:") + b": another\n" + DONE,
        EVENTS + event(None, None, USAGE) + DONE,
    ],
)
def test_a_stream_is_told_again_under_another_id_with_usage_as_it_is_asked_for(data: bytes) -> None:
    kept = stream(data, Counts(prompt=7, output=3))
    assert kept is not None
    was = read(EVENTS + DONE)
    told = read(kept.told('new"'))
    assert [{**row, "id": "c", "usage": None} for row in told] == was
    assert {row["id"] for row in told} == {'new"'}
    assert not any("usage" in row for row in told)
    *more, last = read(kept.told("n", include_usage=True))
    assert [{**row, "id": "c"} for row in more] == was
    assert all(row["usage"] is None for row in more)
    assert (last["choices"], last["id"], last["model"], last["object"]) == ([], "n", "m", "chat.completion.chunk")
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (7, 3)


def test_a_stream_of_which_nobody_knows_the_usage_is_told_without() -> None:
    kept = stream(EVENTS + DONE)
    assert kept is not None
    assert len(read(kept.told("n", include_usage=True))) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        DONE,
        EVENTS,
        EVENTS + DONE + event("c"),
        event("a") + DONE,
        event("a") + event(None, "content_filter") + DONE,
        event("a") + b'data: {"error": {"message": "no"}}\n\n' + DONE,
        event("a").replace(b"\n\n", b"\nid: 7\n\n") + event(None, "stop") + DONE,
        event("a", None, USAGE) + event(None, "stop") + DONE,
        EVENTS.replace(b'"id": "c", ', b"") + DONE,
        EVENTS[:-9] + DONE,
    ],
)
def test_a_stream_that_is_not_whole_or_not_understood_is_not_kept(data: bytes) -> None:
    assert stream(data) is None


def test_a_whole_answer_is_told_again_under_another_id() -> None:
    parts = of_whole(COMPLETION)
    assert parts is not None
    kept = Kept(parts=parts, stream=False, counts=Counts(), finish="stop", content_type=b"")
    assert json.loads(kept.told("n")) == {**json.loads(COMPLETION), "id": "n"}


@pytest.mark.parametrize(
    "change",
    [
        {"choices": []},
        {"choices": [{"finish_reason": None}]},
        {"choices": [{"finish_reason": "content_filter"}]},
        {"choices": 3},
        {"error": {}},
    ],
)
def test_an_answer_that_came_to_no_good_end_is_not_kept(change: dict[str, Any]) -> None:
    assert of_whole(json.dumps({**json.loads(COMPLETION), **change}).encode()) is None
    assert of_whole(COMPLETION[:-1]) is None
    assert of_whole(b"[1]") is None
