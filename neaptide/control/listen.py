"""The admin listener: uvicorn on the supervisor's socket, in TLS where that is configured."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from neaptide.clock import wall_s
from neaptide.config import host_port
from neaptide.tls.listen import TlsListener
from neaptide.tls.served import POLL_S, Served

LOOK_TICKS = round(POLL_S / 0.1)  # uvicorn ticks each 0.1 s


def hosts(url: str, listen: str | None, served: Served | None) -> tuple[str, ...]:
    """What the operator calls the admin listener: in its address, in `admin.listen`, in its certificate."""
    told = [urlsplit(url).hostname or "", host_port(listen, "admin.listen")[0] if listen else ""]
    return tuple(filter(None, (*told, *(served.leaf.names if served else ()))))


class AdminServer(uvicorn.Server):
    """Without uvicorn's own signal handlers: SIGTERM is ours. With `served` it accepts through TlsListener, since the
    TLS of uvicorn has one certificate for good."""

    def __init__(self, app: ASGIApp, served: Served | None = None) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=5))
        self._served = served
        self._listeners: list[TlsListener] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        served = self._served
        if served is None:
            await super().startup(sockets)
            return
        await super().startup([])
        loop = asyncio.get_running_loop()
        self._listeners = [TlsListener(loop, sock, self._protocol, lambda: served.context) for sock in sockets or ()]

    async def on_tick(self, counter: int) -> bool:
        if self._served is not None and counter % LOOK_TICKS == 0:
            self._served.poll(wall_s())
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in self._listeners:
            listener.close()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        """As uvicorn's own listeners make them."""
        kind = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]
