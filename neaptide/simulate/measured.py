"""Policies on an engine as it was measured: each alone over the same requests, replayed with a Setup.

There is no bound here: the clairvoyant schedule is defined for one service time (docs/decisions/0033).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from neaptide.control.peers.table import TUNED
from neaptide.control.policy import Policy
from neaptide.errors import ConfigError
from neaptide.simulate import policies
from neaptide.simulate.arrivals import Rates, Requests
from neaptide.simulate.arrivals import capacity as busiest
from neaptide.simulate.replay import Tier, replay
from neaptide.simulate.sample import sample
from neaptide.simulate.served import Served
from neaptide.simulate.settings import Setup, capacity
from neaptide.simulate.world import World

Tree = dict[str, Any]
Tell = Callable[[float], None]  # the share that is done, 0..1
FIXED = "fixed"  # the setup's own count of replicas, all along


@dataclass(frozen=True, kw_only=True)
class Question:
    """Days are inclusive; `tune`: those whose busiest windows a static count is made for."""

    policies: tuple[str, ...]  # at their own targets
    first_day: int
    last_day: int
    tune: tuple[int, int] = (0, 6)
    tier: Tier = "fast"
    seed: int = 0


class Run(NamedTuple):
    name: str
    target: float | None  # None: it has none
    served: Served


class Measured(NamedTuple):
    setup: Setup
    question: Question
    capacity_rps: float  # of a replica, at these requests' mean lengths
    runs: tuple[Run, ...]  # the cheapest first


def untuned(names: Sequence[str]) -> tuple[str, ...]:
    """Without the tuned forms where `all` has spelt them out. ConfigError E110 where one was asked for."""
    asked = [name for name in names if name.endswith(TUNED)]
    if asked and len(names) < len(policies.names()):
        fix = f"--policy {asked[0].removesuffix(TUNED)}"
        raise ConfigError(f"--setup runs policies at their own targets, not {asked[0]}", code="E110", fix=fix)
    return tuple(name for name in names if not name.endswith(TUNED))


def measured(
    rates: Rates, recorded: Requests | None, setup: Setup, world: World, question: Question,
    tell: Tell = lambda share: None,
) -> Measured:  # fmt: skip
    """`recorded`: the single requests behind the rates; None: they are drawn. `world` has the SLO that Neaptide's own
    policy keeps. A setup with `replicas` is also run without a policy. ConfigError E124: the days are not there."""
    from_s, to_s = rates.span(question.first_day, question.last_day)
    requests = recorded or sample(rates, question.seed, rates.start_s, to_s, setup.tick_s)
    one = capacity(setup, _mean(requests.in_tokens, setup.in_tokens), _mean(requests.out_tokens, setup.out_tokens))
    days = range(question.tune[0], question.tune[1] + 1)
    peak = busiest(rates, days, world.peak_quantile, 1.0) / one.rps
    fixed: list[tuple[str, float | None, Policy | None]] = [(FIXED, None, None)] if setup.replicas is not None else []
    for name in question.policies:
        family = policies.family(name, world, peak)
        fixed.append((name, family.default, policies.build(family.name, [family.default], peak)))
    runs = []
    for at, (name, target, policy) in enumerate(fixed):
        served = replay(
            requests, setup, policy, tier=question.tier, seed=question.seed, from_s=from_s, to_s=to_s,
            progress=lambda share, at=at: tell((at + share) / len(fixed)),  # type: ignore[misc]
        )  # fmt: skip
        runs.append(Run(name, target, served))
    return Measured(setup, question, one.rps, tuple(sorted(runs, key=lambda run: run.served.replica_hours)))


def outcome(found: Measured) -> Tree:
    """Shares are fractions, times in seconds, hours those of replicas."""
    question = found.question
    return {
        "setup": msgspec.to_builtins(found.setup),
        "tier": question.tier,
        "seed": question.seed,
        "days": {"from": question.first_day, "to": question.last_day, "tune": list(question.tune)},
        "capacity_rps": found.capacity_rps,
        "bound": None,
        "policies": [{"name": run.name, "target": run.target, **_told(run.served)} for run in found.runs],
    }


def _told(served: Served) -> Tree:
    """JSON has no NaN."""
    return {name: None if value != value else value for name, value in served.summary().items()}


def _mean(tokens: np.ndarray | None, otherwise: int) -> float:
    return float(otherwise) if tokens is None or not len(tokens) else float(np.maximum(tokens, 1).mean())
