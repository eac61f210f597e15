"""The script: a day in two minutes. Who comes when, what happens when, and the service that it happens to. Pure.

The tide is a line through points (hour of the day, requests/s); visits are a Poisson process under it, from a seed.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any, NamedTuple

DAY_H = 24.0
TIDE = (
    (0.0, 0.0), (4.5, 0.0), (5.0, 2.0), (9.0, 11.0), (12.0, 5.0), (16.0, 5.0), (20.0, 17.0), (22.0, 5.0), (23.0, 2.0),
    (23.5, 0.0), (24.0, 0.0),
)  # fmt: skip
BURST_H, BURST_RPS = (13.5, 14.75), 21.0  # on top of nothing: the tide's own rate where that is higher
WAKERS_H = (1.0, 1.02, 1.05)  # at zero replicas, one shortly after the other: all are held
KILL_H = 19.0
SCENES = (
    ("night", 0.0), ("wake", 1.0), ("morning", 4.5), ("noon", 11.0), ("burst", 13.5), ("evening", 16.5), ("ebb", 21.0),
)  # fmt: skip
TOKENS = (14, 26)  # of an answer, both inclusive

MODEL = "tide"
SLOTS, TTFT_MS, TPOT_MS = 4, 150.0, 40.0  # of a replica: about four requests a second
TTFT_GOAL_S, TPOT_GOAL_S, ATTAINMENT = 1.5, 0.2, 0.95
MOST = 6  # replicas
PRICE, CURRENCY = 12.0, "CNY"  # of a replica-hour


class Guest(NamedTuple):
    """A request of the script."""

    at_s: float  # from the day's begin
    tokens: int


class Scene(NamedTuple):
    name: str
    at_s: float


class Story(NamedTuple):
    """A day of `day_s` seconds, then `rest_s` in which nobody comes."""

    day_s: float
    rest_s: float
    guests: tuple[Guest, ...]
    scenes: tuple[Scene, ...]
    kill_s: float
    policy: str
    short: bool

    @property
    def end_s(self) -> float:
        return self.day_s + self.rest_s

    @property
    def burst_end_s(self) -> float:
        return BURST_H[1] / DAY_H * self.day_s

    def hour(self, at_s: float) -> str:
        """The demo's clock, "06:10"; after midnight it stays there."""
        minutes = int(min(at_s / self.day_s, 1.0) * DAY_H * 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}"


def story(*, short: bool = False, seed: int = 0, policy: str = "thresholds") -> Story:
    day_s, rest_s = (20.0, 1.0) if short else (120.0, 14.0)

    def at(hour: float) -> float:
        return hour / DAY_H * day_s

    chance = random.Random(seed)
    times = sorted([*map(at, WAKERS_H), *_poisson(day_s, chance)])
    return Story(
        day_s=day_s,
        rest_s=rest_s,
        guests=tuple(Guest(t, chance.randint(*TOKENS)) for t in times),
        scenes=tuple(Scene(name, at(hour)) for name, hour in SCENES),
        kill_s=at(KILL_H),
        policy=policy,
        short=short,
    )


def rate(hour: float) -> float:
    """Requests/s at that hour of the day."""
    tide = next(
        (r0 + (r1 - r0) * (hour - h0) / (h1 - h0) for (h0, r0), (h1, r1) in pairwise(TIDE) if h0 <= hour < h1), 0.0
    )
    return max(tide, BURST_RPS) if BURST_H[0] <= hour < BURST_H[1] else tide


def _poisson(day_s: float, chance: random.Random) -> list[float]:
    """Thinned: candidates at the highest rate, each kept with the share that its moment has of it."""
    highest = max(BURST_RPS, *(r for _, r in TIDE))
    out, t = [], chance.expovariate(highest)
    while t < day_s:
        if chance.random() * highest < rate(t / day_s * DAY_H):
            out.append(t)
        t += chance.expovariate(highest)
    return out


def configuration(told: Story) -> str:
    """neaptide.yaml of the day's service. The rules follow a tide of minutes within seconds."""
    scale: dict[str, Any] = {"min": 0, "max": MOST, "policy": told.policy, "price_per_hour": PRICE}
    if told.policy == "thresholds":
        pause = 1.0 if told.short else 2.0
        scale["rules"] = [
            {"signal": "waiting", "above": 3, "add": 2, "cooldown_s": pause},
            {"signal": "in_flight", "per_replica": True, "above": 3.0, "for_s": pause / 2, "add": 1,
             "cooldown_s": pause},
            {"signal": "in_flight", "per_replica": True, "below": 1.5, "for_s": 1.5 * pause, "add": -1,
             "cooldown_s": pause},
            {"signal": "in_flight", "below": 1, "for_s": 1.5 * pause, "add": -MOST, "cooldown_s": pause},
        ]  # fmt: skip
    model = {
        "engine": "echo",
        "options": {"max_running": SLOTS, "echo_ttft_ms": TTFT_MS, "echo_tpot_ms": TPOT_MS},
        "slo": {"ttft_s": TTFT_GOAL_S, "tpot_s": TPOT_GOAL_S, "attainment": ATTAINMENT},
        "scale": scale,
    }
    return json.dumps({"currency": CURRENCY, "models": {MODEL: model}}, indent=1)


def body(guest: Guest) -> bytes:
    """The request as it is sent."""
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"What does the tide bring at {guest.at_s:.1f} s?"}],
        "max_tokens": guest.tokens,
        "ignore_eos": True,
        "stream": True,
    }
    return json.dumps(asked).encode()
