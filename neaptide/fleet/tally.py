"""Asking an own replica what it knows of requests whose gateway died: one short link connection, one TALLY."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from neaptide.link import HELLO, TALLY, FrameReader, Hello, LinkError, TallyRow, frame, short_path


async def ask(link_path: Path, token: str, request_ids: Sequence[str], timeout_s: float = 2.0) -> dict[str, TallyRow]:
    """What the replica tells of `request_ids`; empty when it does not answer: they close without counts."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(short_path(link_path))
            try:
                hello = msgspec.json.encode(Hello(token=token, role="control", name="control"))
                writer.write(frame(0, HELLO, hello) + frame(0, TALLY, msgspec.json.encode(list(request_ids))))
                return await _answer(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError, LinkError, ValueError):
        return {}


async def _answer(reader: asyncio.StreamReader) -> dict[str, TallyRow]:
    frames = FrameReader()
    while data := await reader.read(1 << 16):
        for item in frames.feed(data):
            if item.type == TALLY:
                return msgspec.json.decode(item.payload, type=dict[str, TallyRow])
    return {}
