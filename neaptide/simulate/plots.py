"""The report's drawings: cost against attainment, replicas against need, the price of the SLO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import numpy as np

from neaptide.simulate.arrivals import DAY_S
from neaptide.simulate.compare import Comparison, Measured, Point, Row
from neaptide.simulate.outcome import Price, reported_days
from neaptide.simulate.svg import HEIGHT, WIDTH, Axis, path, steps, tag, ticks
from neaptide.simulate.tally import ARRIVALS, LATE, PAID
from neaptide.simulate.texts import both

LEFT, RIGHT, TOP, BOTTOM = 64.0, 36.0, 20.0, 52.0
MISSES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0001)  # shares of late requests that get a line
COSTS = (0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 50.0)
DEAREST = 2.5  # as a multiple of the bound; what costs more would press the others together
Dot = tuple[float, float]  # share late, cost ratio


# --------------------------------------------------------------------------------------------- cost and attainment


def cost_against_attainment(found: Comparison) -> tuple[str, int]:
    """The drawing, and how many points lie outside of it."""
    measured = {id(p): _dot(found, found.reported(p)) for p in found.points}
    best = min((cost for miss, cost in measured.values() if miss <= MISSES[0]), default=1.0)
    highest = min(max([1.2, *(c for m, c in measured.values() if m <= MISSES[0])]), max(DEAREST, 1.3 * best)) * 1.02
    x = Axis(MISSES[0], MISSES[-1], LEFT, WIDTH - RIGHT, math.log10)
    y = Axis(min(0.95, 0.95 * best), highest, HEIGHT - BOTTOM, TOP, math.log)
    inside = [p for p in found.points if measured[id(p)][0] <= MISSES[0] and measured[id(p)][1] <= highest]
    series = [
        _series(found, name, list(points), x, y) for name, points in groupby(inside, key=lambda point: point.policy)
    ]
    edge = path([(x(m), y(c)) for m, c in front([measured[id(p)] for p in inside])], class_="front")
    drawn = [*_grid(x, y), *_goal(found, x, y), edge, *series]
    return _drawing("plot.cost.alt", drawn), len(found.points) - len(inside)


def front(dots: Sequence[Dot]) -> list[Dot]:
    """Those that no other one beats in both, the most late first."""
    kept: list[Dot] = []
    for miss, cost in sorted(dots):
        if not kept or cost < kept[-1][1]:
            kept.append((miss, cost))
    return kept[::-1]


def _dot(found: Comparison, measured: Measured) -> Dot:
    return max(1 - measured.attainment, MISSES[-1]), found.ratio(measured)


def _series(found: Comparison, name: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    places = [(p, *_dot(found, found.reported(p))) for p in points]
    line = path([(x(miss), y(cost)) for _, miss, cost in places], class_="tried") if len(places) > 1 else ""
    marks = [_mark(found, p, x(miss), y(cost)) for p, miss, cost in places]
    return tag("g", line, *marks, class_=f"series s-{name}")


def _mark(found: Comparison, point: Point, x: float, y: float) -> str:
    names = {row.tuned: row.name for row in found.rows if row.point is point}
    measured = found.reported(point)
    told = f"{names.get(True) or names.get(False) or point.policy} · {point.target:g} · "
    told += f"{100 * measured.attainment:.2f} % · {found.ratio(measured):.3f}×"
    title = tag("title", told)
    drawn = [tag("circle", title, cx=x, cy=y, r=3.0, class_="dot")]
    if False in names:
        drawn.append(tag("rect", title, x=x - 5, y=y - 5, width=10.0, height=10.0, class_="as-shipped"))
    if True in names:
        drawn.append(tag("circle", title, cx=x, cy=y, r=8.0, class_="tuned"))
    return "".join(drawn)


def _grid(x: Axis, y: Axis) -> list[str]:
    lines: list[str] = []
    for miss in MISSES:
        at = x(miss)
        lines.append(tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        share = f"{'≥ ' if miss == MISSES[-1] else ''}{100 * (1 - miss):.4g} %"
        lines.append(tag("text", share, x=at, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
    lines += [_level(y(cost), f"{cost:g}×") for cost in COSTS if y.holds(cost)]
    lines.append(_label("plot.cost.x", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "middle"))
    lines.append(_label("plot.cost.y", LEFT, TOP - 6, "start"))
    return lines


def _goal(found: Comparison, x: Axis, y: Axis) -> list[str]:
    at, level = x(1 - found.world.slo), y(1.0)
    diamond = f"M{at:.1f} {level - 7:.1f}l7 7l-7 7l-7 -7z"
    return [
        tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="goal"),
        _label("plot.cost.goal", at + 6, TOP + 12, "start", slo=f"{100 * found.world.slo:g}"),
        tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="level"),
        tag("path", tag("title", "1.000×"), d=diamond, class_="bound"),
        _label("plot.cost.bound", at - 12, level + 16, "end"),
    ]


# --------------------------------------------------------------------------------------------- replicas and need


def replicas_against_need(found: Comparison, row: Row) -> str:
    """Of the first seed, over the reported days: what was paid for, what the arrivals needed, when work was late."""
    tally, lane = found.tally, row.point.lanes.start
    from_s, to_s = found.span.from_s, found.span.to_s
    times = tally.times()
    part = (times + tally.stretch_s > from_s) & (times < to_s)
    ran = tally.sums[part, :, lane]
    seconds = np.minimum(times[part] + tally.stretch_s, to_s) - np.maximum(times[part], from_s)
    paid = ran[:, PAID] * found.world.tick_s / seconds
    need = ran[:, ARRIVALS] / seconds / found.capacity_rps
    late = ran[:, LATE] / np.maximum(ran[:, ARRIVALS], 1e-9)
    x = Axis(float(from_s), float(to_s), LEFT, WIDTH - RIGHT)
    y = Axis(0.0, 1.08 * float(max(paid.max(), need.max(), 1.0)), HEIGHT - BOTTOM, TOP)
    begins = [x(t) for t in times[part]]
    end = x(to_s)

    def line(values: Sequence[float]) -> list[Dot]:
        heights = [y(v) for v in values]
        return [*zip(begins, heights, strict=True), (end, heights[-1])]

    drawn = [
        *_days(from_s, to_s, x, y),
        steps(line(need.tolist()), base=y(0.0), class_="need"),
        steps(line(paid.tolist()), class_="paid"),
        _late(begins, late.tolist()),
    ]
    return _drawing("plot.time.alt", drawn)


def _late(begins: Sequence[float], late: Sequence[float]) -> str:
    """Bars that hang from the top: the share late in a stretch, from 1 % to all on a log scale."""
    bars = []
    for at, share in zip(begins, late, strict=True):
        if share >= 0.01:
            bars.append(f"M{at:.1f} {TOP:.0f}v{6 + 24 * (2 + math.log10(share)):.0f}")
    return tag("path", d="".join(bars), class_="late") if bars else ""


def _days(from_s: float, to_s: float, x: Axis, y: Axis) -> list[str]:
    lines = []
    lines += [_level(y(count), f"{count:g}") for count in ticks(0.0, y.high)]
    step_s = next(
        (s for s in (600, 3600, 3 * 3600, 6 * 3600, DAY_S, 7 * DAY_S) if (to_s - from_s) / s <= 14), 30 * DAY_S
    )
    for number in range(math.ceil(from_s / step_s), math.floor(to_s / step_s) + 1):
        t = number * step_s
        at = x(t)
        lines.append(tag("line", x1=at, x2=at, y1=TOP, y2=HEIGHT - BOTTOM, class_="grid"))
        if t % DAY_S:
            clock = f"{int(t % DAY_S // 3600):02d}:{int(t % 3600 // 60):02d}"
            lines.append(tag("text", clock, x=at, y=HEIGHT - BOTTOM + 18, text_anchor="middle"))
        else:
            lines.append(_label("plot.time.day", at, HEIGHT - BOTTOM + 18, "middle", day=int(t // DAY_S)))
    lines.append(_label("plot.time.y", LEFT, TOP - 6, "start"))
    return lines


# --------------------------------------------------------------------------------------------- the price of the SLO


def price_of_slo(found: Comparison, price: Price | None) -> str:
    """What Neaptide's own policy costs a day at each SLO it was given; what the next one costs more stands between."""
    amounts = [_a_day(found, point, price) for point in found.slo_points]
    if not amounts:
        return ""
    margin = 0.15 * (max(amounts) - min(amounts)) or 0.1 * max(amounts)
    y = Axis(min(amounts) - margin, max(amounts) + margin, 300.0 - BOTTOM, TOP + 20)
    width = (WIDTH - LEFT - RIGHT) / len(amounts)
    middles = [LEFT + width * (at + 0.5) for at in range(len(amounts))]
    drawn = [_label("plot.slo.y.money" if price else "plot.slo.y", LEFT, TOP - 6, "start")]
    drawn += [_level(y(amount), _amount(amount, price)) for amount in ticks(y.low, y.high, 4)]
    drawn.append(path([(x, y(amount)) for x, amount in zip(middles, amounts, strict=True)], class_="slo"))
    for x, amount, point in zip(middles, amounts, found.slo_points, strict=True):
        drawn += _priced(found, point, (x, y(amount)), y.begin, _amount(amount, price))
    for (before, after), (left, right) in zip(pairwise(amounts), pairwise(middles), strict=True):
        text = _more(before, after, price)
        drawn.append(tag("text", text, x=(left + right) / 2, y=TOP + 12, text_anchor="middle", class_="step"))
    return _drawing("plot.slo.alt", drawn, height=300.0)


