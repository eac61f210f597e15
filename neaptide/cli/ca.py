"""`neaptide ca`: a certificate authority of one's own, for listeners, clients and replicas of one house."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from neaptide.cli.draw import moment, paint, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say

if TYPE_CHECKING:
    from neaptide.tls.ca import Issued

LOW_DAYS = 14.0
_DIR = click.option("--dir", "folder", type=click.Path(file_okay=False, path_type=Path), help=say("ca.opt.dir"))


@click.group("ca", no_args_is_help=False, help=say("ca.help"))
def ca() -> None:
    pass


@ca.command("init", help=say("ca.init"))
@click.option("--name", default="Neaptide local authority", show_default=True, help=say("ca.opt.name"))
@click.option("--days", type=click.IntRange(1, 36_500), default=3650, show_default=True, help=say("ca.opt.days"))
@_DIR
@common
def init(session: Session, name: str, days: int, folder: Path | None) -> None:
    from neaptide.clock import wall_s
    from neaptide.tls.ca import init as make

    cert = make(_folder(session, folder), name, wall_s(), days)
    if session.as_json:
        session.data({"cert": str(cert), "key": str(cert.with_suffix(".key"))})
        return
    session.note(say("ca.made", path=cert.with_suffix(".key")))
    click.echo(cert)


@ca.command("issue", help=say("ca.issue"))
@click.argument("name", metavar="NAME")
@click.option("--dns", multiple=True, metavar="HOST", help=say("ca.opt.dns"))
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help=say("ca.opt.ip"))
@click.option("--server", is_flag=True, help=say("ca.opt.server"))
@click.option("--client", is_flag=True, help=say("ca.opt.client"))
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help=say("ca.opt.days"))
@click.option("--renew", is_flag=True, help=say("ca.opt.renew"))
@_DIR
@common
def issue(
    session: Session, name: str, dns: tuple[str, ...], ips: tuple[str, ...], server: bool, client: bool, days: int,
    renew: bool, folder: Path | None,
) -> None:  # fmt: skip
    from neaptide.clock import wall_s
    from neaptide.tls.ca import Wish
    from neaptide.tls.ca import issue as make

    wish = Wish(dns, ips, server, client, days)
    made = make(_folder(session, folder), name, wish, wall_s(), renew)
    if session.as_json:
        session.data(made._asdict())
        return
    session.note(say("ca.issued", names=", ".join(made.names), until=moment(made.not_after_s)))
    click.echo(f"{made.cert}\n{made.key}")


@ca.command("list", help=say("ca.list"))
@_DIR
@common
def list_issued(session: Session, folder: Path | None) -> None:
    from neaptide.clock import wall_s
    from neaptide.tls.ca import issued

    rows, now_s = issued(_folder(session, folder)), wall_s()
    if session.as_json:
        session.data([{**row._asdict(), "days_left": round((row.not_after_s - now_s) / 86_400, 2)} for row in rows])
        return
    columns = ("name", "names", "usage", "until", "days", "serial")
    table("", [say(f"ca.col.{c}") for c in columns], [_row(row, now_s) for row in rows])


def _row(row: Issued, now_s: float) -> list[str]:
    left = (row.not_after_s - now_s) / 86_400
    days = f"{left:.0f}" if left >= LOW_DAYS else paint(f"{left:.1f}", "yellow" if left > 0 else "red")
    return [row.name, ", ".join(row.names) or "-", ", ".join(row.usage), moment(row.not_after_s), days, row.serial[:16]]


def _folder(session: Session, folder: Path | None) -> Path:
    return folder or session.state / "ca"
