"""What the fleet should be: a pure function of a snapshot. The simulator's policies are the ones that are asked.

How many replicas a model should have is `size`'s to say where its count may change (`scale.min` elsewhere). A new
revision is rolled by surge: its replicas start beside the old ones, which drain once the new are ready. What is let go
may stand by for a while and wakes before another one is launched (`standby`). A replica that dies, or never gets ready,
is started again after a pause that doubles with each death in a row and is forgiven once a successor has lived for
STEADY_S.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from neaptide.control.choices import choice
from neaptide.control.reasons import reason, words
from neaptide.control.size import Case, Fleet, Sized, size
from neaptide.control.spares import spares
from neaptide.control.standby import Pool, pool
from neaptide.types import Carry, Choice, Deployment, Launch, Plan, Reason, Replica, Snapshot, Traits

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 30.0
STUCK_S, STUCK_STARTS = 300.0, 5.0  # a launch that is not ready after both is given up


def decide(snapshot: Snapshot, carry: Carry) -> tuple[Plan, Carry]:
    """The plan for now and what to remember. No clock, no I/O; every launch, drain and hold has its reason."""
    never = _never_ready(snapshot, carry)
    carry = _remember(snapshot, carry, never)
    steps: list[Step] = []
    taken = {r.id for r in snapshot.replicas if r.state != "dead"}
    policies: dict[str, bytes] = {}
    wanted: dict[str, int] = {}
    for deployment in snapshot.deployments:
        stuck = {r.id for r in snapshot.replicas if r.deployment == deployment.model and r.id in never}
        mine = [r for r in snapshot.replicas if r.deployment == deployment.model and r.id not in stuck]
        sized, fleet = None, _fleet(deployment, mine, carry)
        if is_elastic(deployment, snapshot):
            sized = size(_case(deployment, fleet, snapshot, carry), carry.policies.get(deployment.model))
            policies[deployment.model], wanted[deployment.model] = sized.memory, sized.wanted
        steps.append(_step(deployment, mine, sized, fleet, stuck, taken, carry, snapshot))
    gone, unknown = _unknown(snapshot)
    moves = {d.model: (len(s.launches), s.let_go) for d, s in zip(snapshot.deployments, steps, strict=True)}
    held = spares(snapshot, carry.vacant_s, moves)
    why = (*(x for s in steps for x in s.why), *unknown, *held.why)
    plan = Plan(
        launches=tuple(x for s in steps for x in s.launches),
        drains=(*(x for s in steps for x in s.drains), *gone),
        parks=tuple(x for s in steps for x in s.pool.parks),
        wakes=tuple(x for s in steps for x in s.pool.wakes),
        spares=held.counts,
        reasons=tuple(map(words, why)),
        why=why,
        choices=tuple(s.choice for s in steps if s.choice is not None),
        stuck=tuple(x for s in steps for x in s.stuck),
    )
    return plan, replace(carry, policies=policies, wanted=wanted, vacant_s=held.vacant_s)


def pause_s(failures: int) -> float:
    """Seconds to wait after that many deaths in a row."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) if failures else 0.0


def is_elastic(deployment: Deployment, snapshot: Snapshot) -> bool:
    """Whether its count may change. Between equal bounds there is nothing to decide and nothing to say."""
    return deployment.scale.max > deployment.scale.min or deployment.model in snapshot.overrides


def _never_ready(snapshot: Snapshot, carry: Carry) -> set[str]:
    """Launches that are given up. Each death in a row doubles the time that the next has: a model may need long."""
    limits_s = {
        d.model: max(STUCK_S, STUCK_STARTS * snapshot.traits.get(d.model, Traits()).cold_start_s)
        for d in snapshot.deployments
    }
    starting = (r for r in snapshot.replicas if r.state == "starting" and not r.queued and r.deployment in limits_s)
    return {
        r.id
        for r in starting
        if snapshot.now_s - r.started_s > limits_s[r.deployment] * 2 ** min(carry.failures.get(r.deployment, 0), 4)
    }


# --- one deployment ---------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What is done for one deployment, and why."""

    launches: list[Launch]
    drains: list[str]
    why: list[Reason]
    stuck: list[str]
    let_go: int  # of what the policy had, the pool included
    pool: Pool
    choice: Choice | None


def _step(
    deployment: Deployment,
    mine: list[Replica],
    sized: Sized | None,
    fleet: Fleet,
    stuck: set[str],
    taken: set[str],
    carry: Carry,
    snapshot: Snapshot,
) -> Step:
    want = sized.wanted if sized else deployment.scale.min
    case, now_s = _case(deployment, fleet, snapshot, carry), snapshot.now_s
    alive = [r for r in mine if r.revision == deployment.stable.id and r.state in ("starting", "ready")]
    standing = [r for r in mine if r.state == "standby"]
    leaving = _least_busy_first(alive)[: max(0, len(alive) - want)]
    rest = pool(deployment, case.traits, standing, leaving, max(0, want - len(alive)), want, now_s)
    launches, why = _launches(deployment, want, len(alive) + len(rest.wakes), taken, carry, now_s)
    ending = [r for r in leaving if r.id not in rest.parks]
    drains, why_drain = _drains(deployment, want, mine, ending, len(alive))
    said = None
    if sized is not None or launches or drains or rest.drains:
        asked, wait = sized.asked if sized else None, why[0] if why and not launches else None
        up, down = bool(launches or rest.wakes), bool(drains or rest.parks)
        said = choice(case, asked, up, down, wait, len(standing), rest, snapshot)
    never = [reason("stuck", of=id) for id in sorted(stuck)]
    all_why = [*never, *why, *why_drain, *rest.why]
    let_go = sum(not r.queued for r in ending) + len(rest.drains)
    return Step(launches, [*sorted(stuck), *drains, *rest.drains], all_why, sorted(stuck), let_go, rest, said)


