"""`neaptide scale`: how many replicas each model has and why; set by hand for a while; what others would have cost."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.draw import moment, paint, span, table
from neaptide.cli.session import Session, common, user
from neaptide.cli.words import language, say
from neaptide.control.port import Choices, NewOverride, NotFoundError, ScaleRow, Scales, ShadowRow, Shadows
from neaptide.control.reasons import price, sentence
from neaptide.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group("scale", no_args_is_help=False, help=say("scale.help"))
def scale() -> None:
    pass


@scale.command("show", help=say("scale.show"))
@click.argument("model", required=False)
@click.option("--shadows", is_flag=True, help=say("scale.opt.shadows"))
@click.option("--days", type=click.IntRange(1, 35), default=1, show_default=True, help=say("scale.opt.days"))
@common
def show(session: Session, model: str | None, shadows: bool, days: int) -> None:
    api = client.admin(session.state)
    if shadows:
        told = api.call("GET", "scale/shadows", Shadows, query={"model": model, "days": days})
        session.encoded(told) if session.as_json else _draw_shadows(told)
        return
    found = api.call("GET", "scale", Scales)
    if model is not None:
        found = Scales(currency=found.currency, rows=tuple(r for r in found.rows if model in (r.model, *r.members)))
        if not found.rows:
            raise NotFoundError(f"no model {model!r} is served", fix="neaptide models list")
    if session.as_json:
        session.encoded(found)
        return
    columns = ("model", "ready", "starting", "wanted", "bounds", "policy", "expected", "now", "flight", "serves",
               "cost")  # fmt: skip
    table("", [say(f"scale.col.{c}") for c in columns], [_row(r, found.currency) for r in found.rows])
    for row in found.rows:
        click.echo("".join(f"\n{line}" for line in _beneath(row)), nl=bool(_beneath(row)))


def _row(r: ScaleRow, currency: str) -> list[str]:
    name = f"{r.model} ({', '.join(r.members)})" if r.members else r.model
    if not r.scalable:
        return [name, str(r.ready), "-", "-", "-", say("status.remote"), *_traffic(r), "-", "-"]
    policy = say("scale.by_hand") if r.override else r.policy
    cost = f"{price(r.cost_per_hour, currency)}/h" if r.cost_per_hour is not None else "-"
    ready = f"{r.ready} ({say('scale.standby', n=r.standby)})" if r.standby else str(r.ready)
    serves = f"{r.capacity_rps:.1f}/s" if r.traits.learnt == "measured" else f"~{r.capacity_rps:.1f}/s"
    return [name, ready, str(r.starting), str(r.wanted), f"{r.min}-{r.max}", policy, *_traffic(r), serves,
            cost]  # fmt: skip


def _traffic(r: ScaleRow) -> list[str]:
    rates = ["-" if rate is None else f"{rate:.1f}/s" for rate in (r.expected_per_s, r.arrivals_per_s)]
    return [*rates, "-" if r.in_flight is None else str(r.in_flight)]


def _beneath(r: ScaleRow) -> list[str]:
    """The reason in full, what was set by hand, what a start takes."""
    said = sentence(r.choice, language()) if r.choice else r.sentence
    out = [said] if said else []
    if r.gpu_usage is not None:
        out.append(say("scale.gpus", model=r.model, share=f"{r.gpu_usage:.0%}"))
    if r.override is not None:
        out.append(say("scale.held", model=r.model, n=r.override.count, until=moment(r.override.until_wall_s)))
    if r.starts:
        stages = " · ".join(f"{s.name.removesuffix('_s')} {span(s.seconds)}" for s in r.stages) or "-"
        out.append(say("scale.start", model=r.model, span=span(r.traits.cold_start_s), n=r.starts, stages=stages))
    return out


def _draw_shadows(told: Shadows) -> None:
    if not told.rows:
        click.echo(say("scale.no_shadows"))
        return
    columns = ("day", "model", "policy", "hours", "cost", "late", "against")
    real = {(r.day, r.model): r for r in told.rows if r.real}
    rows = [_shadow(r, real.get((r.day, r.model)), told.currency) for r in told.rows]
    table("", [say(f"scale.col.{c}") for c in columns], rows)
    click.echo(say("scale.shadows.note"))


def _shadow(r: ShadowRow, real: ShadowRow | None, currency: str) -> list[str]:
    name = say("scale.real", policy=r.policy) if r.real else r.policy
    cost = price(r.cost, currency) if r.cost is not None else "-"
    late = f"{1 - r.attainment:.1%}" if r.attainment is not None else "-"
    return [r.day, r.model, name, f"{r.replica_hours:.2f}", cost, late, _against(r, real, currency)]


def _against(r: ShadowRow, real: ShadowRow | None, currency: str) -> str:
    if real is None or r.real:
        return ""
    if r.cost is not None and real.cost is not None:
        difference, amount = r.cost - real.cost, price(abs(r.cost - real.cost), currency)
    else:
        difference = r.replica_hours - real.replica_hours
        amount = f"{abs(difference):.2f} h"
    return say("scale.more", amount=amount) if difference >= 0 else say("scale.less", amount=amount)


@scale.command("why", help=say("scale.why"))
@click.argument("model", required=False)
@click.option("--limit", type=click.IntRange(1, 200), default=10, show_default=True, help=say("scale.opt.limit"))
@common
def why(session: Session, model: str | None, limit: int) -> None:
    query = {"model": model, "limit": limit}
    told = client.admin(session.state).call("GET", "scale/why", Choices, query=query)
    if session.as_json:
        session.encoded(told)
        return
    if not told.rows:
        click.echo(say("scale.no_choices"))
    for row in told.rows:
        mark = {"launch": paint("+", "green"), "drain": paint("-", "yellow")}.get(row.choice.action, "=")
        click.echo(f"{moment(row.wall_s)}  {mark} {sentence(row.choice, language())}")


@scale.command("set", help=say("scale.set"))
@click.argument("model")
@click.argument("replicas", metavar="N", type=click.IntRange(0))
@click.option("--for", "lasting", metavar="TIME", default="1h", show_default=True, help=say("scale.opt.for"))
@common
def set_scale(session: Session, model: str, replicas: int, lasting: str) -> None:
    new = NewOverride(model=model, replicas=replicas, for_s=seconds(lasting), by=user())
    row = client.admin(session.state).call("POST", "scale/override", ScaleRow, body=msgspec.json.encode(new))
    _told(session, row, _beneath(row)[-2:] if row.starts else _beneath(row)[-1:])


@scale.command("clear", help=say("scale.clear"))
@click.argument("model")
@common
def clear(session: Session, model: str) -> None:
    row = client.admin(session.state).call("DELETE", "scale/override", ScaleRow, query={"model": model})
    _told(session, row, [say("scale.cleared", model=row.model, policy=row.policy)])


def _told(session: Session, row: ScaleRow, lines: Sequence[str]) -> None:
    if session.as_json:
        session.encoded(row)
    else:
        click.echo("\n".join(lines))


def seconds(text: str) -> float:
    """30m, 2h, 1d, 90s, or several of them together: 1h30m. ConfigError E110."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    found = sum(float(n) * UNITS[unit] for n, unit in parts)
    if "".join(n + unit for n, unit in parts) != text or found <= 0:
        raise ConfigError(f"--for {text!r} is no time", code="E110", fix="write 90s, 30m, 2h, 1d or 1h30m")
    return found
