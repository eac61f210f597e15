"""All peers by name, the target each ships with, and the targets that are tried for NAME-tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from numpy.typing import ArrayLike

from neaptide.control.peers.base import Peer, Static
from neaptide.control.peers.delayed import Ray, Sky
from neaptide.control.peers.engines import Dynamo, DynamoKalman, Wva
from neaptide.control.peers.knative import Knative
from neaptide.control.peers.kubernetes import Aibrix, Hpa, Keda

TUNED = "-tuned"
GRID = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
WVA_GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.95)
STATIC_GRID = tuple(float(count) for count in range(20, 81, 2))
NO_DEFAULT = 0.8  # for those whose operator must give a target in units of their own

DEFAULT_U = {
    "static": 40.0,  # replicas, not a share: replicas_at_peak of the goal's world
    "hpa": NO_DEFAULT,
    "keda": NO_DEFAULT,  # the HTTP add-on's 100 requests say nothing of what a replica can do
    "knative": 0.7,  # container-concurrency-target-percentage
    "ray": 0.4,  # target_ongoing_requests 2 of max_ongoing_requests 5
    "aibrix": NO_DEFAULT,
    "wva": 0.85,  # scaleUpThreshold; scaleDownBoundary .70 is .15 lower
    "dynamo": 1.0,  # ceil(rps / engine_rps): an engine is planned for all that it can do
    "dynamo-kalman": 1.0,
    "skyserve": NO_DEFAULT,  # target_qps_per_replica
}


@dataclass(frozen=True)
class Published:
    policy: type[Peer]
    default: float
    grid: tuple[float, ...]


_GRIDS = {"static": STATIC_GRID, "wva": WVA_GRID}
PEERS = {
    policy.name: Published(policy, DEFAULT_U[policy.name], _GRIDS.get(policy.name, GRID))
    for policy in (Static, Hpa, Keda, Knative, Ray, Aibrix, Wva, Dynamo, DynamoKalman, Sky)
}


def peers(
    names: Iterable[str],
    targets: Mapping[str, ArrayLike] | None = None,
    *,
    min_replicas: int = 1,
    max_replicas: int = 1000,
) -> dict[str, Peer]:
    """A policy a name, with a lane for each of its targets. A name without targets has its default, in one lane;
    NAME-tuned has the grid, a lane for each target. Raises ValueError for a name that no peer has."""
    given, made = targets or {}, {}
    for name in names:
        published = PEERS.get(name.removesuffix(TUNED))
        if published is None:
            raise ValueError(f"no peer is called {name!r}; there are {', '.join(PEERS)}, each also as NAME{TUNED}")
        usual = published.grid if name.endswith(TUNED) else published.default
        made[name] = published.policy(given.get(name, usual), min_replicas=min_replicas, max_replicas=max_replicas)
        made[name].name = name
    return made
