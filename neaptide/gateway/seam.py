"""The events of a replica that goes on with an answer, as the one that began it would have said them. Pure.

Id, time and model stay those of the first event; a second opening is left out; usage counts each token once. A chat
template may strip the text that it is given, so it is given none of the white space at its end: the replica says that
again, and here it is taken out.
"""

from __future__ import annotations

from typing import Any

import msgspec

from neaptide.gateway.transcript import DONE, Transcript, payloads

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_counts = msgspec.json.Decoder(dict[str, Any]).decode
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class Seam:
    """Between what `transcript` tells when it is made, and what one more replica says."""

    __slots__ = ("_given", "_had", "_named", "_role", "_skip")

    def __init__(self, transcript: Transcript, chat: bool) -> None:
        text = transcript.text
        given = sendable(text, chat)
        self._named, self._role = transcript.named, transcript.role
        self._skip = text[len(given) :]  # it is going to say this again
        self._had = transcript.tokens  # of the answer, not counting what is said again
        self._given = self._had if given else 0  # of these, in the prompt that it gets

    def adapt(self, data: bytes) -> bytes:
        """Whole events; perhaps none remain."""
        kept = (it if it == DONE else self._event(it) for it in payloads(data))
        return b"".join(b"data: %b\n\n" % it for it in kept if it)

    def _event(self, payload: bytes) -> bytes:
        try:
            fields = _fields(payload)
            told = bytes(fields.get("usage", b"null")) != b"null"
            if told:
                fields["usage"] = msgspec.Raw(_encode(self._usage(_counts(fields["usage"]))))
            if self._skip or (self._role and b'"role"' in payload):
                choices = _choices(fields["choices"]) if "choices" in fields else []
                if choices and not self._trim(choices[0]) and not told:
                    return b""
                if choices:
                    fields["choices"] = msgspec.Raw(_encode(choices))
        except (ValueError, TypeError):  # nothing that we understand: the client may
            return payload
        fields.update({name: value for name, value in self._named.items() if name in fields})
        return _encode(fields)

    def _trim(self, choice: dict[str, msgspec.Raw]) -> bool:
        """Take out what the client has. False: that was all."""
        delta = _fields(choice["delta"]) if "delta" in choice else {}
        place, name = (delta, "content") if "delta" in choice else (choice, "text")
        again = self._role and delta.pop("role", None) is not None
        said = _decode(place[name]) if name in place else None
        if said and self._skip:
            new = self._unsaid(said)
            again, said = again or not new, new
            place[name] = msgspec.Raw(_encode(new))
        if "delta" in choice:
            choice["delta"] = msgspec.Raw(_encode(delta))
        ends = bytes(choice.get("finish_reason", b"null")) != b"null"
        return not again or bool(said) or ends or any(_decode(v) for n, v in delta.items() if n != "content")

    def _unsaid(self, said: str) -> str:
        """`said` without the white space that was told before; a token of nothing else was counted before."""
        same = next((i for i, (a, b) in enumerate(zip(said, self._skip, strict=False)) if a != b), None)
        if same is None:
            same = min(len(said), len(self._skip))
        self._skip = self._skip[same:] if same == len(said) else ""
        if same == len(said):
            self._had, self._given = max(0, self._had - 1), max(0, self._given - 1)
        return said[same:]

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Prompt and answer as if one replica had counted both."""
        prompt = max(0, (usage.get("prompt_tokens") or 0) - self._given)
        output = self._had + (usage.get("completion_tokens") or 0)
        whole = {**usage, "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and (details.get("cached_tokens") or 0) > prompt:
            whole["prompt_tokens_details"] = {**details, "cached_tokens": prompt}
        return whole


def sendable(text: str, chat: bool) -> str:
    """What of `text` a replica is given to go on from."""
    return text.rstrip() if chat else text
