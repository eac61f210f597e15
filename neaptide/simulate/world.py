"""What is simulated: how long work takes, how long it may wait, how long a replica takes to start."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from neaptide.config import strict_yaml
from neaptide.errors import ConfigError
from neaptide.types import Standby

Seconds = Annotated[float, Meta(gt=0, le=1e6)]
Share = Annotated[float, Meta(gt=0, lt=1)]
SEE = "neaptide/simulate/goal.yaml lists the keys"


class World(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds; the fluid tier's world. `slo`: the share of requests that must start within `slack_s`."""

    name: str = "goal"
    tick_s: Seconds = 5.0
    service_s: Seconds = 10.0  # a request holds a slot for so long
    slack_s: Annotated[float, Meta(ge=0)] = 2.0
    cold_start_s: Seconds = 180.0
    replicas_at_peak: Annotated[float, Meta(gt=0, le=1e5)] = 40.0
    peak_quantile: Annotated[float, Meta(gt=0, le=1)] = 0.999
    slo: Share = 0.99
    seeds: Annotated[int, Meta(ge=1, le=1000)] = 5
    standby: Standby = Standby()  # how many of what a policy lets go may stand by, and what one costs

    @property
    def held_ticks(self) -> int:
        return round(self.service_s / self.tick_s)

    @property
    def cold_ticks(self) -> int:
        return round(self.cold_start_s / self.tick_s)

    @property
    def on_time_share(self) -> float:
        """Of a tick's arrivals, those whose waiting is over by the tick's end."""
        return 1.0 - self.slack_s / self.tick_s


def read_world(path: Path | None = None) -> World:
    """The world of a file; the goal's when none is given. ConfigError: E101 no such file, E102 not YAML or a key that
    stands twice, E105 names the key that is wrong."""
    origin = str(path or "goal.yaml")
    try:
        text = (path or files("neaptide.simulate").joinpath("goal.yaml")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise ConfigError(f"{origin} cannot be read", why=why, code="E101", fix="pass --world FILE") from e
    return checked(_world(strict_yaml(text, origin) or {}, origin), origin)


def changed(
    world: World, *, cold_start_s: float | None = None, slo: float | None = None, standby: Standby | None = None
) -> World:
    """The same with another cold start, SLO or warm pool. ConfigError E105 where that cannot be."""
    given = {"cold_start_s": cold_start_s, "slo": slo, "standby": standby}
    tree = msgspec.structs.asdict(world) | {name: value for name, value in given.items() if value is not None}
    return checked(_world(tree, world.name), world.name)


def checked(world: World, origin: str) -> World:
    for name in ("service_s", "cold_start_s"):
        ticks = getattr(world, name) / world.tick_s
        if not math.isclose(ticks, round(ticks), rel_tol=1e-9):
            raise _wrong(f"{origin}: {name} {getattr(world, name):g} is no multiple of tick_s {world.tick_s:g}")
    if world.slack_s > world.tick_s or world.held_ticks < 1 or world.cold_ticks < 1:
        raise _wrong(f"{origin}: needs 0 <= slack_s <= tick_s <= service_s, cold_start_s")
    if not world.standby.is_sane:
        raise _wrong(f"{origin}: standby needs max 0 or more, rent over 0 and at most 1")
    return world


def _world(tree: object, origin: str) -> World:
    try:
        return msgspec.convert(tree, World)
    except msgspec.ValidationError as e:
        raise _wrong(f"{origin}: {e}") from None


def _wrong(what: str) -> ConfigError:
    return ConfigError(what, code="E105", fix=SEE)
