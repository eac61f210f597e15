"""How many processes are kept up without a model, for each engine: the warm pool's rung below standby.

A spare has behind it what every start of its engine spends before anything of the model: a process and its imports.
What a policy lets go, and the pool with it, leaves one behind, until its rent has cost as much as that part of a start;
a launch takes the last one. Pure; docs/decisions/0027 has the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from neaptide.control.reasons import reason
from neaptide.types import Deployment, Reason, Snapshot, Traits

Vacant = dict[str, tuple[float, ...]]  # by engine: since when each spare is held


class Kept(NamedTuple):
    vacant_s: Vacant
    why: tuple[Reason, ...]

    @property
    def counts(self) -> dict[str, int]:
        return {engine: len(since) for engine, since in self.vacant_s.items()}


def spares(snapshot: Snapshot, vacant_s: Vacant, moves: Mapping[str, tuple[int, int]]) -> Kept:
    """`vacant_s`: as the last tick left it; `moves`: launches, and replicas let go, of each model."""
    kept: Vacant = {}
    why: list[Reason] = []
    most, rent, now_s = snapshot.spares.max, snapshot.spares.rent, snapshot.now_s
    for engine, models in _elastic(snapshot).items():
        spawn_s = max(snapshot.traits.get(d.model, Traits()).spawn_s for d in models)
        launched = sum(moves[d.model][0] for d in models)
        let_go = sum(moves[d.model][1] for d in models)
        held = [since_s for since_s in vacant_s.get(engine, ()) if now_s - since_s < spawn_s / rent]
        held = held[: max(0, len(held) - launched)] + [now_s] * let_go
        if held := held[max(0, len(held) - most) :]:
            kept[engine] = tuple(held)
            terms = {"longest_s": spawn_s / rent, "rent": rent, "spawn_s": spawn_s}
            why.append(reason("spares", of=engine, n=len(held), **terms))
    return Kept(kept, tuple(why))


def _elastic(snapshot: Snapshot) -> Mapping[str, Sequence[Deployment]]:
    """By engine: the models that may want another replica again."""
    out: dict[str, list[Deployment]] = {}
    for d in snapshot.deployments:
        if d.scale.max > d.scale.min and d.stable.engine:
            out.setdefault(d.stable.engine, []).append(d)
    return out
