"""The first question `up` asks its own service: through the front door, streamed, timed."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from neaptide.cli.client import Endpoint
from neaptide.cli.words import say
from neaptide.clock import mono_s
from neaptide.errors import NeaptideError

TIMEOUT_S = 60.0


def self_test(api: str, key: str, leaf: Path | None = None) -> str:
    """One line: what the first model answered and how fast, or why it did not. `leaf`: as Endpoint has it."""
    url = Endpoint.of(api, leaf)
    try:
        models = _get(url, key)
        if not models:
            return say("up.selftest_failed", why="no models")
        return _line(models[0], *_ask(url, key, models[0]))
    except (NeaptideError, OSError, http.client.HTTPException, ValueError, KeyError) as e:
        return say("up.selftest_failed", why=getattr(e, "what", e))


def _get(url: Endpoint, key: str) -> list[str]:
    connection = url.connect(TIMEOUT_S)
    connection.request("GET", url.path + "/models", headers={"Authorization": f"Bearer {key}"})
    listed: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return [m["id"] for m in listed["data"]]


def _ask(url: Endpoint, key: str, model: str) -> tuple[float, float, int]:
    """(TTFT s, TPOT s, tokens), from the client's side."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 48}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    connection = url.connect(TIMEOUT_S)
    began_s = mono_s()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", url.path + "/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
    first_s = last_s = 0.0
    tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise ValueError(chunk["error"].get("message", "error event"))
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if chunk["choices"] and chunk["choices"][0].get("delta", {}).get("content"):
            last_s = mono_s()
            first_s = first_s or last_s
    connection.close()
    tpot_s = (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0
    return first_s - began_s if first_s else 0.0, tpot_s, tokens


def _line(model: str, ttft_s: float, tpot_s: float, tokens: int) -> str:
    return say("up.selftest", model=model, ttft_ms=ttft_s * 1e3, tpot_ms=tpot_s * 1e3, tokens=tokens)
