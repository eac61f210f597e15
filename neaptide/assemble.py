"""Chooses implementations and connects them; the only place that does.

`up` is the supervisor's side: sockets, secrets, control, gateways. `python -m neaptide.assemble` is control's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from neaptide import __version__, lifeline
from neaptide.clock import mono_s, wall_s
from neaptide.config import DEFAULT_TEXT, Settings, host_port, load
from neaptide.cost.prices import rates
from neaptide.errors import NeaptideError, ProcessError
from neaptide.fleet.listen import address, bind
from neaptide.fleet.process import ChildSpec
from neaptide.fleet.state import StateDir, write_private
from neaptide.fleet.supervisor import Report, Supervisor
from neaptide.gateway import counters
from neaptide.specs import ControlSpec, GatewaySpec
from neaptide.tls.context import serving
from neaptide.tls.settings import ListenTls

START_LIMIT_S = 600.0  # a large model from a cold disk; `up` gives up after it


class UpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says."""

    config: Path | None = None  # None: ./neaptide.yaml, made when absent
    state: Path = Path(".neaptide")
    port: int | None = None
    grace_s: float = 20.0


class Up(msgspec.Struct, frozen=True, kw_only=True):
    """A service that is ready: what `up --json` prints and run/up.json keeps."""

    api: str
    admin: str
    key: str
    pids: dict[str, list[int]]
    ready_s: float
    started_wall_s: float
    version: str = __version__


class Sockets(msgspec.Struct, frozen=True, kw_only=True):
    api: list[socket.socket]
    admin: socket.socket


def configuration(options: UpOptions) -> tuple[Settings, str, Path]:
    """(settings with the command line's port, the text, its directory); makes ./neaptide.yaml when there is none."""
    path = options.config or Path("neaptide.yaml")
    if options.config is None and not path.exists():
        path.write_text(DEFAULT_TEXT, encoding="utf-8")
    settings = load(path)
    rates(settings.prices)  # the books would only find out later
    text = path.read_text(encoding="utf-8")
    if options.port is not None:
        host, _ = host_port(settings.listen)
        listen = f"[{host}]:{options.port}" if ":" in host else f"{host}:{options.port}"
        admin = settings.admin.listen or "127.0.0.1:0"
        settings = msgspec.structs.replace(
            settings, listen=listen, admin=msgspec.structs.replace(settings.admin, listen=admin)
        )
    return settings, text, path.absolute()


def open_sockets(settings: Settings) -> Sockets:
    host, port = host_port(settings.listen)
    first = bind(host, port, shared=settings.gateways > 1)
    port = first.getsockname()[1]
    more = [bind(host, port, shared=True) for _ in range(settings.gateways - 1)]
    admin_host, admin_port = host_port(settings.admin.listen or "127.0.0.1:8001", "admin.listen")
    try:
        return Sockets(api=[first, *more], admin=bind(admin_host, admin_port))
    except NeaptideError:
        for sock in (first, *more):
            sock.close()
        raise


def up(options: UpOptions, say: Callable[[Report], None], ready: Callable[[Up], None]) -> None:
    """Run the service until it is told to stop. `say` hears progress, `ready` once all answers.

    Raises NeaptideError when it cannot start; everything it began has ended by then.
    """
    began_s, began_wall_s = mono_s(), wall_s()
    settings, text, origin = configuration(options)
    state = StateDir(options.state)
    state.create()
    lock_fd = state.lock()
    say(Report(stage="config", text=str(origin), seconds=mono_s() - began_s))
    for tls in filter(None, (settings.tls, settings.admin.tls)):
        serving(tls)  # what is wrong with it should be said here, not in a log
    for leaf in (state.api_leaf, state.admin_leaf):
        leaf.unlink(missing_ok=True)
    sockets = open_sockets(settings)
    write_private(state.config_json, json.dumps({"origin": str(origin), "text": text}))
    for stale in state.root.glob("table-*.json"):
        stale.unlink()  # the last boot's replicas and token; a gateway that restarts within this boot keeps its own
    lifeline.raise_open_files()
    service = Service(options, settings, state, sockets, say)
    asyncio.run(service.run(began_s, began_wall_s, ready))
    state.up_json.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (state.run / "lock").unlink()
    del lock_fd  # held open until here


