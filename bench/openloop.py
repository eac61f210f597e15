"""A client in a process of its own that sends streamed completions at given times, whatever comes of those before.

    .venv/bin/python -m bench.openloop --port P --plan FILE --out FILE < KEY

The plan, JSON: {"model", "requests": [[at_s, [token ids], answer tokens], ...], "at_once": null}. With `at_once: N` the
times are not looked at: N requests are in flight until `seconds` have passed (a closed loop). The key comes on stdin: a
command line can be read by others. Answers go past the end of sequence to their full length. The result, JSON:

    {"rows": [[number in the plan, sent_s, first_s, end_s, prompt tokens, answer tokens, error], ...],
     "late_s": largest lag behind the plan, "cpu_s": of this process, "wall_s"}

Times are seconds from the start of sending; first_s is when the first token was read, end_s the last. All requests are
built before the first is sent, and connections are kept, so that little is left to do between two of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httptools
import uvloop

TAIL_BYTES = 2048  # of an answer, in which its usage stands
USAGE = re.compile(rb'"prompt_tokens":(\d+).*?"completion_tokens":(\d+)', re.S)
Row = list[Any]


def packed(model: str, prompt: Sequence[int], tokens: int, key: str) -> bytes:
    body = json.dumps(
        {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        },
        separators=(",", ":"),
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One request at a time; `done` is told when its answer has ended, or broken off."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._row: Row | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def send(self, row: Row, request: bytes) -> None:
        self._row, self._tail = row, b""
        self._parser = httptools.HttpResponseParser(self)
        row[1] = self._client.now_s()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._now_s = self._client.now_s()  # before anything is made of it
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        row = self._row
        assert row is not None
        if row[2] is None and b'data: {"' in body:
            row[2] = self._now_s
        if b'"finish_reason":"' in body:
            row[3] = self._now_s
        self._tail = (self._tail + body)[-TAIL_BYTES:]

    def on_message_complete(self) -> None:
        row, status = self._row, self._parser.get_status_code()
        assert row is not None
        usage = USAGE.search(self._tail)
        if status != 200 or usage is None or row[2] is None or row[3] is None:
            self._end(f"{status}: {self._tail[-300:].decode('utf-8', 'replace')}")
            self.close()
            return
        row[4:6] = int(usage[1]), int(usage[2])
        self._client.idle.append(self)  # first: a closed loop sends the next one within `_end`
        self._end("")

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._client.idle:
            self._client.idle.remove(self)
        if self._row is not None:
            self._end(f"connection lost: {exc or 'closed'}")

    def _end(self, error: str) -> None:
        row, self._row = self._row, None
        assert row is not None
        row[6] = error
        self._client.ended(row)


class Client:
    def __init__(self, port: int, key: str, plan: dict[str, Any]) -> None:
        self._port = port
        self._at_s = [float(at_s) for at_s, _, _ in plan["requests"]]
        self._packed = [packed(plan["model"], prompt, tokens, key) for _, prompt, tokens in plan["requests"]]
        self._at_once: int | None = plan.get("at_once")
        self._until_s = float(plan.get("seconds", 0.0))
        self._next = self._running = 0
        self._rested = asyncio.Event()
        self._opening: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None  # a mistake of ours, that no request is to be blamed for
        self.idle: list[Connection] = []
        self.rows: list[Row] = []

    def now_s(self) -> float:
        return time.monotonic() - self._began_s

    async def run(self) -> dict[str, Any]:
        cpu_s, self._began_s = time.process_time(), time.monotonic()
        if self._at_once is None:
            await self._at_their_times()
        else:
            for _ in range(self._at_once):
                self._send()
        while self._running:
            self._rested.clear()
            await self._rested.wait()
            if self._broken is not None:
                raise self._broken
        for connection in self.idle:
            connection.close()
        late_s = max((row[1] - self._at_s[row[0]] for row in self.rows), default=0.0) if self._at_once is None else 0.0
        return {
            "rows": sorted(self.rows),
            "late_s": late_s,
            "cpu_s": time.process_time() - cpu_s,
            "wall_s": self.now_s(),
        }

    def ended(self, row: Row) -> None:
        self.rows.append(row)
        self._running -= 1
        if self._at_once is not None and self.now_s() < self._until_s and not row[6]:
            self._send()
        self._rested.set()

    async def _at_their_times(self) -> None:
        for at_s in self._at_s:
            if (rest_s := at_s - self.now_s()) > 0:
                await asyncio.sleep(rest_s)
            self._send()

    def _send(self) -> None:
        """The next one of the plan; a closed loop begins again at its end."""
        number = self._next % len(self._packed)
        self._next += 1
        self._running += 1
        row: Row = [number, None, None, None, 0, 0, ""]
        if self.idle:
            self.idle.pop().send(row, self._packed[number])
            return
        task = asyncio.get_running_loop().create_task(self._send_anew(row, self._packed[number]))
        self._opening.add(task)
        task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        self._broken = self._broken or task.exception()
        self._rested.set()

    async def _send_anew(self, row: Row, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self._port)
        except OSError as e:
            row[1], row[6] = self.now_s(), f"no connection: {e}"
            self.ended(row)
            return
        connection.send(row, request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plan, key = json.loads(args.plan.read_text()), sys.stdin.readline().strip()

    async def run() -> dict[str, Any]:
        return await Client(args.port, key, plan).run()

    args.out.write_text(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
