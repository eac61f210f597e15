"""`neaptide audit`: who changed what, from the running service; --check reads the log's files and needs none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import click

from neaptide.cli import client
from neaptide.cli.draw import moment, table
from neaptide.cli.session import Session, common
from neaptide.cli.usage import when
from neaptide.cli.words import say
from neaptide.control.audit import verify
from neaptide.control.chain import AuditPage, AuditRow, Head
from neaptide.errors import ConfigError, StorageError

PAGE = 1000  # lines a request


@click.command("audit", help=say("audit.help"))
@click.option("--since", metavar="WHEN", help=say("opt.since"))
@click.option("--until", metavar="WHEN", help=say("opt.until"))
@click.option("--action", help=say("audit.opt.action"))
@click.option("--who", metavar="ID", help=say("audit.opt.who"))
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help=say("audit.opt.limit"))
@click.option("--check", is_flag=True, help=say("audit.opt.check"))
@click.option("--head", metavar="N:HASH", help=say("audit.opt.head"))
@common
def audit(
    session: Session, since: str | None, until: str | None, action: str | None, who: str | None, limit: int,
    check: bool, head: str | None,
) -> None:  # fmt: skip
    if check or head:
        _check(session, session.state / "audit", head)
        return
    where = {"since_s": when(since, "--since"), "until_s": when(until, "--until"), "action": action, "who": who}
    rows = _newest(client.admin(session.state), where, limit)
    if session.as_json:
        session.encoded(AuditPage(rows=rows))
        return
    columns = ("when", "who", "role", "peer", "action", "object", "change", "outcome")
    table("", [say(f"audit.col.{c}") for c in columns], [_row(row) for row in rows])


def _newest(api: client.Admin, where: Mapping[str, object], limit: int) -> tuple[AuditRow, ...]:
    rows: tuple[AuditRow, ...] = ()
    while len(rows) < limit:
        asked = min(PAGE, limit - len(rows))
        query = {**where, "limit": asked, "before": rows[-1].n if rows else None}
        page = api.call("GET", "audit", AuditPage, query=query).rows
        rows += page
        if len(page) < asked:
            break
    return rows


def _row(r: AuditRow) -> list[str]:
    change = f"{r.before} -> {r.after}" if r.before and r.after else r.after or r.before or "-"
    outcome = f"{r.outcome} {r.code or ''}".strip()
    skipped = f" ({say('audit.skipped', n=r.skipped)})" if r.skipped else ""
    return [moment(r.at_wall_s), r.name or r.who or "-", r.role or "-", r.peer or "-", r.action, r.object or "-",
            change, outcome + skipped]  # fmt: skip


def _check(session: Session, directory: Path, given: str | None) -> None:
    """The verdict, and StorageError E552 where it is bad."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} does not exist", code="E111", fix="pass --state DIR")
    found = verify(directory, *([_head(given)] if given else []))
    if session.as_json:
        session.encoded(found)
    if found.problem:
        raise StorageError(
            f"the audit log in {directory} is not whole: {found.problem}",
            why=f"{found.lines} lines before that follow each other",
            fix="compare it with a backup: somebody changed it, or the disk lost it",
            code="E552",
        )
    if not session.as_json:
        click.echo(say("audit.whole", lines=found.lines, head=f"{found.last}:{found.head}"))


def _head(text: str) -> Head:
    if not re.fullmatch(r"\d{1,15}:[0-9a-f]{64}", text):
        raise ConfigError(f"--head {text!r} is no head", code="E110", fix="give what an earlier --check printed")
    n, _, hash = text.partition(":")
    return Head(int(n), hash)
