"""Newline JSON over a Unix socket: supervisor and control.

    control -> supervisor   {"n": 1, "op": "spawn", "body": {...}}
    supervisor -> control   {"n": 1, "body": {...}}   or {"n": 1, "error": {code, what, why, fix}}
    supervisor -> control   {"event": "exit", "body": {...}}

Lines of at most 4 MiB; the socket is 0600 in a 0700 directory, which is the authentication.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from neaptide.errors import NeaptideError, ProcessError
from neaptide.link import private_umask, short_path

LINE = 4 << 20


class Message(msgspec.Struct, omit_defaults=True):
    n: int = 0
    op: str = ""
    event: str = ""
    body: msgspec.Raw = msgspec.Raw(b"null")
    error: dict[str, str] | None = None


Answer = Callable[[str, msgspec.Raw], Awaitable[Any]]


class Server:
    """Answers calls with `answer(op, body)`; `tell` sends an event to everyone connected."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.AbstractServer | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # noqa: ASYNC240  (once, at start)
        with private_umask():
            self._server = await asyncio.start_unix_server(self._serve, short_path(path), limit=LINE)

    def tell(self, event: str, body: object) -> None:
        line = msgspec.json.encode(Message(event=event, body=msgspec.Raw(msgspec.json.encode(body)))) + b"\n"
        for writer in self._writers:
            writer.write(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while line := await reader.readline():
                call = asyncio.create_task(self._call(msgspec.json.decode(line, type=Message), writer))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)
        except (ConnectionError, ValueError):
            return  # a broken peer; it reconnects
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _call(self, message: Message, writer: asyncio.StreamWriter) -> None:
        try:
            result = await self._answer(message.op, message.body)
            reply = Message(n=message.n, body=msgspec.Raw(msgspec.json.encode(result)))
        except NeaptideError as e:
            reply = Message(n=message.n, error=e.as_dict())
        except (msgspec.ValidationError, OSError) as e:
            reply = Message(n=message.n, error={"code": "E302", "what": f"{message.op}: {e}"})
        if not writer.is_closing():
            writer.write(msgspec.json.encode(reply) + b"\n")

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.close()


class Client:
    """Calls with answers, and events to `on_event(event, body)`. Ends with the connection: `on_close()`."""

    def __init__(self, on_event: Callable[[str, msgspec.Raw], None], on_close: Callable[[], None]) -> None:
        self._on_event, self._on_close = on_event, on_close
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        reader, self._writer = await asyncio.open_unix_connection(short_path(path), limit=LINE)
        self._reading = asyncio.create_task(self._read(reader))

    async def call(self, op: str, body: object = None, timeout_s: float = 30.0) -> bytes:
        """The answer's body; ProcessError with the other side's words, or when it does not answer in time."""
        if self._writer is None or self._writer.is_closing():
            raise ProcessError(f"{op}: the supervisor is not connected", code="E302")
        n = next(self._numbers)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[n] = future
        self._writer.write(
            msgspec.json.encode(Message(n=n, op=op, body=msgspec.Raw(msgspec.json.encode(body)))) + b"\n"
        )
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise ProcessError(f"{op}: no answer from the supervisor in {timeout_s:g} s", code="E302") from None
        finally:
            self._waiting.pop(n, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self._take(msgspec.json.decode(line, type=Message))
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ProcessError("the supervisor went away", code="E302"))
        self._on_close()

    def _take(self, message: Message) -> None:
        if message.event:
            self._on_event(message.event, message.body)
            return
        future = self._waiting.get(message.n)
        if future is None or future.done():
            return
        if message.error is not None:
            e = message.error
            error = ProcessError(e.get("what", ""), why=e.get("why", ""), fix=e.get("fix", ""), code=e.get("code"))
            future.set_exception(error)
        else:
            future.set_result(bytes(message.body))

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()
