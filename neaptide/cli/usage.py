"""`neaptide usage`: what was used and what it cost, from the ledger: totals by a column, or single rows."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import get_args

import click

from neaptide import clock
from neaptide.cli import client
from neaptide.cli.draw import count, moment, money, span, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import GroupBy, UsagePage, UsageRow, UsageTotal, UsageTotals
from neaptide.errors import ConfigError

PAGE = 500  # rows a request
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@click.command("usage", help=say("usage.help"))
@click.option("--by", type=click.Choice(get_args(GroupBy)), default="model", show_default=True, help=say("usage.by"))
@click.option("--rows", is_flag=True, help=say("usage.rows"))
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help=say("usage.limit"))
@click.option("--cursor", help=say("usage.cursor"))
@click.option("--since", metavar="WHEN", help=say("opt.since"))
@click.option("--until", metavar="WHEN", help=say("opt.until"))
@click.option("--model", help=say("opt.model"))
@click.option("--key", metavar="ID", help=say("usage.key"))
@click.option("--tenant", help=say("usage.tenant"))
@click.option("--outcome", help=say("usage.outcome"))
@common
def usage(
    session: Session, by: str, rows: bool, limit: int, cursor: str | None, since: str | None, until: str | None,
    model: str | None, key: str | None, tenant: str | None, outcome: str | None,
) -> None:  # fmt: skip
    where = {
        "since_s": when(since, "--since"),
        "until_s": when(until, "--until"),
        "model": model,
        "key": key,
        "tenant": tenant,
        "outcome": outcome,
    }
    api = client.admin(session.state)
    if rows:
        _rows(session, api, where, limit, cursor)
    else:
        _totals(session, api, where, by)


def when(text: str | None, option: str) -> float | None:
    """Wall seconds of "2h" (ago), "2026-05-01", "2026-05-01T09:30" (local) or epoch seconds; None for None."""
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return clock.wall_s() - float(ago[1]) * _UNITS[ago[2]]
    if re.fullmatch(r"\d{9,}(\.\d+)?", text):
        return float(text)
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not a time", code="E110", fix="write 90s, 2h, 7d, 2026-05-01 or 2026-05-01T09:30"
        ) from None


def _totals(session: Session, api: client.Admin, where: Mapping[str, object], by: str) -> None:
    found = api.call("GET", "usage/totals", UsageTotals, query={**where, "by": by})
    if session.as_json:
        session.encoded(found)
        return
    columns = ("requests", "ok", "refused", "failed", "aborted", "prompt", "cached", "output", "amount")
    headers = [say(f"usage.by.{by}"), *(say(f"usage.col.{c}") for c in columns)]
    rows = [_total(row, row.group or "-", found.currency) for row in found.rows]
    table("", headers, [*rows, _total(found.total, say("usage.sum"), found.currency)])


def _total(t: UsageTotal, name: str, currency: str) -> list[str]:
    numbers = (t.requests, t.ok, t.refused, t.failed, t.aborted, t.prompt_tokens, t.cached_tokens, t.output_tokens)
    return [name, *(count(n) for n in numbers), money(t.amount_nanos, currency)]


def _rows(session: Session, api: client.Admin, where: Mapping[str, object], limit: int, cursor: str | None) -> None:
    rows: list[UsageRow] = []
    currency = ""
    while len(rows) < limit:
        query = {**where, "limit": min(PAGE, limit - len(rows)), "cursor": cursor}
        page = api.call("GET", "usage", UsagePage, query=query)
        rows += page.rows
        cursor, currency = page.next, page.currency
        if cursor is None:
            break
    if session.as_json:
        session.encoded(UsagePage(rows=tuple(rows), next=cursor, currency=currency))
        return
    columns = ("when", "request", "model", "outcome", "prompt", "output", "queued", "ttft", "tpot", "amount")
    table("", [say(f"usage.col.{c}") for c in columns], [_row(row, currency) for row in rows])
    if cursor:
        session.note(say("usage.more", cursor=cursor))


def _row(row: UsageRow, currency: str) -> list[str]:
    u = row.usage
    tokens = [count(u.prompt_tokens), count(u.output_tokens)]
    times = [span(u.queued_s), span(u.ttft_s), span(u.tpot_s)]
    return [moment(u.started_wall_s), u.request_id, u.model, u.outcome, *tokens, *times,
            money(row.amount_nanos, currency)]  # fmt: skip
