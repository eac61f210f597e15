"""decide: what the fleet should be, from a snapshot alone."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from neaptide.control.decide import LONGEST_PAUSE_S, STEADY_S, decide, pause_s
from neaptide.control.decisions import EVERY_S, DecisionJournal, Line, read
from neaptide.types import Carry, Deployment, Launch, Plan, Replica, ReplicaState, Revision, Scale, Snapshot


def deployment(n: int = 1, revision: str = "r1", model: str = "m") -> Deployment:
    return Deployment(
        model=model, stable=Revision(id=revision, model=model, source=""), scale=Scale(min=n, max=n)
    )


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
        assert decide(line.snapshot, line.carry) == (line.plan, line.carry_after)


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
