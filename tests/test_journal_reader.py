"""The reader: from any offset, in any portions, through torn tails and holes; damage is reported, never swallowed."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.journal import Gap, Located, encode, scan, segments
from neaptide.journal.reader import READ_BYTES
from neaptide.types import Usage

LINES = st.lists(st.builds(Usage, request_id=st.text("ab", max_size=3), error=st.text(max_size=60)), max_size=30)


def read_all(directory: Path, limit: int = 1000) -> tuple[list[Located], list[Gap]]:
    offset, records, gaps = 0, [], []
    while True:
        part = scan(directory, 1, offset, finished=True, limit=limit)
        records += part.records
        gaps += part.gaps
        if part.done:
            return records, gaps
        assert part.offset > offset
        offset = part.offset


@given(LINES, st.integers(1, 7), st.integers(0, 9000))
def test_portions_of_any_size_add_up_to_the_whole(usages: list[Usage], limit: int, unwritten: int) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "00000001.log").write_bytes(b"".join(map(encode, usages)) + bytes(unwritten))
        records, gaps = read_all(directory, limit)
    assert [r.value for r in records] == usages
    assert gaps == []


@given(LINES.filter(bool), st.data())
def test_a_torn_tail_costs_one_record_and_is_named(usages: list[Usage], data: st.DataObject) -> None:
    whole = b"".join(map(encode, usages))
    last = encode(usages[-1])
    cut = data.draw(st.integers(1, len(last) - 1))
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "00000001.log").write_bytes(whole[:-cut] + bytes(data.draw(st.integers(0, 5000))))
        live = scan(directory, 1, 0, finished=False)
        records, gaps = read_all(directory)
    assert [r.value for r in live.records] == [r.value for r in records] == usages[:-1]
    assert live.offset == len(whole) - len(last)
    assert live.gaps == []
    assert [(g.start, g.end) for g in gaps] == [(len(whole) - len(last), len(whole) - cut)]


@given(LINES, LINES, st.binary(min_size=1, max_size=3000).filter(lambda b: b.strip(b"\0")))
def test_damage_between_records_never_costs_those_before_or_two_after(
    before: list[Usage], after: list[Usage], damage: bytes
) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name)
        head = b"".join(map(encode, before))
        (directory / "00000001.log").write_bytes(head + damage + b"".join(map(encode, after)))
        live = scan(directory, 1, 0, finished=False)
        records, gaps = read_all(directory)
    values = [r.value for r in records]
    assert [r.value for r in live.records] == before
    assert values[: len(before)] == before
    assert values[len(before) :] in (after, after[1:])  # the damage may have run into the first one's line
    assert gaps
    assert gaps[0].start == len(head)


def test_a_hole_of_lost_pages_is_passed_over_and_reported(tmp_path: Path) -> None:
    first, second = encode(Usage(request_id="a")), encode(Usage(request_id="b"))
    (tmp_path / "00000001.log").write_bytes(first + bytes(8192) + second + bytes(100))
    records, gaps = read_all(tmp_path)
    assert [r.value.request_id for r in records] == ["a", "b"]
    assert [(g.start, g.end) for g in gaps] == [(len(first), len(first) + 8192)]


@pytest.mark.parametrize("shift", range(-40, 41, 8))
def test_a_record_across_the_edge_of_a_read_is_whole(tmp_path: Path, shift: int) -> None:
    line = encode(Usage(request_id="r", error="x" * 200))
    filler = encode(Usage(request_id="f", error="y" * 100))
    count, rest = divmod(READ_BYTES + shift, len(filler))
    blob = filler * (count - 1) + filler[:0] + bytes(len(filler) + rest) + line * 3
    (tmp_path / "00000001.log").write_bytes(blob)
    records, gaps = read_all(tmp_path, limit=10**6)
    assert [r.value.request_id for r in records] == ["f"] * (count - 1) + ["r"] * 3
    assert [(g.start, g.end) for g in gaps] == [(len(filler) * (count - 1), READ_BYTES + shift)]


def test_a_directory_that_is_not_there_has_no_segments(tmp_path: Path) -> None:
    assert segments(tmp_path / "none") == []
    with pytest.raises(FileNotFoundError):
        scan(tmp_path, 1, 0, finished=True)
