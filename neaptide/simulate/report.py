"""A comparison as one page of HTML that needs nothing else: drawings, numbers, the world; English and Chinese."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from neaptide import __version__
from neaptide.simulate import plots
from neaptide.simulate.bound import DEFINITION
from neaptide.simulate.compare import Comparison, Row
from neaptide.simulate.outcome import Price, by_cost, reported_days
from neaptide.simulate.policies import OWN, STATIC
from neaptide.simulate.sheet import sheet
from neaptide.simulate.texts import LANGUAGES, spans, texts

# Light and dark are told apart by the page's own colours; these stand on both.
COLOURS = {
    OWN: "var(--own)",
    STATIC: "#8a9698",
    "hpa": "#4678b8",
    "keda": "#e07b2a",
    "knative": "#d2485a",
    "ray": "#9468b8",
    "aibrix": "#a0745a",
    "wva": "#4f9e46",
    "dynamo": "#b8962e",
    "dynamo-kalman": "#d070a2",
    "skyserve": "#5aa7cc",
}


class Line(NamedTuple):
    """A row of the table."""

    cells: list[str]
    reached: bool


def page(found: Comparison, price: Price | None = None, language: str = "en") -> str:
    """The whole page; `language` is the one that it shows first."""
    shown = shown_row(found)
    cost, outside = plots.cost_against_attainment(found)
    families = list(dict.fromkeys(point.policy for point in found.points))
    return sheet("neaptide.simulate/report.html").render(
        t=say, version=__version__, html_lang=LANGUAGES[language], title=texts("title")[language],
        lead=say("lead", series=_series(found), **_span(found), requests=f"{_requests(found):,.0f}"),
        tiles=_tiles(found, price), in_sample=found.question.in_sample, families=families, colours=_styles(families),
        bound_short=_bound_short(found), bound_long=say("bound.long", definition=DEFINITION),
        cost=Markup(cost), cost_caption=_cost_caption(found, outside),  # noqa: S704 - made by svg.py
        time=Markup(plots.replicas_against_need(found, shown)),  # noqa: S704
        time_title=say("plot.time", policy=shown.name), time_caption=_time_caption(found),
        slo=Markup(plots.price_of_slo(found, price)), slo_lines=_slo_lines(found, price),  # noqa: S704
        table_caption=say("table.caption", tune=_tune(found), seeds=", ".join(map(str, found.question.seeds))),
        columns=_columns(found, price), rows=[_line(found, row, price) for row in by_cost(found)],
        world=_world(found), limits=say("limits"),
    )  # fmt: skip


def say(key: str, **values: object) -> Markup:
    """The text in both languages; placeholders are escaped with it."""
    return Markup(spans(key, **values))  # noqa: S704


def shown_row(found: Comparison) -> Row:
    """Neaptide's own policy where it ran; else the cheapest that kept the goal, else the cheapest."""
    rows = by_cost(found)
    own = [row for row in rows if row.name == OWN]
    good = [row for row in rows if found.reached(row.reported)]
    return (own or good or rows)[0]


def _series(found: Comparison) -> str:
    return found.rates.series or found.rates.source.path


def _span(found: Comparison) -> dict[str, int]:
    return {"first": found.question.first_day, "last": found.question.last_day}


def _tune(found: Comparison) -> str:
    first, last = found.question.tune
    return f"{first}-{last}" if first < last else str(first)


def _requests(found: Comparison) -> float:
    return float(found.rows[0].reported.requests.mean())


def _bound_short(found: Comparison) -> Markup:
    return say("bound.short", hours=f"{found.bound_hours:,.1f}", budget=f"{100 * (1 - found.world.slo):g}")


