"""One answer on its way out: tokens to text to ready bytes, within the credit its reader has given.

Past its credit an answer coalesces: what comes is kept as ids and text and leaves as few large chunks. Memory is
bounded by the request's max_tokens. Pure: the sink's frames go out when its owner flushes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from neaptide.engine.text import Text
from neaptide.engine.tokens import Tokenizer
from neaptide.link import EndHeader
from neaptide.wire import chunks
from neaptide.wire.chunks import Logprob

QUIET_TOKENS = 16  # a non-streaming request's ids are told in groups of this many
QUIET_AT_MOST = 1024  # pieces in one frame once credit has come back
THINK_TAIL = 16  # prompt tokens that may follow a template's opening of the reasoning
MAX_DATA = 256 * 1024  # of one coalesced chunk, far below the link's frame limit


class Sink(Protocol):
    """Where an answer's frames go. `credit`: bytes of `token` payload (2 + 4 a token + data) it still takes."""

    credit: int

    def headers(self, pairs: list[tuple[str, str]]) -> None: ...
    def token(self, ids: Sequence[int], data: bytes) -> None: ...
    def end(self, header: EndHeader, last: bytes) -> None: ...


class _Piece(NamedTuple):
    ids: Sequence[int]
    text: str
    logprobs: Sequence[Logprob]


class Answer:
    """`push` each emission; `credit_came` when the sink has room again; `last_bytes` once `drained()`."""

    __slots__ = (
        "_chat", "_label", "_logprobs", "_opening", "_parts", "_pieces", "_sink", "_stream", "_text", "_thinking",
        "_tokenizer", "_usage", "begun", "output", "reasoned_before", "reasoning", "resumed", "sent",
    )  # fmt: skip

    def __init__(
        self,
        sink: Sink,
        tokenizer: Tokenizer,
        text: Text,
        label: chunks.Label,
        *,
        chat: bool,
        stream: bool,
        include_usage: bool,
        logprobs: bool,
        resumed: int = 0,
    ) -> None:
        """`resumed`: tokens of this answer that were generated elsewhere; they count in the client's usage."""
        self._sink, self._tokenizer, self._text, self._label = sink, tokenizer, text, label
        self._chat, self._usage = chat, include_usage
        self._stream = chunks.stream(label, chat=chat, include_usage=include_usage) if stream else None
        self._opening = self._stream.opening if self._stream is not None and not resumed else b""
        self._logprobs: list[Logprob] | None = [] if logprobs else None
        self._parts: list[str] = []
        self._pieces: list[_Piece] = []  # held back for want of credit, or (non-streaming) of QUIET_TOKENS
        self._thinking = False
        self.output = self.reasoning = self.reasoned_before = 0
        self.resumed = resumed
        self.begun = False  # the client has been sent something of this answer
        self.sent = 0  # token ids told to the sink

    @property
    def stopped(self) -> bool:
        """A stop string was found; what the engine makes from now on is not wanted."""
        return self._text.stopped

    @property
    def streaming(self) -> bool:
        return self._stream is not None

    def push(self, ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        self.output += len(ids)
        text = self._text.push(ids)
        if self._tokenizer.think_close is not None:
            self._count_reasoning(ids)
        if self._stream is None:
            self._push_quietly(ids, text, logprobs)
            return
        entries = self._entries(ids, logprobs)
        if not self._pieces:
            data = self._opening + self._stream.content(text, entries) if text or entries else self._opening
            if 2 + 4 * len(ids) + len(data) <= self._sink.credit:
                self._tell(ids, data)
                return
        self._pieces.append(_Piece(ids, text, entries))

    def credit_came(self) -> None:
        """Send what was held back, as far as the credit reaches."""
        while self._pieces and self._stream is not None and self._send_some(self._stream):
            pass

    def drained(self) -> bool:
        """Everything pushed was sent; for a non-streaming answer, whose text comes with its end, always."""
        return not self._pieces or self._stream is None

    def last_bytes(self, finish: str, prompt_tokens: int, cached_tokens: int) -> bytes:
        """What END carries: the stream's tail, or the whole body."""
        tokens = chunks.Tokens(
            prompt=prompt_tokens,
            output=self.resumed + self.output,
            cached=cached_tokens,
            reasoning=self.reasoned_before + self.reasoning,
        )
        rest = self._text.finish()
        if self._stream is None:
            self._tell_quietly()
            text = "".join(self._parts) + rest
            return chunks.answer(self._label, text, finish, tokens, chat=self._chat, logprobs=self._logprobs)
        out = [self._opening, self._stream.content(rest) if rest else b"", self._stream.finish(finish)]
        if self._usage:
            out.append(self._stream.usage(tokens))
        return b"".join([*out, chunks.DONE])

    def _tell(self, ids: Sequence[int], data: bytes) -> None:
        self._sink.token(ids, data)
        self.sent += len(ids)
        self.begun = True
        self._opening = b""

    def _entries(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> Sequence[Logprob]:
        if self._logprobs is None or logprobs is None:
            return ()
        raw = [self._tokenizer.token_bytes(id) for id in ids]
        return [Logprob(b.decode("utf-8", "replace"), logprob, b) for b, logprob in zip(raw, logprobs)]

    def _push_quietly(self, ids: Sequence[int], text: str, logprobs: Sequence[float] | None) -> None:
        if text:
            self._parts.append(text)
        if self._logprobs is not None:
            self._logprobs += self._entries(ids, logprobs)
        self._pieces.append(_Piece(ids, "", ()))
        if len(self._pieces) >= QUIET_TOKENS:
            self._tell_quietly()

    def _tell_quietly(self) -> None:
        take = min(len(self._pieces), QUIET_AT_MOST)
        ids = [id for piece in self._pieces[:take] for id in piece.ids]
        if ids and 2 + 4 * len(ids) <= self._sink.credit:
            self._sink.token(ids, b"")
            self.sent += len(ids)
            del self._pieces[:take]

    def _send_some(self, stream: chunks.Stream) -> bool:
        """One chunk of as many held pieces as the credit takes; halved until it fits. False when not even one does."""
        take = len(self._pieces)
        while take:
            pieces = self._pieces[:take]
            ids = [id for piece in pieces for id in piece.ids]
            text = "".join(piece.text for piece in pieces)
            entries = [entry for piece in pieces for entry in piece.logprobs]
            data = self._opening + stream.content(text, entries) if text or entries else self._opening
            if 2 + 4 * len(ids) + len(data) <= min(self._sink.credit, MAX_DATA):
                self._tell(ids, data)
                del self._pieces[:take]
                return True
            take //= 2
        return False

    def _count_reasoning(self, ids: Sequence[int]) -> None:
        for id in ids:
            if id == self._tokenizer.think_open:
                self._thinking = True
            self.reasoning += self._thinking
            if id == self._tokenizer.think_close:
                self._thinking = False

    def recall(self, prompt_ids: Sequence[int], generated_ids: Sequence[int]) -> None:
        """Whether the answer goes on inside reasoning: some templates open it, and a resume may stand in it."""
        marks = (self._tokenizer.think_open, self._tokenizer.think_close)
        if self._tokenizer.think_close is None:
            return
        last = next((id for id in reversed(prompt_ids[-THINK_TAIL:]) if id in marks), None)
        self._thinking = last is not None and last == self._tokenizer.think_open
        self._count_reasoning(generated_ids)
        self.reasoned_before, self.reasoning = self.reasoning, 0
