"""What one replica can do, learnt while it works: slots, service time, cold start.

    slots       what the engine says it runs at once, or as many as keep a step a + b x batch within the TPOT goal;
                a and b are fitted to the replicas' own steps
    service     mean time that requests held their slot, of those that ended lately
    cold start  from launch to ready, of the replicas whose start was seen; the latest three weigh most

Pure; what is remembered is Learnt, a value a model, kept in control's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

from neaptide.types import SPARE, Deployment, Load, Replica, Steps, Traits

ASSUMED = Traits()
SERVED_KEPT, SERVED_S = 200.0, 120.0  # requests, or seconds of traffic, that the service time is a mean of
START_GAIN = 0.3
SEEN_EARLY_S = 5.0  # a replica first seen older than this was started by another control: its start is not measured
FIT_STEPS, FIT_SPREAD = 50.0, 0.25  # steps, and variance of the batch, below which a fit says nothing


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's replicas say of themselves now."""

    slots: int | None = None  # None: nobody says
    steps: Steps = Steps()
    kv_usage: float = float("nan")  # of the fullest
    gpu_usage: float = float("nan")  # mean of the GPUs that exporters tell of
    stages: dict[str, dict[str, float]] = {}  # seconds of each stage of the start, by replica


class Learnt(msgspec.Struct, frozen=True, kw_only=True):
    """One model's running estimates."""

    service_s: float = ASSUMED.service_s
    served: float = 0.0  # requests it was measured on
    cold_start_s: float = ASSUMED.cold_start_s
    starts: int = 0
    stages: dict[str, float] = {}
    max_running: int | None = None
    steps: Steps = Steps()


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    models: dict[str, Learnt] = {}
    watched: dict[str, bool] = {}  # replica and epoch: whether its start has been measured, or never will be


def learn(
    memory: Memory,
    deployments: Iterable[Deployment],
    replicas: Iterable[Replica],
    loads: Mapping[str, Load],
    told: Mapping[str, Told],
    now_s: float,
) -> Memory:
    """`memory` after a tick."""
    fleet = list(replicas)
    models = {}
    for d in deployments:
        learnt = memory.models.get(d.model, Learnt())
        learnt = _hear(learnt, told.get(d.model, Told()))
        if (load := loads.get(d.model)) is not None:
            learnt = _serve(learnt, load)
        models[d.model] = learnt
    watched: dict[str, bool] = {}
    for r in fleet:
        key = f"{r.id}/{r.epoch}"
        known = memory.watched.get(key)
        early = r.queued or now_s - r.started_s <= SEEN_EARLY_S
        measured = r.state == "standby" or (not early if known is None else known)
        if not measured and r.state == "ready" and r.deployment in models:
            stages = told.get(r.deployment, Told()).stages.get(r.id, {})
            models[r.deployment] = _start(models[r.deployment], now_s - r.started_s, stages)
            measured = True
        watched[key] = measured
    return Memory(models=models, watched=watched)


def traits(deployment: Deployment, memory: Memory) -> Traits:
    """What to reckon with now; where nothing was learnt, a sane assumption."""
    learnt = memory.models.get(deployment.model, Learnt())
    return Traits(
        slots=slots(learnt, deployment.slo.tpot_s),
        service_s=learnt.service_s,
        cold_start_s=learnt.cold_start_s,
        spawn_s=spawn_s(learnt.stages),
        learnt="measured" if learnt.served else "assumed",
    )


def spawn_s(stages: Mapping[str, float]) -> float:
    """Seconds of a start that are no model's: a process, and what either of its two imports, side by side."""
    if "spawn_s" not in stages:
        return ASSUMED.spawn_s
    return stages["spawn_s"] + max(stages.get("io_import_s", 0.0), stages.get("import_s", 0.0))


def slots(learnt: Learnt, tpot_s: float) -> float:
    """The largest batch that the engine runs and whose step stays within `tpot_s`; at least 1."""
    most = learnt.max_running or ASSUMED.slots
    line = fit(learnt.steps)
    if line is None or line[1] <= 0:
        return float(most)
    base_s, each_s = line
    return float(max(1, min(most, math.floor((tpot_s - base_s) / each_s + 1e-9))))


def fit(steps: Steps) -> tuple[float, float] | None:
    """(a, b) of step time a + b x batch, least squares; None where the steps do not tell them apart."""
    if steps.n < FIT_STEPS:
        return None
    batch, step_s = steps.batch / steps.n, steps.step_s / steps.n
    spread = steps.batch2 / steps.n - batch * batch
    if spread < FIT_SPREAD:
        return None
    each_s = (steps.batch_step_s / steps.n - batch * step_s) / spread
    return step_s - each_s * batch, each_s


def add(one: Steps, other: Steps) -> Steps:
    """The steps of both: sums add up."""
    return Steps(**{name: getattr(one, name) + getattr(other, name) for name in Steps.__struct_fields__})


def _hear(learnt: Learnt, told: Told) -> Learnt:
    """A silent fleet, at zero perhaps, takes nothing back."""
    if told.slots is not None:
        learnt = msgspec.structs.replace(learnt, max_running=told.slots)
    if told.steps.n >= FIT_STEPS:
        learnt = msgspec.structs.replace(learnt, steps=told.steps)
    return learnt


def _serve(learnt: Learnt, load: Load) -> Learnt:
    n = load.served
    if not n or not math.isfinite(load.service_s) or load.service_s <= 0:
        return learnt
    served = min(learnt.served + n, 1e6)
    lasting = min(1 - math.exp(-n / SERVED_KEPT), 1 - math.exp(-max(load.tick_s, 0.0) / SERVED_S))
    gain = max(n / served, lasting)
    service_s = learnt.service_s + gain * (load.service_s - learnt.service_s)
    return msgspec.structs.replace(learnt, service_s=max(service_s, 1e-3), served=served)


def _start(learnt: Learnt, took_s: float, stages: Mapping[str, float]) -> Learnt:
    if SPARE in stages:
        return learnt  # it was shorter than the next one may be
    gain = START_GAIN if learnt.starts else 1.0
    took_s = max(took_s, 1e-3)
    mixed = {k: v if k not in learnt.stages else learnt.stages[k] + gain * (v - learnt.stages[k])
             for k, v in stages.items()}  # fmt: skip
    return msgspec.structs.replace(
        learnt,
        cold_start_s=learnt.cold_start_s + gain * (took_s - learnt.cold_start_s),
        starts=learnt.starts + 1,
        stages=mixed or learnt.stages,
    )
