"""What a request-level run found: a row a request that came within the reported time, and what the replicas cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from neaptide.simulate.arrivals import Floats, Ints

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """Arrays [requests]; seconds on the clock of the arrivals. NaN: never served; tpot_s also of a single token."""

    t_s: Floats
    ttft_s: Floats
    tpot_s: Floats  # (last - first token) / (tokens - 1)
    finish_s: Floats
    replica: Ints  # that finished it, -1: none
    in_tokens: Ints
    out_tokens: Ints
    cached_tokens: Ints  # of the prompt, found in the replica's memory when it was first admitted
    preempted: Ints  # how often it was put back for want of memory
    lost: Ints  # how often its replica was taken away
    slo_ttft_s: float
    replica_hours: float  # paid
    launches: int
    drains: int
    reclaims: int  # of spot replicas
    ticks_s: Floats  # [ticks] of the reported time: each one's end
    ready: Ints  # [ticks] replicas then
    starting: Ints
    standing: Ints  # ... and those that stood by
    standby_hours: float
    standby_rent: float  # what one of them cost, as a share of a replica: paid in replica_hours

    @property
    def scale_events(self) -> int:
        return self.launches + self.drains

    @property
    def unserved(self) -> int:
        """Not done at the end of the run, or too long for a replica's KV memory."""
        return int(np.isnan(self.finish_s).sum())

    @property
    def attainment(self) -> float:
        """The share of requests whose first token came within the SLO; 1 where none came."""
        on_time = np.less_equal(self.ttft_s, self.slo_ttft_s)  # NaN is not
        return float(on_time.mean()) if len(self.t_s) else 1.0

    def quantile(self, what: Literal["ttft_s", "tpot_s"], q: float) -> float:
        """Of those that have one; NaN where none has."""
        values = getattr(self, what)
        known = values[~np.isnan(values)]
        return float(np.quantile(known, q)) if len(known) else float("nan")

    def summary(self) -> dict[str, float]:
        found: dict[str, float] = {"requests": len(self.t_s), "unserved": self.unserved}
        found |= {f"p{100 * q:g}_ttft_s": self.quantile("ttft_s", q) for q in QUANTILES}
        found |= {f"p{100 * q:g}_tpot_s": self.quantile("tpot_s", q) for q in QUANTILES}
        return found | {
            "attainment": self.attainment,
            "replica_hours": self.replica_hours,
            "standby_hours": self.standby_hours,
            "standby_paid_hours": self.standby_rent * self.standby_hours,
            "scale_events": self.scale_events,
            "launches": self.launches,
            "drains": self.drains,
            "reclaims": self.reclaims,
            "cached_share": float(self.cached_tokens.sum() / max(1, self.in_tokens.sum())),
            "preempted": int(self.preempted.sum()),
            "lost": int(self.lost.sum()),
        }
