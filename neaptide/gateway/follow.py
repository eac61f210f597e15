"""Follows control: takes the table, keeps a copy on disk, sends gauges.

While control is away the gateway serves from what it holds, and after a restart from the copy (0600: it carries the
replicas' tokens and the keys' digests). A gap in the versions is answered with FETCH.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from neaptide import link, table
from neaptide.link import FETCH, GAUGES, GRANT, HELLO, RECALL, TABLE, FrameReader, Hello, LinkError, frame
from neaptide.table import Delta, Gauges, Table

log = logging.getLogger("neaptide.gateway")

GAUGES_S = 0.25
RECONNECT_S = (0.1, 0.25, 0.5, 1.0)
HELLO_S = 5.0


def load_table(path: Path) -> Table | None:
    """The copy of the last run; None when there is none, or it cannot be read (control will send a whole one)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Table)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        log.warning("the stored table %s cannot be used, waiting for control: %s", path, e)
        return None


def save_table(path: Path, held: Table) -> None:
    """Atomically: a crash leaves the old or the new table, never half of one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(held))
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class Till(Protocol):
    """What asks control for leases of budgets."""

    def connected(self, say: Callable[[int, Any], None]) -> None: ...
    def disconnected(self) -> None: ...
    def hear(self, kind: int, payload: bytes) -> None: ...


class Follower:
    """`install` is called in the loop with every new table; `gauges` is asked each GAUGES_S; `till` hears the rest."""

    def __init__(
        self,
        control_path: str,
        table_path: Path,
        hello: Hello,
        install: Callable[[Table], None],
        gauges: Callable[[], Gauges],
        till: Till,
    ) -> None:
        self._control_path, self._table_path = control_path, table_path
        self._hello = hello
        self._install, self._gauges, self._till = install, gauges, till
        self._table = Table()
        self._starving = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._save: asyncio.Task[None] | None = None
        self._saved = Table()

    def start(self) -> None:
        """Serve from the copy, if there is one, and begin to follow."""
        stored = load_table(self._table_path)
        if stored is not None:
            self._table = self._saved = stored
            self._install(stored)
        self._task = asyncio.get_running_loop().create_task(self._follow())

    def starving(self) -> None:
        """A request waits and no replica is ready: control should hear at once, not at the next beat."""
        self._starving.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._save is not None:
            await self._save

    async def _follow(self) -> None:
        failures = 0
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(link.short_path(self._control_path))
            except OSError as e:
                if failures == 0:
                    log.info("control is away (%s); serving from the table held", e.strerror or e)
                await asyncio.sleep(RECONNECT_S[min(failures, len(RECONNECT_S) - 1)])
                failures += 1
                continue
            try:
                await self._converse(reader, writer)
                failures = 0
            except (OSError, LinkError, ValueError, TimeoutError) as e:
                log.warning("the connection to control broke: %s", e or type(e).__name__)
                failures += 1
            finally:
                writer.close()
            await asyncio.sleep(RECONNECT_S[0])

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the connection ends: LinkError when control breaks the protocol."""
        frames = FrameReader()
        writer.write(frame(0, HELLO, msgspec.json.encode(self._hello)))
        self._fetch(writer)
        pulse = asyncio.get_running_loop().create_task(self._pulse(writer))
        greeted = False
        try:
            while True:
                async with asyncio.timeout(None if greeted else HELLO_S):
                    data = await reader.read(256 << 10)
                if not data:
                    return
                for f in frames.feed(data):
                    if f.type == HELLO and not greeted:
                        _check(msgspec.json.decode(f.payload, type=Hello), self._hello)
                        greeted = True
                        self._till.connected(partial(_say, writer))
                    elif f.type in (GRANT, RECALL) and greeted:
                        self._till.hear(f.type, f.payload)
                    elif f.type == TABLE and greeted:
                        self._take(msgspec.json.decode(f.payload, type=Delta), writer)
                    else:
                        raise LinkError(f"control sent an unexpected frame of type {f.type}")
        finally:
            self._till.disconnected()
            pulse.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await pulse

    def _fetch(self, writer: asyncio.StreamWriter, whole: bool = False) -> None:
        held = {"fast": 0, "slow": 0} if whole else {"fast": self._table.fast.version, "slow": self._table.slow.version}
        writer.write(frame(0, FETCH, msgspec.json.encode(held)))

    def _take(self, delta: Delta, writer: asyncio.StreamWriter) -> None:
        new = table.apply(self._table, delta)
        if new is None:
            log.info("a table delta does not follow what is held; asking for the whole")
            self._fetch(writer, whole=True)
            return
        self._table = new
        self._install(new)
        if self._save is None or self._save.done():
            self._save = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        """Write the newest table; changes that come meanwhile are written after it."""
        while self._saved is not self._table:
            newest = self._table
            try:
                await asyncio.to_thread(save_table, self._table_path, newest)
            except OSError as e:
                log.warning("the table cannot be stored at %s: %s", self._table_path, e)
                return
            self._saved = newest

    async def _pulse(self, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(frame(0, GAUGES, msgspec.json.encode(self._gauges())))
            await writer.drain()
            self._starving.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GAUGES_S):
                    await self._starving.wait()
                await asyncio.sleep(0.01)  # many may begin to wait at once: one message for all


def _say(writer: asyncio.StreamWriter, kind: int, told: Any) -> None:
    writer.write(frame(0, kind, msgspec.json.encode(told)))


def _check(theirs: Hello, ours: Hello) -> None:
    if theirs.version != ours.version:
        raise LinkError(f"control speaks version {theirs.version} of the link, this gateway {ours.version}")
    if theirs.role != "control" or theirs.token != ours.token:
        raise LinkError("what answers at control's socket is not control of this run")
