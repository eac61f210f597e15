"""The engine process: read commands, step, push; nothing else. `python -m neaptide.engine.core FD`, spec on stdin. With
an engine's name behind it (a spare) its library is imported before the spec comes.

An engine's step holds the GIL, so whatever shares its process starves: HTTP, text and timers live in the I/O process at
the other end of the socketpair FD. The loop is three visible verbs a turn; it blocks on the socket while idle.
Writing blocks when the peer does not read: backpressure, and an engine that runs ahead of its reader helps nobody.

A replica of several models has an engine for each, here; the busy ones make a step each, in a ring (decision 0030).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable

import msgspec

from neaptide import lifeline
from neaptide.clock import RealClock, mono_s
from neaptide.engine import memory
from neaptide.engine.pipe import (
    Abort,
    Add,
    Close,
    Failed,
    FromEngine,
    Member,
    MessageReader,
    Ready,
    Stepped,
    pack,
    to_engine,
)
from neaptide.engine.protocol import Emission, Engine
from neaptide.engine.steplog import watched
from neaptide.errors import ConfigError, ModelError, NeaptideError, ProcessError
from neaptide.specs import ReplicaSpec

SOCKET_BYTES = 4 << 20  # room for hundreds of steps of a large batch; the kernel grants less where its limit is lower
RECEIVE_BYTES = 1 << 18
NAP_S = 0.005  # for which an engine that waits for the clock may hold up others that have work
Wait = Callable[[float], object]
Stages = dict[str, float]


class Ended(Exception):
    """The peer asked to close, or is gone."""


def build(spec: ReplicaSpec, wait: Wait) -> tuple[Engine, Stages]:
    """The spec's engine, loaded and warmed up, and the seconds each stage took. The heavy import happens here."""
    if spec.engine == "echo":
        from neaptide.engine.echo import EchoEngine

        return watched(EchoEngine(spec, RealClock(), wait), spec), {}
    if spec.engine == "openvino":
        started_s = mono_s()
        try:
            from neaptide.engine.openvino import OpenVinoEngine
        except ImportError as error:
            raise ModelError(
                f"the openvino engine cannot be imported: {error}",
                why="it comes with the extra `cpu`",
                fix="pip install 'neaptide[cpu]'",
            ) from error
        stages: Stages = {"import_s": mono_s() - started_s}
        return watched(OpenVinoEngine(spec, stages), spec), stages
    raise ConfigError(
        f"unknown engine {spec.engine!r}",
        why="the engines are openvino and echo",
        fix=f"set models.{spec.model}.engine to one of them",
    )


def prepare(engine: str) -> None:
    """The heavy import, ahead of time. One that fails is told by `build`, which knows for whom."""
    with contextlib.suppress(ImportError):
        importlib.import_module(f"neaptide.engine.{engine}")


