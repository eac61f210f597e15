"""`python -m neaptide.gateway`: the gateway process. Its spec comes on stdin, its life hangs on the supervisor."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop
from msgspec.structs import replace

from neaptide import __version__, lifeline
from neaptide.clock import mono_s, wall_s
from neaptide.errors import RequestError
from neaptide.gateway.access import AccessLog
from neaptide.gateway.counters import Counters
from neaptide.gateway.door import Door
from neaptide.gateway.follow import Follower
from neaptide.gateway.metrics import Metrics
from neaptide.gateway.route import Target
from neaptide.gateway.routes import Routes
from neaptide.gateway.secure import Secure
from neaptide.gateway.server import Server
from neaptide.gateway.throttle import Throttle
from neaptide.gateway.upstream import Upstream
from neaptide.gateway.upstream_http import HttpPool
from neaptide.gateway.upstream_link import LinkClient
from neaptide.journal import Journal
from neaptide.link import Hello
from neaptide.specs import GatewaySpec
from neaptide.table import Gauges, ReplicaRow, Table
from neaptide.tls.listen import TlsListener
from neaptide.tls.served import POLL_S
from neaptide.tls.trust import Trust

log = logging.getLogger("neaptide.gateway")

SWEEP_S = 0.1
LOOK_SWEEPS = round(POLL_S / SWEEP_S)  # between two looks at certificates' files
BACKLOG = 2048
SAYING_GOODBYE_S = 0.3  # for the last bytes to leave


class Gateway:
    """The parts, connected; `run` lives as long as the process serves."""

    def __init__(self, spec: GatewaySpec, loop: asyncio.AbstractEventLoop) -> None:
        self.spec, self.loop = spec, loop
        self.journal = Journal(Path(spec.journal_dir), spec.segment_bytes, loop)
        self.access = AccessLog(spec.access_log) if spec.access_log else None
        self.door = Door(
            spec.id,
            spec.pepper,
            self.journal,
            self._connect,
            metrics=Metrics(spec.version or __version__),
            access=self.access,
            throttle=Throttle(Counters(spec.counters_fd)),
        )
        self.routes = Routes(self.door, spec.version or __version__)
        self.trust = Trust()
        self.secure = self.routes.secure = Secure(spec.tls, spec.tls_leaf) if spec.tls is not None else None
        self.server = self.routes.server = Server(self.routes, Table().slow.limits, Table().slow.cors)
        self._hello = Hello(token=spec.token, role="gateway", name=spec.id, epoch=spec.epoch)
        self.follower = Follower(
            spec.control_path, Path(spec.table_path), self._hello, self.install, self._gauges, self.door.till
        )
        self.door.on_starving = self.follower.starving
        self._stop = asyncio.Event()
        self._sweeps = 0

    def install(self, table: Table) -> None:
        self.server.limits, self.server.cors = table.slow.limits, table.slow.cors
        self.door.install(table)

    async def run(self) -> None:
        """Serve until SIGTERM, then let what runs finish, for at most grace_s."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop.set)
        lifeline.hold(self._on_lifeline_end)
        self.follower.start()
        sock = socket.socket(fileno=self.spec.listen_fd)
        sock.setblocking(False)
        listener = await self._listen(sock)
        self.loop.call_later(SWEEP_S, self._sweep)
        log.info("serving on %s", sock.getsockname())
        await self._stop.wait()
        listener.close()
        await self._drain()

    async def _listen(self, sock: socket.socket) -> asyncio.AbstractServer | TlsListener:
        if self.secure is not None:
            return self.secure.listen(self.loop, sock, self.server)
        return await self.loop.create_server(self.server, sock=sock, backlog=BACKLOG)

    async def _drain(self) -> None:
        self.server.drain()
        end_s = mono_s() + self.spec.grace_s
        while self.door.live and mono_s() < end_s:  # noqa: ASYNC110  (ends once: an event would cost every request)
            await asyncio.sleep(0.05)
        if self.door.live:
            self.door.end_all(RequestError(503, "The gateway is stopping.", slug="stopping"), mono_s())
        await asyncio.sleep(SAYING_GOODBYE_S if self.server.connections else 0)
        await self.follower.close()
        self.server.abort()
        await self.journal.close()
        if self.access is not None:
            self.access.close()

    def _on_lifeline_end(self) -> None:
        self.loop.call_soon_threadsafe(self._orphaned)

    def _orphaned(self) -> None:
        """The supervisor is gone: tell those who are being served, and let lifeline end the process."""
        log.error("the supervisor is gone")
        self.server.drain()
        self.door.end_all(RequestError(503, "The server is stopping.", slug="stopping"), mono_s())
        self.loop.call_later(SAYING_GOODBYE_S, self._stop.set)

    def _sweep(self) -> None:
        now = mono_s()
        self._sweeps += 1
        self.loop.call_later(SWEEP_S, self._sweep)
        self.door.sweep(now)
        if self._sweeps % 5 == 0:
            self.server.sweep(now)
        if self._sweeps % LOOK_SWEEPS == 0:
            self.trust.poll()
            if self.secure is not None:
                self.secure.served.poll(wall_s())
        if self.access is not None:
            self.access.flush()

    def _gauges(self) -> Gauges:
        gauges = self.door.gauges(mono_s(), len(self.server.connections))
        return gauges if self.secure is None else replace(gauges, certificate=self.secure.gauge())

    def _connect(self, row: ReplicaRow, target: Target, on_room: Callable[[], None]) -> Upstream:
        if target.link:
            return LinkClient(row, target, self._hello, self.loop, on_room)
        return HttpPool(row, target, self.loop, self.trust)


def main() -> None:
    spec = lifeline.read_spec(GatewaySpec)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    lifeline.raise_open_files()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)  # hot objects die by reference count; a full collection would stop every stream
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(spec))


async def _serve(spec: GatewaySpec) -> None:
    await Gateway(spec, asyncio.get_running_loop()).run()


if __name__ == "__main__":
    main()
