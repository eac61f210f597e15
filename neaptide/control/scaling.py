"""Scaling's side of control: what the loop asks of the running service, what people set, and what they are told."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from neaptide.clock import wall_s
from neaptide.control import keep
from neaptide.control.guard import AdminError
from neaptide.control.keep import Kept, Wants
from neaptide.control.port import (
    ChoiceRow,
    Choices,
    NewOverride,
    NotFoundError,
    ScaleRow,
    Scales,
    ShadowRow,
    Shadows,
    Stage,
)
from neaptide.control.shadow import NAMES, REAL, Day
from neaptide.control.size import is_stale, key_of, policy_name, policy_of
from neaptide.control.standby import rent_per_hour
from neaptide.control.traits import Learnt, Told, add
from neaptide.errors import ConfigError, StorageError
from neaptide.types import Choice, Deployment, Load, Override, Steps, Traits

if TYPE_CHECKING:
    from neaptide.control.app import Control

log = logging.getLogger("neaptide.control")
LONGEST_OVERRIDE_S = 30 * 86400.0


def check(deployments: tuple[Deployment, ...]) -> None:
    """ConfigError for a policy that cannot be made with the target it was given."""
    for d in deployments:
        try:
            policy_of(d.scale, d.slo.attainment)
        except ValueError as e:
            key = _scale_key(d)
            raise ConfigError(f"{key}: {e}", code="E108", fix=f"correct {key}.target") from e


def _scale_key(d: Deployment) -> str:
    return f"pools.{d.model}.scale" if d.members else f"models.{d.model}.scale"


class Scaling:
    """Belongs to one Control."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._kept_path = control.state.root / "scaling.json"
        self._overrides_path = control.state.root / "overrides.json"
        self._overrides = keep.read_overrides(self._overrides_path, wall_s())

    # -- what the loop asks --------------------------------------------------------------------------------------

    def about(self) -> dict[str, Told]:
        """What each model's replicas say of themselves, and exporters of their GPUs."""
        told: dict[str, list[str]] = {}
        for id, row in self._control.local.rows().items():
            told.setdefault(row.model, []).append(id)
        remote = {r.model: Told(slots=r.max_running) for r in self._control.static.rows().values() if r.max_running}
        said = remote | {model: self._told(ids) for model, ids in told.items()}
        usage = {d.model: self._control.gpus.usage(d.models) for d in self._control.units}
        return {m: replace(said.get(m, Told()), gpu_usage=usage.get(m, math.nan)) for m in said.keys() | usage.keys()}

    def _told(self, ids: list[str]) -> Told:
        about = {id: self._control.local.about(id) for id in ids}
        steps, slots, kv = Steps(), [], []
        for a in about.values():
            steps = add(steps, a.steps)
            slots += [a.description.max_running] if a.description and a.description.max_running else []
            kv += [a.load.kv_usage] if a.load else []
        stages = {id: a.stages for id, a in about.items()}
        return Told(slots=min(slots, default=None), steps=steps, kv_usage=max(kv, default=math.nan), stages=stages)

    def overrides(self) -> Mapping[str, Override]:
        """Those that still hold; one that has ended is forgotten."""
        now = wall_s()
        if any(o.until_wall_s <= now for o in self._overrides.values()):
            self._write({m: o for m, o in self._overrides.items() if o.until_wall_s > now})
        return self._overrides

    def currency(self) -> str:
        return self._control.settings.currency

    def keep(self, kept: Kept) -> None:
        """A disk that is full must not stop the loop: the next minute tries again."""
        try:
            keep.save(self._kept_path, kept)
        except OSError as e:
            log.warning("what scaling learnt cannot be kept in %s: %s", self._kept_path, e.strerror)

    def resume(self) -> Kept:
        wants = {}
        for d in self._control.units:
            if (policy := policy_of(d.scale, d.slo.attainment)) is not None:
                wants[d.model] = Wants(key_of(d.scale), policy.start())
        return keep.load(self._kept_path, wall_s(), wants)

    def is_starving(self) -> bool:
        """Whether something waits for a model that has no replica, ready or starting."""
        alive = {r.deployment for r in self._control.replicas if r.state in ("starting", "ready")}
        waiting = self._control.waiting_of()
        ours = {model: d.model for d in self._control.units for model in d.models}
        return any(n and ours.get(model, model) not in alive for model, n in waiting.items())

    # -- what people set -----------------------------------------------------------------------------------------

    def set(self, new: NewOverride) -> ScaleRow:
        d = self._deployment(new.model)
        scale = d.scale
        if not d.stable.engine:
            raise AdminError(409, "E609", f"{d.model} is not ours to scale", why="somebody else runs its replicas")
        if not scale.min <= new.replicas <= scale.max:
            raise AdminError(
                409,
                "E609",
                f"{d.model}: {new.replicas} replicas are outside {scale.min} to {scale.max}",
                why="what is set by hand stays within scale.min and scale.max",
                fix=f"change {_scale_key(d)}, then neaptide apply",
            )
        if not 0 < new.for_s <= LONGEST_OVERRIDE_S:
            raise AdminError(400, "E605", f"for_s={new.for_s:g} is out of range", fix="over 0, at most 30 days")
        held = Override(count=new.replicas, until_wall_s=wall_s() + new.for_s, by=new.by[:64])
        self._write({**self._overrides, d.model: held})
        log.warning("%s: set to %d for %.0f s by %r", d.model, held.count, new.for_s, held.by)  # a policy is overruled
        self._control.loop.nudge()
        return self.row(d)

    def clear(self, model: str) -> ScaleRow:
        d = self._deployment(model)
        if d.model in self._overrides:
            self._write({m: o for m, o in self._overrides.items() if m != d.model})
            log.warning("%s: what was set by hand is cleared", d.model)
            self._control.loop.nudge()
        return self.row(d)

    def _write(self, overrides: dict[str, Override]) -> None:
        try:
            keep.write_overrides(self._overrides_path, overrides)
        except OSError as e:
            raise StorageError(f"{self._overrides_path} cannot be written: {e.strerror}", code="E507") from e
        self._overrides = overrides

    # -- what people are told ------------------------------------------------------------------------------------

    def rows(self) -> Scales:
        return Scales(currency=self.currency(), rows=tuple(map(self.row, self._control.units)))

    def row(self, d: Deployment) -> ScaleRow:
        c = self._control
        mine = [r for r in c.replicas if r.deployment == d.model]
        ready, starting, standby = (sum(r.state == s for r in mine) for s in ("ready", "starting", "standby"))
        learnt, choice, load = c.loop.learnt.models.get(d.model, Learnt()), self._choice(d.model), self._load(d.model)
        traits = c.loop.snapshot.traits.get(d.model, Traits()) if c.loop.snapshot else Traits()
        price, wanted = d.scale.price_per_hour, c.loop.carry.wanted.get(d.model, d.scale.min)
        remote, gpu_usage = not d.stable.engine, c.gpus.usage(d.models)
        return ScaleRow(
            model=d.model,
            members=d.members,
            scalable=not remote,
            policy="" if remote else policy_name(d.scale),
            ready=ready,
            starting=starting,
            wanted=ready if remote else wanted,
            min=d.scale.min,
            max=d.scale.max,
            arrivals_per_s=load.arrivals / load.tick_s if load and load.tick_s > 0 else None,
            expected_per_s=choice.numbers.get("expected_per_s") if choice else None,
            in_flight=load.waiting + load.running if load else None,
            capacity_rps=traits.slots / traits.service_s,
            traits=traits,
            stages=tuple(Stage(name=k, seconds=v) for k, v in learnt.stages.items()),
            starts=learnt.starts,
            override=self._overrides.get(d.model),
            clamp=choice.clamp if choice else "",
            sentence=choice.sentence if choice else "",
            choice=choice,
            standby=standby,
            cost_per_hour=round((ready + starting) * price + rent_per_hour(d.scale, standby), 9) if price else None,
            gpu_usage=None if math.isnan(gpu_usage) else gpu_usage,
        )

    def choices(self, model: str, limit: int) -> Choices:
        said = self._control.journal.said
        models = [self._deployment(model).model] if model else [d.model for d in self._control.units]
        rows = [ChoiceRow(wall_s=s.wall_s, choice=s.choice) for m in models for s in said.get(m, ())]
        return Choices(rows=tuple(sorted(rows, key=lambda r: -r.wall_s)[:limit]))

    def shadows(self, model: str, days: int) -> Shadows:
        wanted = [self._deployment(model)] if model else self._control.units
        rows = []
        for d in wanted:
            by_day = self._control.loop.shadows.days().models.get(d.model, {})
            for day in sorted(by_day, reverse=True)[:days]:
                rows += [_shadow_row(day, d, name, by_day[day]) for name in (REAL, *NAMES) if name in by_day[day]]
        rows.sort(key=lambda r: r.day, reverse=True)
        return Shadows(currency=self.currency(), rows=tuple(rows))

    # -- inside --------------------------------------------------------------------------------------------------

    def _deployment(self, model: str) -> Deployment:
        """By name or alias; a model of a pool has its pool's. NotFoundError."""
        models = self._control.settings.models
        for d in self._control.units:
            if model == d.model or any(model == m or model in models[m].aliases for m in d.models):
                return d
        names = ", ".join(d.model for d in self._control.units)
        raise NotFoundError(f"no model {model!r} is served", why=f"there are: {names}", fix="neaptide models list")

    def _choice(self, model: str) -> Choice | None:
        with contextlib.suppress(StopIteration):
            return next(c for c in self._control.loop.plan.choices if c.model == model)
        return None

    def _load(self, model: str) -> Load | None:
        snapshot = self._control.loop.snapshot
        load = snapshot.loads.get(model) if snapshot else None
        return None if is_stale(load) else load


def _shadow_row(day: str, d: Deployment, name: str, rows: dict[str, Day]) -> ShadowRow:
    of, price = rows[name], d.scale.price_per_hour
    return ShadowRow(
        day=day,
        model=d.model,
        policy=policy_name(d.scale) if name == REAL else name,
        real=name == REAL,
        replica_hours=of.replica_s / 3600,
        cost=round(of.replica_s / 3600 * price, 9) if price else None,
        arrivals=of.arrivals,
        attainment=1 - of.late / of.arrivals if of.arrivals else None,
    )
