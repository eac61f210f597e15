"""Tells gateways the table and hears their gauges: the control side of table.py, on a Unix socket."""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from neaptide.clock import mono_s
from neaptide.link import (
    ASK,
    FETCH,
    GAUGES,
    HELLO,
    LEASES,
    RETURN,
    TABLE,
    VERSION,
    FrameReader,
    Hello,
    LinkError,
    frame,
    private_umask,
    short_path,
)
from neaptide.table import Fast, Gauges, Held, Slow, Table, difference, parts, whole


class Gateway:
    """One connected gateway: what it says it is, what it holds, what it told last."""

    def __init__(self, hello: Hello, writer: asyncio.StreamWriter) -> None:
        self.id, self.epoch, self.pid = hello.name, hello.epoch, hello.pid
        self.writer = writer
        self.journal = f"{hello.name}-{hello.epoch}"  # its run's own name
        self.leases: dict[str, Held] = {}  # as far as it has told them
        self.held: Table | None = None  # what we last sent
        self.gauges: Gauges | None = None
        self.heard_s = mono_s()


class Budgets(Protocol):
    """What hears gateways' frames of budgets."""

    def hear(self, gateway: Gateway, kind: int, payload: bytes) -> None:
        """LinkError or ValueError for what is no such frame."""

    def left(self, gateway: Gateway) -> None:
        """This connection is over; there may be another one of the same gateway already."""


class Publisher:
    """Holds the table in force; `replace` sends everyone what changed. `on_gauges(gateway)` runs on each report."""

    def __init__(self, token: str, on_gauges: Callable[[Gateway], None], budgets: Budgets | None = None) -> None:
        self._token, self._on_gauges, self._budgets = token, on_gauges, budgets
        self.table = Table()
        self.gateways: dict[str, Gateway] = {}
        self._server: asyncio.AbstractServer | None = None
        # Versions must rise across restarts of control, so that a gateway never takes an old table for a new one.
        self._fast = self._slow = int(mono_s() * 1000)

    async def listen(self, path: Path) -> None:
        path.unlink(missing_ok=True)  # noqa: ASYNC240  (once, at start)
        with private_umask():
            self._server = await asyncio.start_unix_server(self._serve, short_path(path))

    def replace(self, fast: Fast, slow: Slow) -> bool:
        """Put a new table in force; the versions inside are ours to set. False when nothing changed."""
        old = self.table
        fast = msgspec.structs.replace(fast, version=old.fast.version)
        slow = msgspec.structs.replace(slow, version=old.slow.version)
        fast_differs, slow_differs = fast != old.fast, slow != old.slow
        if not fast_differs and not slow_differs:
            return False
        self._fast += fast_differs
        self._slow += slow_differs
        fast = msgspec.structs.replace(fast, version=self._fast)
        self.table = Table(fast=fast, slow=msgspec.structs.replace(slow, version=self._slow))
        for gateway in self.gateways.values():
            self._send(gateway)
        return True

    def in_force(self) -> bool:
        """Whether every connected gateway, and at least one, has said that it holds the table."""
        want = (self.table.fast.version, self.table.slow.version)
        told = [(g.gauges.fast, g.gauges.slow) if g.gauges else (0, 0) for g in self.gateways.values()]
        return bool(told) and all(t == want for t in told)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for gateway in list(self.gateways.values()):
            gateway.writer.close()

    # -- one connection ------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames, gateway = FrameReader(), None
        try:
            while data := await reader.read(1 << 16):
                for item in frames.feed(data):
                    gateway = self._take(item.type, item.payload, gateway, writer)
        except (ConnectionError, LinkError, ValueError):
            return  # a broken peer reconnects; a foreign one has no business here
        finally:
            if gateway is not None and self.gateways.get(gateway.id) is gateway:
                del self.gateways[gateway.id]
            if gateway is not None and self._budgets is not None:
                self._budgets.left(gateway)
            writer.close()

    def _take(self, kind: int, payload: bytes, gateway: Gateway | None, writer: asyncio.StreamWriter) -> Gateway | None:
        if gateway is None:
            return self._greet(kind, payload, writer)
        if kind == FETCH:
            gateway.held = None
            self._send(gateway)
        elif kind == GAUGES:
            gateway.gauges = msgspec.json.decode(payload, type=Gauges)
            gateway.heard_s = mono_s()
            self._on_gauges(gateway)
        elif kind in (LEASES, ASK, RETURN) and self._budgets is not None:
            self._budgets.hear(gateway, kind, payload)
        else:
            raise LinkError(f"a gateway sends no frame of type {kind}")
        return gateway

    def _greet(self, kind: int, payload: bytes, writer: asyncio.StreamWriter) -> Gateway:
        if kind != HELLO:
            raise LinkError("the first frame must be HELLO")
        hello = msgspec.json.decode(payload, type=Hello)
        if hello.version != VERSION or not hmac.compare_digest(hello.token, self._token):
            raise LinkError(f"{hello.name} speaks version {hello.version}, or has not our token")
        mine = Hello(token=self._token, role="control", name="control", pid=os.getpid())
        writer.write(frame(0, HELLO, msgspec.json.encode(mine)))
        gateway = self.gateways[hello.name] = Gateway(hello, writer)
        return gateway

    def _send(self, gateway: Gateway) -> None:
        delta = whole(self.table) if gateway.held is None else difference(gateway.held, self.table)
        gateway.held = self.table
        if not gateway.writer.is_closing():
            gateway.writer.writelines(frame(0, TABLE, msgspec.json.encode(part)) for part in parts(delta))
