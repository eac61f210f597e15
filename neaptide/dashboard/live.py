"""The page's numbers, from what control holds: gauges become ticks, ticks become rows. Pure; time is in its arguments.

A Tick is what one model did in a second: sums that add up exactly over any span, and gauges at its end. A row is a
Tick as the page shows it, in the order of FIELDS. NaN is "nobody told"; it never becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import add

import msgspec

from neaptide.table import Gauges
from neaptide.types import Slo, Usage

NAN = math.nan
SUMS = ("arrivals", "done", "errors", "tokens", "late", "firsts", "ttft_sum_s", "paced", "tpot_sum_s")
LEVELS = ("waiting", "running", "oldest_wait_s")
FIELDS = (
    "arrivals_per_s",
    "requests_per_s",  # ended
    "good_per_s",  # ended within the SLO
    "share_in_slo",
    "errors_per_s",
    "tokens_per_s",
    "ttft_s",  # mean
    "ttft_p50_s",
    "ttft_p95_s",
    "tpot_s",  # mean, or p50 where the gateways do not tell
    "tpot_p95_s",
    "waiting",
    "running",
    "oldest_wait_s",
    "slots",  # requests that the ready replicas run at once
    "capacity_per_s",  # requests that the ready replicas serve within the SLO
    "ready",
    "starting",
    "wanted",
    "replica_cost_per_hour",
    "token_spend_per_hour",
    "cost_per_hour",
    "cost_per_mtok",
)
Counters = dict[tuple[str, str], dict[str, float]]  # (gateway, model) -> counters at the last look


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger's newest rows tell, over `span_s`; at most the last minute."""

    rows: int
    span_s: float
    ttft_p50_s: float = NAN
    ttft_p95_s: float = NAN
    tpot_p50_s: float = NAN
    tpot_p95_s: float = NAN
    share_in_slo: float = NAN
    spend_per_hour: float = NAN  # at list prices, in the currency; NaN: no price


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """One model's replicas at this moment."""

    ready: int = 0
    starting: int = 0
    billed: float = 0.0  # ready, starting, draining, and standbys by their rent: what costs
    wanted: float = NAN
    slots: float = NAN  # NaN: without limit, or not told
    capacity_per_s: float = NAN
    price_per_hour: float = 0.0  # of one replica; 0: not known
    remote: bool = False  # somebody else runs them: what they cost is what their tokens cost


class Tick(msgspec.Struct, kw_only=True):
    """One model over `span_s`."""

    span_s: float
    arrivals: float = NAN
    done: float = NAN
    errors: float = NAN
    tokens: float = NAN
    late: float = NAN  # of those done, errors of ours included
    firsts: float = NAN  # of those done: had a first token
    ttft_sum_s: float = NAN
    paced: float = NAN  # of those done: had a time between tokens
    tpot_sum_s: float = NAN
    waiting: float = NAN
    running: float = NAN
    oldest_wait_s: float = NAN
    fleet: Fleet = Fleet()
    replica_cost: float = NAN  # money over span_s
    window: Window | None = None


def ticks(before: Counters, gauges: Sequence[Gauges], span_s: float) -> tuple[dict[str, Tick], Counters]:
    """Each model's sums since `before` and levels now, all gateways together, and the counters to hand in next time.

    A counter below what it was began anew with its gateway. A gateway that is new brings its levels; its counters
    count from the next look on, for they may be hours old.
    """
    out: dict[str, Tick] = {}
    after: Counters = {}
    for gauge in gauges:
        for model, told in gauge.models.items():
            fields = msgspec.structs.asdict(told)
            now = {name: float(fields[name]) for name in SUMS if name in fields}
            after[gauge.gateway, model] = now
            tick = out.setdefault(model, Tick(span_s=span_s))
            for name in LEVELS:
                _add(tick, name, float(fields[name]), max if name == "oldest_wait_s" else add)
            was = before.get((gauge.gateway, model))
            if was is None:
                continue
            for name, value in now.items():
                past = was.get(name, 0.0)
                _add(tick, name, value - past if value >= past else value, add)
    return out, after


def _add(tick: Tick, name: str, value: float, fold: Callable[[float, float], float]) -> None:
    had = getattr(tick, name)
    setattr(tick, name, value if math.isnan(had) else fold(had, value))


def joined(parts: Sequence[Tick]) -> Tick:
    """One model's ticks in order, as one: sums add up, levels are their means, the fleet is the last one."""
    out = Tick(span_s=sum(t.span_s for t in parts), fleet=parts[-1].fleet, window=parts[-1].window)
    for name in (*SUMS, "replica_cost"):
        setattr(out, name, _known(sum, [getattr(t, name) for t in parts]))
    for name in LEVELS:
        setattr(out, name, _known(_mean, [getattr(t, name) for t in parts]))
    return out


