"""Where Neaptide's own cost above the bound goes: control, forecast, cold start.

Two more runs over the same counts tell. One is told the future: the fewest whole replicas that serve the most that is
needed until a replica launched now is ready; what that costs above the bound is the control's (whole replicas, nobody
late where some may be), what the policy costs above that the forecast's. In the other the policy's replicas start
within a tick: what that saves, of control and forecast, is the cold start's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neaptide.control.policy import Floats, Policy, Seen, State
from neaptide.simulate import policies
from neaptide.simulate.compare import Comparison, Measured, Point, Tell, counts_of, watched
from neaptide.simulate.fluid import Entry, run
from neaptide.simulate.policies import OWN
from neaptide.simulate.tally import Tally
from neaptide.simulate.world import World, changed

DEFINITION = (
    "in multiples of the bound. control: the fewest whole replicas for the most that is needed until one launched now "
    "is ready, told the future, less the bound. forecast: the policy less that. cold_start: what the policy saves, of "
    "both, when replicas start within a tick"
)


@dataclass(frozen=True)
class Parts:
    """Arrays are [seeds], in multiples of the bound; the first two sum to the policy's cost less one."""

    control: Floats
    forecast: Floats
    cold_start: Floats
    told_attainment: float
    instant_attainment: float

    @property
    def over(self) -> float:
        """The policy's cost above the bound, the seeds' mean."""
        return float((self.control + self.forecast).mean())

    @property
    def means(self) -> dict[str, float]:
        return {name: float(getattr(self, name).mean()) for name in ("control", "forecast", "cold_start")}


class Told:
    """Whole replicas for `needed` [ticks, lanes], requests/s, from `start_s` on."""

    name = "told"
    every_s = 0.0

    def __init__(self, needed: Floats, start_s: float) -> None:
        self.lanes, self._needed, self._start_s = needed.shape[1], needed, start_s

    def start(self) -> State:
        return {}

    def observe(self, seen: Seen, state: State) -> None:
        """There is nothing to learn."""

    def want(self, seen: Seen, state: State) -> Floats:
        row: Floats = self._needed[round((seen.now_s - self._start_s) / seen.tick_s) - 1]
        count: Floats = np.ceil(row / seen.capacity_rps - 1e-9)
        return count


def parts(found: Comparison, tell: Tell = lambda share: None) -> Parts | None:
    """Of the policy that stands in `found` as Neaptide's own; None where it was not asked for."""
    own = next((row for row in found.rows if row.name == OWN), None)
    if own is None:
        return None
    world, span, seeds = found.world, found.span, found.question.seeds
    rows = counts_of(world, found.rates, seeds, span)
    told = _ran(found, world, rows, Told(needed(world, rows), span.start_s), lambda share: tell(share / 2))
    instant = changed(world, cold_start_s=world.tick_s)
    own_again = policies.build(OWN, [world.slo] * len(seeds), found.peak)
    quick = _ran(found, instant, rows, own_again, lambda share: tell((1 + share) / 2))
    bound = np.array([b.replica_hours for b in found.bounds])
    ours = own.reported.replica_hours
    return Parts(
        control=told.replica_hours / bound - 1,
        forecast=(ours - told.replica_hours) / bound,
        cold_start=(ours - quick.replica_hours) / bound,
        told_attainment=told.attainment,
        instant_attainment=quick.attainment,
    )


def needed(world: World, rows: Floats) -> Floats:
    """[ticks, seeds], requests/s: the most of now and of each tick until a replica launched now is ready; a moment's
    need is the mean over the ticks that a request holds its slot."""
    ticks = rows.shape[1]
    held, ahead = world.held_ticks, world.cold_ticks
    sums = np.cumsum(np.pad(rows, ((0, 0), (held, 0))), axis=1)
    now = (sums[:, held:] - sums[:, :-held]) / (held * world.tick_s)
    padded = np.pad(now, ((0, 0), (0, ahead)), mode="edge")
    most = now.copy()
    for later in range(1, ahead + 1):
        np.maximum(most, padded[:, later : later + ticks], out=most)
    return np.ascontiguousarray(most.T)


def _ran(found: Comparison, world: World, rows: Floats, policy: Policy, tell: Tell) -> Measured:
    """On the reported days."""
    question, span, (seeds, ticks) = found.question, found.span, rows.shape
    tally = Tally(world.tick_s, span.start_s, ticks, seeds)
    entry = Entry(policy, np.arange(seeds))
    run(world, found.capacity_rps, rows, [entry], start_s=span.start_s, watch=watched(tally, ticks, tell))
    lanes = slice(0, seeds)
    point = Point(policy.name, world.slo, tally.days(lanes), tally.first_day, lanes)
    return point.over(question.first_day, question.last_day)


def tree(parts: Parts) -> dict[str, object]:
    """For `--json`."""
    return {
        "definition": DEFINITION,
        **parts.means,
        "attainment": {"told": parts.told_attainment, "instant": parts.instant_attainment},
        "by_seed": [
            dict(zip(("control", "forecast", "cold_start"), map(float, row), strict=True))
            for row in zip(parts.control, parts.forecast, parts.cold_start, strict=True)
        ],
    }
