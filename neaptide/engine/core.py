"""The engine process: read commands, step, push; nothing else. `python -m neaptide.engine.core FD`, spec on stdin.

An engine's step holds the GIL, so whatever shares its process starves: HTTP, text and timers live in the I/O process at
the other end of the socketpair FD. The loop is three visible verbs a turn; it blocks on the socket while idle.
Writing blocks when the peer does not read: backpressure, and an engine that runs ahead of its reader helps nobody.
"""

from __future__ import annotations

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
from neaptide.engine.pipe import Abort, Add, Close, Failed, MessageReader, Ready, Stepped, pack, to_engine
from neaptide.engine.protocol import Emission, Engine
from neaptide.engine.steplog import watched
from neaptide.errors import ConfigError, ModelError, NeaptideError, ProcessError
from neaptide.specs import ReplicaSpec

SOCKET_BYTES = 4 << 20  # room for hundreds of steps of a large batch; the kernel grants less where its limit is lower
RECEIVE_BYTES = 1 << 18
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


class Loop:
    """Owns the socket and the engine until the end; everything happens in the caller's thread."""

    def __init__(self, engine: Engine, sock: socket.socket) -> None:
        self._engine, self._sock = engine, sock
        self._reader = MessageReader()
        self._refused: list[Emission] = []

    def run(self) -> None:
        """Until Ended or an error of the engine."""
        engine, sock = self._engine, self._sock
        while True:
            self._drain(block=not engine.busy())
            emissions: list[Emission] = []
            step_s = 0.0
            if engine.busy():
                started_s = mono_s()
                emissions = engine.step()
                step_s = mono_s() - started_s
            elif not self._refused:
                continue
            capacity = engine.free()
            batch = capacity.running + sum(emission.finish != "" for emission in emissions)
            if self._refused:
                emissions += self._refused
                self._refused = []
            sock.sendall(pack(Stepped(emissions=emissions, capacity=capacity, step_s=step_s, batch=batch)))

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
                    self._engine.add(id, prompt_ids, generated_ids, emitted_chars, sampling)
                except ValueError as error:  # a request that this engine cannot serve; the others go on
                    self._refused.append(Emission(id=id, finish="error", error=str(error)))
            case Abort(id):
                self._engine.abort(id)
            case Close():
                raise Ended


def serve(spec: ReplicaSpec, sock: socket.socket) -> int:
    """The process's life; returns its exit code. Every failure is told as Failed before the exit."""

    def wait(seconds: float) -> object:
        return select.select([sock], [], [], seconds)

    try:
        _pin(spec)  # before the library counts the processors it may use
        engine, stages = build(spec, wait)
        sock.sendall(pack(Ready(description=engine.describe(), stages=stages)))
        try:
            Loop(engine, sock).run()
        except Ended:
            engine.close()
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
    spec = lifeline.read_spec(ReplicaSpec)
    lifeline.hold()
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
