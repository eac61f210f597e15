"""What the gateways tell, made into one Load a model: counters now less counters remembered, all gateways together.

Counters rise from a gateway's start, so one that fell belongs to a gateway that started anew: all it has is new. The
first word of a gateway that nobody remembers is where counting begins: a control that starts late must not take an old
gateway's hours for this tick's arrivals. Pure; what is remembered is a Heard, replaced, never changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from neaptide.control.traits import Told
from neaptide.table import Gauges, ModelGauge
from neaptide.types import Load

FORGET_S = 60.0  # a gateway that has been away for so long is no longer waited for
COUNTERS = (
    "arrivals", "done", "errors", "late", "tokens", "firsts", "ttft_sum_s", "paced", "tpot_sum_s", "served",
    "held_sum_s",
)  # fmt: skip
NAN = float("nan")
UNTOLD = Told()


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted up to `at_s`: the last word of each gateway."""

    at_s: float = float("-inf")  # -inf: nothing was ever heard
    gateways: dict[str, Gauges] = {}


class Sums:
    """One model's counters of this tick and its levels now."""

    __slots__ = ("counts", "oldest_wait_s", "running", "waiting")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTERS, 0.0)
        self.waiting = self.running = 0
        self.oldest_wait_s = 0.0

    def count(self, now: ModelGauge, before: ModelGauge) -> None:
        anew = now.arrivals < before.arrivals or now.done < before.done
        for name in COUNTERS:
            value = getattr(now, name)
            self.counts[name] += value if anew else max(0.0, value - getattr(before, name))

    def level(self, now: ModelGauge) -> None:
        self.waiting += now.waiting
        self.running += now.running
        self.oldest_wait_s = max(self.oldest_wait_s, now.oldest_wait_s)

    def mean(self, total: str, of: str) -> float:
        return self.counts[total] / self.counts[of] if self.counts[of] else NAN


def read(
    words: Sequence[Gauges],
    heard: Heard,
    now_s: float,
    about: Mapping[str, Told] | None = None,
    pool_of: Mapping[str, str] | None = None,
) -> tuple[dict[str, Load], Heard]:
    """The Loads since `heard`, and what to remember if they are taken for a tick's. `about`: what replicas and GPUs
    tell, by model or pool. `pool_of`: models that are counted together, under their pool's name.

    The oldest word of any gateway that is, or was lately, connected is what the Loads' `age_s` says.
    """
    gateways = {id: g for id, g in heard.gateways.items() if now_s - g.mono_s <= FORGET_S}
    gateways.update({g.gateway: g for g in words})
    age_s = max((now_s - g.mono_s for g in gateways.values()), default=float("inf"))
    tick_s = now_s - heard.at_s if heard.gateways else 0.0
    sums: dict[str, Sums] = {}
    for word in words:
        before = heard.gateways.get(word.gateway)
        for model, gauge in word.models.items():
            mine = sums.setdefault((pool_of or {}).get(model, model), Sums())
            mine.level(gauge)
            if before is not None:
                mine.count(gauge, before.models.get(model, ModelGauge()))
    loads = {m: _load(s, tick_s, max(0.0, age_s), (about or {}).get(m, UNTOLD)) for m, s in sums.items()}
    return loads, Heard(at_s=now_s, gateways=gateways)


def _load(s: Sums, tick_s: float, age_s: float, about: Told) -> Load:
    counts = {name: int(s.counts[name]) for name in ("arrivals", "done", "errors", "late", "tokens", "served")}
    return Load(
        tick_s=tick_s,
        age_s=age_s,
        waiting=s.waiting,
        running=s.running,
        oldest_wait_s=s.oldest_wait_s,
        ttft_s=s.mean("ttft_sum_s", "firsts"),
        tpot_s=s.mean("tpot_sum_s", "paced"),
        kv_usage=about.kv_usage,
        gpu_usage=about.gpu_usage,
        service_s=s.mean("held_sum_s", "served"),
        **counts,
    )
