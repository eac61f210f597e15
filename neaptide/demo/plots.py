"""The page's drawings, all on one clock: traffic, replicas against need, time to the first token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neaptide.demo.bill import Bill, is_held
from neaptide.demo.records import Played
from neaptide.demo.story import DAY_H, TTFT_GOAL_S
from neaptide.demo.texts import both
from neaptide.simulate.svg import WIDTH, Axis, Point, steps, tag, ticks

LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 26.0, 26.0
BINS = 80  # of a day
TTFTS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def traffic(played: Played) -> str:
    """Requests/s that came, and a mark for each that failed."""
    rates, width_s = arrivals(played)
    x, y = _clock(played), Axis(0.0, 1.1 * max([1.0, *rates]), 190.0 - BOTTOM, TOP)
    points = [*((x(i * width_s), y(r)) for i, r in enumerate(rates)), (x(len(rates) * width_s), y(0.0))]
    failed = "".join(f"M{x(v.at_s):.1f} {TOP:.0f}v10" for v in played.visits if v.error)
    drawn = [*_frame(played, x, y, "plot.traffic.y"), steps(points, base=y(0.0), class_="came")]
    drawn += [tag("path", d=failed, class_="late")] if failed else []
    return _drawing("plot.traffic.alt", [*drawn, *_marks(played, x, 190.0)], 190.0)


def replicas(played: Played, made: Bill) -> str:
    """What was paid for and what was ready, over what the arrivals needed."""
    rates, width_s = arrivals(played)
    need = [rate / made.capacity_rps for rate in rates]
    x = _clock(played)
    y = Axis(0.0, 1.1 * max([1.0, made.peak, *need]), 240.0 - BOTTOM, TOP)
    area = [*((x(i * width_s), y(n)) for i, n in enumerate(need)), (x(len(need) * width_s), y(0.0))]
    samples = played.seen.samples
    end = x(played.played_s)

    def line(values: Sequence[int]) -> list[Point]:
        points = [(x(s.at_s), y(v)) for s, v in zip(samples, values, strict=True)]
        return [*points, (end, points[-1][1])] if points else []

    drawn = [
        *_frame(played, x, y, "plot.replicas.y"),
        steps(area, base=y(0.0), class_="need"),
        tag("line", x1=LEFT, x2=end, y1=y(made.peak), y2=y(made.peak), class_="fixed"),
        steps(line([s.paid for s in samples]), class_="paid"),
        steps(line([s.ready for s in samples]), class_="ready"),
        *_marks(played, x, 240.0),
    ]
    return _drawing("plot.replicas.alt", drawn, 240.0)


def ttft(played: Played) -> str:
    """A dot a request, on a log scale; the line is the goal."""
    rows = {row.request_id: row for row in played.rows}
    told = [(v, v.ttft_s) for v in played.visits if v.ttft_s is not None]
    low, high = min([0.1, *(t for _, t in told)]), max([2 * TTFT_GOAL_S, *(t for _, t in told)])
    x, y = _clock(played), Axis(low / 1.2, high * 1.2, 220.0 - BOTTOM, TOP, math.log)
    dots = [
        tag("circle", cx=x(v.at_s), cy=y(t), r=2.2,
            class_="broken" if v.error else "held" if is_held(v, rows, played.seen.samples) else "dot")
        for v, t in told
    ]  # fmt: skip
    goal = y(TTFT_GOAL_S)
    drawn = _frame(played, x, y, "plot.ttft.y", [t for t in TTFTS if y.holds(t)])
    drawn += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=goal, y2=goal, class_="goal")]
    drawn += [_label("plot.ttft.goal", WIDTH - RIGHT - 4, goal - 5, "end", goal=f"{TTFT_GOAL_S:g}"), *dots]
    return _drawing("plot.ttft.alt", [*drawn, *_marks(played, x, 220.0)], 220.0)


def arrivals(played: Played) -> tuple[list[float], float]:
    """Requests/s by stretches of the day, and a stretch's seconds."""
    width_s = played.story.day_s / BINS
    counts = [0] * math.ceil(max(played.played_s, played.story.end_s) / width_s)
    for v in played.visits:
        counts[min(int(v.at_s / width_s), len(counts) - 1)] += 1
    return [n / width_s for n in counts], width_s


# --- shared -----------------------------------------------------------------------------------------------------------


def _clock(played: Played) -> Axis:
    return Axis(0.0, max(played.played_s, played.story.end_s), LEFT, WIDTH - RIGHT)


def _frame(played: Played, x: Axis, y: Axis, title: str, levels: Sequence[float] = ()) -> list[str]:
    drawn = []
    for value in levels or [v for v in ticks(0.0, y.high, 4) if v == int(v)]:
        line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid")
        drawn.append(line + tag("text", f"{value:g}", x=LEFT - 8, y=y(value) + 4, text_anchor="end"))
    for hour in range(0, int(DAY_H) + 1, 3):
        at = x(hour / DAY_H * played.story.day_s)
        drawn.append(tag("text", f"{hour:02d}:00", x=at, y=y.begin + 18, text_anchor="middle"))
    return [*drawn, _label(title, LEFT - 40, 12, "start")]


def _marks(played: Played, x: Axis, height: float) -> list[str]:
    """The burst as a band, the kill as a line."""
    scenes = {s.name: s.at_s for s in played.story.scenes}
    at, wide = x(scenes["burst"]), x(played.story.burst_end_s) - x(scenes["burst"])
    drawn = [tag("rect", x=at, y=TOP, width=wide, height=height - TOP - BOTTOM, class_="band"),
             _label("plot.burst", at + wide / 2, TOP - 5, "middle")]  # fmt: skip
    if killed := played.seen.killed:
        at = x(killed.at_s)
        drawn.append(tag("line", x1=at, x2=at, y1=TOP, y2=height - BOTTOM, class_="kill"))
        drawn.append(_label("plot.kill", at, TOP - 5, "middle"))
    return drawn


def _label(key: str, x: float, y: float, anchor: str, **values: object) -> str:
    return both(lambda lang, text: tag("text", text, x=x, y=y, text_anchor=anchor, lang=lang), key, **values)


def _drawing(alt: str, drawn: Sequence[str], height: float) -> str:
    titles = both(lambda lang, text: tag("desc", text, lang=lang), alt)
    return tag("svg", titles, *drawn, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img")
