"""The engine process as the I/O process sees it: start it, speak pipe.py with it, know when it is gone."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol

import msgspec

from neaptide import lifeline
from neaptide.engine import pipe
from neaptide.errors import ProcessError
from neaptide.specs import ReplicaSpec


class Listener(Protocol):
    """Called from the event loop, in the order the engine wrote."""

    def heard(self, messages: list[pipe.FromEngine]) -> None: ...
    def gone(self, why: str) -> None: ...


class EngineChild:
    """`send` may be called before the engine is ready; the socket keeps what it cannot read yet."""

    def __init__(self, process: subprocess.Popen[bytes], transport: asyncio.Transport) -> None:
        self._process, self._transport = process, transport

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: pipe.ToEngine) -> None:
        self._transport.write(pipe.pack(message))

    def send_all(self, messages: list[pipe.ToEngine]) -> None:
        self._transport.write(b"".join(map(pipe.pack, messages)))

    async def close(self, timeout_s: float) -> int:
        """Ask it to end; after `timeout_s` kill it. Its exit code."""
        if not self._transport.is_closing():
            self.send(pipe.Close())
        return await self.wait(timeout_s)

    async def wait(self, timeout_s: float) -> int:
        """Its exit code; killed when it outlives `timeout_s`."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, self._process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await loop.run_in_executor(None, self._process.wait)


class _EngineEnd(asyncio.Protocol):
    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._reader = pipe.MessageReader()
        self._decode: Callable[[bytes], pipe.FromEngine] = pipe.from_engine.decode

    def data_received(self, data: bytes) -> None:
        try:
            messages = [self._decode(body) for body in self._reader.feed(data)]
        except ValueError as e:
            self._listener.gone(f"it wrote what cannot be read: {e}")
            return
        if messages:
            self._listener.heard(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.gone(str(exc) if exc is not None else "its end of the pipe closed")


class Started(NamedTuple):
    """An engine process; `sock` is our end of the pipe, which keeps what it says."""

    process: subprocess.Popen[bytes]
    sock: socket.socket


def start(spec: ReplicaSpec) -> Started:
    """Start the engine process, which loads from here on. ProcessError when that fails."""
    started = begin()
    tell(started, spec)
    return started


def begin(*engine: str) -> Started:
    """Start an engine process that waits for its spec; with an engine named it imports its library meanwhile."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    inherited = [theirs.fileno()]
    if (fd := lifeline.lifeline_fd()) is not None:
        inherited.append(fd)
    argv = [sys.executable, "-m", "neaptide.engine.core", str(theirs.fileno()), *engine]
    try:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=inherited)
    except OSError as e:
        raise ProcessError(f"the engine process cannot be started: {e}", why=os.strerror(e.errno or 0)) from e
    finally:
        theirs.close()
    return Started(process, ours)


def tell(started: Started, spec: ReplicaSpec) -> None:
    """Give it its spec. ProcessError when it has ended."""
    process = started.process
    # The boot token is the link's: the engine speaks with nobody else.
    document = msgspec.json.encode(msgspec.structs.replace(spec, token=""))
    assert process.stdin is not None  # noqa: S101 (it is a pipe: see above)
    try:
        process.stdin.write(document)
        process.stdin.close()
    except BrokenPipeError as e:
        code = process.wait()
        raise ProcessError(f"the engine process ended at once with code {code}", why="its error is on stderr") from e


async def attach(started: Started, listener: Listener) -> EngineChild:
    """From here on what the engine says comes to `listener`."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: _EngineEnd(listener), sock=started.sock)
    return EngineChild(started.process, transport)