def _tiles(found: Comparison, price: Price | None) -> list[tuple[str, Markup]]:
    good = [row for row in by_cost(found) if found.reached(row.reported)]
    if not good:
        return [("–", say("tile.none"))]
    best, world = good[0], found.world
    tiles = [
        (best.name, say("tile.best")),
        (f"{found.ratio(best.reported):.3f}×", say("tile.cost")),
        (f"{100 * best.reported.attainment:.2f} %",
         say("tile.attainment", slack=f"{world.slack_s:g}", slo=f"{100 * world.slo:g}")),
    ]  # fmt: skip
    static = next((row for row in good[::-1] if row.name.startswith(STATIC)), None)
    if static and static is not best:
        tiles.append((f"{100 * (1 - best.reported.hours / static.reported.hours):.0f} %", say("tile.static")))
    if price:
        tiles.append((price.text(price.a_day(found, best.reported)), say("tile.money")))
    return tiles


def _cost_caption(found: Comparison, outside: int) -> Markup:
    caption = say("plot.cost.caption", tune=_tune(found))
    return caption + " " + say("plot.cost.outside", n=outside, dearest=f"{plots.DEAREST:g}") if outside else caption


def _time_caption(found: Comparison) -> Markup:
    minutes = f"{found.tally.stretch_s / 60:g}"
    capacity = f"{found.capacity_rps:.3g}"
    caption = say("plot.time.caption", capacity=capacity, minutes=minutes, seed=found.question.seeds[0])
    return caption if found.tier == "fluid" else caption + " " + say("plot.time.fluid")


def _slo_lines(found: Comparison, price: Price | None) -> list[Markup]:
    key = "plot.slo.sentence" if price else "plot.slo.hours"
    return [say(key, low=low, high=high, amount=more) for low, high, more in plots.slo_steps(found, price)]


def _columns(found: Comparison, price: Price | None) -> list[tuple[str, str]]:
    names = ["target", "cost", "attainment", "hours", "events"]
    names += ["p99"] if found.tier != "fluid" else []
    names += ["standby"] if found.world.standby.max else []
    return [("policy", ""), *((name, "n") for name in [*names, *(["money"] if price else [])])]


def _line(found: Comparison, row: Row, price: Price | None) -> Line:
    measured = row.reported
    cells = [
        row.name, f"{row.point.target:g}", f"{found.ratio(measured):.3f}×", f"{100 * measured.attainment:.2f} %",
        f"{measured.hours / reported_days(found):,.1f}", f"{measured.scale_events.mean():,.0f}",
    ]  # fmt: skip
    if found.tier != "fluid":
        cells.append("–" if row.p99_ttft_s is None else f"{row.p99_ttft_s:.2f} s")
    cells += [f"{measured.standby_hours.mean() / reported_days(found):,.1f}"] if found.world.standby.max else []
    cells += [price.text(price.a_day(found, measured))] if price else []
    return Line(cells, found.reached(measured))


def _world(found: Comparison) -> list[tuple[str, Any]]:
    world, rates = found.world, found.rates
    standby = [("standby", f"{world.standby.max} × {world.standby.rent:g}")] if world.standby.max else []
    return [
        ("source", str(rates.source)), ("tier", found.tier),
        ("capacity", say("world.rps", n=f"{found.capacity_rps:.4g}")),
        ("service", f"{world.service_s:g} s"), ("slack", f"{world.slack_s:g} s"),
        ("cold", f"{world.cold_start_s:g} s"), ("tick", f"{world.tick_s:g} s"), *standby,
        ("dispersion", f"{rates.dispersion:.2f}"), ("filled", str(rates.filled)),
    ]  # fmt: skip


def _styles(families: list[str]) -> Markup:
    """A colour a policy, and the others faded while one is pointed at."""
    lines = [f".s-{name}, .k-{name} {{ --c: {COLOURS.get(name, 'var(--soft)')}; }}" for name in families]
    lines += [
        f"figure.cost:has(.k-{name}:hover) .series:not(.s-{name}) {{ opacity: .12; }}" for name in families
    ]  # fmt: skip
    return Markup("\n".join(lines))  # noqa: S704
