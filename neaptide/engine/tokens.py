"""Text to token ids and back: the tokenizer of a model directory, and the byte tokenizer of the echo engine.

Decoding is incremental and never shows half a character. Where a token is a run of bytes (byte-level BPE, and echo) a
table and an incremental UTF-8 decoder are exact and cost 0.2 us a token; other vocabularies (SentencePiece style) go
through `tokenizers.DecodeStream`. Both agree with decoding the whole (tests/test_text.py).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import decoders

from neaptide.errors import ModelError

PENDING_TOKENS = 16  # tokens that may wait for their character to complete: UTF-8 needs 4 at most
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """One answer's ids to text, in order; `flush` once at the end, for what was held back."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """Thread-safe. Ids outside the vocabulary decode to nothing."""

    vocab_size: int
    longest_token: int  # characters; a text of n characters has at least n / longest_token tokens
    think_open: int | None  # the ids that bracket reasoning, where the vocabulary has such tokens
    think_close: int | None

    def encode(self, text: str, special: bool) -> list[int]:
        """`special`: add what the model wants around a bare text (a begin token, say)."""

    def decoder(self) -> Decoder: ...
    def token_bytes(self, id: int) -> bytes:
        """What the token is alone, as logprobs tell it: special tokens by their name."""


class ByteDecoder:
    """Tokens are runs of bytes. Invalid sequences become U+FFFD only once they can no longer become valid."""

    __slots__ = ("_bytes", "_utf8")

    def __init__(self, table: ByteTable) -> None:
        self._bytes = table.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, ids: Sequence[int]) -> str:
        if len(ids) == 1:
            return self._utf8(self._bytes(ids[0]))
        return self._utf8(b"".join(map(self._bytes, ids)))

    def flush(self) -> str:
        return self._utf8(b"", True)


class ByteTable(Protocol):
    def bytes_of(self, id: int) -> bytes: ...


class ByteTokenizer:
    """Echo's vocabulary: id 0..255 is the byte; 256 ends, 257 begins and neither shows."""

    vocab_size = 258
    longest_token = 1
    think_open: int | None = None
    think_close: int | None = None

    def __init__(self) -> None:
        self._table = [bytes((i,)) for i in range(256)]

    def encode(self, text: str, special: bool) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decoder(self) -> Decoder:
        return ByteDecoder(self)

    def bytes_of(self, id: int) -> bytes:
        return self._table[id] if id < 256 else b""

    token_bytes = bytes_of


class ModelTokenizer:
    """A Hugging Face tokenizer.json."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.longest_token = max(map(len, inner.get_vocab(with_added_tokens=True)), default=1)
        self.think_open = inner.token_to_id("<think>")
        self.think_close = inner.token_to_id("</think>")
        added = inner.get_added_tokens_decoder()
        self._special = {id: token.content.encode() for id, token in added.items() if token.special}
        self._cache = {id: b"" if token.special else token.content.encode() for id, token in added.items()}
        self._bytewise = isinstance(inner.decoder, decoders.ByteLevel)

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._inner.encode(text, add_special_tokens=special).ids
        return ids

    def decoder(self) -> Decoder:
        return ByteDecoder(self) if self._bytewise else StreamDecoder(self._inner)

    def bytes_of(self, id: int) -> bytes:
        known = self._cache.get(id)
        if known is None:
            token = self._inner.id_to_token(id)
            known = self._cache[id] = b"" if token is None else _byte_level(token)
        return known

    def token_bytes(self, id: int) -> bytes:
        if id in self._special:
            return self._special[id]
        if self._bytewise:
            return self.bytes_of(id)
        return self._inner.decode([id], skip_special_tokens=True).encode()


class StreamDecoder:
    """DecodeStream, guarded: it holds back while the text ends in U+FFFD, for ever if the model emits broken bytes, and
    it raises when a decoder rewrites what it has already told. In both cases the whole is decoded anew."""

    __slots__ = ("_ids", "_inner", "_pending", "_shown", "_stream")

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._pending = 0
        self._shown = 0  # characters told so far

    def push(self, ids: Sequence[int]) -> str:
        out = []
        for id in ids:
            self._ids.append(id)
            try:
                text = self._stream.step(self._inner, id)
            except Exception:  # tokenizers raises bare Exception; the whole is decoded instead
                text = self._again()
            if text is None:
                self._pending += 1
                text = self._again() if self._pending > PENDING_TOKENS else None
            if text:
                self._pending = 0
                self._shown += len(text)
                out.append(text)
        return "".join(out)

    def flush(self) -> str:
        return self._inner.decode(self._ids, skip_special_tokens=True)[self._shown :] if self._pending else ""

    def _again(self) -> str:
        self._stream = decoders.DecodeStream(ids=list(self._ids), skip_special_tokens=True)
        text: str = self._inner.decode(self._ids, skip_special_tokens=True)
        return text[self._shown :]


def _byte_level(token: str) -> bytes:
    """A byte-level BPE token's bytes. A token with a character outside the alphabet stands for itself, as in
    tokenizers' own decoder."""
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def load_tokenizer(directory: Path) -> ModelTokenizer:
    """ModelError when tokenizer.json is missing or unreadable."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} has no tokenizer.json",
            why="the replica turns text into tokens with it",
            fix="export the model together with its fast tokenizer (neaptide models convert does)",
            code="E220",
        )
    try:
        return ModelTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as e:  # tokenizers raises bare Exception
        why = f"{type(e).__name__}: {e}"
        raise ModelError(f"{path} cannot be read", why=why, fix="export the tokenizer again", code="E221") from e
