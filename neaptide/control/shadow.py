"""What other policies would have cost: each decides on the same arrivals, over replicas that are only imagined.

The imagined service is the simulator's fluid one (control/lanes.py), with a lane a policy, stepped every five seconds
with the traits in force. It is kept a day and a policy: replica seconds, arrivals, late ones; `real` is what ran. A
policy that looks cheaper in it was cheaper in this world: requests of one length, no batching, starts that never fail.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import msgspec
import numpy as np

from neaptide.control.lanes import Lanes
from neaptide.control.peers.table import PEERS
from neaptide.control.policy import Policy, Seen, State
from neaptide.types import Deployment, Load, Traits

TICK_S = 5.0
NAMES = tuple(name for name in PEERS if name != "static")
REAL = "real"
DAYS_KEPT = 35
CHANGED = 1.25  # traits that moved by more make another world
LONGEST_COLD_TICKS = 720  # an hour: a bound on memory


class Day(msgspec.Struct, frozen=True, kw_only=True):
    replica_s: float = 0.0  # from launch on
    arrivals: float = 0.0
    late: float = 0.0


class Days(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept: by model, day (YYYY-MM-DD, UTC) and policy."""

    models: dict[str, dict[str, dict[str, Day]]] = {}


class Shadow:
    """One model's. `step` takes a beat's Load; `days` is what came of it."""

    def __init__(self, deployment: Deployment, traits: Traits, present: float, days: dict[str, dict[str, Day]]) -> None:
        self.days = days
        self._deployment, self._traits = deployment, traits
        scale = deployment.scale
        bounds = {"min_replicas": scale.min, "max_replicas": max(scale.max, 1)}
        self._policies: list[Policy] = [PEERS[n].policy(PEERS[n].default, **bounds) for n in NAMES]
        self._states: list[State] = [p.start() for p in self._policies]
        self._next_s = [-np.inf] * len(NAMES)
        self._lanes, self._seen = self._world(np.full(len(NAMES), float(present)), np.zeros(len(NAMES)))
        self._arrivals = self._spent_s = 0.0

    def step(self, load: Load, traits: Traits, present: float, now_s: float) -> None:
        """A beat. `present`: replicas that are paid for; `now_s`: the policies' time, wall seconds."""
        self._add(_day(now_s), REAL, present * load.tick_s, load.arrivals, load.late)
        self._arrivals += load.arrivals
        self._spent_s += load.tick_s
        if self._spent_s < TICK_S - load.tick_s / 2:
            return
        if _moved(traits, self._traits):
            self._traits = traits
            self._lanes, self._seen = self._world(self._lanes.ready + self._lanes.starting, self._lanes.queue)
        self._imagine(self._arrivals * TICK_S / self._spent_s, now_s)
        self._arrivals = self._spent_s = 0.0

    def _imagine(self, arrivals: float, now_s: float) -> None:
        lanes, day = self._lanes, _day(now_s)
        lanes.work(np.full(len(NAMES), arrivals))
        for i, name in enumerate(NAMES):
            paid = float(lanes.ready[i] + lanes.starting[i])
            self._add(day, name, paid * TICK_S, arrivals, float(lanes.late[i]))
            seen, policy = self._seen[i], self._policies[i]
            seen.now_s = now_s
            policy.observe(seen, self._states[i])
            if now_s >= self._next_s[i]:
                self._next_s[i] = now_s + policy.every_s - TICK_S / 2
                lanes.scale(slice(i, i + 1), policy.want(seen, self._states[i]))

    def _world(self, ready: np.ndarray, queue: np.ndarray) -> tuple[Lanes, list[Seen]]:
        t, slack_s = self._traits, self._deployment.slo.ttft_s
        held = max(1, round(t.service_s / TICK_S))
        cold = min(max(1, round(t.cold_start_s / TICK_S)), LONGEST_COLD_TICKS)
        capacity_rps = t.slots / t.service_s
        share = min(1.0, max(0.0, 1.0 - slack_s / TICK_S))
        # A service shorter than a tick holds its slot for a whole one: slots are what keeps the capacity.
        slots = capacity_rps * held * TICK_S
        lanes = Lanes(slots, len(NAMES), held_ticks=held, cold_ticks=cold, on_time_share=share)
        lanes.ready[:], lanes.queue[:] = ready, queue
        lanes.arrived[:] = lanes.counted[:] = queue  # what already waits was counted when it came
        return lanes, [self._view(lanes, i, capacity_rps) for i in range(len(NAMES))]

    def _view(self, lanes: Lanes, i: int, capacity_rps: float) -> Seen:
        return lanes.seen(slice(i, i + 1), TICK_S, capacity_rps, self._traits.cold_start_s)

    def _add(self, day: str, policy: str, replica_s: float, arrivals: float, late: float) -> None:
        rows = self.days.setdefault(day, {})
        had = rows.get(policy, Day())
        rows[policy] = Day(replica_s=had.replica_s + replica_s, arrivals=had.arrivals + arrivals, late=had.late + late)
        while len(self.days) > DAYS_KEPT:
            del self.days[min(self.days)]


class Shadows:
    """All models'. A model without room to scale has none; one whose configuration changed begins a new world."""

    def __init__(self, kept: Days) -> None:
        self._days = {m: {d: dict(rows) for d, rows in days.items()} for m, days in kept.models.items()}
        self._shadows: dict[str, tuple[Deployment, Shadow]] = {}

    def step(self, d: Deployment, load: Load, traits: Traits, present: float, now_s: float) -> None:
        known = self._shadows.get(d.model)
        if known is None or (known[0].scale, known[0].slo) != (d.scale, d.slo):
            known = self._shadows[d.model] = (d, Shadow(d, traits, present, self._days.setdefault(d.model, {})))
        known[1].step(load, traits, present, now_s)

    def keep_only(self, models: Iterable[str]) -> None:
        """Forget the worlds of models that are no longer scaled; their days stay."""
        wanted = set(models)
        self._shadows = {m: s for m, s in self._shadows.items() if m in wanted}

    def days(self) -> Days:
        return Days(models={m: {d: dict(rows) for d, rows in days.items()} for m, days in self._days.items()})


def _moved(now: Traits, then: Traits) -> bool:
    pairs = ((now.slots, then.slots), (now.service_s, then.service_s), (now.cold_start_s, then.cold_start_s))
    return any(max(a, b) > CHANGED * min(a, b) for a, b in pairs)


def _day(now_s: float) -> str:
    return datetime.datetime.fromtimestamp(now_s, datetime.UTC).date().isoformat()
