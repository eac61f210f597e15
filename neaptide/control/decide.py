"""What the fleet should be: a pure function of a snapshot. The simulator will call the same one.

The floor holds fixed counts (`scale.min`); what moves them comes with the tide. A new revision is rolled by surge: its
replicas start beside the old ones, which drain once the new are ready. A replica that dies is started again after a
pause that doubles with each death in a row and is forgiven once a successor has lived for STEADY_S.
"""

from __future__ import annotations

from collections.abc import Iterable

from neaptide.types import Carry, Deployment, Launch, Plan, Replica, Snapshot

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 30.0


def decide(snapshot: Snapshot, carry: Carry) -> tuple[Plan, Carry]:
    """The plan for now and what to remember. No clock, no I/O; every launch, drain and hold has its reason."""
    carry = _remember(snapshot, carry)
    launches: list[Launch] = []
    drains: list[str] = []
    reasons: list[str] = []
    taken = {r.id for r in snapshot.replicas if r.state != "dead"}
    for deployment in snapshot.deployments:
        mine = [r for r in snapshot.replicas if r.deployment == deployment.model]
        new, why = _launches(deployment, mine, taken, carry, snapshot.now_s)
        old, why_drain = _drains(deployment, mine)
        launches += new
        drains += old
        reasons += why + why_drain
    known = {d.model for d in snapshot.deployments}
    for replica in snapshot.replicas:
        if replica.deployment not in known and replica.state in ("starting", "ready"):
            drains.append(replica.id)
            reasons.append(f"{replica.id}: drain, {replica.deployment} is no longer configured")
    return Plan(launches=tuple(launches), drains=tuple(drains), reasons=tuple(reasons)), carry


def pause_s(failures: int) -> float:
    """Seconds to wait after that many deaths in a row."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) if failures else 0.0


def _remember(snapshot: Snapshot, carry: Carry) -> Carry:
    failures, not_before = dict(carry.failures), dict(carry.not_before_s)
    for deployment in snapshot.deployments:
        name = deployment.model
        mine = [r for r in snapshot.replicas if r.deployment == name]
        deaths = sum(r.state == "dead" for r in mine)
        if deaths:
            failures[name] = failures.get(name, 0) + 1
            not_before[name] = snapshot.now_s + pause_s(failures[name])
        elif name in failures and _steady(mine, snapshot.now_s):
            del failures[name]
            not_before.pop(name, None)
    known = {d.model for d in snapshot.deployments}
    return Carry(
        failures={k: v for k, v in failures.items() if k in known},
        not_before_s={k: v for k, v in not_before.items() if k in known},
    )


def _steady(replicas: Iterable[Replica], now_s: float) -> bool:
    return any(r.state == "ready" and now_s - r.started_s > STEADY_S for r in replicas)


def _launches(
    deployment: Deployment, mine: list[Replica], taken: set[str], carry: Carry, now_s: float
) -> tuple[list[Launch], list[str]]:
    name, revision = deployment.model, deployment.stable.id
    alive = [r for r in mine if r.revision == revision and r.state in ("starting", "ready")]
    missing = deployment.scale.min - len(alive)
    if missing <= 0:
        return [], []
    wait_s = carry.not_before_s.get(name, 0.0) - now_s
    if wait_s > 0:
        deaths = carry.failures.get(name, 0)
        return [], [f"{name}: hold, {missing} missing, next start in {wait_s:.1f} s after {deaths} deaths in a row"]
    launches = [Launch(deployment=name, replica=_free_id(name, taken), epoch=0) for _ in range(missing)]
    ids = ", ".join(x.replica for x in launches)
    return launches, [f"{name}: start {ids}, {len(alive)} of {deployment.scale.min} of revision {revision} are there"]


def _free_id(name: str, taken: set[str]) -> str:
    """The lowest free number; ids name sockets and logs, so nothing but plain characters."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    n = 0
    while f"{safe}-{n}" in taken:
        n += 1
    taken.add(f"{safe}-{n}")
    return f"{safe}-{n}"


def _drains(deployment: Deployment, mine: list[Replica]) -> tuple[list[str], list[str]]:
    revision, want = deployment.stable.id, deployment.scale.min
    ready = [r for r in mine if r.revision == revision and r.state == "ready"]
    old = [r for r in mine if r.revision != revision and r.state in ("starting", "ready")]
    out: list[str] = []
    reasons: list[str] = []
    if len(ready) >= want:
        out += [r.id for r in old]
        reasons += [f"{r.id}: drain, revision {revision} has its {want} replicas ready" for r in old]
    elif old:
        reasons.append(f"{deployment.model}: hold {len(old)} of an old revision until {want} of {revision} are ready")
    alive = [r for r in mine if r.revision == revision and r.state in ("starting", "ready")]
    for r in _least_busy_first(alive)[: max(0, len(alive) - want)]:
        out.append(r.id)
        reasons.append(f"{r.id}: drain, {len(alive)} replicas, {want} wanted")
    return out, reasons


def _least_busy_first(replicas: list[Replica]) -> list[Replica]:
    """Starting ones, then idle ones, then the youngest: a busy replica never goes while an idle one could."""
    return sorted(replicas, key=lambda r: (r.state == "ready", r.running + r.waiting, -r.started_s))
