"""What is simulated: how long work takes, how long it may wait, how long a replica takes to start."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import msgspec

from neaptide.errors import ConfigError


class World(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds; the fluid tier's world. `slo`: the share of requests that must start within `slack_s`."""

    name: str = "goal"
    tick_s: float = 5.0
    service_s: float = 10.0  # a request holds a slot for so long
    slack_s: float = 2.0
    cold_start_s: float = 180.0
    replicas_at_peak: float = 40.0
    peak_quantile: float = 0.999
    slo: float = 0.99
    seeds: int = 5

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
    """The world of a file; the goal's when none is given. ConfigError E110 names the key that is wrong."""
    text = path.read_bytes() if path else files("neaptide.simulate").joinpath("goal.yaml").read_bytes()
    try:
        world = msgspec.yaml.decode(text, type=World)
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", code="E110", fix="see neaptide/simulate/goal.yaml") from e
    for name in ("service_s", "cold_start_s"):
        if getattr(world, name) % world.tick_s:
            raise ConfigError(f"{path}: {name} is no multiple of tick_s", code="E110", fix="change either")
    if not 0 <= world.slack_s <= world.tick_s or world.held_ticks < 1 or world.cold_ticks < 1:
        raise ConfigError(f"{path}: needs 0 <= slack_s <= tick_s <= service_s, cold_start_s", code="E110")
    return world
