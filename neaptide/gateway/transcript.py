"""What a client has been told of an answer by replicas that bring text, so that another can go on with it. Pure.

A read costs an append: its bytes are kept as they came, and folded into text, at most 64 KB of it, when there are 16 KB
of them or when a replica was lost. An answer that is longer, or that holds more than text, is given up: nothing is kept
of it any more, and where its replica is lost it ends as it did before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

TEXT_BYTES = 64 << 10  # of an answer's text that is kept
FOLD_BYTES = 16 << 10  # of events that are kept before they are read
DONE = b"[DONE]"
NAMED = ("id", "object", "created", "model")  # what is the same in all events of an answer
WORDS = frozenset(("role", "content"))  # of a delta; whatever else it brings cannot be gone on with


class _Choice(msgspec.Struct):
    index: int = 0
    delta: dict[str, Any] | None = None
    text: str | None = None  # of a completion
    finish_reason: str | None = None


class _Counted(msgspec.Struct):
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Counted | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


class Transcript:
    """Ours, mutable, one an answer. What it tells is true after `fold`."""

    __slots__ = ("_raw", "_raw_bytes", "_text", "done", "finished", "named", "role", "tokens", "usable")

    def __init__(self) -> None:
        self._raw: list[bytes] = []
        self._raw_bytes = 0
        self._text = bytearray()
        self.usable = True  # False: given up
        self.role = self.finished = self.done = False  # was told; a finish reason; [DONE]
        self.tokens = 0  # as a replica counted them, or one for each event that brings text
        self.named: dict[str, msgspec.Raw] = {}  # what its first event said of all of them; empty: nothing was told

    @property
    def text(self) -> str:
        return self._text.decode()

    def keep(self, data: bytes) -> None:
        """Whole events that go to the client, perhaps within one HTTP chunk's framing."""
        if not self.usable:
            return
        self._raw.append(data)
        self._raw_bytes += len(data)
        if self._raw_bytes > FOLD_BYTES:
            self.fold()

    def fold(self) -> None:
        """Read what has been kept as bytes."""
        raw, self._raw, self._raw_bytes = b"".join(self._raw), [], 0
        if not self.usable:
            return
        for payload in payloads(raw):
            if payload == DONE:
                self.done = True
            elif not self._read(payload):
                self.give_up()
                return

    def ended(self) -> bool:
        """Whether all of the answer was told, as far as it is followed."""
        if self._raw and self._raw[-1].rstrip().endswith(b"data: [DONE]"):
            return True
        self.fold()
        return self.done or self.finished or not self.usable

    def give_up(self) -> None:
        self.usable = self.finished = False
        self._raw, self._raw_bytes, self._text = [], 0, bytearray()

    def ending(self, chat: bool) -> bytes:
        """The event that ends an answer at its limit, whose replica was lost before it could say so."""
        said: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": "length"}
        return b"data: %b\n\n" % _encode({**self.named, "choices": [choice]})

    def _read(self, payload: bytes) -> bool:
        """One event. False: the answer cannot be gone on with."""
        try:
            event = _decode(payload)
            if not self.named:
                self.named = {n: v.copy() for n, v in _fields(payload).items() if n in NAMED}
        except ValueError:
            return False
        choices = event.choices or ()
        if bytes(event.error) not in (b"", b"null") or len(choices) > 1:
            return False
        counted = event.usage.completion_tokens if event.usage is not None else None
        if counted is not None:
            self.tokens = counted
        return not choices or self._hear(choices[0], counted is None)

    def _hear(self, choice: _Choice, count: bool) -> bool:
        delta = choice.delta or {}
        said = choice.text if choice.text is not None else delta.get("content")
        if choice.index or not isinstance(said, str | None) or any(delta[it] for it in delta.keys() - WORDS):
            return False
        role, ends = bool(delta.get("role")), choice.finish_reason is not None
        self.role, self.finished = self.role or role, self.finished or ends
        if said is not None and count and (said or not (role or ends)):  # half a character is a token too
            self.tokens += 1
        self._text += (said or "").encode()
        return len(self._text) <= TEXT_BYTES


def payloads(data: bytes) -> Iterator[bytes]:
    """Of the events in `data`; comments, blank lines and the framing of chunks are passed over."""
    for line in data.split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()
