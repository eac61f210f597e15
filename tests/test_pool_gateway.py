"""The gateway before replicas that serve several models: a lane each, one connection and one count for all."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from neaptide.clock import mono_s
from neaptide.gateway.route import Target, choose
from neaptide.link import LoadReport
from neaptide.table import DeploymentRow, Fast, ReplicaRow, Slow, Table
from tests.fake_link import FakeLinkReplica, Opened
from tests.gateway_kit import Running, chat, gateway, key_row, post, run, until

MEMBERS = {"one": "one-r1", "two": "two-r7"}


def row(id: str, endpoint: str, members: dict[str, str] = MEMBERS, **more: Any) -> ReplicaRow:
    return ReplicaRow(id=id, model="tail", endpoint=endpoint, revision="tail-r", members=members, **more)


def table(*rows: ReplicaRow, models: tuple[str, ...] = ("one", "two")) -> Table:
    deployments = tuple(DeploymentRow(model=m, aliases=(f"{m}-alias",), revision=f"{m}-now") for m in models)
    return Table(fast=Fast(version=1, replicas=rows), slow=Slow(version=1, deployments=deployments, keys=(key_row(),)))


@contextlib.asynccontextmanager
async def pooled() -> AsyncIterator[tuple[Running, FakeLinkReplica]]:
    with tempfile.TemporaryDirectory(prefix="np") as directory:
        replica = await FakeLinkReplica(Path(directory, "r.link")).start()
        try:
            async with gateway(table(row("tail-0", f"link:{replica.path}", token="boot"))) as running:
                await until(lambda: running.door.targets["tail-0"].report is not None)
                yield running, replica
        finally:
            await replica.stop()


async def room(running: Running, replica: FakeLinkReplica, **rooms: int) -> None:
    """The replica tells its room, and the gateway has heard it."""
    replica.wires[0].load(slots=sum(rooms.values()), rooms=rooms)
    await until(lambda: (report := running.door.targets["tail-0"].report) is not None and report.rooms == rooms)


async def opened(replica: FakeLinkReplica, count: int = 1) -> Opened:
    await until(lambda: len(replica.requests) >= count)
    return replica.requests[count - 1]


def test_models_of_one_replica_share_a_connection_and_each_request_names_its_model():
    async def main() -> None:
        async with pooled() as (running, replica):
            await room(running, replica, one=9, two=9)
            asks = []
            for n, model in enumerate(("one", "two-alias"), 1):
                asks.append(asyncio.create_task(running.ask(post(chat(model=model)))))
                await opened(replica, n)
            assert [r.header.model for r in replica.requests] == ["one", "two"]
            assert len(replica.wires) == 1
            gauges = running.door.gauges(mono_s(), 0)
            assert gauges.replicas == {"tail-0": 2}
            assert [gauges.models[m].running for m in MEMBERS] == [1, 1]
            for request in replica.requests:
                request.end(b"{}", finish="stop", output_tokens=3)
            for ask in asks:
                assert (await ask).status == 200
            rows = {r.model: r.revision for r in running.journal.rows}
            assert rows == MEMBERS
            assert {b.model: (b.revision, b.replica) for b in running.journal.begins} == {
                m: (r, "tail-0") for m, r in MEMBERS.items()
            }
            scrape = (await running.ask(b"GET /metrics HTTP/1.1\r\nHost: t\r\n\r\n")).body.decode()
            assert scrape.count('neaptide_replica_in_flight{model_name="tail",replica="tail-0"}') == 1

    run(main())


def test_a_full_model_waits_while_the_other_is_served_and_goes_when_there_is_room():
    async def main() -> None:
        async with pooled() as (running, replica):
            await room(running, replica, one=0, two=5)
            waits = asyncio.create_task(running.ask(post(chat(model="one"))))
            await until(lambda: len(running.door.lanes["one"].line) == 1)
            served = asyncio.create_task(running.ask(post(chat(model="two"))))
            (await opened(replica)).end(b"{}", finish="stop")
            assert (await served).status == 200
            assert len(running.door.lanes["one"].line) == 1
            await room(running, replica, one=1, two=5)
            request = await opened(replica, 2)
            assert request.header.model == "one"
            request.end(b"{}", finish="stop")
            assert (await waits).status == 200

    run(main())


def test_a_lost_replica_is_lost_to_all_its_models():
    async def main() -> None:
        async with pooled() as (running, replica):
            await room(running, replica, one=9, two=9)
            asks = [asyncio.create_task(running.ask(post(chat(model=m, stream=True)))) for m in MEMBERS]
            for n in (1, 2):
                (await opened(replica, n)).token(b"data: {}\n\n")
            await until(lambda: all(e.opened for e in running.door.live))
            replica.cut()
            for ask in asks:
                assert b"replica_lost" in (await ask).body
            assert running.door.gauges(mono_s(), 0).replicas == {"tail-0": 0}

    run(main())


def test_a_model_that_leaves_the_table_takes_no_connection_with_it():
    async def main() -> None:
        async with pooled() as (running, replica):
            await room(running, replica, one=9, two=9)
            here = running.door.table.fast.replicas
            running.install(table(*here, models=("two",)))
            assert (await running.ask(post(chat(model="one")))).code == "model_not_found"
            ask = asyncio.create_task(running.ask(post(chat(model="two"))))
            (await opened(replica)).end(b"{}", finish="stop")
            assert (await ask).status == 200
            assert len(replica.wires) == 1
            running.install(table(*here, models=()))
            await until(lambda: replica.wires[0].lost)

    run(main())


def test_of_two_pool_replicas_a_model_goes_to_the_one_less_busy_with_any():
    near, far = (Target(row(f"tail-{n}", f"link:/{n}")) for n in range(2))
    for target in (near, far):
        target.connected = True
        target.heard(LoadReport(slots=8, rooms={"one": 4, "two": 4}))
    near.take()
    assert choose([near, far], 0.0, 0, (), "two") is far
    far.heard(LoadReport(slots=4, rooms={"one": 4, "two": 0}))
    assert choose([near, far], 0.0, 0, (), "two") is near
    assert choose([near, far], 0.0, 0, (), "three") is None
