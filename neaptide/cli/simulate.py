"""`neaptide simulate`: what scaling policies would have cost and reached on recorded traffic."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from neaptide.cli import measured as on_setup
from neaptide.cli.draw import span, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import language, say
from neaptide.errors import ConfigError
from neaptide.simulate import sources, tail_report
from neaptide.simulate.arrivals import Rates, Requests
from neaptide.simulate.bound import DEFINITION
from neaptide.simulate.compare import Comparison, Question, Row, Tell, compare, span_of
from neaptide.simulate.measured import Question as SetupQuestion
from neaptide.simulate.measured import measured, untuned
from neaptide.simulate.outcome import Price, by_cost, outcome
from neaptide.simulate.parts import parts, tree
from neaptide.simulate.policies import ALL, OWN, chosen
from neaptide.simulate.replay import Tier
from neaptide.simulate.settings import read_setup
from neaptide.simulate.singly import MOST_REQUESTS, replayed_requests, singly
from neaptide.simulate.tail import COLD_START_S, TailQuestion, compare_tail
from neaptide.simulate.tail_bound import DEFINITION as TAIL_DEFINITION
from neaptide.simulate.world import World, changed, read_world
from neaptide.types import Standby

PRICED_SLOS = (0.95, 0.98, 0.99, 0.995, 0.999)
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("simulate", help=say("simulate.help"))
@click.option("--arrivals", "path", metavar="FILE", required=True, help=say("simulate.arrivals"))
@click.option("--series", metavar="NAME", help=say("simulate.series"))
@click.option("--from", "first", metavar="DAY", type=click.IntRange(0), help=say("simulate.from"))
@click.option("--to", "last", metavar="DAY", type=click.IntRange(0), help=say("simulate.to"))
@click.option("--history", metavar="FILE", help=say("simulate.history"))
@click.option("--tune", metavar="FROM-TO", default="0-6", show_default=True, help=say("simulate.tune"))
@click.option("--policy", "policies", metavar="NAMES", default="all", show_default=True, help=say("simulate.policy"))
@click.option("--cold-start-s", type=float, metavar="S", help=say("simulate.cold_start"))
@click.option("--standby", metavar="N[:RENT]", help=say("simulate.standby"))
@click.option("--slo", type=float, metavar="SHARE", help=say("simulate.slo"))
@click.option("--capacity", type=click.FloatRange(0, min_open=True), metavar="RPS", help=say("simulate.capacity"))
@click.option("--world", "world_file", type=FILE, help=say("simulate.world"))
@click.option("--setup", "setup_file", type=FILE, help=say("simulate.setup"))
@click.option("--tier", type=click.Choice(("fluid", "fast", "exact")), help=say("simulate.tier"))
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help=say("simulate.seed"))
@click.option("--seeds", type=click.IntRange(1, 100), default=1, show_default=True, help=say("simulate.seeds"))
@click.option("--price-per-hour", type=click.FloatRange(0, min_open=True), help=say("simulate.price"))
@click.option("--currency", default="CNY", show_default=True, help=say("simulate.currency"))
@click.option("--html", type=FILE, help=say("simulate.html"))
@click.option("--parts", "in_parts", is_flag=True, help=say("simulate.parts"))
@click.option("--tail", is_flag=True, help=say("simulate.tail"))
@click.option(
    "--tail-below",
    type=click.FloatRange(0, min_open=True),
    metavar="RPS",
    default=0.5,
    show_default=True,
    help=say("simulate.tail_below"),
)
@click.option(
    "--pool", type=click.IntRange(1, 1000), metavar="N", default=4, show_default=True, help=say("simulate.pool")
)
@common
def simulate(
    session: Session, path: str, series: str | None, first: int | None, last: int | None, history: str | None,
    tune: str, policies: str, cold_start_s: float | None, slo: float | None, capacity: float | None,
    world_file: Path | None, setup_file: Path | None, tier: str | None, seed: int, seeds: int,
    price_per_hour: float | None, currency: str, html: Path | None, in_parts: bool, tail: bool, tail_below: float,
    pool: int, standby: str | None,
) -> None:  # fmt: skip
    if in_parts and tier not in (None, "fluid"):
        raise ConfigError(f"--parts is of the fluid tier, not of {tier}", code="E110", fix="leave out --tier")
    if tail and (html or price_per_hour or tier or in_parts or standby or policies != ALL):
        fix = "leave out --policy, --tier, --parts, --standby, --price-per-hour and --html"
        raise ConfigError("--tail has policies of its own, no tiers, no pool, no prices, no page", code="E110", fix=fix)
    if setup_file and (html or price_per_hour or in_parts or tail or history or world_file or capacity or seeds > 1):
        fix = "of --policy, --from, --to, --tune, --tier, --cold-start-s, --standby, --slo and --seed only"
        raise ConfigError("--setup is another world than the one these options are of", code="E110", fix=fix)
    names = chosen(name.strip() for name in policies.split(",") if name.strip())
    start_s, kept = None if setup_file else cold_start_s, standbys(standby)
    world = changed(read_world(world_file), cold_start_s=start_s, slo=slo, standby=kept)
    tune_days = days(tune, "--tune")
    price = Price(price_per_hour, currency) if price_per_hour else None
    found = _read(session, path, series)
    before = _read(session, history, series) if history else None
    rates = sources.rates(found, before, series or "")
    first, last = reported(rates, tune_days, first, last)
    if setup_file:
        setup = on_setup.changed(read_setup(setup_file), cold_start_s, kept)
        asked = SetupQuestion(
            policies=untuned(names), first_day=first, last_day=last, tune=tune_days, tier=single(tier), seed=seed
        )
        with _progress() as tell:
            got = measured(rates, sources.recorded(found, before), setup, world, asked, tell)
        return on_setup.show(session, got)
    if tail:
        world = world if world_file else changed(world, cold_start_s=cold_start_s or COLD_START_S)
        small = TailQuestion(
            first_day=first, last_day=last, tune=tune_days, below_rps=tail_below, pool=pool,
            seeds=tuple(range(seed, seed + seeds)), capacity_rps=capacity,
        )  # fmt: skip
        return _tail(session, rates, world, small)
    question = Question(
        policies=names, first_day=first, last_day=last, tune=tune_days, seeds=tuple(range(seed, seed + seeds)),
        slos=PRICED_SLOS if html and OWN in names else (), capacity_rps=capacity,
    )  # fmt: skip
    with _progress() as tell:
        result = _compared(world, rates, question, "fluid" if in_parts else tier, sources.recorded(found, before), tell)
    if html:
        _write(html, result, price)
        session.note(say("simulate.written", file=html))
    found_parts = None
    if in_parts:
        with _progress() as tell:
            found_parts = parts(result, tell)
    if session.as_json:
        session.data(outcome(result, price) | ({"parts": tree(found_parts)} if found_parts else {}))
        return
    _show(result, price)
    if found_parts:
        shares = {name: f"{100 * share:.1f}" for name, share in found_parts.means.items()}
        click.echo(say("simulate.in_parts", over=f"{100 * found_parts.over:.1f}", **shares))


def _tail(session: Session, rates: Rates, world: World, question: TailQuestion) -> None:
    with _progress() as tell:
        found = compare_tail(rates, world, question, tell)
    if session.as_json:
        session.data(tail_report.outcome(found))
        return
    budget = f"{100 * (1 - world.slo):g}"
    columns = [say(f"simulate.col.{name}") for name in tail_report.COLUMNS]
    title = say("simulate.tail_title", models=len(found.models), series=rates.series, below=f"{question.below_rps:g}",
                first=question.first_day, last=question.last_day, seeds=", ".join(map(str, question.seeds)),
                slots=found.shop.slots, cold=f"{world.cold_start_s:g}", slo=f"{100 * world.slo:g}",
                slack=f"{world.slack_s:g}")  # fmt: skip
    table(title, columns, [tail_report.cells(found, row) for row in tail_report.by_cost(found)])
    click.echo(say("simulate.bound", hours=f"{found.bound_hours:,.1f}", budget=budget, definition=TAIL_DEFINITION))


def single(tier: str | None) -> Tier:
    """A tier of single requests; ConfigError E110 for the fluid one."""
    if tier == "fluid":
        raise ConfigError("--setup has single requests, the fluid tier has none", code="E110", fix="--tier fast")
    return "exact" if tier == "exact" else "fast"


def days(text: str, option: str) -> tuple[int, int]:
    """ "0-6" -> (0, 6); "3" -> (3, 3). ConfigError E110 otherwise."""
    written = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())
    first, last = (int(written[1]), int(written[2] or written[1])) if written else (1, 0)
    if first > last:
        raise ConfigError(f"{option} {text!r} is no span of days", code="E110", fix=f"{option} 0-6")
    return first, last


def standbys(text: str | None) -> Standby | None:
    """ "2:0.1" -> two at a tenth; "2" -> two at the default rent. ConfigError E110 otherwise."""
    if text is None:
        return None
    count, _, rent = text.partition(":")
    try:
        kept = Standby(max=int(count), rent=float(rent) if rent else Standby().rent)
    except ValueError:
        kept = Standby(max=-1)
    if not kept.is_sane:
        what = f"--standby {text!r}: how many may stand by, and what one costs as a share of a replica"
        raise ConfigError(what, code="E110", fix="--standby 2:0.1")
    return kept


def reported(rates: Rates, tune: tuple[int, int], first: int | None, last: int | None) -> tuple[int, int]:
    """The days to report. Without --from and --to those after the tuning days, or all where there are none."""
    present = rates.days
    if first is None:
        first = tune[1] + 1 if tune[1] + 1 in present else present[0]
    last = present[-1] if last is None else last
    missing = [f"--{name} {day}" for name, day in (("from", first), ("to", last)) if day not in present]
    if missing or first > last:
        what = f"{', '.join(missing)}: there is no such day" if missing else f"--from {first} is after --to {last}"
        raise ConfigError(
            f"{rates.source.path or rates.series}: {what}", why=f"it has days {present[0]} to {present[-1]}",
            code="E124", fix="choose days it has; --history FILE adds earlier ones",
        )  # fmt: skip
    return first, last


def _read(session: Session, path: str, series: str | None) -> Rates | Requests:
    found = sources.arrivals(path, series)
    session.note(str(found.source))
    return found


def _compared(
    world: World, rates: Rates, question: Question, tier: str | None, recorded: Requests | None, tell: Tell
) -> Comparison:
    """In the tier that was asked for; by default request by request where those are few enough."""
    few = replayed_requests(rates, span_of(world, rates, question), question, world) <= MOST_REQUESTS
    tier = tier or ("fast" if few else "fluid")
    if tier == "fluid":
        return compare(world, rates, question, tell)
    found = compare(world, rates, question, lambda share: tell(share / 2))
    return singly(found, "exact" if tier == "exact" else "fast", recorded, lambda share: tell((1 + share) / 2))


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda share: None
        return
    with click.progressbar(length=1000, label=say("simulate.running"), file=sys.stderr) as bar:
        yield lambda share: bar.update(max(0, round(1000 * share) - bar.pos))


def _write(file: Path, found: Comparison, price: Price | None) -> None:
    from neaptide.simulate.report import page

    try:
        file.write_text(page(found, price, language()), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{file} cannot be written", why=e.strerror or "", code="E110", fix="--html FILE") from e


def _show(found: Comparison, price: Price | None) -> None:
    world, question = found.world, found.question
    columns: dict[str, Callable[[Row], str]] = {
        "policy": lambda row: row.name,
        "target": lambda row: f"{row.point.target:g}",
        "cost": lambda row: f"{found.ratio(row.reported):.3f}",
        "attainment": lambda row: f"{100 * row.reported.attainment:.2f} %",
        "hours": lambda row: f"{row.reported.hours:,.1f}",
        "events": lambda row: f"{row.reported.scale_events.mean():,.0f}",
    }
    if found.tier != "fluid":
        columns["p99"] = lambda row: span(row.p99_ttft_s)
    if world.standby.max:
        columns["standby"] = lambda row: f"{row.reported.standby_hours.mean():,.1f}"
    if price:
        columns["money"] = lambda row: price.text(price.a_day(found, row.reported))
    columns["verdict"] = lambda row: "" if found.reached(row.reported) else say("simulate.missed", slo=f"{world.slo:g}")
    rows = [[cell(row) for cell in columns.values()] for row in by_cost(found)]
    table(_title(found), [say(f"simulate.col.{name}") for name in columns], rows)
    click.echo(say("simulate.bound", hours=f"{found.bound_hours:,.1f}", budget=f"{100 * (1 - world.slo):g}",
                   definition=DEFINITION))  # fmt: skip
    if question.in_sample:
        click.echo(say("simulate.in_sample"))


def _title(found: Comparison) -> str:
    world, question = found.world, found.question
    return say(
        "simulate.title", series=found.rates.series or found.rates.source.path, first=question.first_day,
        last=question.last_day, seeds=", ".join(map(str, question.seeds)), capacity=f"{found.capacity_rps:.3g}",
        cold=f"{world.cold_start_s:g}", slo=f"{100 * world.slo:g}", slack=f"{world.slack_s:g}", tier=found.tier,
    )  # fmt: skip
