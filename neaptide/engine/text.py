"""One answer's text as its tokens come: characters completed, stop strings cut, a resume's known part skipped.

Pure: no clock, no I/O. The text of a request does not depend on how its tokens were grouped into steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from neaptide.engine.tokens import Decoder


class Stops:
    """Finds the stop string that completes first (of those that complete together, the one that began first).

    What could still become a stop string is held back: the longest tail that begins one.
    """

    __slots__ = ("_held", "_longest", "_prefixes", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(s) for s in stops), default=1) - 1
        self._prefixes = frozenset(s[:n] for s in stops for n in range(1, len(s)))
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be shown, whether a stop string was found). After True nothing may be pushed."""
        text = self._held + text
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)[1]], True
        for n in range(min(self._longest, len(text)), 0, -1):
            if text[-n:] in self._prefixes:
                self._held = text[-n:]
                return text[:-n], False
        self._held = ""
        return text, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Text:
    """`push` ids, show what it returns, end when `stopped`; `finish` once when the engine ended the answer.

    `generated_ids` continue an answer of which the client has the first `emitted_chars` characters (None: all that they
    show): they are pushed at once, and what of their text the client lacks comes with the first `push` (or `finish`).
    """

    __slots__ = ("_decoder", "_owed", "_skip", "_stops", "known_chars", "stopped")

    def __init__(
        self,
        decoder: Decoder,
        stops: Sequence[str] = (),
        generated_ids: Sequence[int] = (),
        emitted_chars: int | None = 0,
    ) -> None:
        self._decoder = decoder
        self._stops = Stops(stops) if stops else None
        self._skip = emitted_chars or 0
        self._owed = ""
        self.stopped = False
        self.known_chars = emitted_chars or 0  # of this answer, that the client has from elsewhere
        if generated_ids:
            shown = self.push(generated_ids)
            if emitted_chars is None:
                self.known_chars = len(shown)
            else:
                self._owed = shown

    def push(self, ids: Sequence[int]) -> str:
        text = self._decoder.push(ids)
        if self._stops is not None and text:
            text, self.stopped = self._stops.push(text)
        if self._skip or self._owed:
            return self._resume(text)
        return text

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        if self.stopped:
            return self._resume("")
        text = self._decoder.flush()
        if self._stops is not None:
            text, self.stopped = self._stops.push(text)
            if not self.stopped:
                text += self._stops.flush()
        return self._resume(text)

    def _resume(self, text: str) -> str:
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        owed, self._owed = self._owed, ""
        return owed + text[skipped:]
