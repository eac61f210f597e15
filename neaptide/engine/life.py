"""The life of a replica's I/O process, from its sockets to its exit code.

It binds its sockets, loads the tokenizer while the engine process loads its model, and takes requests once the engine
is warm. SIGTERM drains. When the engine dies every request is told, and this process ends with ENGINE_DIED so that
whoever started it starts a fresh one: an I/O process without its engine has nothing to serve.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from neaptide import lifeline, link
from neaptide.clock import mono_s
from neaptide.engine import pipe, serve_http
from neaptide.engine.child import EngineChild, Started, attach
from neaptide.engine.log import Log
from neaptide.engine.pool import Pool
from neaptide.engine.prime import MOST_S, START_SHARE
from neaptide.engine.prompt import Model, load_model
from neaptide.engine.serve_link import LinkServer
from neaptide.engine.service import STARTING, Service, Shared
from neaptide.errors import NeaptideError, ProcessError
from neaptide.link import STALL_S
from neaptide.specs import ReplicaSpec

ENGINE_DIED = 71
ENGINE_EXIT_S = 2.0
BACKLOG = 1024


class Replica:
    """One life: `run` returns the process's exit code."""

    def __init__(self, spec: ReplicaSpec, started: Started, stages: dict[str, float], stall_s: float = STALL_S) -> None:
        """`stages`: seconds of each start-up stage so far; more are added."""
        self._spec, self._child = spec, started
        self._log = Log(spec.log_path, replica=spec.id, epoch=spec.epoch)
        shared = Shared()
        services = [
            Service(one, partial(self._send, index), self._log, stall_s, shared)
            for index, one in enumerate(spec.each())
        ]
        self._service = Pool(spec, services, shared)
        self._link = LinkServer(self._service, self._log)
        self._stages = stages
        self._engine: EngineChild | None = None
        self._told: list[pipe.Ready] = []  # of its models, in order
        self._heard = self._addressed = 0  # which model's words come, and go: see pipe.Member
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, began_s: float) -> int:
        """Raises NeaptideError when it cannot start; the engine is ended in any case. `began_s`: the start (mono)."""
        self._engine = await attach(self._child, self)
        try:
            return await self._live(began_s)
        finally:
            # Before it is ready it loads and hears nothing.
            code = await self._engine.close(ENGINE_EXIT_S if self._service.description is not None else 0.0)
            self._log.info("engine ended", code=code)

    async def _live(self, began_s: float) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unexpected)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_end)
        http, link_server = await self._listen()
        try:
            self._stages["listening_s"] = mono_s() - began_s
            starting = loop.create_task(self._start(began_s))
            starting.add_done_callback(self._start_ended)
            code = await self._end
            if starting.done() and not starting.cancelled():
                starting.result()  # raises what kept it from starting
            starting.cancel()
            return await self._drain() if code == 0 else code
        finally:
            await self._link.sent(1.0)
            await self._stop(http, link_server)

    async def _listen(self) -> tuple[serve_http.HttpServer, asyncio.Server | None]:
        spec = self._spec
        sockets = []
        if spec.http_path:
            sockets.append(_unix_socket(spec.http_path))
        if spec.http_host:
            sockets.append(_tcp_socket(spec.http_host, spec.http_port))
            self._log.info("listening", host=spec.http_host, port=sockets[-1].getsockname()[1])
        http = serve_http.server(serve_http.application(self._service, self._stages))
        self._serving = asyncio.create_task(http.serve(sockets=sockets)) if sockets else None
        link_server = None
        if spec.link_path:
            loop = asyncio.get_running_loop()
            link_server = await loop.create_unix_server(self._link.protocol, sock=_unix_socket(spec.link_path))
        return http, link_server

    async def _start(self, began_s: float) -> None:
        """Engine and tokenizer load side by side; ready when both are."""
        self._log.info("starting", engine_pid=self._child.process.pid)
        models = await asyncio.get_running_loop().run_in_executor(None, self._load_models)
        await self._started
        self._stages |= stages_of(self._told)
        for service, model, told in zip(self._service.services, models, self._told, strict=True):
            service.warm(model, told.description)
        await self._service.primed(min(MOST_S, START_SHARE * (mono_s() - began_s)))
        self._stages["ready_s"] = mono_s() - began_s
        if self._service.state == STARTING:
            gc.collect()
            gc.freeze()  # what the start has built lives as long as we do: no collection need look at it again
            for service in self._service.services:
                service.ready()
            self._link.greet()
            self._log.info("ready", stages=self._stages)

    def _load_models(self) -> list[Model]:
        began_s = mono_s()
        models = [load_model(one.engine, one.source) for one in self._spec.each()]
        self._stages["tokenizer_s"] = mono_s() - began_s
        return models

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback of ours raised: a bug. Its connection is lost, the process goes on."""
        error = context.get("exception")
        where = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
        self._log.error("unexpected", message=context.get("message", ""), where=where[-1024:])

    def _start_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._finish(1)

    # ------------------------------------------------------------------------------------------ the engine's words

    def heard(self, messages: list[pipe.FromEngine]) -> None:
        for message in messages:
            if isinstance(message, pipe.Stepped):
                self._service.stepped(self._heard, message)
            elif isinstance(message, pipe.Member):
                self._heard = message.index
            elif isinstance(message, pipe.Ready):
                self._loaded(message)
            else:
                self._failed(message)
        self._service.changed()

    def _loaded(self, message: pipe.Ready) -> None:
        self._told.append(message)
        self._log.info("loaded", model=message.description.model, stages=message.stages)
        if len(self._told) == len(self._service.services):
            self._started.set_result(None)

    def gone(self, why: str) -> None:
        """The pipe to the engine has closed."""
        if self._end.done() and self._end.result() == 0 and not self._service.busy():
            return  # we asked it to
        self._log.error("engine gone", why=why, state=self._service.state)
        if not self._started.done():
            self._started.set_exception(ProcessError("the engine process ended while it loaded", why=why, code="E311"))
        if self._started.exception() is not None:
            return  # `_start` ends our life with it
        self._service.engine_gone(why)
        self._finish(ENGINE_DIED)

    def _failed(self, told: pipe.Failed) -> None:
        self._log.error("engine failed", code=told.code, what=told.what, why=told.why, fix=told.fix)
        error = NeaptideError(told.what, why=told.why, fix=told.fix, code=told.code)
        if self._started.done():
            print(error, file=sys.stderr)
            self._service.engine_gone(told.what)
            self._finish(ENGINE_DIED)
        else:
            self._started.set_exception(error)

    def _send(self, index: int, messages: list[pipe.ToEngine]) -> None:
        if self._engine is None:
            return
        whose = [] if index == self._addressed else [pipe.Member(index)]
        self._addressed = index
        self._engine.send_all([*whose, *messages])

    # ------------------------------------------------------------------------------------------ the end

    def _ask_to_end(self) -> None:
        if self._end.done():
            self._service.cut()  # asked twice: no more grace
        self._finish(0)

    def _finish(self, code: int) -> None:
        if not self._end.done():
            self._end.set_result(code)

    async def _drain(self) -> int:
        """Let what runs finish, at most grace_s."""
        self._log.info("draining", running=self._service.load().running)
        self._service.drain()
        try:
            async with asyncio.timeout(self._spec.grace_s):
                await self._service.idle()
        except TimeoutError:
            self._service.cut()
        return 0 if self._service.state != "dead" else ENGINE_DIED

    async def _stop(self, http: serve_http.HttpServer, link_server: asyncio.Server | None) -> None:
        if link_server is not None:
            link_server.close()
        http.should_exit = True
        if self._serving is not None:
            await self._serving
        self._service.stop()
        _unlink([self._spec.link_path, self._spec.http_path])


def stages_of(told: list[pipe.Ready]) -> dict[str, float]:
    """Seconds of each stage of the engine's start; of several models, loaded one after the other, the sums."""
    sums: dict[str, float] = {}
    for name, seconds in (item for ready in told for item in ready.stages.items()):
        sums[name] = sums.get(name, 0.0) + seconds
    return sums