class Loop:
    """Owns the socket and the engines until the end; everything happens in the caller's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = MessageReader()
        self._engines: list[Engine] = []
        self._refused: list[list[Emission]] = []
        self._heard = self._told = 0  # whose messages come, and whose went last
        self._last = 0  # whose turn was the last

    def host(self, engine: Engine, stages: Stages) -> None:
        """One more engine, loaded; the peer is told."""
        self._engines.append(engine)
        self._refused.append([])
        self._tell(len(self._engines) - 1, Ready(description=engine.describe(), stages=stages))

    def run(self) -> None:
        """Until Ended or an error of an engine."""
        while True:
            self._drain(block=self._next() is None)
            index = self._next()
            if index is not None:
                self._last = index
                self._turn(index)

    def wait(self, seconds: float) -> object:
        """For engines that wait for the clock; ends early for a command, or when others should have their turn."""
        alone = sum(engine.busy() for engine in self._engines) <= 1
        return select.select([self._sock], [], [], seconds if alone else min(seconds, NAP_S))

    def close(self) -> None:
        for engine in self._engines:
            engine.close()

    def _next(self) -> int | None:
        """Whose turn it is: the next in the ring that has something to do or to tell."""
        count = len(self._engines)
        for step in range(1, count + 1):
            index = (self._last + step) % count
            if self._engines[index].busy() or self._refused[index]:
                return index
        return None

    def _turn(self, index: int) -> None:
        engine = self._engines[index]
        emissions: list[Emission] = []
        step_s = 0.0
        if engine.busy():
            started_s = mono_s()
            emissions = engine.step()
            step_s = mono_s() - started_s
        capacity = engine.free()
        batch = capacity.running + sum(emission.finish != "" for emission in emissions)
        emissions += self._refused[index]
        self._refused[index] = []
        self._tell(index, Stepped(emissions=emissions, capacity=capacity, step_s=step_s, batch=batch))

    def _tell(self, index: int, message: FromEngine) -> None:
        whose = b"" if index == self._told else pack(Member(index))
        self._told = index
        self._sock.sendall(whose + pack(message))

    def _drain(self, *, block: bool) -> None:
        """Apply every command that has come; when `block`, wait for the first."""
        flags = 0 if block else socket.MSG_DONTWAIT
        while True:
            try:
                received = self._sock.recv(RECEIVE_BYTES, flags)
            except BlockingIOError:
                return
            if not received:
                raise Ended
            for body in self._reader.feed(received):
                self._apply(body)
            if len(received) < RECEIVE_BYTES:
                return
            flags = socket.MSG_DONTWAIT

    def _apply(self, body: bytes) -> None:
        command = to_engine.decode(body)
        match command:
            case Add(id, prompt_ids, generated_ids, emitted_chars, sampling):
                try:
                    self._engines[self._heard].add(id, prompt_ids, generated_ids, emitted_chars, sampling)
                except ValueError as error:  # a request that this engine cannot serve; the others go on
                    self._refused[self._heard].append(Emission(id=id, finish="error", error=str(error)))
            case Abort(id):
                self._engines[self._heard].abort(id)
            case Member(index):
                self._heard = index
            case Close():
                raise Ended


def serve(spec: ReplicaSpec, sock: socket.socket) -> int:
    """The process's life; returns its exit code. Every failure is told as Failed before the exit."""
    try:
        _pin(spec)  # before the library counts the processors it may use
        loop = Loop(sock)
        checked = memory.check(spec)
        for one in spec.each():
            engine, stages = build(one, loop.wait)
            loop.host(engine, checked | stages)
            checked = {}  # once, of the first
        try:
            loop.run()
        except Ended:
            loop.close()
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return 0
    except NeaptideError as error:
        return _fail(sock, error)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _fail(sock, ProcessError(f"the replica sent what the engine cannot read: {error}", code="E310"))
    except Exception as error:  # the library's RuntimeError, memory, or a mistake of ours: told, then the end
        traceback.print_exc()
        why = "the inference library, or our code around it, failed; the log has the trace"
        return _fail(sock, ModelError(f"{type(error).__name__}: {error}", why=why, code="E210"))


def _pin(spec: ReplicaSpec) -> None:
    if not spec.engine_cpus:
        return
    try:
        os.sched_setaffinity(0, spec.engine_cpus)
    except OSError as error:
        raise ConfigError(
            f"the engine cannot be pinned to cpus {list(spec.engine_cpus)}: {error.strerror}",
            why=f"this process may use {sorted(os.sched_getaffinity(0))}",
            fix=f"correct models.{spec.model}.options.cpus, or remove it",
        ) from error


def _fail(sock: socket.socket, error: NeaptideError) -> int:
    try:
        sock.sendall(pack(Failed(code=error.code, what=error.what, why=error.why, fix=error.fix)))
    except (BrokenPipeError, ConnectionResetError):  # nobody is left to tell but the log
        print(error, file=sys.stderr)
    return error.exit_code


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the replica decides when we end
    lifeline.hold()
    for engine in argv[2:]:
        prepare(engine)
    spec = lifeline.read_spec(ReplicaSpec)
    if argv[2:]:
        lifeline.log_to(spec.log_path)
    sock = socket.socket(fileno=int(argv[1]))
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    code = serve(spec, sock)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: nothing is left to save, and an inference library's own teardown may take long or abort.
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv)