def together(models: Mapping[str, Tick], window: Window | None) -> Tick:
    """All models over the same span as one; `window` holds the rows of all."""
    parts = list(models.values())
    fleets = [t.fleet for t in parts]
    fleet = Fleet(
        ready=sum(f.ready for f in fleets),
        starting=sum(f.starting for f in fleets),
        billed=sum(f.billed for f in fleets),
        wanted=_known(sum, [f.wanted for f in fleets]),
        slots=sum(f.slots for f in fleets),  # one without limit makes all without limit
        capacity_per_s=_known(sum, [f.capacity_per_s for f in fleets]),
        price_per_hour=0.0,
        remote=bool(fleets) and all(f.remote for f in fleets),
    )
    out = Tick(span_s=max((t.span_s for t in parts), default=1.0), fleet=fleet, window=window)
    for name in (*SUMS, "waiting", "running", "replica_cost"):
        setattr(out, name, _known(sum, [getattr(t, name) for t in parts]))
    out.oldest_wait_s = _known(max, [t.oldest_wait_s for t in parts])
    return out


def _known(fold: Callable[[list[float]], float], values: Iterable[float]) -> float:
    """`fold` over what is told; NaN when nothing is."""
    told = [v for v in values if not math.isnan(v)]
    return fold(told) if told else NAN


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def row(tick: Tick, remote_spend: float = NAN) -> list[float]:
    """`tick` as the page shows it, in FIELDS' order. `remote_spend`: an hour's tokens on replicas of others, where it
    is not the window's whole spend."""
    window = tick.window or Window(rows=0, span_s=0.0)
    share = _share(tick, window)
    per_s = tick.done / tick.span_s
    replica_cost = tick.replica_cost / tick.span_s * 3600
    spend = window.spend_per_hour if tick.fleet.remote else remote_spend
    cost = _known(sum, (replica_cost, spend))
    tokens_per_s = tick.tokens / tick.span_s
    return [
        tick.arrivals / tick.span_s,
        per_s,
        per_s * share if per_s else per_s,
        share,
        tick.errors / tick.span_s,
        tokens_per_s,
        _per(tick.ttft_sum_s, tick.firsts),
        window.ttft_p50_s,
        window.ttft_p95_s,
        _first(_per(tick.tpot_sum_s, tick.paced), window.tpot_p50_s),
        window.tpot_p95_s,
        tick.waiting,
        tick.running,
        tick.oldest_wait_s,
        tick.fleet.slots,
        tick.fleet.capacity_per_s,
        tick.fleet.ready,
        tick.fleet.starting,
        tick.fleet.wanted,
        replica_cost,
        window.spend_per_hour,
        cost,
        _per(cost, tokens_per_s * 3600 / 1e6),
    ]


def _share(tick: Tick, window: Window) -> float:
    """Ended within the SLO, of all that ended: counted by the gateways where they do, else of the ledger's rows."""
    if not math.isnan(tick.late) and tick.done:
        return max(0.0, 1.0 - tick.late / tick.done)
    return window.share_in_slo


def _per(a: float, b: float) -> float:
    return a / b if b else NAN


def _first(*values: float) -> float:
    return next((v for v in values if not math.isnan(v)), NAN)


def window(
    rows: Sequence[tuple[Usage, int | None]], slos: Mapping[str, Slo], now_wall_s: float, cut: bool
) -> Window | None:
    """The newest rows (newest first) of one model or of all; `cut`: there were older ones within the minute too."""
    if not rows:
        return None
    served = [u for u, _ in rows if u.status != 0 and u.outcome != "refused"]
    ttft = sorted(u.ttft_s for u in served if u.ttft_s)
    tpot = sorted(u.tpot_s for u in served if u.tpot_s)
    span_s = max(1.0, now_wall_s - rows[-1][0].started_wall_s) if cut else 60.0
    amounts = [a for _, a in rows if a is not None]
    good = [u for u in served if is_good(u, slos.get(u.model, Slo()))]
    counted = [u for u in served if u.outcome != "aborted"]
    return Window(
        rows=len(rows),
        span_s=span_s,
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p95_s=quantile(ttft, 0.95),
        tpot_p50_s=quantile(tpot, 0.5),
        tpot_p95_s=quantile(tpot, 0.95),
        share_in_slo=_per(float(len(good)), float(len(counted))),
        spend_per_hour=sum(amounts) / 1e9 / span_s * 3600 if amounts else NAN,
    )


def is_good(usage: Usage, slo: Slo) -> bool:
    """Answered whole, its first token and its pace within the SLO."""
    return usage.outcome == "ok" and usage.ttft_s <= slo.ttft_s and usage.tpot_s <= slo.tpot_s


def quantile(ordered: Sequence[float], q: float) -> float:
    """Nearest rank; NaN of nothing."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else NAN


def rounded(value: float) -> float:
    """Four significant digits; NaN for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else NAN


def shown(values: Iterable[float]) -> list[float | None]:
    """For JSON: None where nobody told."""
    return [None if v != v else v for v in values]  # v != v: NaN, at a third of isnan's cost
