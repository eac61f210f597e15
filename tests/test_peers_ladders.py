"""The peers' lanes against a plain ladder of ifs a policy, one count at a time, written from the same sources."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, floor
from typing import Protocol

import numpy as np
import pytest

from neaptide.control.peers import PEERS
from neaptide.control.peers.engines import DynamoKalman
from neaptide.control.policy import Seen

SLOTS, CAPACITY_RPS, TICK_S, COLD_TICKS = 10.0, 1.0, 5.0, 12
LOW, HIGH = 1, 60


def up(x: float) -> int:
    return ceil(x - 1e-9)


def bounded(count: float) -> float:
    return max(LOW, min(HIGH, count))


class Ladder(Protocol):
    def tick(self, load: float, rate: float) -> None: ...
    def want(self, now_s: float, ready: int, starting: int) -> float: ...


@dataclass
class Window:
    seconds: float
    values: deque[float] = field(default_factory=deque)

    def add(self, value: float) -> None:
        self.values.append(value)
        while len(self.values) * TICK_S > self.seconds:
            self.values.popleft()

    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass
class Recommendations:
    made: list[tuple[float, float]] = field(default_factory=list)

    def calm(self, now_s: float, proposal: float, current: float) -> float:
        recent = [count for t, count in self.made if t > now_s - 300] + [proposal]
        self.made.append((now_s, proposal))
        if proposal >= current:
            return proposal
        return min(current, max(recent))


class HpaLadder:
    def __init__(self, u: float) -> None:
        self.target, self.load, self.past = u * SLOTS, 0.0, Recommendations()

    def tick(self, load: float, rate: float) -> None:
        self.load = load

    def want(self, now_s: float, ready: int, starting: int) -> float:
        current = ready + starting
        if not self.past.made:
            self.past.made.append((now_s, current))
        calm = self.past.calm(now_s, self.proposal(ready, starting), current)
        return bounded(min(calm, max(2 * current, current + 4)))

    def proposal(self, ready: int, starting: int) -> float:
        if ready == 0:
            return starting
        ratio = self.load / ready / self.target
        if starting == 0:
            return ready if abs(1 - ratio) <= 0.1 + 1e-9 else up(ratio * ready)
        load = self.load + (starting * self.target if ratio < 1 else 0.0)
        again = load / (ready + starting) / self.target
        if abs(1 - again) <= 0.1 + 1e-9 or (ratio < 1 < again) or (again < 1 < ratio):
            return ready + starting
        return up(again * (ready + starting))


class KedaLadder:
    def __init__(self, u: float) -> None:
        self.target, self.rates, self.past = u * CAPACITY_RPS, Window(60), Recommendations()

    def tick(self, load: float, rate: float) -> None:
        self.rates.add(rate)

    def want(self, now_s: float, ready: int, starting: int) -> float:
        current, rate = ready + starting, self.rates.mean()
        if not self.past.made:
            self.past.made.append((now_s, current))
        near = abs(1 - rate / (self.target * current)) <= 0.1 + 1e-9
        calm = self.past.calm(now_s, current if near else up(rate / self.target), current)
        return bounded(min(calm, max(2 * current, current + 4)))


class AibrixLadder:
    def __init__(self, u: float) -> None:
        self.target, self.loads, self.past = u * SLOTS, Window(180), Recommendations()

    def tick(self, load: float, rate: float) -> None:
        self.loads.add(load)

    def want(self, now_s: float, ready: int, starting: int) -> float:
        n = ready + starting
        ratio = self.loads.mean() / n / self.target
        proposal: float = n
        if ratio > 1.1 + 1e-9:
            proposal = min(up(n * ratio), ceil(2 * n))
        elif ratio < 0.9 - 1e-9:
            proposal = max(up(n * ratio), floor(n / 2))
        return bounded(self.past.calm(now_s, proposal, n))


class KnativeLadder:
    def __init__(self, u: float) -> None:
        self.target, self.stable, self.burst = u * SLOTS, Window(60), Window(6)
        self.panic_s: float | None = None
        self.most, self.began = 0.0, False

    def tick(self, load: float, rate: float) -> None:
        self.stable.add(load)
        self.burst.add(load)

    def want(self, now_s: float, ready: int, starting: int) -> float:
        if not self.began and ready > 1:
            self.panic_s, self.most = now_s, ready
        self.began = True
        pods = max(1, ready)
        calm, burst = up(self.stable.mean() / self.target), up(self.burst.mean() / self.target)
        if burst / pods >= 2:
            self.panic_s = now_s
        elif self.panic_s is not None and self.panic_s + 60 < now_s:
            self.panic_s, self.most = None, 0.0
        calm = min(max(calm, floor(pods / 2)), 1000 * pods)
        burst = min(max(burst, floor(pods / 2)), 1000 * pods)
        if self.panic_s is None:
            return bounded(calm)
        self.most = max(self.most, calm, burst)
        return bounded(self.most)


class RayLadder:
    """With its control loop at the tick: a delay is int(delay / interval) decisions, and one more."""

    def __init__(self, u: float) -> None:
        self.target_load, self.loads, self.counter = u * SLOTS, Window(30), 0
        self.target: float | None = None

    def tick(self, load: float, rate: float) -> None:
        self.loads.add(load)

    def want(self, now_s: float, ready: int, starting: int) -> float:
        target = self.target = bounded(ready + starting) if self.target is None else self.target
        if ready == 0:
            return max(1, target) if self.loads.mean() > 0 else target
        desired = bounded(up(self.loads.mean() / self.target_load))
        if desired > target:
            self.counter = max(self.counter, 0) + 1
        elif desired < target:
            self.counter = min(self.counter, 0) - 1
        else:
            self.counter = 0
        if self.counter > int(30 / TICK_S) or self.counter < -int(600 / TICK_S):
            self.counter, self.target = 0, desired
        return self.target


class SkyLadder:
    def __init__(self, u: float) -> None:
        self.target_rate, self.rates, self.more, self.fewer = u * CAPACITY_RPS, Window(60), 0, 0
        self.target: float | None = None

    def tick(self, load: float, rate: float) -> None:
        self.rates.add(rate)

    def want(self, now_s: float, ready: int, starting: int) -> float:
        target = self.target = bounded(ready + starting) if self.target is None else self.target
        desired = bounded(up(sum(self.rates.values) * TICK_S / 60 / self.target_rate))
        if desired > target:
            self.more, self.fewer = self.more + 1, 0
            if self.more >= 15:
                self.more, self.target = 0, desired
        elif desired < target:
            self.more, self.fewer = 0, self.fewer + 1
            if self.fewer >= 60:
                self.fewer, self.target = 0, desired
        else:
            self.more = self.fewer = 0
        return self.target


class WvaLadder:
    def __init__(self, u: float) -> None:
        self.u, self.load = u, 0.0

    def tick(self, load: float, rate: float) -> None:
        self.load = load

    def want(self, now_s: float, ready: int, starting: int) -> float:
        required = self.load / self.u - SLOTS * (ready + starting)
        if required > 1e-9 * SLOTS:
            return bounded(ready + starting + up(required / SLOTS))
        spare = SLOTS * ready - self.load / (self.u - 0.15)
        if spare > 0:
            return bounded(max(1, ready + starting - floor(spare / SLOTS + 1e-9)))
        return bounded(ready + starting)


LADDERS: dict[str, type[Ladder]] = {
    "hpa": HpaLadder,
    "keda": KedaLadder,
    "aibrix": AibrixLadder,
    "knative": KnativeLadder,
    "ray": RayLadder,
    "skyserve": SkyLadder,
    "wva": WvaLadder,
}


def trace(random: np.random.Generator, ticks: int) -> list[float]:
    """Requests in flight: a slow swing with noise, jumps that halve or triple it, and silence."""
    steps = np.cumsum(random.choice([0.0, np.log(3), -np.log(2)], ticks, p=[0.97, 0.012, 0.018]))
    swing = 80 * np.exp(0.6 * np.sin(np.arange(ticks) / 150) + np.clip(steps - steps.mean(), -2, 1.5))
    silent = np.repeat(random.random(-(-ticks // 60)) < 0.1, 60)[:ticks]
    return [float(x) for x in np.where(silent, 0.0, swing * random.gamma(30.0, 1 / 30, ticks))]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LADDERS)
def test_a_lane_says_what_the_ladder_says_for_three_hours(name: str, seed: int) -> None:
    """Both see replicas that start for a minute, as the lane ordered them; the youngest go first."""
    random = np.random.default_rng([seed, 3])
    ladder, policy = LADDERS[name](0.7), PEERS[name].policy(0.7, min_replicas=LOW, max_replicas=HIGH)
    state, ready, coming, next_s, wanted = policy.start(), 9, [0] * COLD_TICKS, 0.0, []
    for tick, load in enumerate(trace(random, 2160), start=1):
        now_s, rate = tick * TICK_S, load / 10
        ready += coming.pop(0)
        coming.append(0)
        seen = Seen(
            now_s=now_s,
            tick_s=TICK_S,
            arrivals=np.array([rate * TICK_S]),
            in_flight=np.array([load]),
            waiting=np.zeros(1),
            ready=np.array([float(ready)]),
            starting=np.array([float(sum(coming))]),
            capacity_rps=CAPACITY_RPS,
            slots=SLOTS,
            cold_start_s=60.0,
        )
        policy.observe(seen, state)
        ladder.tick(load, rate)
        if now_s < next_s:
            continue
        next_s = now_s + policy.every_s - 1e-9
        want = int(policy.want(seen, state)[0])
        assert want == ladder.want(now_s, ready, sum(coming)), f"at {now_s} s, {ready} ready, {sum(coming)} starting"
        wanted.append(want)
        change = want - ready - sum(coming)
        coming[-1] += max(change, 0)
        for back in range(COLD_TICKS - 1, -1, -1):
            gone = min(coming[back], max(-change, 0))
            coming[back], change = coming[back] - gone, change + gone
        ready += min(change, 0)
    assert len(set(wanted)) > 5, "the trace moves nothing, so it shows nothing"


def kalman_by_the_book(counts: Sequence[float]) -> list[float]:
    """Level and trend with matrices, as filterpy computes them; the forecast after each count."""
    f, h = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    q, r, p = np.diag([1.0, 0.1]), np.array([[10.0]]), np.eye(2) * 1000.0
    x = np.array([[counts[0]], [0.0]])
    ahead = []
    for i, count in enumerate(counts):
        if i:
            gain = p @ h.T @ np.linalg.inv(h @ p @ h.T + r)
            x = x + gain @ (np.array([[count]]) - h @ x)
            rest = np.eye(2) - gain @ h
            p = rest @ p @ rest.T + gain @ r @ gain.T
        x, p = f @ x, f @ p @ f.T + q
        ahead.append(float(x[0, 0]))
    return ahead


def test_dynamo_kalman_predicts_what_the_matrices_do() -> None:
    counts = [180.0, 360.0, 900.0, 720.0, 1800.0, 1710.0]
    policy = DynamoKalman([1.0, 1.0])
    state = policy.start()
    found = [policy.predict(np.array([count, 3 * count]), state) for count in counts]
    assert np.allclose([lane[0] for lane in found], kalman_by_the_book(counts))
    assert np.allclose([lane[1] for lane in found], kalman_by_the_book([3 * count for count in counts]))