def _unlink(paths: list[str]) -> None:
    for path in paths:
        if path:
            Path(link.short_path(path)).unlink(missing_ok=True)


def _unix_socket(path: str) -> socket.socket:
    """Bound at `path`, 0600 from its first moment; a stale socket of a former life is replaced."""
    _unlink([path])
    short = link.short_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with link.private_umask():
            sock.bind(short)
    except OSError as e:
        raise ProcessError(f"cannot listen on {path}: {e}", why="the directory must exist and be writable") from e
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def _tcp_socket(host: str, port: int) -> socket.socket:
    try:
        sock = socket.create_server((host, port), backlog=BACKLOG)
    except OSError as e:
        fix = "stop what listens there, or choose another port"
        raise ProcessError(f"cannot listen on {host}:{port}: {e}", why="the port must be free", fix=fix) from e
    sock.setblocking(False)
    return sock


def live(spec: ReplicaSpec, started: Started, stages: dict[str, float], began_s: float, stall_s: float) -> int:
    """Serve until told to end; the process's exit code. NeaptideError when it cannot start."""
    lifeline.raise_open_files()
    if spec.io_cpus:
        os.sched_setaffinity(0, spec.io_cpus)

    async def whole() -> int:
        return await Replica(spec, started, stages, stall_s).run(began_s)

    return uvloop.run(whole())