class Service:
    """The supervisor's side of one `up`."""

    def __init__(
        self, options: UpOptions, settings: Settings, state: StateDir, sockets: Sockets, say: Callable[[Report], None]
    ) -> None:
        self.options, self.settings, self.state, self.sockets = options, settings, state, sockets
        self._say = say
        self.api = f"{_scheme(settings.tls)}://{address(sockets.api[0])}/v1"
        self.admin = f"{_scheme(settings.admin.tls)}://{address(sockets.admin)}/"
        self.counters_fd = counters.create()
        self.token = secrets.token_hex(32)  # this boot's: shared by its processes, never stored
        self.pepper = state.secret(state.pepper)
        self.key = state.secret(state.key, "sk-" + secrets.token_urlsafe(32))
        state.secret(state.admin_token)
        self._started: asyncio.Future[None] | None = None

    async def run(self, began_s: float, began_wall_s: float, ready: Callable[[Up], None]) -> None:
        self._started = asyncio.get_running_loop().create_future()
        supervisor = Supervisor(self.state, self.options.grace_s, self._heard)
        await supervisor.open()
        supervisor.keep("control", self._control_spec)
        for i, sock in enumerate(self.sockets.api):
            supervisor.keep(f"gateway-{i}", partial(self._gateway_spec, number=i, listen_fd=sock.fileno()))
        life = asyncio.create_task(supervisor.run())
        try:
            await self._wait_started(life)
            if not life.done() and not supervisor.is_ending():
                ready(self._ready(supervisor, mono_s() - began_s, began_wall_s))
        finally:
            if self._started.done() and self._started.exception() is not None:
                supervisor.end()
            await life
            for sock in (*self.sockets.api, self.sockets.admin):
                sock.close()

    async def _wait_started(self, life: asyncio.Task[None]) -> None:
        started = self._started
        if started is None:
            return
        done, _ = await asyncio.wait((started, life), timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            started.set_exception(
                ProcessError(f"not ready after {START_LIMIT_S:g} s", fix=f"read {self.state.log}", code="E305")
            )
        if started.done():
            started.result()

    def _heard(self, report: Report) -> None:
        started = self._started
        waiting = started is not None and not started.done()
        if waiting and started is not None and report.stage == "ready":
            started.set_result(None)
        elif waiting and started is not None and report.error is not None:
            e = report.error
            error = NeaptideError(e.get("what", ""), why=e.get("why", ""), fix=e.get("fix", ""), code=e.get("code"))
            started.set_exception(error)
        else:
            self._say(report)

    def _ready(self, supervisor: Supervisor, ready_s: float, began_wall_s: float) -> Up:
        up = Up(
            api=self.api,
            admin=self.admin,
            key=self.key,
            pids=supervisor.pids(),
            ready_s=round(ready_s, 3),
            started_wall_s=began_wall_s,
        )
        kept = {k: v for k, v in msgspec.to_builtins(up).items() if k != "key"}  # the key has its own 0600 file
        write_private(self.state.up_json, json.dumps(kept))
        return up

    def _control_spec(self, epoch: int) -> ChildSpec:
        spec = ControlSpec(
            epoch=epoch,
            admin_fd=self.sockets.admin.fileno(),
            config_path=str(self.state.config_json),
            state_dir=str(self.state.root),
            supervisor_path=str(self.state.supervisor_sock),
            control_path=str(self.state.control_sock),
            token=self.token,
            api_url=self.api,
            admin_url=self.admin,
            grace_s=self.options.grace_s,
            admin_tls=self.settings.admin.tls,
        )
        document = msgspec.Raw(msgspec.json.encode(spec))
        return ChildSpec(
            kind="control",
            id="control",
            epoch=epoch,
            module="neaptide.assemble",
            document=document,
            fds=(spec.admin_fd,),
            full_environment=True,
        )

    def _gateway_spec(self, epoch: int, number: int, listen_fd: int) -> ChildSpec:
        id = f"gateway-{number}"
        spec = GatewaySpec(
            id=id,
            epoch=epoch,
            listen_fd=listen_fd,
            control_path=str(self.state.control_sock),
            table_path=str(self.state.root / f"table-{number}.json"),
            journal_dir=str(self.state.journal / f"{id}-{epoch}"),
            pepper=self.pepper,
            token=self.token,
            access_log=str(self.state.log / access_name(number)) if self.settings.access_log else "",
            segment_bytes=self.settings.journal.segment_mib << 20,
            grace_s=self.options.grace_s,
            version=__version__,
            tls=self.settings.tls,
            tls_leaf=str(self.state.api_leaf),
            counters_fd=self.counters_fd,
        )
        document = msgspec.Raw(msgspec.json.encode(spec))
        fds = (listen_fd, self.counters_fd)
        return ChildSpec(kind="gateway", id=id, epoch=epoch, module="neaptide.gateway", document=document, fds=fds)


def _scheme(tls: ListenTls | None) -> str:
    return "https" if tls is not None else "http"


def access_name(number: int) -> str:
    """A file a gateway: each rotates its own."""
    return "access.jsonl" if number == 0 else f"access-{number}.jsonl"


def main() -> None:
    """Control's process."""
    from neaptide.control.app import run
    from neaptide.dashboard.app import Dashboard
    from neaptide.dashboard.source import ControlSource

    run(lambda control: Dashboard(ControlSource(control)))


if __name__ == "__main__":
    main()
