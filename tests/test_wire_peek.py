"""What the gateway reads of a body, and the only way it changes one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.errors import RequestError
from neaptide.wire.peek import Peek, peek, splice

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("model", "stream", "max_tokens", "max_completion_tokens", "stream_options")


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        peek(body)
    assert caught.value.status == 400
    return caught.value


def attempt(body: bytes) -> Peek | int:
    """What was read, or the status of the refusal; any other exception fails the test."""
    try:
        return peek(body)
    except RequestError as e:
        return e.status


def test_reads_only_what_routing_needs():
    assert peek(b'{"model":"m","stream":true,"max_tokens":5,"stream_options":{"include_usage":true}}') == Peek(
        "m", True, 5, True
    )
    assert peek(b'{"model":"m","messages":[{"role":"tool","x":[1,{"y":null}]}]}') == Peek("m", False, None, None)
    assert peek(b'{"model":"m","stream":null,"max_tokens":null,"stream_options":null}') == Peek("m", False, None, None)


def test_max_completion_tokens_goes_before_max_tokens():
    assert peek(b'{"model":"m","max_tokens":5,"max_completion_tokens":9}').max_tokens == 9


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model":1}', "model"),
        (b'{"model":null}', "model"),
        (b'{"stream":true}', "model"),
        (b'{"model":""}', "model"),
        (b'{"model":"m","stream":"yes"}', "stream"),
        (b'{"model":"m","max_tokens":1.5}', "max_tokens"),
        (b'{"model":"m","max_tokens":-1}', "max_tokens"),
        (b'{"model":"m","max_tokens":99999999999999999999}', "max_tokens"),
        (b'{"model":"m","max_completion_tokens":"9"}', "max_completion_tokens"),
        (b'{"model":"m","stream_options":{"include_usage":3}}', "stream_options.include_usage"),
        (b'{"model":"a\\u0000b"}', "model"),
    ],
)
def test_names_the_parameter_that_is_wrong(body: bytes, param: str):
    assert refusal(body).param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model":"m"} x',
        b'{"model":"m","x":nan}',
        b'{"model":"m","x":"\xff"}',
        b'{"model":"m","x":"\\ud800"}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_refuses_what_is_not_a_json_object(body: bytes):
    assert refusal(body).slug == "invalid_json"


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_refused(body: bytes):
    assert isinstance(attempt(body), Peek) or attempt(body) == 400


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), JSON, max_size=6))
def test_arbitrary_objects_are_read_or_refused(fields: dict[str, Any]):
    body = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    read = attempt(body)
    if isinstance(read, Peek):
        assert read.model == fields["model"]
        assert read.stream is bool(fields.get("stream"))
    else:
        assert read == 400


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda k: k not in FIELDS), JSON, max_size=5
    ),
    st.booleans(),
    st.none() | st.just("other"),
)
def test_splice_changes_nothing_but_what_it_was_told(fields: dict[str, Any], usage: bool, model: str | None):
    sent = {"model": "m", "stream": True, **fields}
    body = json.dumps(sent).encode()  # lone surrogates are escaped: the peek refuses those
    try:
        peek(body)
    except RequestError:
        return
    after = json.loads(splice(body, model=model, include_usage=usage))
    wanted = {**sent, "model": model or "m", **({"stream_options": {"include_usage": True}} if usage else {})}
    assert after == wanted


def test_splice_keeps_the_bytes_of_nested_values():
    body = b'{"model":"a","messages":[ {"n": 1.50e1,"u":"\\u00e9"} ] , "stream_options": {"x" : 1.0}}'
    spliced = splice(body, model="b", include_usage=True)
    assert b'[ {"n": 1.50e1,"u":"\\u00e9"} ]' in spliced
    assert b'"model":"b"' in spliced
    assert b'"x":1.0' in spliced
    assert json.loads(spliced)["stream_options"] == {"x": 1.0, "include_usage": True}


def test_duplicate_keys_collapse_to_the_one_that_was_read():
    body = b'{"model":"a","stream":false,"model":"m","stream":true}'
    assert peek(body) == Peek("m", True, None, None)
    assert json.loads(splice(body, include_usage=True)) == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
