"""One contract for every driver; what only the local one can do is told after it, with real echo replicas."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from neaptide.config import parse
from neaptide.fleet.driver import Driver
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.process import ChildStatus
from neaptide.fleet.rpc import Client
from neaptide.fleet.state import StateDir
from neaptide.fleet.static import StaticDriver
from neaptide.fleet.supervisor import Supervisor
from neaptide.specs import ReplicaSpec
from neaptide.types import Deployment, Launch, Revision
from tests.conftest import ROOT, alive

DEPLOYMENT = Deployment(model="m", stable=Revision(id="m-r1", model="m", source=""))
LAUNCH = Launch(deployment="m", replica="m-0", epoch=0)


async def until(true: Callable[[], Awaitable[object]], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await true():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def static(tmp_path: Path) -> AsyncIterator[StaticDriver]:
    settings = parse("models: {m: {replicas: [{url: 'http://127.0.0.1:1/v1', max_running: 3}]}}", "x")
    yield StaticDriver(settings.models, {"m": "m-r1"})


@asynccontextmanager
async def local(tmp_path: Path) -> AsyncIterator[LocalDriver]:
    async with supervised(tmp_path) as (state, _), driver(state) as one:
        await one.launch(LAUNCH, DEPLOYMENT)

        async def ready() -> bool:
            return [r.state for r in await one.observe()] == ["ready"]

        await until(ready)
        yield one


@asynccontextmanager
async def supervised(tmp_path: Path) -> AsyncIterator[tuple[StateDir, Supervisor]]:
    os.environ["PYTHONPATH"] = str(ROOT)
    state = StateDir(tmp_path / "state")
    state.create()
    supervisor = Supervisor(state, 5.0, lambda report: None)
    await supervisor.open()
    life = asyncio.create_task(supervisor.run())
    try:
        yield state, supervisor
    finally:
        supervisor.end()
        await life


@asynccontextmanager
async def driver(state: StateDir) -> AsyncIterator[LocalDriver]:
    def spec(launch: Launch, deployment: Deployment) -> ReplicaSpec:
        return ReplicaSpec(
            id=launch.replica,
            epoch=state.next_epoch(),
            model=deployment.model,
            revision=deployment.stable.id,
            engine="echo",
            token="boot",
            link_path=str(state.run / f"{launch.replica}.link"),
            http_path=str(state.run / f"{launch.replica}.http"),
            cache_dir=str(state.cache),
            log_path=str(state.log / f"{launch.replica}.log"),
            grace_s=2.0,
        )

    def event(name: str, body: msgspec.Raw) -> None:
        one.exited(msgspec.json.decode(body, type=ChildStatus))

    client = Client(event, lambda: None)
    await client.connect(state.supervisor_sock)
    one = LocalDriver(client, state, "boot", spec, lambda: None)
    await one.adopt()
    try:
        yield one
    finally:
        await one.close()
        await client.close()


drivers = pytest.mark.parametrize("make", [static, local])


@drivers
def test_a_ready_replica_is_observed_and_gateways_are_told_how_to_reach_it(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as one:
            (replica,) = await one.observe()
            assert (replica.deployment, replica.revision, replica.state) == ("m", "m-r1", "ready")
            (row,) = one.rows().values()
            assert (row.id, row.model, row.endpoint) == (replica.id, "m", replica.endpoint)
            assert row.state == "ready"

    asyncio.run(story())


@drivers
def test_every_verb_may_be_repeated_and_unknown_ids_are_ignored(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as one:
            before = await one.observe()
            await one.launch(Launch(deployment="m", replica=before[0].id, epoch=0), DEPLOYMENT)
            await one.drain("nobody")
            await one.forget("nobody")
            await one.forget(before[0].id)  # it lives: nothing to forget
            assert list(before) == list(await one.observe())

    asyncio.run(story())


async def states(one: Driver) -> dict[str, str]:
    return {r.id: r.state for r in await one.observe()}


def test_a_drained_local_replica_ends_and_is_gone(tmp_path: Path) -> None:
    async def story() -> None:
        async with local(tmp_path) as one:
            pid = one.pids()["m-0"]
            await one.drain("m-0")
            assert one.rows()["m-0"].state == "draining"

            async def gone() -> bool:
                return not await one.observe()

            await until(gone)
            assert not alive(pid)

    asyncio.run(story())


def test_a_killed_local_replica_is_told_dead_until_it_is_forgotten(tmp_path: Path) -> None:
    async def story() -> None:
        async with local(tmp_path) as one:
            os.kill(one.pids()["m-0"], signal.SIGKILL)

            async def dead() -> bool:
                return await states(one) == {"m-0": "dead"}

            await until(dead)
            assert not one.rows()
            await one.forget("m-0")
            assert await states(one) == {}

    asyncio.run(story())


def test_a_restarted_control_adopts_the_running_replica_without_touching_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, _):
            async with driver(state) as first:
                await first.launch(LAUNCH, DEPLOYMENT)
                pid = first.pids()["m-0"]
            async with driver(state) as second:

                async def ready() -> bool:
                    return await states(second) == {"m-0": "ready"}

                await until(ready)
                assert second.pids() == {"m-0": pid}
                assert second.rows()["m-0"].revision == "m-r1"

    asyncio.run(story())
