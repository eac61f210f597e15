"""decide: what the fleet should be, from a snapshot alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from neaptide.control.decide import LONGEST_PAUSE_S, STEADY_S, STUCK_S, decide, pause_s
from neaptide.control.decisions import EVERY_S, WHOLE_EVERY_S, DecisionJournal, Line, read, replays
from neaptide.types import (
    Carry,
    Deployment,
    Launch,
    Load,
    Override,
    Plan,
    PolicyName,
    Replica,
    ReplicaState,
    Revision,
    Scale,
    Snapshot,
    Traits,
)


def deployment(n: int = 1, revision: str = "r1", model: str = "m") -> Deployment:
    return Deployment(model=model, stable=Revision(id=revision, model=model, source=""), scale=Scale(min=n, max=n))


def replica(
    id: str, state: ReplicaState = "ready", revision: str = "r1", running: int = 0, started_s: float = 0.0
) -> Replica:
    return Replica(
        id=id, deployment="m", revision=revision, state=state, endpoint="", running=running, started_s=started_s
    )


def plan(deployments: list[Deployment], replicas: list[Replica], carry: Carry | None = None, now_s: float = 100.0):
    snapshot = Snapshot(now_s=now_s, deployments=tuple(deployments), replicas=tuple(replicas))
    return decide(snapshot, carry or Carry())


def test_missing_replicas_are_started_with_the_lowest_free_numbers() -> None:
    found, _ = plan([deployment(3)], [replica("m-1")])
    assert [x.replica for x in found.launches] == ["m-0", "m-2"]
    assert not found.drains
    assert "1 of 3" in found.reasons[0]


def test_a_fleet_that_is_as_it_should_be_is_left_alone() -> None:
    found, carry = plan([deployment(2)], [replica("m-0"), replica("m-1", "starting")])
    assert found == Plan()
    assert carry == Carry()


def test_a_dead_replica_is_started_again_only_after_its_pause() -> None:
    first, carry = plan([deployment()], [replica("m-0", "dead")])
    assert not first.launches
    assert "hold" in first.reasons[0]
    early, carry = plan([deployment()], [], carry, 100.0 + pause_s(1) - 0.01)
    assert not early.launches
    late, _ = plan([deployment()], [], carry, 100.0 + pause_s(1) + 0.01)
    assert [x.replica for x in late.launches] == ["m-0"]


def test_the_pause_doubles_with_each_death_up_to_a_limit_and_is_forgiven_by_a_steady_life() -> None:
    carry, now_s = Carry(), 0.0
    for _ in range(12):
        _, carry = plan([deployment()], [replica("m-0", "dead")], carry, now_s)
        now_s = carry.not_before_s["m"]
    assert carry.failures["m"] == 12
    assert pause_s(12) == LONGEST_PAUSE_S
    _, carry = plan([deployment()], [replica("m-0", started_s=now_s)], carry, now_s + STEADY_S - 1)
    assert carry.failures["m"] == 12
    _, carry = plan([deployment()], [replica("m-0", started_s=now_s)], carry, now_s + STEADY_S + 1)
    assert carry == Carry()


def test_a_new_revision_starts_beside_the_old_which_drains_once_the_new_is_ready() -> None:
    old = replica("m-0", revision="r0")
    found, _ = plan([deployment()], [old])
    assert [x.replica for x in found.launches] == ["m-1"]
    assert not found.drains
    found, _ = plan([deployment()], [old, replica("m-1", "starting")])
    assert not found.launches
    assert not found.drains
    found, _ = plan([deployment()], [old, replica("m-1")])
    assert found.drains == ("m-0",)


def test_of_too_many_the_idle_ones_go_before_the_busy_ones() -> None:
    found, _ = plan([deployment(1)], [replica("m-0"), replica("m-1", running=3), replica("m-2", "starting")])
    assert set(found.drains) == {"m-0", "m-2"}


def test_replicas_of_a_model_that_is_gone_from_the_configuration_drain() -> None:
    found, _ = plan([deployment(0, model="other")], [replica("m-0"), replica("m-1", "draining")])
    assert found.drains == ("m-0",)


states = st.sampled_from(["starting", "ready", "draining", "dead"])
fleets = st.lists(st.tuples(states, st.sampled_from(["r0", "r1"]), st.integers(0, 5)), max_size=12).map(
    lambda rows: [replica(f"m-{i}", s, r, n) for i, (s, r, n) in enumerate(rows)]
)


@given(fleets, st.integers(0, 6))
def test_no_plan_ever_leaves_fewer_ready_than_it_found_or_than_wanted(fleet: list[Replica], want: int) -> None:
    found, _ = plan([deployment(want)], fleet)
    ready = {r.id for r in fleet if r.state == "ready"}
    assert len(ready - set(found.drains)) >= min(want, len(ready))
    new = {r.id for r in fleet if r.revision == "r1" and r.state in ("starting", "ready")}
    assert len(new - set(found.drains)) + len(found.launches) <= max(want, 0) or not found.launches
    assert len({x.replica for x in found.launches}) == len(found.launches)
    assert not {x.replica for x in found.launches} & {r.id for r in fleet if r.state != "dead"}


@given(fleets, st.integers(0, 6))
def test_deciding_twice_on_the_same_snapshot_gives_the_same_plan(fleet: list[Replica], want: int) -> None:
    assert plan([deployment(want)], fleet) == plan([deployment(want)], fleet)


def test_the_decision_journal_replays_as_a_test_of_decide(tmp_path: Path) -> None:
    journal, carry = DecisionJournal(tmp_path / "decisions.jsonl"), Carry()
    fleets = [[], [replica("m-0", "starting")], [replica("m-0")], [replica("m-0", "dead")], []]
    for second, fleet in enumerate(fleets):
        snapshot = Snapshot(now_s=float(second), deployments=(deployment(),), replicas=tuple(fleet))
        made, after = decide(snapshot, carry)
        journal.note(Line(wall_s=0.0, snapshot=snapshot, carry=carry, plan=made, carry_after=after))
        carry = after
    lines = read(tmp_path / "decisions.jsonl")
    assert len(lines) >= 3
    for line in lines:
        assert line.whole
        assert replays(line)


def test_the_decision_journal_writes_a_line_on_change_and_each_minute_only(tmp_path: Path) -> None:
    journal = DecisionJournal(tmp_path / "decisions.jsonl")

    def note(now_s: float, made: Plan) -> bool:
        snapshot = Snapshot(now_s=now_s, deployments=(), replicas=())
        return journal.note(Line(wall_s=0.0, snapshot=snapshot, carry=Carry(), plan=made, carry_after=Carry()))

    assert note(0.0, Plan())
    assert not note(1.0, Plan())
    launch = Plan(launches=(Launch(deployment="m", replica="m-0", epoch=0),), reasons=("m: start m-0",))
    assert note(2.0, launch)
    assert note(3.0, Plan(reasons=("m: hold, next start in 1.5 s",)))
    assert not note(4.0, Plan(reasons=("m: hold, next start in 0.5 s",)))
    assert note(3.0 + EVERY_S, Plan(reasons=("m: hold, next start in 0.5 s",)))


# --- counts that change -----------------------------------------------------------------------------------------------


def elastic(low: int = 1, high: int = 5, name: PolicyName = "knative", revision: str = "r1", **more: Any) -> Deployment:
    stable = Revision(id=revision, model="m", source="")
    return Deployment(model="m", stable=stable, scale=Scale(min=low, max=high, policy=name, **more))


class Service:
    """One elastic model, tick by tick: what is launched is ready `cold_s` later, what is drained is gone at once."""

    def __init__(self, deployment: Deployment, cold_s: float = 0.0) -> None:
        self.deployment, self.cold_s = deployment, cold_s
        self.fleet: list[Replica] = []
        self.carry, self.now_s = Carry(), 1000.0
        self.plan = Plan()

    def tick(self, n: int = 1, load: Load | None = None, **snapshot: Any) -> Plan:
        for _ in range(n):
            self.now_s += 1.0
            self.fleet = [replace(r, state="ready") if self._is_up(r) else r for r in self.fleet]
            seen = Snapshot(
                now_s=self.now_s, now_wall_s=1e9 + self.now_s, deployments=(self.deployment,),
                replicas=tuple(self.fleet), loads={"m": load} if load else {}, **snapshot,
            )  # fmt: skip
            self.plan, self.carry = decide(seen, self.carry)
            self.fleet = [r for r in self.fleet if r.id not in self.plan.drains and r.state != "dead"]
            self.fleet += [
                replica(x.replica, "starting", self.deployment.stable.id, started_s=self.now_s)
                for x in self.plan.launches
            ]
        return self.plan

    def _is_up(self, r: Replica) -> bool:
        return r.state == "starting" and self.now_s - r.started_s >= self.cold_s

    def busy(self, **running: int) -> None:
        self.fleet = [replace(r, running=running.get(r.id.replace("-", ""), 0)) for r in self.fleet]

    @property
    def ids(self) -> set[str]:
        return {r.id for r in self.fleet}


def load(in_flight: int = 0, waiting: int = 0, age_s: float = 0.1) -> Load:
    return Load(tick_s=1.0, age_s=age_s, running=in_flight, waiting=waiting)


def test_a_count_rises_with_the_load_and_falls_with_it_and_every_tick_has_a_choice() -> None:
    service = Service(elastic())
    service.tick(5, load(1))
    assert len(service.fleet) == 1
    service.tick(70, load(20))
    assert len(service.fleet) == 4  # 20 in flight at 0.7 of 8 slots each
    service.tick(200, load(1))
    assert len(service.fleet) == 1
    (choice,) = service.plan.choices
    assert (choice.action, choice.before, choice.after) == ("hold", 1, 1)
    assert "knative wants 1" in choice.sentence


def test_a_change_is_told_with_numbers_and_money() -> None:
    service = Service(elastic(price_per_hour=3.2))
    service.fleet = [replica("m-0")]
    plan = service.tick(1, load(40), currency="CNY")
    (choice,) = plan.choices
    assert choice.action == "launch"
    assert choice.sentence.startswith("m: 1 to 5 replicas: knative wants 5 for 0.0 requests/s and 40 in flight")
    assert "one replica serves 4.0" in choice.sentence
    assert choice.sentence.endswith("+¥12.80/h")
    assert (choice.cost_per_hour, choice.cost_change_per_hour) == (16.0, 12.8)
    assert choice.numbers["running"] == 40.0


def test_a_busy_replica_never_goes_while_an_idle_one_could() -> None:
    service = Service(elastic())
    service.tick(70, load(20))
    service.busy(m0=0, m1=3, m2=0, m3=0)
    service.tick(1, None, overrides={"m": Override(count=1, until_wall_s=1e12)})
    assert service.ids == {"m-1"}


def test_a_rollout_keeps_the_wanted_count_and_surges() -> None:
    service = Service(elastic(), cold_s=3.0)
    service.tick(70, load(20))
    assert len(service.fleet) == 4
    service.deployment = elastic(revision="r2")
    plan = service.tick(1, load(20))
    assert len(plan.launches) == 4
    assert not plan.drains
    service.tick(20, load(20))
    assert {r.revision for r in service.fleet} == {"r2"}
    assert len(service.fleet) == 4


def test_stale_signals_hold_and_a_replica_that_dies_meanwhile_is_started_again() -> None:
    service = Service(elastic())
    service.tick(70, load(20))
    service.fleet[0] = replace(service.fleet[0], state="dead")
    service.tick(10, load(20, age_s=60.0))
    assert len(service.fleet) == 4
    assert "signals are 60.0 s old" in service.plan.choices[0].sentence


def test_an_override_and_its_end_are_told_and_an_elastic_model_keeps_its_memory() -> None:
    service = Service(elastic())
    service.tick(5, load(1))
    service.tick(3, load(1), overrides={"m": Override(count=3, until_wall_s=1e12, by="ann")})
    assert (len(service.fleet), service.plan.choices[0].clamp) == (3, "override")
    assert "set to 3 by ann" in service.plan.choices[0].sentence
    service.tick(200, load(1))
    assert len(service.fleet) == 1


def test_a_launch_that_never_gets_ready_is_stopped_counted_as_a_death_and_tried_again_after_a_pause() -> None:
    service = Service(elastic(low=1, high=2), cold_s=1e9)
    service.tick(1, load())
    assert service.ids == {"m-0"}
    service.tick(int(STUCK_S), load())
    assert service.carry.failures == {}
    plan = service.tick(1, load())
    assert plan.stuck == plan.drains == ("m-0",)
    assert not plan.launches
    assert service.carry.failures == {"m": 1}
    assert "never got ready" in plan.reasons[0]
    plan = service.tick(1, load())
    assert [x.replica for x in plan.launches] == ["m-0"]


def test_a_model_with_a_slow_start_is_given_five_of_them() -> None:
    service, traits = Service(elastic(low=1, high=2), cold_s=1e9), {"m": Traits(cold_start_s=200.0)}
    service.tick(1, load(), traits=traits)
    assert not service.tick(999, load(), traits=traits).stuck
    assert service.tick(2, load(), traits=traits).stuck == ("m-0",)


def test_a_start_that_was_given_up_has_twice_the_time_the_next_time() -> None:
    service = Service(elastic(low=1, high=2), cold_s=1e9)
    service.tick(int(STUCK_S) + 2, load())
    assert service.carry.failures == {"m": 1}
    service.tick(2, load())
    assert service.ids == {"m-0"}
    service.tick(2 * int(STUCK_S) - 4, load())
    assert service.carry.failures == {"m": 1}
    service.tick(6, load())
    assert service.carry.failures == {"m": 2}


def test_a_death_pauses_a_scale_up_and_the_choice_says_when_it_goes_on() -> None:
    service = Service(elastic())
    service.tick(1, load(1))
    service.fleet = [replace(r, state="dead") for r in service.fleet]
    plan = service.tick(1, load(1))
    assert not plan.launches
    assert plan.choices[0].action == "hold"
    assert "next start in 0.5 s after 1 deaths" in plan.choices[0].sentence


def test_the_journal_replays_an_elastic_model_and_keeps_idle_lines_small(tmp_path: Path) -> None:
    journal = DecisionJournal(tmp_path / "decisions.jsonl")
    service = Service(elastic(price_per_hour=1.0))
    for second in range(400):
        before, plan = service.carry, None
        now = load(20 if 100 < second < 250 else 1)
        seen_fleet = None
        service.now_s += 1.0
        service.fleet = [replace(r, state="ready") for r in service.fleet]
        seen_fleet = tuple(service.fleet)
        snapshot = Snapshot(
            now_s=service.now_s, now_wall_s=1e9 + service.now_s, deployments=(service.deployment,),
            replicas=seen_fleet, loads={"m": now}, traits={"m": Traits()}, currency="CNY",
        )  # fmt: skip
        plan, service.carry = decide(snapshot, before)
        journal.note(Line(wall_s=float(second), snapshot=snapshot, carry=before, plan=plan, carry_after=service.carry))
        service.fleet = [r for r in service.fleet if r.id not in plan.drains]
        service.fleet += [replica(x.replica, "starting", started_s=service.now_s) for x in plan.launches]
    lines = read(tmp_path / "decisions.jsonl")
    whole = [line for line in lines if line.whole]
    assert any(line.plan.launches for line in whole)
    assert any(line.plan.drains for line in whole)
    assert all(map(replays, whole))
    idle = [line for line in lines if not line.whole]
    assert idle
    assert all(not line.carry.policies and not line.carry_after.policies for line in idle)
    assert len(lines) < 40
    said = journal.said["m"]
    assert [s.choice.action for s in said].count("launch") >= 2
    assert any(s.choice.action == "hold" for s in said)
    assert said[0].wall_s > said[-1].wall_s
    assert WHOLE_EVERY_S == 3600.0