def slo_steps(found: Comparison, price: Price | None) -> list[tuple[str, str, str]]:
    """(goal, next goal, what it costs more a day) of neighbouring SLOs, in per cent and as text."""
    amounts = [(f"{100 * point.target:g}", _a_day(found, point, price)) for point in found.slo_points]
    return [(low, high, _more(before, after, price)) for (low, before), (high, after) in pairwise(amounts)]


def _more(before: float, after: float, price: Price | None) -> str:
    return ("+" if after >= before else "") + _amount(after - before, price)


def _priced(found: Comparison, point: Point, at: Dot, base: float, amount: str) -> list[str]:
    x, y = at
    reached = f"{100 * found.reported(point).attainment:.2f}"
    return [
        tag("circle", cx=x, cy=y, r=5.0, class_="slo-dot"),
        tag("text", amount, x=x, y=y - 11, text_anchor="middle", class_="value"),
        tag("text", f"{100 * point.target:g} %", x=x, y=base + 18, text_anchor="middle"),
        _label("plot.slo.reached", x, base + 36, "middle", share=reached),
    ]


def _a_day(found: Comparison, point: Point, price: Price | None) -> float:
    measured = found.reported(point)
    return price.a_day(found, measured) if price else measured.hours / reported_days(found)


def _amount(amount: float, price: Price | None) -> str:
    return price.text(amount) if price else f"{amount:,.1f}"


# --------------------------------------------------------------------------------------------- shared


def _level(y: float, text: str) -> str:
    """A line across the drawing, and what it stands for."""
    line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
    return line + tag("text", text, x=LEFT - 8, y=y + 4, text_anchor="end")


def _label(key: str, x: float, y: float, anchor: str, **values: object) -> str:
    return both(lambda lang, text: tag("text", text, x=x, y=y, text_anchor=anchor, lang=lang), key, **values)


def _drawing(alt: str, drawn: Sequence[str], height: float = HEIGHT) -> str:
    titles = both(lambda lang, text: tag("desc", text, lang=lang), alt)
    return tag("svg", titles, *drawn, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img")
