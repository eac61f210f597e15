"""One request as a client sees it: sent, first token, last token, how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Protocol

from neaptide.clock import mono_s
from neaptide.demo.records import Visit
from neaptide.errors import NeaptideError


class Stream(Protocol):
    """A streamed answer: the payloads of its events; [DONE] ends the iteration, anything else that ends it raises."""

    @property
    def request_id(self) -> str: ...
    def __iter__(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


Open = Callable[[bytes], Stream]  # raises NeaptideError


def visit(open_stream: Open, body: bytes, began_s: float) -> Visit:
    """Send `body` and read the answer. What goes wrong stands in the Visit."""
    made = Visit(at_s=mono_s() - began_s)
    try:
        stream = open_stream(body)
        made.request_id = stream.request_id
        try:
            for payload in stream:
                _read(json.loads(payload), made, mono_s() - began_s)
        finally:
            stream.close()
    except NeaptideError as e:
        made.error = made.error or f"{e.code}: {e.what}"
    except (OSError, ValueError) as e:
        made.error = made.error or f"{type(e).__name__}: {e}"
    made.end_s = mono_s() - began_s if made.error or not made.end_s else made.end_s
    return made


def _read(event: dict[str, object], made: Visit, now_s: float) -> None:
    if "error" in event:
        told = event["error"]
        made.error = str(told.get("code") or told.get("message")) if isinstance(told, dict) else str(told)
        return
    choices = event.get("choices")
    if isinstance(choices, list) and any((c.get("delta") or {}).get("content") for c in choices):
        made.first_s = now_s if made.first_s is None else made.first_s
        made.end_s = now_s
        made.tokens += 1
