"""How many replicas a model should have: its policy, then what a person set, then the bounds; and why, as facts.

    asked     the policy's count at each beat; the last one between beats; what is there while signals are stale
    awake     at zero, anything that waits is one replica at once; to zero only after as much idle time as a start costs
    calendar  while an event is near or on: at least its factor times the usual
    override  `neaptide scale set`: stands above all of these
    clamped   budget an hour, then max, then min

Pure: the policy's arrays are copied out of bytes and packed into new ones.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from neaptide.control.forecast import Expected
from neaptide.control.memory import Memory, pack, state_of, unpack
from neaptide.control.peers.table import PEERS
from neaptide.control.policy import Policy, State
from neaptide.control.reasons import reason
from neaptide.control.slo import HELD, Slo
from neaptide.control.thresholds import SeenLive, Thresholds
from neaptide.elastic import span_s
from neaptide.types import Deployment, Load, Override, Reason, Scale, Traits

TICK_S = 1.0  # the loop's beat: what a policy is told a tick is
BEAT_S = 0.9  # signals that cover less are of a tick between two beats
STALE_S = 5.0
LONGEST_TICK_S = 60 * TICK_S  # more has passed: the machine was suspended, and the counts say nothing
IDLE_STARTS, IDLE_S = 5.0, 10.0  # cold starts, and seconds, after which a policy that never wants zero is sent there
USUAL_S = 3600.0


class Fleet(NamedTuple):
    """Replicas that count for the size; in a rollout, old ones whose successors start are not counted twice."""

    ready: int
    starting: int

    @property
    def present(self) -> int:
        return self.ready + self.starting


class Case(NamedTuple):
    """One model at one tick."""

    deployment: Deployment
    fleet: Fleet
    load: Load | None
    traits: Traits
    now_s: float  # the policies' time
    override: Override | None = None
    last: int | None = None  # the count decided last

    @property
    def scale(self) -> Scale:
        return self.deployment.scale


class Asked(NamedTuple):
    """A count and its reason on the way to the end; `policy`: what the policy itself wanted."""

    replicas: int
    why: tuple[Reason, ...]
    policy: int
    clamp: str = ""
    expected: float = math.nan  # requests/s, a cold start from now


class Sized(NamedTuple):
    asked: Asked
    memory: bytes

    @property
    def wanted(self) -> int:
        return self.asked.replicas


def size(case: Case, raw: bytes | None) -> Sized:
    """The count for now. `raw`: what was remembered; Sized.memory is what to remember."""
    policy = policy_of(case.scale, case.deployment.slo.attainment)
    memory = unpack(raw, key_of(case.scale)) or Memory(policy=key_of(case.scale), busy_s=case.now_s)
    if _is_busy(case.load):
        memory = replace(memory, busy_s=case.now_s)
    asked, memory, packed = _asked(case, policy, memory)
    if not is_stale(case.load):
        asked = _awake(case, policy, memory, asked)
        asked = _calendar(case, memory, asked)
    if case.override is not None:
        asked = _overridden(case.override, asked)
    return Sized(_clamped(case.scale, asked), packed)


def policy_name(scale: Scale) -> str:
    return "fixed" if scale.min == scale.max else scale.policy


def key_of(scale: Scale) -> str:
    """Whose memory it is: the arrays of `thresholds` have a row a rule."""
    return f"{scale.policy}:{len(scale.rules)}" if scale.rules else scale.policy


@functools.lru_cache(maxsize=256)
def policy_of(scale: Scale, attainment: float) -> Policy | None:
    """The policy that decides between min and max; None for `fixed`."""
    bounds = {"min_replicas": scale.min, "max_replicas": max(scale.max, 1)}
    if scale.policy == "fixed" or scale.min == scale.max:
        return None
    if scale.policy == "thresholds":
        return Thresholds(scale.rules, **bounds)
    if scale.policy == "slo":
        events = [Expected(*span_s(e), e.factor) for e in scale.calendar]
        return Slo(1, attainment, events=events, **bounds)
    published = PEERS[scale.policy]
    return published.policy(published.default if scale.target is None else scale.target, **bounds)


def is_stale(load: Load | None) -> bool:
    return load is None or load.age_s > STALE_S or load.tick_s > LONGEST_TICK_S


def _is_busy(load: Load | None) -> bool:
    return load is not None and not is_stale(load) and bool(load.waiting or load.running or load.arrivals)


# --- what the policy says ---------------------------------------------------------------------------------------------


def _asked(case: Case, policy: Policy | None, memory: Memory) -> tuple[Asked, Memory, bytes]:
    load = case.load
    held = case.last if case.last is not None else max(case.fleet.present, case.scale.min)
    if load is None or is_stale(load):
        return Asked(held, (_stale(load),), held), memory, pack(memory)
    if policy is None:
        asked = Asked(case.scale.min, (reason("keeps", policy=case.scale.policy),), case.scale.min)
        return asked, memory, pack(memory)
    if load.tick_s < BEAT_S:
        known = case.last is not None and memory.wanted is not None
        count = memory.wanted if known and memory.wanted is not None else held
        why = memory.reasons or (reason("soon", policy=case.scale.policy),)
        return Asked(count, why, count, expected=memory.expected), memory, pack(memory)
    return _stepped(case, policy, memory, load)


def _stepped(case: Case, policy: Policy, memory: Memory, load: Load) -> tuple[Asked, Memory, bytes]:
    state = state_of(memory) if memory.arrays else policy.start()
    seen = seen_of(case, load)
    policy.observe(seen, state)
    count = memory.wanted
    waits_s = memory.next_s - case.now_s
    if count is None or waits_s <= 1e-9 or waits_s > policy.every_s + TICK_S:  # the last: remembered from a later time
        count = round(float(policy.want(seen, state)[0]))
        memory = replace(memory, next_s=case.now_s + policy.every_s - TICK_S / 2, wanted=count)
    memory = _usual(case, memory, count, load)
    expected = _expected(seen, state)
    memory = replace(memory, reasons=_policy_reasons(case, policy, seen, state, count), expected=expected)
    return Asked(count, memory.reasons, count, expected=expected), memory, pack(memory, state)


def seen_of(case: Case, load: Load) -> SeenLive:
    """One lane; arrivals as a tick's share where the tick was longer or shorter, so that rates are right."""
    traits = case.traits

    def lane(value: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([value], dtype=np.float64)

    return SeenLive(
        now_s=case.now_s,
        tick_s=TICK_S,
        arrivals=lane(load.arrivals * TICK_S / load.tick_s),
        in_flight=lane(load.waiting + load.running),
        waiting=lane(load.waiting),
        ready=lane(case.fleet.ready),
        starting=lane(case.fleet.starting),
        capacity_rps=traits.slots / traits.service_s,
        slots=traits.slots,
        cold_start_s=traits.cold_start_s,
        slack_s=case.deployment.slo.ttft_s,
        load=load,
    )


def _usual(case: Case, memory: Memory, count: int, load: Load) -> Memory:
    """The policy's mean count, while no event distorts it."""
    if not case.scale.calendar or _events(case)[0]:
        return memory
    spent_s = min(memory.usual_s + load.tick_s, USUAL_S)
    usual = memory.usual + load.tick_s / spent_s * (count - memory.usual)
    return replace(memory, usual=usual, usual_s=spent_s)


# --- what stands above it ---------------------------------------------------------------------------------------------


def _awake(case: Case, policy: Policy | None, memory: Memory, asked: Asked) -> Asked:
    """To zero and back, whatever the policy says."""
    load = case.load
    if load is None or case.scale.min > 0:
        return asked
    if load.waiting and not case.fleet.present:
        return asked._replace(replicas=max(asked.replicas, 1), why=(reason("waits", n=load.waiting),))
    idle_s, never = case.now_s - memory.busy_s, never_zero(policy)
    after_s = max(IDLE_S, IDLE_STARTS * case.traits.cold_start_s) if never else case.traits.cold_start_s
    if not case.fleet.present:
        count = 0 if never else asked.replicas
        return asked._replace(replicas=count, why=asked.why if count else (reason("nothing"),))
    if idle_s > after_s and (never or asked.replicas == 0):
        return asked._replace(replicas=0, why=(reason("idle.over", idle_s=idle_s, kept_s=after_s),))
    if asked.replicas == 0:
        return asked._replace(replicas=1, why=(reason("idle", idle_s=idle_s, kept_s=after_s),))
    return asked


def never_zero(policy: Policy | None) -> bool:
    """Whether this is a published policy that never wants zero itself."""
    return bool(getattr(policy, "never_zero", False))


def _calendar(case: Case, memory: Memory, asked: Asked) -> Asked:
    """For policies that know nothing of a calendar; `slo` does."""
    if case.scale.policy == "slo":
        return asked
    names, factor = _events(case)
    floor = math.ceil(memory.usual * factor - 1e-9)
    if not names or floor <= asked.replicas:
        return asked
    why = reason("calendar", factor=factor, usual=memory.usual, events=names)
    return asked._replace(replicas=floor, why=(why,))


def _events(case: Case) -> tuple[str, float]:
    """The events that are on, or begin within two cold starts and a minute: their names, the largest factor."""
    names: list[str] = []
    factors: list[float] = []
    ahead_s = 2 * case.traits.cold_start_s + 60.0
    for event in case.scale.calendar:
        start_s, end_s = span_s(event)
        if start_s - ahead_s <= case.now_s < end_s:
            names.append(event.name or event.start)
            factors.append(event.factor)
    return ", ".join(names), max(factors, default=1.0)


def _overridden(override: Override, asked: Asked) -> Asked:
    n, by = override.count, override.by
    why = reason("set.by", n=n, by=by) if by else reason("set", n=n)
    return asked._replace(replicas=n, why=(why,), clamp="override")


def _clamped(scale: Scale, asked: Asked) -> Asked:
    if scale.budget_per_hour is not None and scale.price_per_hour > 0:
        paid = int(scale.budget_per_hour / scale.price_per_hour + 1e-9)
        why = reason("clamp.budget", n=paid, budget=scale.budget_per_hour)
        asked = _bounded(asked, min(asked.replicas, paid), "budget", why)
    asked = _bounded(asked, min(asked.replicas, scale.max), "max", reason("clamp.max", n=scale.max))
    return _bounded(asked, max(asked.replicas, scale.min), "min", reason("clamp.min", n=scale.min))


def _bounded(asked: Asked, count: int, clamp: str, why: Reason) -> Asked:
    return asked if count == asked.replicas else asked._replace(replicas=count, clamp=clamp, why=(*asked.why, why))


# --- reasons ----------------------------------------------------------------------------------------------------------


def _policy_reasons(case: Case, policy: Policy, seen: SeenLive, state: State, count: int) -> tuple[Reason, ...]:
    """What it wants for what, and, where it changes nothing, what would."""
    rate, flight = seen.arrivals[0] / seen.tick_s, seen.in_flight[0]
    if "s.expected" in state:
        return _slo_reasons(case, seen, state, count, rate)
    said = (reason("wants", policy=case.scale.policy, count=count, rate=rate, flight=flight),)
    if count != case.fleet.present:
        return said
    explain = getattr(policy, "explain", None)
    if explain is not None:
        return (*said, *explain(seen, state))
    share = getattr(policy, "u", None)
    if share is None:
        return said
    name, per = ("flight", seen.slots) if getattr(policy, "signal", "") == "in_flight" else ("rate", seen.capacity_rps)
    full = float(share[0]) * per
    return (*said, reason(f"meant.{name}", count=count, most=full * count, least=full * max(count - 1, 0)))


def _expected(seen: SeenLive, state: State) -> float:
    """The forecast of `slo`, in requests/s; NaN of a policy that makes none."""
    return float(state["s.expected"][0]) * seen.capacity_rps if "s.expected" in state else math.nan


def _slo_reasons(case: Case, seen: SeenLive, state: State, count: int, rate: float) -> tuple[Reason, ...]:
    """The forecast, and between which forecasts the count stays: the bounds of control/slo.py, solved for the rate."""
    expected, capacity = _expected(seen, state), seen.capacity_rps
    goal = case.deployment.slo.attainment
    said: tuple[Reason, ...] = (reason("expected", rate=expected, ahead_s=seen.cold_start_s, goal=goal, now=rate),)
    if count != case.fleet.present:
        return said
    rungs = state["s.margins"][:, 0]
    spread = float(state["s.spread"][0])
    margin = float(np.interp(state["s.place"][0], np.arange(len(rungs)), rungs)) * spread
    most, least = count + 0.5 - margin, count - 0.5 - margin - HELD * spread
    said = (*said, reason("more_over", most=max(most, 0.0) * capacity))
    return (*said, reason("fewer_under", least=least * capacity)) if least > 0 else said


def _stale(load: Load | None) -> Reason:
    if load is None:
        return reason("stale.unheard")
    if math.isinf(load.age_s):
        return reason("stale.silent")
    return reason("stale.old", age_s=load.age_s) if load.age_s > STALE_S else reason("stale.jump", tick_s=load.tick_s)
