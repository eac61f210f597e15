"""Every policy a comparison can name: Neaptide's own and the peers', each with the targets that are tried for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neaptide.control.peers import PEERS, peers
from neaptide.control.peers.table import DEFAULT_U, TUNED
from neaptide.control.policy import Floats, Policy
from neaptide.control.slo import Slo
from neaptide.errors import ConfigError
from neaptide.simulate.world import World

OWN = "neaptide"
ALL = "all"
STATIC = "static"
MOST_REPLICAS = 1000


@dataclass(frozen=True)
class Family:
    """One policy and its targets: that of NAME, and those that NAME-tuned chooses from. Neaptide's target is the SLO; a
    static count's is replicas; the others' is the load of a replica, as a share of what it can do."""

    name: str
    default: float
    grid: tuple[float, ...] = ()  # empty: there is nothing to tune


def names() -> tuple[str, ...]:
    """All that `all` means, in the order in which they are listed."""
    peers_and_tuned = [name + suffix for name in PEERS for suffix in ("", TUNED)]
    return (OWN, *peers_and_tuned)


def chosen(asked: Iterable[str]) -> tuple[str, ...]:
    """Each once, `all` spelt out. ConfigError E125 for a name there is none of."""
    known = names()
    found: dict[str, None] = {}
    for name in asked:
        if name != ALL and name not in known:
            raise ConfigError(
                f"no policy is called {name!r}", code="E125", fix=f"--policy {ALL}, or any of {', '.join(known)}"
            )
        found.update(dict.fromkeys(known if name == ALL else (name,)))
    if not found:
        raise ConfigError("no policy is named", code="E125", fix=f"--policy {ALL}, or any of {', '.join(known)}")
    return tuple(found)


def family(name: str, world: World, peak: float) -> Family:
    """The family of NAME or NAME-tuned; `peak` is how many replicas the busiest windows of the tuning days need."""
    base = name.removesuffix(TUNED)
    if base == OWN:
        return Family(base, world.slo)
    published = PEERS[base]
    if base != STATIC:
        return Family(base, published.default, published.grid)
    scale = peak / DEFAULT_U[STATIC]
    grid = sorted({max(1.0, round(count * scale)) for count in published.grid})
    return Family(base, float(max(1, math.ceil(peak - 1e-9))), tuple(float(count) for count in grid))


def build(base: str, targets: Sequence[float] | Floats, peak: float) -> Policy:
    """One lane a target."""
    most = max(MOST_REPLICAS, math.ceil(10 * peak))
    if base == OWN:
        return own(np.asarray(targets, dtype=np.float64), most)
    return peers([base], {base: targets}, max_replicas=most)[base]


def own(slos: Any, most: int) -> Policy:
    """An SLO a lane: it enters the policy's arithmetic lane by lane, so that an array does for the one live number."""
    return Slo(len(slos), slos, max_replicas=most)
