"""The warm pool: what a policy lets go stands by, loaded and idle, until its rent has cost as much as a restart.

Ski rental with three rungs: ready (rent 1), standby (`scale.standby.rent`; back in a tick), gone (no rent; back after a
cold start that is paid for). Being always on the rung whose line climb + rent x time is lowest costs at most twice what
foresight would (the lower envelope), so a replica stands by for cold start / rent. The last parked wakes first, which
gives each place in the pool a clock of its own. Pure; docs/decisions/0027 has the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from neaptide.control.reasons import reason
from neaptide.types import Deployment, Reason, Replica, Scale, Traits


class Pool(NamedTuple):
    """What becomes of a model's standbys at one tick: ids, and reasons for all of them."""

    wakes: tuple[str, ...] = ()
    parks: tuple[str, ...] = ()
    drains: tuple[str, ...] = ()
    left_s: tuple[float, ...] = ()  # of those that stand by after it: how much longer each one may
    why: tuple[Reason, ...] = ()


def pool(
    deployment: Deployment,
    traits: Traits,
    standing: Sequence[Replica],
    leaving: Sequence[Replica],
    missing: int,
    want: int,
    now_s: float,
) -> Pool:
    """`standing`: all that stand by; `leaving`: what the policy lets go, the dearest to keep last; `missing`: how many
    of `want` are neither ready nor starting."""
    scale, revision = deployment.scale, deployment.stable.id
    longest_s, most = hold_s(scale, traits), room(scale, want)
    newest = sorted((r for r in standing if r.revision == revision), key=lambda r: (-r.parked_s, r.id))
    wakes, resting = newest[:missing], newest[missing:]
    left = [(r, longest_s) for r in leaving if r.state == "ready"]
    left += [(r, r.parked_s + longest_s - now_s) for r in resting]
    kept = [(r, s) for r, s in left if s > 0][:most]
    parks = [r for r, _ in kept if r.state == "ready"]
    stay = {r.id for r in (*wakes, *(r for r, _ in kept))}
    gone = [r for r in standing if r.id not in stay]
    terms = {"longest_s": longest_s, "rent": scale.standby.rent, "cold_start_s": traits.cold_start_s}
    over = {r.id for r, s in left if s <= 0}
    why = [reason("wake", of=r.id, n=len(newest)) for r in wakes]
    why += [reason("park", of=r.id, **terms) for r in parks]
    why += [reason("rested", of=r.id, **terms) for r in gone if r.id in over]
    why += [reason("crowded", of=r.id, n=most, revision=revision) for r in gone if r.id not in over]
    left_s = tuple(s for _, s in kept)
    return Pool(_ids(wakes), _ids(parks), _ids(gone), left_s, tuple(why))


def _ids(replicas: Sequence[Replica]) -> tuple[str, ...]:
    return tuple(r.id for r in replicas)


def hold_s(scale: Scale, traits: Traits) -> float:
    """Seconds after which the rent of a standby has cost as much as starting another one."""
    return traits.cold_start_s / scale.standby.rent


def room(scale: Scale, want: int) -> int:
    """How many may stand by beside `want`: never more replicas than max, and what is left of the budget pays rents."""
    most = max(0, min(scale.standby.max, scale.max - want))
    if scale.budget_per_hour is not None and scale.price_per_hour > 0:
        left = scale.budget_per_hour / scale.price_per_hour - want
        most = min(most, max(0, math.floor(left / scale.standby.rent + 1e-9)))
    return most


def rent_per_hour(scale: Scale, count: int) -> float:
    """What `count` standbys cost, in the config's currency; 0 where no price is known."""
    return count * scale.standby.rent * scale.price_per_hour
