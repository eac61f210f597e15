"""The dashboard over a real server and loopback, its numbers from a source of plain memory, its seconds set by hand."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from neaptide.clock import VirtualClock
from neaptide.control.admin import build_app
from neaptide.control.port import UsageRow
from neaptide.dashboard.app import Dashboard
from neaptide.dashboard.live import Fleet
from neaptide.dashboard.source import About, Look, ReplicaLine
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Override, Plan
from tests.admin_fake import TOKEN, FakeControl, access

BEARER = {"Authorization": f"Bearer {TOKEN}"}


class FakeSource:
    """Implements Source; `look` is whatever the test put there last."""

    version, currency = "0.1.0", "CNY"

    def __init__(self, admin_url: str = "http://127.0.0.1:8001/", api_url: str = "http://127.0.0.1:9/v1") -> None:
        self.admin_url, self.api_url = admin_url, api_url
        self.now = look(0)
        self.rows: tuple[UsageRow, ...] = ()
        self.asked = 0

    def key(self) -> str:
        return "sk-of-the-service"

    def api_tls(self) -> None:
        return None

    def look(self) -> Look:
        return self.now

    async def newest(self, since_wall_s: float, limit: int) -> tuple[UsageRow, ...]:
        self.asked += 1
        return self.rows[:limit]


def look(
    second: int, *, plan: Plan | None = None, fleet: Fleet | None = None, override: Override | None = None,
    model: str = "m", **counters: Any,
) -> Look:  # fmt: skip
    """What control holds at a second: one model with these counters, one replica."""
    wall_s = 1_760_000_000.0 + second
    gauge = Gauges(gateway="gateway-0", mono_s=float(second), fast=1, slow=1, models={model: ModelGauge(**counters)})
    return Look(
        wall_s=wall_s,
        mono_s=float(second),
        gauges=(gauge,),
        fleets={model: fleet or Fleet(ready=1, billed=1, wanted=1.0, slots=8.0, price_per_hour=3.6)},
        about=(About(model=model, engine="echo", min=1, max=2, policy="slo", price_per_hour=3.6, override=override),),
        replicas=(ReplicaLine(id=f"{model}-0", model=model, state="ready"),),
        plans=((wall_s, plan),) if plan else (),
    )


class Site:
    """One running admin app with its dashboard, asked with raw HTTP."""

    def __init__(self, control: FakeControl, source: FakeSource, clock: VirtualClock, board: Dashboard) -> None:
        self.control, self.source, self.clock, self.board = control, source, clock, board
        self.loop: asyncio.AbstractEventLoop | None = None
        self.second = 0  # of the last look, where a test counts them
        self.port = int(source.admin_url.rsplit(":", 1)[1].strip("/"))
        self.cookie_name = f"neaptide_{self.port}"

    def open(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, headers or {})
        return connection, connection.getresponse()

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection, response = self.open(method, path, headers, body)
        raw = response.read()
        connection.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, raw

    def link(self) -> str:
        """The path of a fresh one-time link."""
        status, _, raw = self.ask("POST", "/ui/ticket", BEARER)
        assert status == 201
        return json.loads(raw)["url"].removeprefix(self.source.admin_url.rstrip("/"))

    def sign_in(self) -> dict[str, str]:
        """The headers of a session's browser."""
        status, headers, _ = self.ask("GET", self.link())
        assert status == 200
        return {"Cookie": headers["set-cookie"].partition(";")[0], "Sec-Fetch-Site": "same-origin"}

    def token(self, browser: dict[str, str]) -> dict[str, str]:
        """The header that a session's own page adds to calls that change something."""
        told = json.loads(self.ask("GET", "/ui/session", browser)[2])
        return {told["header"]: told["token"]}

    def beat(self, now: Look) -> None:
        """A second passes."""
        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(self.board.feed.beat(now), self.loop).result(10)


@contextlib.contextmanager
def site(state: Path, api_url: str = "http://127.0.0.1:9/v1") -> Iterator[Site]:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    clock = VirtualClock()
    source = FakeSource(url, api_url)
    board = Dashboard(source, clock)
    control = FakeControl(state)
    here = Site(control, source, clock, board)
    app = build_app(control, access(state, clock), front=board)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    ready = threading.Event()

    async def live() -> None:
        here.loop = asyncio.get_running_loop()
        ready.set()
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield here
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


def events(response: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
    """(kind, content) of a stream of server-sent events."""
    kind = ""
    for raw in response:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            yield kind, json.loads(line[6:])
