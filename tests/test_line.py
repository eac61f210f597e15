"""The line: whose turn it is to start on a host, in virtual time, and what control makes of one that waits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from neaptide.cli.status import draw
from neaptide.control.decide import STUCK_S, decide
from neaptide.control.port import ReplicaStatus, Status
from neaptide.control.traits import Memory, learn
from neaptide.fleet.line import TURN_S, next_in_line, starts_at_once
from neaptide.types import Carry, Deployment, Plan, Replica, ReplicaState, Revision, Scale, Snapshot


def replica(id: str, state: ReplicaState = "starting", queued: bool = False, started_s: float = 0.0) -> Replica:
    """`m-0` is of the deployment m."""
    return Replica(id=id, deployment=id[0], revision="r1", state=state, endpoint="", queued=queued, started_s=started_s)


def queued(*ids: str) -> list[Replica]:
    return [replica(id, queued=True) for id in ids]


class Host:
    """Cores that all starts under way share; each start needs `start_s` of one core. `hung` ones never get ready."""

    def __init__(self, cores: int, at_once: int, hung: str = "", start_s: float = 1.0) -> None:
        self.cores, self.at_once, self.hung, self.start_s = cores, at_once, hung, start_s
        self.fleet: dict[str, Replica] = {}
        self.left_s: dict[str, float] = {}
        self.ready_at_s: dict[str, float] = {}
        self.began: list[str] = []
        self.now_s = 0.0

    def launch(self, *ids: str) -> None:
        self.fleet |= {r.id: r for r in queued(*ids)}
        self.fill()

    def fill(self) -> None:
        while (one := next_in_line(self.fleet.values(), self.at_once, self.now_s)) is not None:
            self.fleet[one.id] = replica(one.id, started_s=self.now_s)
            self.began.append(one.id)
            self.left_s[one.id] = math.inf if one.deployment == self.hung else self.start_s

    def run(self) -> None:
        """Until nothing more gets ready."""
        while busy := {id: s for id, s in self.left_s.items() if s < math.inf}:
            share = min(1.0, self.cores / len(busy))
            step_s = min(min(busy.values()) / share, TURN_S)
            self.now_s += step_s
            for id in busy:
                self.left_s[id] -= step_s * share
                if self.left_s[id] < 1e-9:
                    del self.left_s[id]
                    self.fleet[id], self.ready_at_s[id] = replica(id, "ready"), self.now_s
            self.fill()


def ids(model: str, count: int) -> list[str]:
    return [f"{model}-{n}" for n in range(count)]


def test_of_a_hundred_the_first_is_ready_after_about_one_start_and_the_last_no_later_than_without_a_line() -> None:
    together, in_line = Host(cores=2, at_once=100), Host(cores=2, at_once=starts_at_once(2))
    for host in (together, in_line):
        host.launch(*ids("m", 100))
        host.run()
    assert (min(together.ready_at_s.values()), max(together.ready_at_s.values())) == pytest.approx((50.0, 50.0))
    assert (min(in_line.ready_at_s.values()), max(in_line.ready_at_s.values())) == pytest.approx((2.0, 50.0))


def test_a_model_of_which_nothing_is_there_goes_before_all_the_replicas_that_another_still_wants() -> None:
    host = Host(cores=1, at_once=2)
    host.launch(*ids("m", 50))
    host.launch("n-0")
    host.run()
    assert host.began.index("n-0") == 2


def test_two_models_that_grow_take_turns_whoever_came_first() -> None:
    host = Host(cores=1, at_once=2)
    host.fleet = {"m-9": replica("m-9", "ready"), "n-9": replica("n-9", "standby")}
    host.launch(*ids("m", 6), *ids("n", 6))
    host.run()
    assert host.began[:4] == ["m-0", "n-0", "m-1", "n-1"]
    assert host.began[-1] == "n-5"


def test_a_model_whose_starts_hang_does_not_hold_the_line() -> None:
    host = Host(cores=2, at_once=2, hung="h", start_s=10.0)
    host.launch(*ids("h", 6), *ids("m", 6))
    host.run()
    assert set(host.ready_at_s) == set(ids("m", 6))
    assert host.began[:2] == ["h-0", "m-0"]


def test_a_start_keeps_its_place_for_its_turn_only() -> None:
    fleet = [replica("m-0", started_s=100.0), *queued("m-1")]
    assert next_in_line(fleet, 1, 100.0 + TURN_S - 1) is None
    after = next_in_line(fleet, 1, 100.0 + TURN_S)
    assert after is not None
    assert after.id == "m-1"


def test_what_is_ready_stands_by_leaves_or_is_dead_takes_no_place() -> None:
    states: Sequence[ReplicaState] = ("ready", "standby", "draining", "dead")
    fleet = [*(replica(f"m-{n}", state) for n, state in enumerate(states)), *queued("m-9")]
    assert next_in_line(fleet, 1, 1.0) is fleet[-1]
    assert next_in_line(fleet[:-1], 1, 1.0) is None


def test_as_many_starts_are_under_way_as_keep_the_cores_busy() -> None:
    assert [starts_at_once(cores) for cores in (0.5, 1, 1.5, 2, 16)] == [2, 2, 3, 4, 32]


@given(st.lists(st.tuples(st.sampled_from("mn"), st.sampled_from(["starting", "ready", "dead"]), st.booleans())))
def test_no_more_than_the_bound_are_ever_under_way_and_nobody_is_left_while_there_is_a_place(
    rows: list[tuple[str, ReplicaState, bool]],
) -> None:
    fleet = {f"{m}-{n}": replica(f"{m}-{n}", s, s == "starting" and q) for n, (m, s, q) in enumerate(rows)}
    while (one := next_in_line(fleet.values(), 3, 1.0)) is not None:
        assert sum(r.state == "starting" and not r.queued for r in fleet.values()) < 3
        fleet[one.id] = replace(one, queued=False)
    places = 3 - sum(r.state == "starting" and not r.queued for r in fleet.values())
    assert places <= 0 or not any(r.queued for r in fleet.values())


# --- control --------------------------------------------------------------------------------------------------------


def plan(want: int, *fleet: Replica, now_s: float = 1e6, revision: str = "r1") -> Plan:
    stable = Revision(id=revision, model="m", source="")
    deployment = Deployment(model="m", stable=stable, scale=Scale(min=want, max=want))
    return decide(Snapshot(now_s=now_s, deployments=(deployment,), replicas=fleet), Carry())[0]


def test_what_waits_in_line_is_never_stuck_and_is_not_launched_again() -> None:
    assert plan(2, *queued("m-0", "m-1")) == Plan()
    assert plan(1, replica("m-0", started_s=1e6 - STUCK_S - 1)).stuck == ("m-0",)


def test_what_waits_in_line_leaves_before_what_has_begun() -> None:
    begun = replica("m-0", started_s=1e6 - 1)
    assert plan(2, begun, *queued("m-1"), replica("m-2", "ready")).drains == ("m-1",)


def test_of_an_old_revision_what_waits_in_line_leaves_at_once_and_the_others_serve_on() -> None:
    found = plan(2, replica("m-0", "ready"), *queued("m-1"), revision="r2")
    assert found.drains == ("m-1",)
    assert [x.replica for x in found.launches] == ["m-2", "m-3"]
    assert any("out of the line" in said for said in found.reasons)


def test_a_cold_start_is_measured_from_its_beginning_not_from_the_line() -> None:
    deployment, memory = Deployment(model="m", stable=Revision(id="r1", model="m", source="")), Memory()
    story = [
        (500.0, queued("m-0")),
        (501.0, [replica("m-0", started_s=500.5)]),
        (502.5, [replica("m-0", "ready", started_s=500.5)]),
    ]
    for now_s, fleet in story:
        memory = learn(memory, [deployment], fleet, {}, {}, now_s)
    assert (memory.models["m"].cold_start_s, memory.models["m"].starts) == (2.0, 1)


def test_status_says_of_a_replica_that_it_waits_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    rows = (ReplicaStatus(id="m-1", deployment="m", revision="r1", state="starting", queued=True),)
    draw(Status(version="x", ready=True, now_wall_s=1.0, started_wall_s=0.0, api_url="", admin_url="", replicas=rows))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "m-1" in x]
    assert "starting" in line
    assert "queued" in line
