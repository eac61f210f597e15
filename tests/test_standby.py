"""The warm pool: who stands by, for how long, who wakes, and what it costs; decide alone, no process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from neaptide.config import parse
from neaptide.control.decide import decide
from neaptide.control.standby import hold_s, room
from neaptide.errors import ConfigError
from neaptide.types import (
    Carry,
    Choice,
    Deployment,
    Load,
    Override,
    Plan,
    Replica,
    ReplicaState,
    Revision,
    Scale,
    Snapshot,
    Standby,
    Traits,
)

COLD_S, HOLD_S = 5.0, 50.0  # what a start takes, and at a tenth of the price how long one may stand by
POOL = Standby(max=2, rent=0.1)


def deployment(revision: str = "r1", high: int = 4, standby: Standby = POOL, **scale: Any) -> Deployment:
    stable = Revision(id=revision, model="m", source="")
    wide = Scale(min=0, max=high, policy="knative", standby=standby, **scale)
    return Deployment(model="m", stable=stable, scale=wide)


def replica(id: str, state: ReplicaState = "ready", parked_s: float = 0.0, running: int = 0) -> Replica:
    return Replica(id=id, deployment="m", revision="r1", state=state, endpoint="", running=running, parked_s=parked_s)


class Service:
    """One model, tick by tick, its count set by hand: what is parked stands by and what is woken is ready at once."""

    def __init__(self, ready: int = 0, **scale: Any) -> None:
        self.deployment = deployment(**scale)
        self.fleet = [replica(f"m-{i}") for i in range(ready)]
        self.carry, self.plan, self.now_s = Carry(), Plan(), 1000.0
        self.launched = 0

    def tick(self, want: int, after_s: float = 1.0) -> Plan:
        self.now_s += after_s
        seen = Snapshot(
            now_s=self.now_s, now_wall_s=1e9 + self.now_s, deployments=(self.deployment,), replicas=tuple(self.fleet),
            loads={"m": Load(tick_s=1.0, age_s=0.1)}, traits={"m": Traits(cold_start_s=COLD_S)}, currency="CNY",
            overrides={"m": Override(count=want, until_wall_s=1e12)},
        )  # fmt: skip
        self.plan, self.carry = decide(seen, self.carry)
        self.launched += len(self.plan.launches)
        self.fleet = [self._moved(r) for r in self.fleet if r.id not in self.plan.drains and r.state != "dead"]
        self.fleet += [replica(x.replica) for x in self.plan.launches]
        return self.plan

    def _moved(self, r: Replica) -> Replica:
        if r.id in self.plan.parks:
            return replace(r, state="standby", parked_s=self.now_s)
        return replace(r, state="ready", parked_s=0.0) if r.id in self.plan.wakes else r

    def count(self, state: ReplicaState) -> int:
        return sum(r.state == state for r in self.fleet)

    @property
    def choice(self) -> Choice:
        return self.plan.choices[0]


def test_what_is_let_go_stands_by_and_wakes_before_anything_is_launched() -> None:
    service = Service(ready=3)
    plan = service.tick(1)
    assert (len(plan.parks), plan.drains) == (2, ())
    assert (service.count("ready"), service.count("standby")) == (1, 2)
    plan = service.tick(4)
    assert (len(plan.wakes), len(plan.launches)) == (2, 1)
    assert service.count("standby") == 0


def test_a_standby_is_let_go_once_its_rent_has_cost_as_much_as_a_restart() -> None:
    assert hold_s(deployment().scale, Traits(cold_start_s=COLD_S)) == HOLD_S
    service = Service(ready=1)
    service.tick(0)
    service.tick(0, HOLD_S - 1.0)
    assert service.count("standby") == 1
    plan = service.tick(0, 1.0)
    assert plan.drains == ("m-0",)
    assert "it stood by for 50.0 s, at 0.1 of a replica as much as a start of 5.0 s" in plan.reasons[0]


def test_holding_and_restarting_never_cost_twice_what_foresight_would_have_paid() -> None:
    for gap_s in (1.0, 25.0, 49.0, 50.0, 51.0, 500.0):
        service = Service(ready=1)
        service.tick(0)
        parked_s = service.now_s
        stood_s, asked_again_s = 0.0, parked_s + gap_s
        while service.now_s + 1.0 < asked_again_s:
            service.tick(0)
            stood_s += service.count("standby")
        service.tick(1, asked_again_s - service.now_s)
        paid = 0.1 * min(gap_s, stood_s + 1.0) + COLD_S * service.launched
        assert paid <= 2 * min(0.1 * gap_s, COLD_S) + 0.1


def test_the_last_parked_wakes_first_and_the_first_parked_goes_first() -> None:
    service = Service(ready=2)
    service.tick(1)
    (first,) = service.plan.parks
    service.tick(0, 20.0)
    (last,) = service.plan.parks
    assert service.tick(1).wakes == (last,)
    service.tick(0)
    assert service.tick(0, 30.0).drains == (first,)
    assert service.count("standby") == 1


def test_a_busy_replica_is_parked_only_where_no_idle_one_goes() -> None:
    service = Service(ready=3)
    service.fleet = [replace(r, running=int(r.id == "m-1")) for r in service.fleet]
    assert "m-1" not in service.tick(1).parks


def test_only_as_many_stand_by_as_may_and_the_rest_drains() -> None:
    service = Service(ready=4)
    plan = service.tick(1)
    assert (len(plan.parks), len(plan.drains)) == (2, 1)
    service.deployment = deployment(standby=Standby(max=1))
    plan = service.tick(1)
    assert len(plan.drains) == 1
    assert "1 of r1 may stand by" in " ".join(plan.reasons)
    service.deployment = deployment(standby=Standby())
    service.tick(1)
    assert service.count("standby") == 0


def test_without_a_pool_everything_is_as_it_was() -> None:
    service = Service(ready=3, standby=Standby())
    assert len(service.tick(1).drains) == 2
    assert not service.plan.parks
    assert service.choice.standby == 0


def test_a_starting_replica_that_is_not_wanted_any_more_is_not_kept() -> None:
    service = Service(ready=1)
    service.fleet.append(replica("m-1", "starting"))
    plan = service.tick(1)
    assert (plan.drains, plan.parks) == (("m-1",), ())


def test_a_standby_of_an_old_revision_drains_and_is_never_woken() -> None:
    service = Service(ready=1)
    service.tick(0)
    service.deployment = deployment(revision="r2")
    plan = service.tick(1)
    assert (plan.drains, plan.wakes, len(plan.launches)) == (("m-0",), (), 1)


def test_a_standby_of_a_model_that_is_gone_drains() -> None:
    snapshot = Snapshot(now_s=1.0, deployments=(), replicas=(replica("m-0", "standby"),))
    assert decide(snapshot, Carry())[0].drains == ("m-0",)


def test_a_standby_that_dies_is_noticed_counted_and_not_replaced() -> None:
    service = Service(ready=2)
    service.tick(1)
    service.fleet = [replace(r, state="dead") if r.state == "standby" else r for r in service.fleet]
    plan = service.tick(1)
    assert not plan.launches
    assert service.carry.failures == {"m": 1}
    assert service.choice.standby == 0


def test_waking_does_not_wait_for_the_pause_after_a_death() -> None:
    service = Service(ready=3)
    service.tick(1)
    service.fleet = [replace(r, state="dead") if r.state == "ready" else r for r in service.fleet]
    plan = service.tick(1)
    assert (len(plan.wakes), len(plan.launches)) == (1, 0)


def test_the_reason_names_number_time_restart_and_money() -> None:
    service = Service(ready=3, price_per_hour=3.6)
    service.tick(1)
    assert service.choice.sentence.startswith("m: 3 to 1 replica: set to 1")
    assert "2 stand by for at most 50.0 s more: a restart costs 5.0 s, ¥0.0050" in service.choice.sentence
    assert (service.choice.standby, service.choice.cost_per_hour) == (2, 4.32)
    assert service.choice.cost_change_per_hour == -6.48
    service.tick(1, 9.0)
    assert "for at most 41.0 s more" in service.choice.sentence
    assert service.choice.sentence.endswith("¥4.32/h")


def test_a_budget_pays_for_those_that_serve_first() -> None:
    scale = Scale(min=0, max=9, price_per_hour=1.0, budget_per_hour=2.15, standby=Standby(max=5))
    assert [room(scale, want) for want in (0, 1, 2, 3)] == [5, 5, 1, 0]


def test_between_equal_bounds_nothing_stands_by() -> None:
    assert room(Scale(min=2, max=2, standby=POOL), 2) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 20.0, 60.0])), max_size=25))
def test_there_are_never_more_replicas_than_max_nor_fewer_ready_than_wanted(walk: list[tuple[int, float]]) -> None:
    service = Service()
    for want, after_s in walk:
        service.tick(want, after_s)
        assert service.count("ready") == want
        assert len(service.fleet) <= 4
        assert service.count("standby") == service.choice.standby <= POOL.max


@pytest.mark.parametrize("standby", ["{max: -1}", "{max: 1, rent: 0}", "{max: 1, rent: 1.5}"])
def test_a_pool_that_cannot_be_is_refused_with_its_key(standby: str) -> None:
    with pytest.raises(ConfigError, match=r"models\.m\.scale\.standby"):
        parse(f"models: {{m: {{engine: echo, scale: {{min: 0, max: 2, standby: {standby}}}}}}}", "x")
