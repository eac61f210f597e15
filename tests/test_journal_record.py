"""A record is a line: what goes in comes out, what is damaged is refused, nothing is longer than MAX_RECORD."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.journal import MAX_RECORD, CorruptRecord, decode, encode
from neaptide.journal.record import FIELD_BYTES
from neaptide.types import Attempt, Begin, Paid, Usage

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
COUNTS = st.integers(0, 2**40)
SECONDS = st.floats(0, 1e9, allow_nan=False)
USAGES = st.builds(
    Usage,
    request_id=NAMES,
    client_id=NAMES,
    tenant=NAMES,
    model=NAMES,
    error=NAMES,
    prompt_tokens=COUNTS,
    output_tokens=COUNTS,
    duration_s=SECONDS,
    outcome=st.sampled_from(["ok", "refused", "error", "aborted", "timeout", "lost"]),
    attempts=st.lists(st.builds(Attempt, NAMES, COUNTS), max_size=4).map(tuple),
    paid=st.lists(st.builds(Paid, NAMES, COUNTS, COUNTS), max_size=2).map(tuple),
)
BEGINS = st.builds(Begin, request_id=NAMES, tenant=NAMES, replica=NAMES, prompt_bytes=COUNTS, started_wall_s=SECONDS)


@given(USAGES | BEGINS)
def test_a_record_comes_out_as_it_went_in(record: Usage | Begin) -> None:
    line = encode(record)
    assert len(line) <= MAX_RECORD
    assert line.count(b"\n") == 1
    assert b"\0" not in line
    assert decode(line) == record


@given(USAGES, st.data())
def test_a_changed_byte_is_noticed(record: Usage, data: st.DataObject) -> None:
    line = bytearray(encode(record))
    at = data.draw(st.integers(0, len(line) - 2))
    line[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptRecord):
        decode(bytes(line))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_record_are_refused(line: bytes) -> None:
    with pytest.raises(CorruptRecord):
        decode(line)


@pytest.mark.parametrize("char", ["x", "\x01", "é", "𝄞", "\ud800", '"'])
def test_the_worst_record_still_fits_and_keeps_its_ids(char: str) -> None:
    texts = {name: char * 9000 for name in Usage.__struct_fields__ if name in FIELD_BYTES}
    numbers = {
        f.name: 2**70 if f.type is int else 1.2345678901234567e-300
        for f in msgspec.structs.fields(Usage)
        if f.type in (int, float)
    }
    worst = Usage(**texts, **numbers, stream=True, outcome="refused", attempts=(Attempt(char * 9000, 2**70),) * 50)
    line = encode(worst)
    found = decode(line)
    assert len(line) <= MAX_RECORD
    assert isinstance(found, Usage)
    assert found.output_tokens == 2**63 - 1
    assert 0 < len(found.request_id) <= 64
    assert len(found.attempts) == 6


@pytest.mark.parametrize("char", ["x", "\x01", "é", "\ud800"])
def test_the_worst_record_keeps_every_payment(char: str) -> None:
    texts = {name: char * 9000 for name in Usage.__struct_fields__ if name in FIELD_BYTES}
    names = [f"{'t' * 82}:tokens:2026-11-{day}" for day in range(10, 18)]
    numbers = {
        f.name: 2**70 if f.type is int else 1.2345678901234567e-300
        for f in msgspec.structs.fields(Usage)
        if f.type in (int, float)
    }
    paid = tuple(Paid(name, 2**63 - 1, 2**63 - 1) for name in names)
    worst = Usage(**texts, **numbers, outcome="refused", attempts=(Attempt(char * 9000, 2**70),) * 9, paid=paid)
    line = encode(worst)
    found = decode(line)
    assert len(line) <= MAX_RECORD
    assert isinstance(found, Usage)
    assert found.paid == paid
    assert len(found.attempts) == 2


def test_the_worst_begin_fits() -> None:
    texts = {name: "\x01" * 9000 for name in Begin.__struct_fields__ if name in FIELD_BYTES}
    assert len(encode(Begin(**texts, prompt_bytes=2**70, max_tokens=2**70, started_wall_s=1e-300))) <= MAX_RECORD


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_json_has_not_becomes_zero(value: float) -> None:
    found = decode(encode(Usage(request_id="r1", tpot_s=value, ttft_s=0.5)))
    assert (found.tpot_s, found.ttft_s) == (0.0, 0.5)


def test_a_newer_writers_field_is_passed_over() -> None:
    class Newer(Usage, frozen=True, kw_only=True, tag=False):
        colour: str = ""

    body = b"E " + msgspec.json.encode(Newer(request_id="r1", colour="blue"))
    import zlib

    assert decode(b"%08x %b\n" % (zlib.crc32(body), body)) == Usage(request_id="r1")
