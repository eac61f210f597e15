"""`thresholds`: the operator's own rules. While a signal has been over or under a bound for long enough, replicas are
added or removed; then the count is left alone for the rule's cooldown.

A removal's cooldown holds back removals only: traffic that comes back is served at once. A signal that nobody tells
(NaN: no request ended) is taken for what it was up to 10 s ago; after that it meets no rule and its clock starts anew.
The most that any ripe rule adds wins over every removal. What replicas that start already will take at once does not
count as waiting where a rule adds: it would add anew at each cooldown, for as long as they start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from neaptide.control.policy import Floats, Seen, State, mean_window, note, ring
from neaptide.control.reasons import reason
from neaptide.types import Load, Reason, Rule

RATE_S = 10.0  # arrivals_per_s is a mean over so long, and what is not told holds so long: single seconds are noise
NEVER = -np.inf
NOTHING = Load(tick_s=1.0, age_s=0.0)


@dataclass(slots=True)
class SeenLive(Seen):
    """What a policy sees live: one lane, and the whole Load beside it."""

    load: Load = NOTHING


class Thresholds:
    """A Policy with one lane. Its target is its own: a replica that dies is one that is missing, not one fewer."""

    name = "thresholds"
    every_s = 0.0  # at each tick
    lanes = 1

    def __init__(self, rules: tuple[Rule, ...], *, min_replicas: int = 1, max_replicas: int = 1000) -> None:
        self.rules, self.low, self.high = rules, float(min_replicas), float(max_replicas)

    def start(self) -> State:
        rules = len(self.rules)
        return {
            "since_s": np.full((rules, 1), np.inf),  # when each began to be met; inf: it is not
            "value": np.full((rules, 1), np.nan),  # of each signal, when it was last told ...
            "told_s": np.full((rules, 1), NEVER),  # ... which was then
            "until_s": np.full((2, 1), NEVER),  # no adding, no removing before
            "target": np.full(1, np.nan),
        }

    def observe(self, seen: Seen, state: State) -> None:
        if "rate" not in state:
            ring(state, "rate", RATE_S, seen.tick_s, self.lanes)
        note(state, "rate", seen.arrivals / seen.tick_s)
        for i, rule in enumerate(self.rules):
            value = self._value(rule, seen, state)
            if not math.isnan(value):
                state["told_s"][i] = seen.now_s
            elif seen.now_s - state["told_s"][i, 0] <= RATE_S:
                value = float(state["value"][i, 0])
            met = (rule.above is not None and value > rule.above) or (rule.below is not None and value < rule.below)
            since = state["since_s"][i, 0]
            state["value"][i] = value
            state["since_s"][i] = min(since, seen.now_s) if met else np.inf

    def want(self, seen: Seen, state: State) -> Floats:
        target, current = state["target"], seen.ready + seen.starting
        if math.isnan(target[0]):
            target[:] = current
        ripe = [i for i, r in enumerate(self.rules) if seen.now_s - state["since_s"][i, 0] >= r.for_s - 1e-9]
        up = max((i for i in ripe if self.rules[i].add > 0), key=lambda i: self.rules[i].add, default=None)
        down = min((i for i in ripe if self.rules[i].add < 0), key=lambda i: self.rules[i].add, default=None)
        adds, removes = (seen.now_s >= state["until_s"][way, 0] - 1e-9 for way in (0, 1))
        chosen = up if up is not None and adds else down if up is None and removes else None
        if chosen is not None:
            self._act(self.rules[chosen], seen.now_s, state)
        np.clip(target, self.low, self.high, out=target)
        return target.copy()

    def explain(self, seen: Seen, state: State) -> tuple[Reason, ...]:
        """The rules, each with its signal now: what would have to happen."""
        return tuple(x for i, rule in enumerate(self.rules) for x in _reasons(rule, float(state["value"][i, 0])))

    def _act(self, rule: Rule, now_s: float, state: State) -> None:
        state["target"] += rule.add
        state["until_s"][1] = now_s + rule.cooldown_s
        if rule.add > 0:
            state["until_s"][0] = now_s + rule.cooldown_s
        state["since_s"][:] = np.inf  # the replicas of this act must show in the signals first

    def _value(self, rule: Rule, seen: Seen, state: State) -> float:
        load = seen.load if isinstance(seen, SeenLive) else None
        if rule.signal == "arrivals_per_s":
            value = float(mean_window(state, "rate", RATE_S, seen.tick_s)[0])
        elif rule.signal == "in_flight":
            value = float(seen.in_flight[0])
        elif rule.signal == "waiting":
            coming = seen.starting[0] * seen.slots if rule.above is not None else 0.0
            value = max(0.0, float(seen.waiting[0] - coming))
        else:
            value = float(getattr(load, rule.signal)) if load is not None else math.nan
        return value / max(1.0, float((seen.ready + seen.starting)[0])) if rule.per_replica else value


def _reasons(rule: Rule, value: float) -> list[Reason]:
    told = [reason("rule.adds" if rule.add > 0 else "rule.removes", n=abs(rule.add), signal=rule.signal)]
    told += [reason("rule.share")] if rule.per_replica else []
    told += [reason("rule.over", bound=rule.above)] if rule.above is not None else []
    told += [reason("rule.under", bound=rule.below)] if rule.above is None and rule.below is not None else []
    told += [reason("rule.lasting", for_s=rule.for_s)] if rule.for_s else []
    told += [reason("rule.untold") if math.isnan(value) else reason("rule.now", value=value)]
    return told
