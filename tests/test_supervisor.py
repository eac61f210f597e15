"""The only parent: keeps what it should, tells what ended, leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from neaptide.errors import ProcessError
from neaptide.fleet.process import ChildSpec, ChildStatus
from neaptide.fleet.rpc import Client
from neaptide.fleet.state import StateDir
from neaptide.fleet.supervisor import Report, Supervisor
from tests.conftest import ROOT, alive


def child(id: str, tmp_path: Path, kind: str = "replica", **play: object) -> ChildSpec:
    document = {"alive": str(tmp_path / f"{id}.alive"), **play}
    return ChildSpec(
        kind=kind, id=id, epoch=1, module="tests.child_process", document=msgspec.Raw(msgspec.json.encode(document))
    )


async def until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.01)


class Running:
    """A supervisor in this process, and a client connected to it."""

    def __init__(self, supervisor: Supervisor, client: Client, exits: list[ChildStatus], reports: list[Report]) -> None:
        self.supervisor, self.client, self.exits, self.reports = supervisor, client, exits, reports

    async def spawn(self, spec: ChildSpec) -> ChildStatus:
        return msgspec.json.decode(await self.client.call("spawn", spec), type=ChildStatus)

    async def listed(self) -> list[ChildStatus]:
        return msgspec.json.decode(await self.client.call("list"), type=list[ChildStatus])


@asynccontextmanager
async def running(tmp_path: Path, grace_s: float = 5.0) -> AsyncIterator[Running]:
    os.environ["PYTHONPATH"] = str(ROOT)
    state = StateDir(tmp_path / "state")
    state.create()
    exits: list[ChildStatus] = []
    reports: list[Report] = []
    supervisor = Supervisor(state, grace_s, reports.append)
    await supervisor.open()
    life = asyncio.create_task(supervisor.run())
    client = Client(lambda event, body: exits.append(msgspec.json.decode(body, type=ChildStatus)), lambda: None)
    await client.connect(state.supervisor_sock)
    try:
        yield Running(supervisor, client, exits, reports)
    finally:
        supervisor.end()
        await life
        await client.close()


def test_a_spawned_child_is_listed_and_its_death_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            told = await r.spawn(child("a-0", tmp_path))
            await until((tmp_path / "a-0.alive").exists)
            assert [c.pid for c in await r.listed()] == [told.pid]
            os.kill(told.pid, signal.SIGKILL)
            await until(lambda: r.exits)
            assert (r.exits[0].id, r.exits[0].exit_code) == ("a-0", -signal.SIGKILL)
            assert await r.listed() == []

    asyncio.run(story())


def test_spawning_a_running_id_again_starts_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            first, second = await r.spawn(child("a-0", tmp_path)), await r.spawn(child("a-0", tmp_path))
            assert first.pid == second.pid

    asyncio.run(story())


def test_a_stop_for_another_epoch_touches_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            told = await r.spawn(child("a-0", tmp_path))
            assert await r.client.call("stop", {"id": "a-0", "epoch": 99}) == b"false"
            assert alive(told.pid)
            await until((tmp_path / "a-0.alive").exists)
            assert await r.client.call("stop", {"id": "a-0", "epoch": 1}) == b"true"
            assert not alive(told.pid)

    asyncio.run(story())


def test_a_kept_process_that_dies_is_started_again_with_a_higher_epoch(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            epochs: list[int] = []

            def make(epoch: int) -> ChildSpec:
                epochs.append(epoch)
                return msgspec.structs.replace(child("control", tmp_path, "control"), epoch=epoch)

            r.supervisor.keep("control", make)
            await until((tmp_path / "control.alive").exists)
            (first,) = r.supervisor.pids()["control"]
            os.kill(first, signal.SIGKILL)
            await until(lambda: r.supervisor.pids()["control"] not in ([], [first]))
            assert epochs[1] > epochs[0]
            assert any(x.stage == "died" for x in r.reports)

    asyncio.run(story())


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            told = await r.spawn(child("a-0", tmp_path, stubborn=True))
            await until((tmp_path / "a-0.alive").exists)
            await r.client.call("stop", {"id": "a-0", "epoch": 1, "grace_s": 0.1})
            assert not alive(told.pid)
            assert r.exits[0].exit_code == -signal.SIGKILL

    asyncio.run(story())


def test_what_the_supervisor_does_not_know_is_an_error_with_words(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as r:
            with pytest.raises(ProcessError, match="juggle"):
                await r.client.call("juggle")
            with pytest.raises(ProcessError, match="not control's to start"):
                await r.client.call("spawn", child("gateway-9", tmp_path, "gateway"))

    asyncio.run(story())


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.test_supervisor import child, running

async def main(root):
    async with running(root, 5.0) as r:
        told = [await r.spawn(child(f"a-{i}", root, stubborn=i == 1)) for i in range(3)]
        while not all((root / f"a-{i}.alive").exists() for i in range(3)):
            await asyncio.sleep(0.01)
        print(*(t.pid for t in told), flush=True)
        await asyncio.sleep(60)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_when_the_supervisor_is_killed_every_child_ends_by_itself(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    pids = [int(x) for x in parent.stdout.readline().split()]
    assert len(pids) == 3
    parent.kill()
    parent.wait()
    asyncio.run(until(lambda: not any(map(alive, pids)), 5.0))
    parent.stdout.close()


def test_a_second_service_on_the_same_state_directory_is_refused(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    fd = state.lock()
    with pytest.raises(ProcessError, match=str(os.getpid())):
        state.lock()
    assert state.locked()
    os.close(fd)
    assert not state.locked()
