"""Replicas on this host: processes that the supervisor starts for us, watched over their Unix sockets.

So many start at once as the host has cores for; the others wait in line.

After a restart of control the running ones are adopted again by what the supervisor lists (id, epoch, and the facts
kept with them), so that no stream notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from neaptide.clock import mono_s
from neaptide.errors import NeaptideError
from neaptide.fleet.line import TURN_S, next_in_line
from neaptide.fleet.probe import get
from neaptide.fleet.process import ChildSpec, ChildStatus
from neaptide.fleet.rpc import Client
from neaptide.fleet.state import StateDir
from neaptide.fleet.supervisor import Note
from neaptide.link import LoadReport
from neaptide.specs import ReplicaSpec
from neaptide.table import ReplicaRow
from neaptide.types import Deployment, Launch, Replica, ReplicaState, Steps

MODULE = "neaptide.engine.replica"
PARKED = "parked_s"  # the fact that the supervisor keeps with a standby
ENGINE = "engine"  # ... and with a spare
SPARE_PAUSE_S = 30.0
PROBE_STARTING_S = 0.05
PROBE_READY_S = 2.0
CUT_S = 5.0  # beyond drain_s, for a replica to cut off what still runs
SILENT_PROBES = 5  # then it is killed: alive by pid, dead to the world
MakeSpec = Callable[[Launch, Deployment], ReplicaSpec]


class Traits(msgspec.Struct):
    """The part of an engine's description that people are shown."""

    context_tokens: int = 0
    kv_tokens: int = 0
    max_running: int = 0
    chunk_tokens: int = 0
    precision: str = ""


class About(msgspec.Struct):
    """What a replica tells of itself; `stages` in seconds."""

    stages: dict[str, float] = {}
    description: Traits | None = None
    load: LoadReport | None = None
    steps: Steps = Steps()
    members: dict[str, Traits | None] = {}  # by model


class Watched:
    """One replica as this driver knows it: a process, or in line to become one with this `spec`."""

    def __init__(self, status: ChildStatus, spec: ReplicaSpec | None = None) -> None:
        self.status, self.spec = status, spec
        self.state: ReplicaState = "standby" if status.opaque.get(PARKED) else "starting"
        self.ready_s = 0.0  # from process start to ready
        self.about = About()
        self.error = ""
        self.silent = 0
        self.probe: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.status.id

    @property
    def deployment(self) -> str:
        return self.status.opaque.get("deployment", "")

    @property
    def queued(self) -> bool:
        return self.spec is not None

    @property
    def started_s(self) -> float:
        return self.status.started_mono_s


