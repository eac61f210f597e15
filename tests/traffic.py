"""Clients for tests of the whole service: plain http.client, threads, nothing of ours."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import Service


def wait_for(true: Callable[[], Any], what: str, timeout_s: float = 20.0) -> Any:
    """The first truthy answer; an AssertionError naming `what` when none comes in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


class Answer:
    """One request on a connection of its own, read in a thread."""

    def __init__(self, service: Service, body: dict[str, Any], path: str = "/chat/completions") -> None:
        self.service, self.body, self.path = service, body, path
        self.status = 0
        self.text, self.events, self.tokens = "", 0, 0
        self.finish = self.error = self.message = ""
        self.done = False  # [DONE] seen, or a whole JSON body
        self.broken = ""  # the connection's end, when it was not clean
        self.first = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def join(self, timeout_s: float = 30.0) -> Answer:
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), f"no end after {timeout_s:g} s: {self.body}"
        return self

    def leave(self) -> None:
        """Hang up in the middle."""
        import socket

        self.connection.sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        url = urllib.parse.urlsplit(self.service.api)
        self.connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        headers = {"Authorization": f"Bearer {self.service.key}", "Content-Type": "application/json"}
        try:
            self.connection.request("POST", url.path + self.path, json.dumps(self.body), headers)
            response = self.connection.getresponse()
            self.status = response.status
            if self.body.get("stream") and response.status == 200:
                self._events(response)
            else:
                self._whole(json.loads(response.read()))
        except (OSError, http.client.HTTPException) as e:
            self.broken = repr(e)
        finally:
            self.first.set()
            self.connection.close()

    def _events(self, response: http.client.HTTPResponse) -> None:
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                self.done = True
                continue
            event = json.loads(line[6:])
            self.events += 1
            if "error" in event:
                self.error = event["error"]["code"] or event["error"]["message"]
                continue
            for choice in event["choices"]:
                self.text += choice.get("delta", {}).get("content") or choice.get("text") or ""
                self.finish = choice.get("finish_reason") or self.finish
                if self.text:
                    self.first.set()
            self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)

    def _whole(self, tree: dict[str, Any]) -> None:
        self.done = True
        if "error" in tree:
            self.error = tree["error"]["code"] or tree["error"]["message"]
            self.message = tree["error"]["message"]
            return
        choice = tree["choices"][0]
        self.text = choice.get("message", choice).get("content") or choice.get("text") or ""
        self.finish = choice["finish_reason"]
        self.tokens = tree["usage"]["completion_tokens"]


def chat(service: Service, text: str = "hello", model: str = "echo", **more: Any) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "ignore_eos": True, **more}
    return Answer(service, body)


def stream(service: Service, text: str = "hello", model: str = "echo", **more: Any) -> Answer:
    return chat(service, text, model, stream=True, **more)


def admin(service: Service, path: str) -> Any:
    """GET of the admin API."""
    token = (Path(service.state) / "admin-token").read_text().strip()
    request = urllib.request.Request(service.admin + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def usage_rows(service: Service) -> list[dict[str, Any]]:
    """Every Usage row the ledger has."""
    rows: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = admin(service, f"api/v1/usage?limit=500{'&cursor=' + cursor if cursor else ''}")
        rows += [r["usage"] for r in page["rows"]]
        cursor = page.get("next") or ""
        if not cursor:
            return rows


def rows_when(service: Service, n: int, timeout_s: float = 20.0) -> list[dict[str, Any]]:
    """The rows once there are `n`; more than `n` is an error too."""
    wait_for(lambda: len(usage_rows(service)) >= n, f"{n} usage rows", timeout_s)
    rows = usage_rows(service)
    assert len(rows) == n, [(r["outcome"], r.get("error")) for r in rows]
    return rows
