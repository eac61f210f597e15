"""Frames: whatever the network cuts, the same frames come out; whatever a peer sends, a LinkError at worst."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide import link
from neaptide.link import MAX_FRAME, Frame, FrameReader, LinkError, frame, pack_token, split_header, split_token

frames = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=300)), max_size=20)


@given(frames, st.data())
def test_frames_survive_any_split_of_their_bytes(sent: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    wire = b"".join(frame(s, k, p) for s, k, p in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    reader, got = FrameReader(), []
    for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += reader.feed(wire[a:b])
    assert got == [Frame(*x) for x in sent]


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_give_frames_or_a_link_error(data: bytes) -> None:
    try:
        for item in FrameReader().feed(data):
            for split in (split_header, split_token):
                try:
                    split(item.payload)
                except LinkError:
                    continue
    except LinkError:
        return


def test_a_frame_over_the_limit_is_refused_on_both_sides_before_it_is_buffered() -> None:
    with pytest.raises(LinkError, match="exceeds"):
        frame(1, link.TOKEN, bytes(MAX_FRAME + 1))
    with pytest.raises(LinkError, match="exceeds"):
        FrameReader().feed((MAX_FRAME + 1).to_bytes(4, "little") + bytes(5))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.binary(max_size=100))
def test_token_frames_carry_ids_and_ready_bytes(ids: list[int], data: bytes) -> None:
    assert split_token(pack_token(ids, data)) == (tuple(ids), data)


def test_headers_round_trip_with_the_bytes_behind_them() -> None:
    end = link.EndHeader(status=429, finish="error", error="busy", retryable=True)
    head, rest = split_header(link.pack_header(end, b"body"))
    assert msgspec.json.decode(head, type=link.EndHeader) == end
    assert rest == b"body"
    with pytest.raises(LinkError):
        split_header(b"\xff\xff{}")


def test_a_socket_path_too_long_for_the_kernel_is_shortened_to_the_same_file(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    short = link.short_path(deep / "x.sock")
    assert len(short) < 100
    Path(short).touch()
    assert (deep / "x.sock").exists()
    assert os.path.samefile(short, deep / "x.sock")
