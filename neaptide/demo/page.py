"""The day as one page of HTML that needs nothing else: drawings, decisions, the bill; English and Chinese."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from neaptide import __version__
from neaptide.control.reasons import price
from neaptide.demo import plots
from neaptide.demo.bill import Bill, Promise
from neaptide.demo.records import Decided, Played
from neaptide.demo.story import ATTAINMENT, MOST, TPOT_GOAL_S, TTFT_GOAL_S
from neaptide.demo.texts import LANGUAGES, say, texts
from neaptide.simulate.sheet import sheet


class Line(NamedTuple):
    """A decision, as the table shows it."""

    hour: str
    up: bool
    step: str
    said: Markup  # control's own words


def page(played: Played, made: Bill, language: str = "en") -> str:
    """The whole page; `language` is the one that it shows first."""
    return sheet("neaptide.demo/page.html").render(
        t=say, version=__version__, html_lang=LANGUAGES[language], title=texts("title")[language],
        lead=say("lead", seconds=f"{played.played_s:.0f}", sent=made.sent, most=MOST),
        rules=say("rules") if made.policy == "thresholds" else say("chosen", policy=made.policy),
        tiles=_tiles(made), promises=[(p.kept, _promise(p)) for p in made.promises],
        traffic=Markup(plots.traffic(played)), replicas=Markup(plots.replicas(played, made)),  # noqa: S704 - by svg.py
        ttft=Markup(plots.ttft(played)),  # noqa: S704
        replicas_caption=say("plot.replicas.caption", capacity=f"{made.capacity_rps:.1f}", peak=made.peak),
        traffic_caption=say("plot.traffic.caption", failed=made.failed, broken=made.broken),
        ttft_caption=say("plot.ttft.caption", ttft=f"{TTFT_GOAL_S:g}", tpot=f"{TPOT_GOAL_S:g}", goal=_share(ATTAINMENT),
                         share=_share(made.attainment)),
        decisions=[_line(played, d) for d in played.seen.decided], bill=_bill(made),
        day=say("bill.day", day=_money(made, made.a_day(made.cost)), fixed=_money(made, made.a_day(made.fixed_cost))),
        shadows=_shadows(made), limits=say("limits", minutes=f"{1440 / played.story.day_s:.0f}"),
    )  # fmt: skip


def _tiles(made: Bill) -> list[tuple[str, Markup]]:
    return [
        (f"{100 * made.saved:.0f} %", say("tile.saved", peak=made.peak)),
        (_share(made.attainment), say("tile.attainment", goal=_share(made.goal))),
        (_seconds(made.ttft_p50_s), say("tile.ttft", p95=_seconds(made.ttft_p95_s))),
        (_seconds(made.from_zero_s), say("tile.zero", held=made.held)),
        (f"{made.answered:,}", say("tile.answered", sent=f"{made.sent:,}", failed=made.failed)),
    ]


def _promise(promise: Promise) -> Markup:
    values = {k: _seconds(v) if k == "seconds" else v for k, v in promise.values.items()}
    return say(f"promise.{promise.name}", **values)


def _line(played: Played, decided: Decided) -> Line:
    spans = [Markup('<span lang="{}">{}</span>').format(LANGUAGES[name], text) for name, text in decided.said.items()]
    return Line(
        hour=played.story.hour(decided.at_s),
        up=decided.after > decided.before,
        step=f"{decided.before} → {decided.after}",
        said=Markup("").join(spans),
    )


def _bill(made: Bill) -> list[tuple[Markup, str, str, str]]:
    """(what, replica-hours, price of one, amount)."""
    each = f"{price(made.price_per_hour, made.currency)}/h"
    return [
        (say("bill.fixed", peak=made.peak), _hours(made.fixed_s), each, _money(made, made.fixed_cost)),
        (say("bill.scaled"), _hours(made.replica_s), each, _money(made, made.cost)),
        (say("bill.saved"), _hours(made.fixed_s - made.replica_s), "", _money(made, made.fixed_cost - made.cost)),
    ]


def _shadows(made: Bill) -> list[tuple[str, bool, str, str, str]]:
    """(policy, whether it ran, replica-hours, amount, share late), the cheapest first."""
    rows: list[dict[str, Any]] = sorted(made.shadows, key=lambda r: r["replica_hours"])
    return [
        (r["policy"], r["real"], f"{r['replica_hours']:.3f}", "–" if r["cost"] is None else _money(made, r["cost"]),
         "–" if r["attainment"] is None else f"{100 * (1 - r['attainment']):.1f} %")
        for r in rows
    ]  # fmt: skip


def _money(made: Bill, amount: float) -> str:
    return f"-{price(-amount, made.currency)}" if amount < 0 else price(amount, made.currency)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}".removesuffix(".0") + " %"