def _case(deployment: Deployment, fleet: Fleet, snapshot: Snapshot, carry: Carry) -> Case:
    model = deployment.model
    return Case(
        deployment=deployment,
        fleet=fleet,
        load=snapshot.loads.get(model),
        traits=snapshot.traits.get(model, Traits()),
        now_s=snapshot.now_wall_s or snapshot.now_s,
        override=snapshot.overrides.get(model),
        last=carry.wanted.get(model),
    )


def _fleet(deployment: Deployment, mine: list[Replica], carry: Carry) -> Fleet:
    """During a rollout old replicas count only where their successors are missing."""
    alive = [r for r in mine if r.state in ("starting", "ready")]
    new = sum(r.revision == deployment.stable.id for r in alive)
    most = max(new, carry.wanted.get(deployment.model, len(alive)))
    present = min(len(alive), most)
    ready = min(sum(r.state == "ready" for r in alive), present)
    return Fleet(ready, present - ready)


def _unknown(snapshot: Snapshot) -> tuple[list[str], list[Reason]]:
    known = {d.model for d in snapshot.deployments}
    living = ("starting", "ready", "standby")
    gone = [r for r in snapshot.replicas if r.deployment not in known and r.state in living]
    return [r.id for r in gone], [reason("gone", of=r.id, model=r.deployment) for r in gone]


def _remember(snapshot: Snapshot, carry: Carry, never: set[str]) -> Carry:
    failures, not_before = dict(carry.failures), dict(carry.not_before_s)
    for deployment in snapshot.deployments:
        name = deployment.model
        mine = [r for r in snapshot.replicas if r.deployment == name]
        deaths = sum(r.state == "dead" or r.id in never for r in mine)
        if deaths:
            failures[name] = failures.get(name, 0) + 1
            not_before[name] = snapshot.now_s + pause_s(failures[name])
        elif name in failures and _steady(mine, snapshot.now_s):
            del failures[name]
            not_before.pop(name, None)
    known = {d.model for d in snapshot.deployments}
    return replace(
        carry,
        failures={k: v for k, v in failures.items() if k in known},
        not_before_s={k: v for k, v in not_before.items() if k in known},
    )


def _steady(replicas: Iterable[Replica], now_s: float) -> bool:
    return any(r.state == "ready" and now_s - r.started_s > STEADY_S for r in replicas)


def _launches(
    deployment: Deployment, want: int, there: int, taken: set[str], carry: Carry, now_s: float
) -> tuple[list[Launch], list[Reason]]:
    name, revision = deployment.model, deployment.stable.id
    missing = want - there
    if missing <= 0:
        return [], []
    wait_s = carry.not_before_s.get(name, -math.inf) - now_s
    if wait_s > 0:
        deaths = carry.failures.get(name, 0)
        return [], [reason("pause", of=name, missing=missing, wait_s=wait_s, deaths=deaths)]
    launches = [Launch(deployment=name, replica=_free_id(name, taken), epoch=0) for _ in range(missing)]
    ids = ", ".join(x.replica for x in launches)
    return launches, [reason("start", of=name, ids=ids, there=there, want=want, revision=revision)]


def _free_id(name: str, taken: set[str]) -> str:
    """The lowest free number; ids name sockets and logs, so nothing but plain characters."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    n = 0
    while f"{safe}-{n}" in taken:
        n += 1
    taken.add(f"{safe}-{n}")
    return f"{safe}-{n}"


def _drains(
    deployment: Deployment, want: int, mine: list[Replica], leaving: list[Replica], there: int
) -> tuple[list[str], list[Reason]]:
    revision = deployment.stable.id
    ready = [r for r in mine if r.revision == revision and r.state == "ready"]
    old = [r for r in mine if r.revision != revision and r.state in ("starting", "ready")]
    unbegun = [r for r in old if r.queued]
    old = [r for r in old if not r.queued]
    out = [r.id for r in unbegun]
    why = [reason("unbegun", of=r.id, revision=revision) for r in unbegun]
    if len(ready) >= want:
        out += [r.id for r in old]
        why += [reason("replaced", of=r.id, revision=revision, want=want) for r in old]
    elif old:
        why.append(reason("surge", of=deployment.model, old=len(old), want=want, revision=revision))
    out += [r.id for r in leaving]
    why += [reason("spare", of=r.id, there=there, want=want) for r in leaving]
    return out, why


def _least_busy_first(replicas: list[Replica]) -> list[Replica]:
    """Those in line to start, starting ones, then idle ones, then the youngest: a busy replica never goes while an idle
    one could."""
    return sorted(replicas, key=lambda r: (not r.queued, r.state == "ready", r.running + r.waiting, -r.started_s))
