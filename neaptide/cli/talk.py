"""One answer from an OpenAI chat endpoint: streamed, measured on the client's side, cut short by Ctrl-C."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from neaptide.cli.client import MAX_ANSWER, Endpoint, Stream, exchange, refused
from neaptide.clock import mono_s
from neaptide.errors import NeaptideError, UnreachableError

# A model may write anything: what could move the cursor, retitle or paste into the terminal is shown as U+FFFD.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Asked(NamedTuple):
    """How to ask; None leaves the server's default."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None


class Answer(NamedTuple):
    text: str
    finish: str  # "" when it was cut short
    prompt_tokens: int | None  # None: the server did not tell
    cached_tokens: int
    output_tokens: int | None
    ttft_s: float | None
    tpot_s: float | None
    duration_s: float
    request_id: str
    cache: str = ""  # hit, shared or stale: it was told from the cache; miss; "" where there is none


def models(endpoint: Endpoint, key: str, timeout_s: float) -> list[str]:
    """The ids of GET /models, in the server's order."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    status, _, raw = exchange(endpoint, "GET", f"{endpoint.path}/models", headers, None, timeout_s)
    if status >= 400:
        raise refused(status, raw, endpoint)
    try:
        return [str(m["id"]) for m in json.loads(raw)["data"]]
    except (ValueError, KeyError, TypeError) as e:
        raise UnreachableError(f"{endpoint}/models does not list models", why=str(e), code="E402") from e


def ask(
    endpoint: Endpoint, key: str, how: Asked, messages: list[dict[str, str]], timeout_s: float,
    show: Callable[[str], None],
) -> Answer:  # fmt: skip
    """Stream one answer; `show` gets each piece as it comes, made safe for a terminal. Ctrl-C ends it: the answer so
    far, `finish` "". Raises UnreachableError, or the server's error as E610."""
    body: dict[str, Any] = {"model": how.model, "messages": messages, "stream": True}
    body["stream_options"] = {"include_usage": True}
    body |= {} if how.max_tokens is None else {"max_tokens": how.max_tokens}
    body |= {} if how.temperature is None else {"temperature": how.temperature}
    heard = _Heard(mono_s())
    stream: Stream | None = None
    try:
        stream = Stream(endpoint, "/chat/completions", json.dumps(body).encode(), key, timeout_s)
        heard.request_id, heard.cache = stream.request_id, stream.cache
        for payload in stream:
            piece = heard.take(payload, endpoint)
            if piece:
                show(_CONTROL.sub("�", piece))
    except KeyboardInterrupt:
        heard.finish = ""
    finally:
        if stream is not None:
            stream.close()
    return heard.answer()


class _Heard:
    """What has come so far."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.first_s = self.last_s = 0.0
        self.pieces: list[str] = []
        self.chars = 0
        self.finish = self.request_id = self.cache = ""
        self.usage: dict[str, Any] = {}

    def take(self, payload: bytes, endpoint: Endpoint) -> str:
        """The text of one event; NeaptideError when the event is an error."""
        try:
            event = json.loads(payload)
        except ValueError as e:
            raise UnreachableError(f"{endpoint} sent an event that is not JSON", why=str(e), code="E402") from e
        if "error" in event:
            error = refused(500, payload, endpoint)
            raise NeaptideError(error.what, why="the answer broke off", fix="neaptide logs --status 500", code="E611")
        self.usage = event.get("usage") or self.usage
        choice = (event.get("choices") or [{}])[0]
        self.finish = choice.get("finish_reason") or self.finish
        text = str((choice.get("delta") or {}).get("content") or "")
        if text:
            self.last_s = mono_s()
            self.first_s = self.first_s or self.last_s
            self.chars += len(text)
            if self.chars > MAX_ANSWER:
                raise UnreachableError(f"{endpoint} sent an endless answer", code="E402")
            self.pieces.append(text)
        return text

    def answer(self) -> Answer:
        tokens = self.usage.get("completion_tokens")
        details = self.usage.get("prompt_tokens_details") or {}
        tpot = (self.last_s - self.first_s) / (tokens - 1) if tokens and tokens > 1 else None
        return Answer(
            text="".join(self.pieces),
            finish=self.finish,
            prompt_tokens=self.usage.get("prompt_tokens"),
            cached_tokens=int(details.get("cached_tokens") or 0),
            output_tokens=tokens,
            ttft_s=self.first_s - self.began_s if self.first_s else None,
            tpot_s=tpot,
            duration_s=mono_s() - self.began_s,
            request_id=self.request_id,
            cache=self.cache,
        )
