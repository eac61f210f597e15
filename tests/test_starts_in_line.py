"""Replicas that wait in line to start, with real echo processes."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from msgspec.structs import replace

from neaptide.types import Deployment, Launch
from tests.test_driver_contract import DEPLOYMENT, driver, states, supervised, until


def launch(id: str) -> Launch:
    """`m-0` is of the deployment m."""
    return Launch(deployment=id[0], replica=id, epoch=0)


def of(id: str) -> Deployment:
    return replace(DEPLOYMENT, model=id[0])


def test_eight_replicas_start_two_at_a_time_and_all_serve(tmp_path: Path) -> None:
    ids, most = [f"m-{n}" for n in range(8)], 0

    async def story() -> None:
        async with supervised(tmp_path) as (state, supervisor), driver(state, at_once=2) as one:
            for id in ids:
                await one.launch(launch(id), of(id))
            waiting = [r.id for r in await one.observe() if r.queued]
            assert waiting == ids[2:]
            assert (set(one.pids()), len(supervisor.pids()["replica"])) == (set(ids[:2]), 2)
            assert not one.rows()

            async def all_ready() -> bool:
                nonlocal most
                fleet = await one.observe()
                most = max(most, sum(r.state == "starting" and not r.queued for r in fleet))
                return [r.state for r in fleet] == ["ready"] * 8

            await until(all_ready, 120.0)
            assert most == 2
            assert list(one.rows()) == ids

    asyncio.run(story())


def test_what_leaves_the_line_has_never_run_and_what_leaves_while_it_starts_frees_its_place(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, _), driver(state, at_once=1) as one:
            for id in ("m-0", "m-1", "m-2"):
                await one.launch(launch(id), of(id))
            await one.launch(launch("m-1"), of("m-1"))  # it is in line
            await one.drain("m-1")
            assert await states(one) == {"m-0": "starting", "m-2": "starting"}
            await one.drain("m-0")

            async def ready() -> bool:
                return await states(one) == {"m-2": "ready"}

            await until(ready)
            assert not (state.log / "m-1.log").exists()

    asyncio.run(story())


def test_a_start_that_dies_takes_its_kin_out_of_the_line_and_the_next_model_starts(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, _), driver(state, at_once=1) as one:
            for id in ("m-0", "m-1", "n-0"):
                await one.launch(launch(id), of(id))
            os.kill(one.pids()["m-0"], signal.SIGKILL)

            async def next_is_ready() -> bool:
                return await states(one) == {"m-0": "dead", "n-0": "ready"}

            await until(next_is_ready)

    asyncio.run(story())


def test_a_successor_of_control_finds_what_runs_and_not_the_line(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, supervisor):
            async with driver(state, at_once=1) as first:
                await first.launch(launch("m-0"), of("m-0"))
                await first.launch(launch("m-1"), of("m-1"))
            async with driver(state, at_once=1) as second:
                assert list(await states(second)) == ["m-0"]
                await second.launch(launch("m-1"), of("m-1"))

                async def both() -> bool:
                    return await states(second) == {"m-0": "ready", "m-1": "ready"}

                await until(both)
                assert len(supervisor.pids()["replica"]) == 2

    asyncio.run(story())


def test_a_replica_that_the_supervisor_cannot_start_is_told_dead_with_its_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, supervisor), driver(state) as one:
            supervisor.end()  # it starts nothing any more
            await one.launch(launch("m-0"), of("m-0"))
            (found,) = await one.observe()
            assert found.state == "dead"
            assert "E302" in found.error
            await one.forget("m-0")
            assert not await one.observe()

    asyncio.run(story())
