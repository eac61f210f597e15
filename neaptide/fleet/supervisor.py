"""The only parent: starts control and gateways and keeps them, starts and stops replicas on control's request.

It decides nothing about replicas; a replica's death is an event that control reads. A gateway or control that dies is
started again at once, then with a growing pause while it keeps dying young. On the way down gateways drain first (they
hold the clients), replicas next, control last (it takes the journal's end into the ledger).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

import msgspec

from neaptide.clock import mono_s
from neaptide.errors import ProcessError
from neaptide.fleet.process import Child, ChildSpec, ChildStatus, start
from neaptide.fleet.rpc import Server
from neaptide.fleet.state import StateDir

YOUNG_S = 5.0  # a process that dies younger than this is paused before its next start
LONGEST_PAUSE_S = 5.0
LAST_S = 4.0  # of the grace, kept for replicas and control
STARTED = ("replica", "spare")  # on control's request
MakeSpec = Callable[[int], ChildSpec]  # epoch -> spec


class Stop(msgspec.Struct):
    id: str
    epoch: int
    grace_s: float = 20.0
    kill: bool = False


class Note(msgspec.Struct):
    """New facts in place of those that control keeps with a replica."""

    id: str
    epoch: int
    opaque: dict[str, str]


class Report(msgspec.Struct):
    """From control, for whoever waits on `up`: a stage that was reached, or why it cannot be."""

    stage: str
    text: str = ""
    seconds: float = 0.0
    error: dict[str, str] | None = None


class Supervisor:
    """`on_report` hears control's reports; `run` returns when everything has ended."""

    def __init__(self, state: StateDir, grace_s: float, on_report: Callable[[Report], None]) -> None:
        self.state, self.grace_s = state, grace_s
        self._on_report = on_report
        self._children: dict[str, Child] = {}
        self._kept: dict[str, MakeSpec] = {}
        self._young_deaths: dict[str, int] = {}
        self._rpc = Server(self._answer)
        self._lifeline = os.pipe()
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.end)
        await self._rpc.listen(self.state.supervisor_sock)

    def keep(self, name: str, make: MakeSpec) -> None:
        """Start a process and start it again whenever it dies."""
        self._kept[name] = make
        self._start(make(self.state.next_epoch()))

    def end(self) -> None:
        """The first call drains; a second one kills."""
        (self._hurry if self._ending.is_set() else self._ending).set()

    def is_ending(self) -> bool:
        return self._ending.is_set()

    async def run(self) -> None:
        await self._ending.wait()
        for timer in self._timers:
            timer.cancel()
        deadline = mono_s() + self.grace_s
        for kinds, until in (
            (("gateway",), deadline - LAST_S),
            (STARTED, deadline - 2.0),
            (("control",), deadline),
        ):
            await self._end_all(kinds, max(0.2, until - mono_s()))
        await self._rpc.close()
        os.close(self._lifeline[1])
        os.close(self._lifeline[0])

    async def _end_all(self, kinds: tuple[str, ...], grace_s: float) -> None:
        group = [c for c in self._children.values() if c.spec.kind in kinds]
        if not group:
            return
        ends = asyncio.gather(*(c.end(grace_s) for c in group))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((ends, hurry), return_when=asyncio.FIRST_COMPLETED)
        for child in group if self._hurry.is_set() else ():
            child.signal(signal.SIGKILL)
        await ends
        hurry.cancel()

    # -- children ------------------------------------------------------------------------------------------------

    def _start(self, spec: ChildSpec) -> Child:
        log_fd = self.state.log_file(spec.id)
        try:
            child = start(spec, self._lifeline[0], log_fd, str(self.state.root), self._exited)
        except OSError as e:
            raise ProcessError(f"{spec.id} cannot be started: {e.strerror}", code="E303") from e
        finally:
            os.close(log_fd)
        self._children[spec.id] = child
        return child

    def _exited(self, child: Child) -> None:
        if self._children.get(child.spec.id) is child:
            del self._children[child.spec.id]
        self._rpc.tell("exit", child.status())
        make = self._kept.get(child.spec.id)
        if make is None or self._ending.is_set():
            return
        young = mono_s() - child.started_mono_s < YOUNG_S
        deaths = self._young_deaths[child.spec.id] = self._young_deaths.get(child.spec.id, 0) + 1 if young else 0
        self._on_report(Report(stage="died", text=f"{child.spec.id} (exit {child.exit_code}); starting it again"))
        pause_s = 0.0 if deaths <= 1 else min(LONGEST_PAUSE_S, 0.25 * 2**deaths)
        self._later(pause_s, lambda: self._start(make(self.state.next_epoch())))

    def _later(self, pause_s: float, action: Callable[[], object]) -> None:
        def fire() -> None:
            self._timers.discard(timer)
            if not self._ending.is_set():
                action()

        timer = asyncio.get_running_loop().call_later(pause_s, fire)
        self._timers.add(timer)

    # -- what control asks ---------------------------------------------------------------------------------------

    async def _answer(self, op: str, body: msgspec.Raw) -> object:
        match op:
            case "list":
                return [c.status() for c in self._children.values()]
            case "spawn":
                return self._spawn(msgspec.json.decode(body, type=ChildSpec))
            case "stop":
                return await self._stop(msgspec.json.decode(body, type=Stop))
            case "note":
                return self._note(msgspec.json.decode(body, type=Note))
            case "report":
                return self._on_report(msgspec.json.decode(body, type=Report))
            case "down":
                self.end()
                return True
        raise ProcessError(f"the supervisor knows no {op!r}", code="E302")

    def _spawn(self, spec: ChildSpec) -> ChildStatus:
        """Idempotent by id: a child that runs is told, not doubled. A spare that is named becomes the child."""
        if spec.kind not in STARTED:
            raise ProcessError(f"{spec.kind} is not control's to start", code="E302")
        if self._ending.is_set():
            raise ProcessError(f"{spec.id}: shutting down", code="E302")
        running, spare = self._children.get(spec.id), self._children.get(spec.spare)
        if running is None and spare is not None and spare.spec.kind == "spare" and spare.become(spec):
            running = self._children[spec.id] = self._children.pop(spec.spare)
        return (running or self._start(spec)).status()

    async def _stop(self, stop: Stop) -> bool:
        """True when that very process (id and epoch) was running and has ended."""
        child = self._replica(stop.id, stop.epoch)
        if child is None:
            return False
        if stop.kill:
            child.signal(signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.gone.wait(), 5.0)
        else:
            await child.end(stop.grace_s)
        return True

    def _note(self, note: Note) -> bool:
        """True when that very process runs; it is listed with these facts from now on."""
        child = self._replica(note.id, note.epoch)
        if child is not None:
            child.spec = msgspec.structs.replace(child.spec, opaque=note.opaque)
        return child is not None

    def _replica(self, id: str, epoch: int) -> Child | None:
        child = self._children.get(id)
        mine = child is not None and child.spec.kind in STARTED and child.spec.epoch == epoch
        return child if mine else None

    def pids(self) -> dict[str, list[int]]:
        """What `up --json` prints."""
        out: dict[str, list[int]] = {"supervisor": [os.getpid()], "control": [], "gateway": [], "replica": []}
        for child in self._children.values():
            out.setdefault(child.spec.kind, []).append(child.pid)
        return out
