"""Spares: processes that are up without a model. How many, for how long; and that a start becomes one of them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from neaptide.config import parse
from neaptide.control.decide import decide
from neaptide.control.traits import Memory, Told, learn, traits
from neaptide.errors import ConfigError
from neaptide.fleet.local import LocalDriver
from neaptide.fleet.supervisor import Supervisor
from neaptide.types import (
    SPARE,
    Carry,
    Deployment,
    Launch,
    Load,
    Override,
    Plan,
    Replica,
    Revision,
    Scale,
    Snapshot,
    Spares,
    Standby,
    Traits,
)
from tests.conftest import Service, alive, descendants
from tests.test_driver_contract import DEPLOYMENT, LAUNCH, driver, states, supervised, until
from tests.traffic import admin, chat, wait_for

SPAWN_S, HOLD_S = 0.5, 50.0


def deployment(model: str = "m", high: int = 4, engine: str = "echo", standby: int = 0) -> Deployment:
    stable = Revision(id="r1", model=model, source="", engine=engine)
    scale = Scale(min=0, max=high, policy="knative", standby=Standby(max=standby, rent=1.0))
    return Deployment(model=model, stable=stable, scale=scale)


class Host:
    """Two models of one engine whose counts are set by hand; what is launched is ready at once."""

    def __init__(self, spares: int = 2, standby: int = 0) -> None:
        self.spares = Spares(max=spares, rent=0.01)
        self.deployments = (deployment("m", standby=standby), deployment("n", standby=standby))
        self.fleet: list[Replica] = []
        self.carry, self.plan, self.now_s = Carry(), Plan(), 1000.0

    def tick(self, m: int = 0, n: int = 0, after_s: float = 1.0) -> dict[str, int]:
        self.now_s += after_s
        seen = Snapshot(
            now_s=self.now_s, now_wall_s=1e9 + self.now_s, deployments=self.deployments, replicas=tuple(self.fleet),
            loads={d: Load(tick_s=1.0, age_s=0.1) for d in ("m", "n")}, spares=self.spares,
            traits={d: Traits(cold_start_s=5.0, spawn_s=SPAWN_S) for d in ("m", "n")},
            overrides={d: Override(count=c, until_wall_s=1e12) for d, c in (("m", m), ("n", n))},
        )  # fmt: skip
        self.plan, self.carry = decide(seen, self.carry)
        self.fleet = [
            replace(r, state="standby", parked_s=self.now_s) if r.id in self.plan.parks else r
            for r in self.fleet
            if r.id not in self.plan.drains
        ]
        self.fleet += [
            Replica(id=x.replica, deployment=x.deployment, revision="r1", state="ready", endpoint="")
            for x in self.plan.launches
        ]
        return self.plan.spares


def test_what_is_let_go_leaves_a_spare_behind_until_its_rent_has_cost_what_it_would_save() -> None:
    host = Host()
    assert host.tick(m=1) == {}
    assert host.tick(m=0) == {"echo": 1}
    assert "1 process without a model is kept for at most 50.0 s" in " ".join(host.plan.reasons)
    assert host.tick(after_s=HOLD_S - 1.0) == {"echo": 1}
    assert host.tick() == {}


def test_a_launch_of_any_model_of_that_engine_takes_the_last_one() -> None:
    host = Host()
    host.tick(m=2)
    host.tick(m=1)
    host.tick(m=0, after_s=20.0)
    assert host.plan.spares == {"echo": 2}
    assert host.tick(n=1) == {"echo": 1}
    assert host.tick(n=1, after_s=HOLD_S - 21.0) == {}  # the first one's time is over


def test_there_are_never_more_than_may_be_and_without_any_everything_is_as_it_was() -> None:
    host = Host()
    host.tick(m=4)
    assert host.tick(m=0) == {"echo": 2}
    host = Host(spares=0)
    host.tick(m=1)
    assert host.tick(m=0) == {}
    assert host.carry.vacant_s == {}


def test_what_stands_by_leaves_a_spare_only_when_it_goes() -> None:
    host = Host(standby=1)
    host.tick(m=1)
    assert host.tick(m=0) == {}
    assert host.plan.parks
    assert host.tick(after_s=5.0) == {"echo": 1}


def test_a_start_from_a_spare_is_no_measure_of_a_cold_one() -> None:
    d, memory = deployment(), Memory()
    for n, stages in enumerate(({"spawn_s": 0.1, "io_import_s": 0.3, "import_s": 0.2}, {SPARE: 9.0, "spawn_s": 0.0})):
        r = Replica(id=f"m-{n}", deployment="m", revision="r1", state="starting", endpoint="", started_s=10.0 * n)
        memory = learn(memory, [d], [r], {}, {}, 10.0 * n)
        told = {"m": Told(stages={r.id: stages})}
        memory = learn(memory, [d], [replace(r, state="ready")], {}, told, 10.0 * n + 2.0 - n)
    found = traits(d, memory)
    assert (found.cold_start_s, memory.models["m"].starts) == (2.0, 1)
    assert found.spawn_s == pytest.approx(0.4)


@pytest.mark.parametrize("spares", ["{max: -1}", "{rent: 0}"])
def test_spares_that_cannot_be_are_refused(spares: str) -> None:
    with pytest.raises(ConfigError, match="spares: max"):
        parse(f"models: {{m: {{engine: echo}}}}\nspares: {spares}", "x")


# --- real processes ---------------------------------------------------------------------------------------------------


def spare_pids(supervisor: Supervisor) -> list[int]:
    return supervisor.pids().get("spare", [])


def with_driver(tmp_path: Path, story: Callable[[LocalDriver, Supervisor], Awaitable[Any]]) -> None:
    async def whole() -> None:
        async with supervised(tmp_path) as (state, supervisor), driver(state) as one:
            await story(one, supervisor)

    asyncio.run(whole())


async def ready(one: LocalDriver, id: str = "m-0") -> None:
    async def is_ready() -> bool:
        return (await states(one)).get(id) == "ready"

    await until(is_ready)


def test_a_launch_becomes_the_spare_of_its_engine_and_serves(tmp_path: Path) -> None:
    async def story(one: LocalDriver, supervisor: Supervisor) -> None:
        await one.keep_spares({"echo": 1})
        await one.keep_spares({"echo": 1})
        (pid,) = spare_pids(supervisor)
        await one.launch(LAUNCH, DEPLOYMENT)
        await one.keep_spares({})
        await ready(one)
        assert one.pids() == {"m-0": pid}
        assert one.about("m-0").stages[SPARE] > 0.0
        assert spare_pids(supervisor) == []
        assert one.rows()["m-0"].state == "ready"

    with_driver(tmp_path, story)


def test_spares_that_are_not_wanted_any_more_end_with_their_engine_processes(tmp_path: Path) -> None:
    async def story(one: LocalDriver, supervisor: Supervisor) -> None:
        await one.keep_spares({"echo": 2})
        both = spare_pids(supervisor)

        async def engines() -> bool:
            return all(descendants(pid) for pid in both)

        await until(engines)
        everyone = [*both, *(child for pid in both for child in descendants(pid))]
        assert len(everyone) == 4
        await one.keep_spares({})

        async def gone() -> bool:
            return not any(map(alive, everyone))

        await until(gone)

    with_driver(tmp_path, story)


def test_where_the_spare_has_died_a_launch_starts_from_nothing(tmp_path: Path) -> None:
    async def story(one: LocalDriver, supervisor: Supervisor) -> None:
        await one.keep_spares({"echo": 1})
        (pid,) = spare_pids(supervisor)
        os.kill(pid, signal.SIGKILL)
        await one.launch(LAUNCH, DEPLOYMENT)  # perhaps before anybody has noticed
        await one.launch(Launch(deployment="m", replica="m-1", epoch=0), DEPLOYMENT)
        await ready(one, "m-1")

    with_driver(tmp_path, story)


def test_a_successor_of_control_finds_the_spares(tmp_path: Path) -> None:
    async def story() -> None:
        async with supervised(tmp_path) as (state, supervisor):
            async with driver(state) as first:
                await first.keep_spares({"echo": 1})
                (pid,) = spare_pids(supervisor)
            async with driver(state) as second:
                await second.keep_spares({"echo": 1})
                assert spare_pids(supervisor) == [pid]
                await second.launch(LAUNCH, DEPLOYMENT)
                assert second.pids() == {"m-0": pid}

    asyncio.run(story())


def test_a_model_at_zero_leaves_a_spare_which_its_next_start_becomes_and_which_ends_with_the_supervisor(
    serve: Callable[..., Service],
) -> None:
    service = serve("models: {echo: {engine: echo, scale: {min: 0, max: 1}}}\nspares: {max: 1, rent: 0.0001}\n")

    def spare() -> list[int]:
        return [p["pid"] for p in admin(service, "api/v1/status")["processes"] if p["role"] == "spare"]

    service.run("scale", "set", "echo", "1")
    wait_for(lambda: admin(service, "api/v1/status")["deployments"][0]["ready"] == 1, "one replica", 60.0)
    service.run("scale", "set", "echo", "0")
    (pid,) = wait_for(spare, "a spare")
    service.run("scale", "set", "echo", "1")
    assert chat(service, "from the spare", max_tokens=2).join(60).status == 200
    assert [r["pid"] for r in admin(service, "api/v1/status")["replicas"]] == [pid]
    service.run("scale", "set", "echo", "0")
    wait_for(spare, "the next spare")
    supervisor = service.pids["supervisor"][0]
    everyone = descendants(supervisor)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, everyone)), "no orphan")
