"""What an operator says of scaling: bounds, rules, a calendar. Checked where it is read. Pure."""

from __future__ import annotations

import datetime
import math

from neaptide.errors import ConfigError
from neaptide.types import Event, Rule, Scale


def check_scale(s: Scale, key: str) -> None:
    """`key`: where it stands, such as models.m.scale. ConfigError E108."""
    if s.min < 0 or s.max < s.min:
        raise ConfigError(f"{key}: min {s.min}, max {s.max}", code="E108", fix="0 <= min <= max")
    if s.target is not None and not 0 < s.target < math.inf:
        raise ConfigError(f"{key}.target: {s.target:g}", code="E108", fix="a number over 0, such as 0.8")
    for name, price in (("price_per_hour", s.price_per_hour), ("budget_per_hour", s.budget_per_hour or 0.0)):
        if not 0 <= price < math.inf:
            raise ConfigError(f"{key}.{name}: {price:g}", code="E108", fix="0 or more")
    if s.budget_per_hour is not None and not s.price_per_hour:
        raise ConfigError(f"{key}: a budget without a price", code="E108", fix=f"add {key}.price_per_hour")
    if not s.standby.is_sane:
        what = f"{key}.standby: max {s.standby.max}, rent {s.standby.rent:g}"
        raise ConfigError(what, code="E108", fix="max: 0 or more; rent: over 0, at most 1, such as 0.1")
    if bool(s.rules) != (s.policy == "thresholds"):
        fix = f"add {key}.rules" if not s.rules else f"set {key}.policy: thresholds, or remove the rules"
        raise ConfigError(f"{key}: policy {s.policy} with {len(s.rules)} rules", code="E108", fix=fix)
    for i, rule in enumerate(s.rules):
        _check_rule(rule, f"{key}.rules[{i}]")
    for i, event in enumerate(s.calendar):
        span_s(event, f"{key}.calendar[{i}]")


def _check_rule(r: Rule, key: str) -> None:
    if (r.above is None) == (r.below is None):
        raise ConfigError(f"{key}: either above or below", code="E108", fix=f"{key}: {{signal: {r.signal}, above: 4}}")
    if r.add == 0 or min(r.for_s, r.cooldown_s) < 0:
        fix = "add: 1 or more, or -1 or less; for_s and cooldown_s: 0 or more"
        raise ConfigError(f"{key}: add {r.add}, for_s {r.for_s:g}, cooldown_s {r.cooldown_s:g}", code="E108", fix=fix)


def check_told(s: Scale, key: str, has_gpus: bool) -> None:
    """Every signal that its rules name is told by somebody. ConfigError E108."""
    if not has_gpus and any(rule.signal == "gpu_usage" for rule in s.rules):
        fix = "add gpus to the model: gpus: [{url: http://127.0.0.1:9400/metrics}]"
        raise ConfigError(f"{key}: a rule on gpu_usage, and no exporter tells of it", code="E108", fix=fix)


def span_s(event: Event, key: str = "calendar") -> tuple[float, float]:
    """An event's start and end in wall seconds; times without an offset are local. ConfigError when it has none."""
    try:
        start, end = (datetime.datetime.fromisoformat(t).timestamp() for t in (event.start, event.end))
    except (ValueError, OverflowError) as e:
        fix = "write 2026-11-11T20:00, or 2026-11-11T20:00+08:00"
        raise ConfigError(f"{key}: {e}", code="E108", fix=fix) from None
    if end <= start:
        raise ConfigError(f"{key}: it ends at {event.end}, before it starts", code="E108", fix="start before end")
    if not 0 < event.factor < math.inf:
        raise ConfigError(f"{key}.factor: {event.factor:g}", code="E108", fix="a number over 0: 3 for three times")
    return start, end