class LocalDriver:
    """`make_spec` builds a replica's document; `on_change` is called when a replica became ready or died; `at_once`
    starts are under way at most."""

    def __init__(
        self,
        supervisor: Client,
        state: StateDir,
        token: str,
        make_spec: MakeSpec,
        on_change: Callable[[], None],
        at_once: int,
    ) -> None:
        self._supervisor, self._state, self._token = supervisor, state, token
        self._make_spec, self._on_change, self._at_once = make_spec, on_change, at_once
        self._watched: dict[str, Watched] = {}  # in the order in which they were launched
        self._tasks: set[asyncio.Task[object]] = set()
        self._spares: dict[str, ChildStatus] = {}  # oldest first
        self._spares_from_s = 0.0  # none is started before (monotonic)

    async def adopt(self) -> None:
        """Take over what runs already."""
        listed = msgspec.json.decode(await self._supervisor.call("list"), type=list[ChildStatus])
        for status in listed:
            if status.kind == "replica":
                watched = self._watched[status.id] = Watched(status)
                self._probe(watched)
            elif status.kind == "spare":
                self._spares[status.id] = status

    def exited(self, status: ChildStatus) -> None:
        """The supervisor's exit event. One that died in draining is gone; another stays, dead, to be noted. After the
        death of a spare that was held none is started for a while: what killed it may kill the next."""
        if (spare := self._spares.get(status.id)) is not None and spare.epoch == status.epoch:
            del self._spares[status.id]
            self._spares_from_s = mono_s() + SPARE_PAUSE_S
            return
        watched = self._watched.get(status.id)
        if watched is None or watched.status.epoch != status.epoch:
            return
        if watched.probe is not None:
            watched.probe.cancel()
        self._ended(watched, self._last_words(status))

    async def observe(self) -> Sequence[Replica]:
        return [self._replica(w) for w in self._watched.values()]

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        if launch.replica in self._watched:
            return
        spec = self._make_spec(launch, deployment)
        status = ChildStatus(
            kind="replica",
            id=spec.id,
            epoch=spec.epoch,
            pid=0,
            started_mono_s=0.0,
            started_wall_s=0.0,
            opaque=_facts(spec),
        )
        self._watched[spec.id] = Watched(status, spec)
        await self._start_next()

    async def drain(self, id: str) -> None:
        watched = self._watched.get(id)
        if watched is None or watched.state == "draining":
            return
        if watched.state == "dead" or watched.queued:
            del self._watched[id]
            return
        watched.state = "draining"
        self._later(self._stop(watched))
        self._later(self._start_next())  # it may have been starting

    async def park(self, id: str) -> None:
        """The fact goes before the state: a control that dies between leaves a standby to its successor."""
        w = self._watched.get(id)
        if w is not None and w.state == "ready" and await self._note(w, {**w.status.opaque, PARKED: str(mono_s())}):
            w.state = "standby" if w.state == "ready" else w.state  # it may have died meanwhile

    async def wake(self, id: str) -> None:
        w = self._watched.get(id)
        facts = {k: v for k, v in w.status.opaque.items() if k != PARKED} if w is not None else {}
        if w is not None and w.state == "standby" and await self._note(w, facts):
            w.state = "ready" if w.state == "standby" else w.state

    async def keep_spares(self, wanted: Mapping[str, int]) -> None:
        for engine in {*wanted, *(s.opaque[ENGINE] for s in self._spares.values())}:
            mine = [s for s in self._spares.values() if s.opaque[ENGINE] == engine]
            for _ in range(wanted.get(engine, 0) - len(mine) if mono_s() >= self._spares_from_s else 0):
                await self._start_spare(engine)
            for status in mine[wanted.get(engine, 0) :]:
                del self._spares[status.id]
                self._later(self._supervisor.call("stop", {"id": status.id, "epoch": status.epoch, "kill": True}))

    async def forget(self, id: str) -> None:
        watched = self._watched.get(id)
        if watched is not None and watched.state == "dead":
            del self._watched[id]

    def rows(self) -> Mapping[str, ReplicaRow]:
        return {w.id: self._row(w) for w in self._watched.values() if w.state in ("ready", "standby", "draining")}

    def about(self, id: str) -> About:
        """What the replica told of itself last; empty for one that is not known."""
        watched = self._watched.get(id)
        return watched.about if watched else About()

    def ready(self) -> list[Watched]:
        return [w for w in self._watched.values() if w.state == "ready"]

    def pids(self) -> dict[str, int]:
        return {w.id: w.status.pid for w in self._watched.values() if w.state != "dead" and w.status.pid}

    def http_path(self, id: str) -> Path:
        return self._state.run / f"{id}.http"

    def link_path(self, id: str) -> Path:
        return self._state.run / f"{id}.link"

    async def close(self) -> None:
        """Stop watching; the processes stay (the supervisor is their parent), and the line is forgotten."""
        self._watched = {w.id: w for w in self._watched.values() if not w.queued}
        for watched in self._watched.values():
            if watched.probe is not None:
                watched.probe.cancel()

    # -- inside ------------------------------------------------------------------------------------------------

    async def _start_next(self) -> None:
        """Start those whose turn it is. Again whenever a place may be free: a start has ended or had its turn."""
        while (w := next_in_line(self._watched.values(), self._at_once, mono_s())) and w.spec is not None:
            await self._start(w, w.spec)

    async def _start(self, w: Watched, spec: ReplicaSpec) -> None:
        """From here on it holds a place. One that cannot be started has died."""
        w.spec, w.status = None, msgspec.structs.replace(w.status, started_mono_s=mono_s())
        asyncio.get_running_loop().call_later(TURN_S, lambda: self._later(self._start_next()))
        self._remove_sockets(w.id)
        child = ChildSpec(
            kind="replica",
            id=w.id,
            epoch=w.status.epoch,
            module=MODULE,
            document=msgspec.Raw(msgspec.json.encode(spec)),
            spare=self._spare_for(spec),
            opaque=w.status.opaque,
        )
        try:
            w.status = msgspec.json.decode(await self._supervisor.call("spawn", child), type=ChildStatus)
        except NeaptideError as e:
            self._ended(w, str(e))
        else:
            self._probe(w)

    def _ended(self, w: Watched, error: str) -> None:
        """Dead, or gone if it was to go. What waits in line behind a start that died would die as well: that leaves the
        line, and whether to try again is control's to decide."""
        gone = [w.id] if w.state == "draining" else []
        if w.state == "starting":
            gone = [x.id for x in self._watched.values() if x.queued and x.deployment == w.deployment]
        for id in gone:
            del self._watched[id]
        w.state, w.error = "dead", error
        self._later(self._start_next())
        self._on_change()

    def _probe(self, w: Watched) -> None:
        w.probe = asyncio.create_task(self._keep_probing(w))

    async def _keep_probing(self, w: Watched) -> None:
        path = self.http_path(w.id)
        while w.state in ("starting", "ready", "standby"):
            target = "/health/ready" if w.state == "starting" else "/health"
            status, _ = await get(path, target)
            if w.state == "starting" and status == 200:
                await self._became_ready(w, path)
            elif w.state in ("ready", "standby"):
                w.silent = 0 if status == 200 else w.silent + 1
                await self._ask_about(w, path)
                if w.silent >= SILENT_PROBES:
                    w.error = f"no answer to {SILENT_PROBES} health checks"
                    await self._kill(w)
            await asyncio.sleep(PROBE_STARTING_S if w.state == "starting" else PROBE_READY_S)

    async def _became_ready(self, w: Watched, path: Path) -> None:
        w.ready_s = mono_s() - w.status.started_mono_s
        await self._ask_about(w, path)
        w.state = "ready" if w.state == "starting" else w.state  # it may have been told to leave meanwhile
        self._later(self._start_next())
        self._on_change()

    async def _ask_about(self, w: Watched, path: Path) -> None:
        """Take what it tells of itself; one that tells nothing keeps what it told last."""
        status, body = await get(path, "/about")
        if status == 200:
            with contextlib.suppress(ValueError):
                w.about = msgspec.json.decode(body, type=About)

    def _later(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_spare(self, engine: str) -> None:
        """Where it fails, or one of that id is about to end, the next tick tries again."""
        epoch = self._state.next_epoch()
        id = next(id for n in itertools.count() if (id := f"spare-{engine}-{n}") not in self._spares)
        child = ChildSpec(kind="spare", id=id, epoch=epoch, module=MODULE, args=(engine,), opaque={ENGINE: engine})
        with contextlib.suppress(NeaptideError):
            status = msgspec.json.decode(await self._supervisor.call("spawn", child), type=ChildStatus)
            if status.epoch == epoch:
                self._spares[id] = status

    def _spare_for(self, spec: ReplicaSpec) -> str:
        """The oldest of that engine: it has imported most. Not for a replica with CPUs of its own: a library may have
        counted all of them."""
        fitting = (s.id for s in self._spares.values() if s.opaque[ENGINE] == spec.engine)
        id = "" if spec.engine_cpus or spec.io_cpus else next(fitting, "")
        self._spares.pop(id, None)
        return id

    async def _note(self, w: Watched, facts: dict[str, str]) -> bool:
        """Whether the supervisor keeps these facts with it now; if it could not be asked the next tick asks again."""
        body = Note(id=w.id, epoch=w.status.epoch, opaque=facts)
        with contextlib.suppress(NeaptideError):
            if await self._supervisor.call("note", body) == b"true":
                w.status = msgspec.structs.replace(w.status, opaque=facts)
                return True
        return False

    async def _kill(self, w: Watched) -> None:
        with contextlib.suppress(NeaptideError):
            body = {"id": w.id, "epoch": w.status.epoch, "kill": True}
            await self._supervisor.call("stop", body)

    async def _stop(self, w: Watched) -> None:
        grace_s = float(w.status.opaque["drain_s"]) + CUT_S
        body = {"id": w.id, "epoch": w.status.epoch, "grace_s": grace_s}
        ended = await self._supervisor.call("stop", body, timeout_s=grace_s + 10)
        if ended == b"false":  # it had died before we asked
            self.exited(w.status)

    def _row(self, w: Watched) -> ReplicaRow:
        return ReplicaRow(
            id=w.id,
            model=w.deployment,
            endpoint=f"link:{self.link_path(w.id)}",
            revision=w.status.opaque.get("revision", ""),
            epoch=w.status.epoch,
            state="ready" if w.state == "ready" else "draining",  # a standby keeps its link and is given nothing
            token=self._token,
            members=msgspec.json.decode(w.status.opaque.get("members", "{}"), type=dict[str, str]),
        )

    def _replica(self, w: Watched) -> Replica:
        return Replica(
            id=w.id,
            deployment=w.deployment,
            revision=w.status.opaque.get("revision", ""),
            state=w.state,
            endpoint=f"link:{self.link_path(w.id)}",
            epoch=w.status.epoch,
            started_s=w.started_s,
            queued=w.queued,
            parked_s=float(w.status.opaque.get(PARKED, 0.0)),
            running=w.about.load.running if w.about.load else 0,
            waiting=w.about.load.waiting if w.about.load else 0,
            free_kv_tokens=w.about.load.free_kv_tokens if w.about.load else None,
            error=w.error,
        )

    def _remove_sockets(self, id: str) -> None:
        for path in (self.http_path(id), self.link_path(id)):
            path.unlink(missing_ok=True)

    def _last_words(self, status: ChildStatus) -> str:
        """Why it died, from the last error line of its log where it left one."""
        said = last_error(self._state.log / f"{status.id}.log")
        return said or f"exit {status.exit_code}"


def _facts(spec: ReplicaSpec) -> dict[str, str]:
    """What the supervisor keeps of a replica for whoever controls it next."""
    facts = {"deployment": spec.model, "revision": spec.revision, "drain_s": str(spec.grace_s)}
    if spec.members:
        facts["members"] = msgspec.json.encode({m.model: m.revision for m in spec.members}).decode()
    return facts


class LogLine(msgspec.Struct):
    """The part of a replica's JSON log line that tells why it ended."""

    code: str = ""
    what: str = ""
    why: str = ""
    fix: str = ""


def last_error(path: Path, look_back: int = 16 << 10) -> str:
    """The last `{"code", "what", "why", "fix"}` line of a log, as an error text; "" when there is none."""
    try:
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - look_back))
            lines = f.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            said = msgspec.json.decode(line, type=LogLine)
            if said.code and said.what:
                return str(NeaptideError(said.what, why=said.why, fix=said.fix, code=said.code))
    return ""
