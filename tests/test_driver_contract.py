"""One contract for every driver, and one for those that start replicas: the local one with real echo replicas, the
simulator's in virtual time. What only the local one can do is told after it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from neaptide.clock import mono_s
from neaptide.config import parse
from neaptide.fleet.driver import Driver
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.process import ChildStatus
from neaptide.fleet.rpc import Client
from neaptide.fleet.state import StateDir
from neaptide.fleet.static import StaticDriver
from neaptide.fleet.supervisor import Supervisor
from neaptide.simulate.cold import Stage
from neaptide.simulate.fates import Fate
from neaptide.simulate.live import Live
from neaptide.simulate.settings import Setup
from neaptide.specs import MemberSpec, ReplicaSpec
from neaptide.types import Deployment, Launch, Revision
from tests.conftest import ROOT, alive

DEPLOYMENT = Deployment(model="m", stable=Revision(id="m-r1", model="m", source=""))
LAUNCH = Launch(deployment="m", replica="m-0", epoch=0)
SECOND = Launch(deployment="m", replica="m-1", epoch=0)
LIFE_S = 60.0  # of the simulated m-0


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

        await until(all_ready(one, "m-0"))
        yield one


class Fleet(NamedTuple):
    """A driver that starts replicas; m-0 is ready. `until` lets time pass, `kill` ends its process unasked."""

    one: Driver
    until: Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]
    kill: Callable[[], None]  # m-0


@asynccontextmanager
async def started(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with local(tmp_path) as one:
        yield Fleet(one, until, lambda: os.kill(one.pids()["m-0"], signal.SIGKILL))


@asynccontextmanager
async def simulated(tmp_path: Path) -> AsyncIterator[Fleet]:
    boot = (Stage(name="process", seconds=1.0, spared=True), Stage(name="weights", seconds=3.0))
    live = Live(Setup(boot=boot), fates=[Fate(dies_s=LIFE_S)])

    async def until(true: Callable[[], Awaitable[object]]) -> None:
        for _ in range(1000):
            if await true():
                return
            live.advance(0.1)
        raise TimeoutError

    fleet = Fleet(live.driver, until, lambda: live.advance(LIFE_S))
    await fleet.one.launch(LAUNCH, DEPLOYMENT)
    await until(all_ready(fleet.one, "m-0"))
    yield fleet


@asynccontextmanager
async def virtual(tmp_path: Path) -> AsyncIterator[Driver]:
    async with simulated(tmp_path) as fleet:
        yield fleet.one


def all_ready(one: Driver, *ids: str) -> Callable[[], Awaitable[object]]:
    async def ready() -> bool:
        return await states(one) == dict.fromkeys(ids, "ready")

    return ready


@asynccontextmanager
async def local_pair(tmp_path: Path) -> AsyncIterator[tuple[LocalDriver, LocalDriver]]:
    """One that has a ready replica, and its successor, which has adopted nothing yet."""
    async with supervised(tmp_path) as (state, _), driver(state) as first, driver(state) as second:
        await first.launch(LAUNCH, DEPLOYMENT)

        async def ready() -> bool:
            return await states(first) == {"m-0": "ready"}

        await until(ready)
        yield first, second


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
async def driver(state: StateDir, at_once: int = 8) -> AsyncIterator[LocalDriver]:
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
            members=tuple(MemberSpec(model=m, revision=f"{m}-r7") for m in deployment.members),
        )

    def event(name: str, body: msgspec.Raw) -> None:
        one.exited(msgspec.json.decode(body, type=ChildStatus))

    client = Client(event, lambda: None)
    await client.connect(state.supervisor_sock)
    one = LocalDriver(client, state, "boot", spec, lambda: None, at_once)
    await one.adopt()
    try:
        yield one
    finally:
        await one.close()
        await client.close()


drivers = pytest.mark.parametrize("make", [static, local, virtual])
starters = pytest.mark.parametrize("make", [started, simulated])


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
            await one.park("nobody")
            await one.wake("nobody")
            await one.wake(before[0].id)  # it does not stand by
            await one.forget("nobody")
            await one.forget(before[0].id)  # it lives: nothing to forget
            assert list(before) == list(await one.observe())

    asyncio.run(story())


@drivers
def test_a_replica_that_was_parked_and_woken_serves_as_before(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as one:
            (before,), rows = await one.observe(), dict(one.rows())
            await one.park(before.id)
            await one.park(before.id)
            assert set(one.rows()) == {before.id}
            await one.wake(before.id)
            assert list(await one.observe()) == [before]
            assert dict(one.rows()) == rows

    asyncio.run(story())


async def states(one: Driver) -> dict[str, str]:
    return {r.id: r.state for r in await one.observe()}


@starters
def test_a_launched_replica_starts_and_serves_with_an_epoch_of_its_own(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            await fleet.one.launch(SECOND, DEPLOYMENT)
            assert await states(fleet.one) == {"m-0": "ready", "m-1": "starting"}
            assert set(fleet.one.rows()) == {"m-0"}
            await fleet.until(all_ready(fleet.one, "m-0", "m-1"))
            first, second = await fleet.one.observe()
            assert first.epoch < second.epoch
            assert first.started_s < second.started_s

    asyncio.run(story())


@starters
def test_a_drained_replica_ends_and_is_gone(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            await fleet.one.drain("m-0")

            async def gone() -> bool:
                return not await fleet.one.observe()

            await fleet.until(gone)
            assert not fleet.one.rows()
            await fleet.one.drain("m-0")

    asyncio.run(story())


@starters
def test_a_replica_that_dies_is_told_dead_until_it_is_forgotten(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            fleet.kill()

            async def dead() -> bool:
                return await states(fleet.one) == {"m-0": "dead"}

            await fleet.until(dead)
            assert not fleet.one.rows()
            await fleet.one.forget("m-0")
            assert await states(fleet.one) == {}

    asyncio.run(story())


@starters
def test_a_parked_replica_stands_by_and_gateways_are_told_to_give_it_nothing(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            await fleet.one.park("m-0")
            (replica,) = await fleet.one.observe()
            assert replica.state == "standby"
            assert replica.parked_s >= replica.started_s
            assert fleet.one.rows()["m-0"].state == "draining"
            await fleet.one.launch(LAUNCH, DEPLOYMENT)  # of that id: it exists
            assert await states(fleet.one) == {"m-0": "standby"}

    asyncio.run(story())


@starters
def test_a_standby_that_dies_is_told_dead_and_one_that_drains_is_gone(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            await fleet.one.launch(SECOND, DEPLOYMENT)
            await fleet.until(all_ready(fleet.one, "m-0", "m-1"))
            await fleet.one.park("m-0")
            await fleet.one.park("m-1")
            await fleet.one.drain("m-1")
            fleet.kill()

            async def ended() -> bool:
                return await states(fleet.one) == {"m-0": "dead"}

            await fleet.until(ended)
            await fleet.one.wake("m-0")
            assert not fleet.one.rows()

    asyncio.run(story())


@starters
def test_spares_are_kept_as_wanted_and_a_launch_serves_with_them_as_without(make, tmp_path: Path) -> None:
    async def story() -> None:
        async with make(tmp_path) as fleet:
            await fleet.one.keep_spares({"echo": 1})
            await fleet.one.keep_spares({"echo": 1})
            assert set(await states(fleet.one)) == {"m-0"}
            await fleet.one.launch(SECOND, DEPLOYMENT)
            await fleet.one.keep_spares({})
            await fleet.until(all_ready(fleet.one, "m-0", "m-1"))

    asyncio.run(story())


# --- the local driver -------------------------------------------------------------------------------------------------


def test_a_drained_local_replica_finishes_first_and_its_process_ends(tmp_path: Path) -> None:
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


def test_a_parked_local_replica_lives_on_and_keeps_when_it_was_parked(tmp_path: Path) -> None:
    async def story() -> None:
        async with local(tmp_path) as one:
            before_s, pid = mono_s(), one.pids()["m-0"]
            await one.park("m-0")
            (replica,) = await one.observe()
            assert before_s <= replica.parked_s <= mono_s()
            assert (one.pids(), alive(pid)) == ({"m-0": pid}, True)

    asyncio.run(story())


def test_a_restarted_control_adopts_a_standby_as_one_with_its_clock_and_can_wake_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with local_pair(tmp_path) as (first, second):
            await first.park("m-0")
            (left,) = await first.observe()
            await second.adopt()
            (found,) = await second.observe()
            assert (found.state, found.parked_s) == ("standby", left.parked_s)
            await second.wake("m-0")
            assert (await states(second), second.rows()["m-0"].state) == ({"m-0": "ready"}, "ready")

    asyncio.run(story())


def test_a_replica_of_several_models_is_one_row_that_tells_them_all_after_a_restart_of_control_too(
    tmp_path: Path,
) -> None:
    pool = msgspec.structs.replace(DEPLOYMENT, members=("a", "b"))

    async def story() -> None:
        async with supervised(tmp_path) as (state, _):
            async with driver(state) as first:
                await first.launch(LAUNCH, pool)
            async with driver(state) as second:

                async def ready() -> bool:
                    return await states(second) == {"m-0": "ready"}

                await until(ready)
                (row,) = second.rows().values()
                assert (row.model, row.revision, row.members) == ("m", "m-r1", {"a": "a-r7", "b": "b-r7"})
                assert set(second.about("m-0").members) == {"a", "b"}

    asyncio.run(story())
