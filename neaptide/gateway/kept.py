"""An answer as it is kept, to be told again: cut where its id stands, because each telling has an id of its own.

Of a stream, `usage` is cut out of its chunks too: each client gets it, or not, as it asked. Only what is understood is
kept: JSON with choices that have all come to a good end, and of a stream events of one line each, up to [DONE].
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Raw

from neaptide.gateway.sse import Counts
from neaptide.wire import chunks

GOOD_ENDS = frozenset(("stop", "length", "tool_calls", "function_call"))  # a filter's verdict is not for ever
PART_BYTES = 90  # what a part takes beside its bytes, roughly
NULL_USAGE = b',"usage":null'

_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_encode = msgspec.json.Encoder().encode


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    finish_reason: str | None = None


_choices = msgspec.json.Decoder(list[_Choice]).decode


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer with status 200. `parts`: an id stands between each two."""

    parts: tuple[bytes, ...]
    last: bytes = b""  # of a stream: its usage chunk behind the id; empty where usage is not known
    stream: bool
    counts: Counts
    finish: str
    content_type: bytes
    passed: bytes = b""  # header lines
    revision: str = ""

    @property
    def size(self) -> int:
        return sum(map(len, self.parts)) + len(self.last) + len(self.passed) + PART_BYTES * len(self.parts)

    def told(self, id: str, include_usage: bool = False) -> bytes:
        """The body, or all events, under this id."""
        name = _encode(id)
        if not self.stream:
            return name.join(self.parts)
        if not include_usage:
            return name.join(self.parts) + chunks.DONE
        usage = self.parts[0] + name + self.last if self.last else b""
        return (name + NULL_USAGE).join(self.parts) + usage + chunks.DONE


def of_whole(body: bytes) -> tuple[bytes, ...] | None:
    """The parts of an answer that did not stream; None where it is not to be kept."""
    try:
        fields = _fields(body)
        ends = [choice.finish_reason for choice in _choices(fields["choices"])]
    except (ValueError, KeyError, RecursionError):
        return None
    if "error" in fields or fields.pop("id", None) is None or not ends or not GOOD_ENDS.issuperset(ends):
        return None
    return b'{"id":', b"," + _encode(fields)[1:]


def of_stream(data: bytes, counts: Counts | None) -> tuple[tuple[bytes, ...], bytes] | None:
    """The parts of a stream and the end of its usage chunk; None where it is not to be kept. `counts`: what the usage
    chunk says, where none came because the client did not ask for it."""
    parts = [b'data: {"id":']
    ends: dict[int, str | None] = {}
    usage: Raw | bytes = _encode(chunks.usage_object(_tokens(counts))) if counts is not None else b""
    fields: dict[str, Raw] = {}
    try:
        for line in _lines(data):
            fields = _fields(line)
            choices, told = _choices(fields["choices"]), fields.pop("usage", None)
            if "error" in fields or fields.pop("id", None) is None:
                return None
            if told is not None and bytes(told).strip() != b"null":
                if choices:
                    return None
                usage = told
                continue
            ends.update((c.index, ends.get(c.index) or c.finish_reason) for c in choices)
            parts.append(b"," + _encode(fields)[1:] + b"\n\n" + parts[0])
    except (ValueError, KeyError, RecursionError):
        return None
    if not ends or not GOOD_ENDS.issuperset(ends.values()):
        return None
    parts[-1] = parts[-1].removesuffix(parts[0])
    fields |= {"choices": Raw(b"[]"), "usage": Raw(usage)}
    return tuple(parts), b"," + _encode(fields)[1:] + b"\n\n" if usage else b""


def _lines(data: bytes) -> Iterator[bytes]:
    """The data of each event up to [DONE], comments left out. ValueError for what is no such stream."""
    done = False
    for event in data.replace(b"\r\n", b"\n").split(b"\n\n"):
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        if not lines:
            continue
        if done or len(lines) > 1 or not lines[0].startswith(b"data:"):
            raise ValueError("not a stream of single lines")
        line = lines[0][5:].strip()
        done = line == b"[DONE]"
        if not done:
            yield line
    if not done:
        raise ValueError("a stream without an end")


def _tokens(counts: Counts) -> chunks.Tokens:
    return chunks.Tokens(prompt=counts.prompt, output=counts.output, cached=counts.cached, reasoning=counts.reasoning)
