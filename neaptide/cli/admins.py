"""`neaptide admins`: tokens for the admin API, each with a role. A token is shown once, when it is made."""

from __future__ import annotations

from urllib.parse import quote

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.draw import moment, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.roles import ROLES, AdminInfo, AdminList, CreatedAdmin, NewAdmin


@click.group("admins", no_args_is_help=False, help=say("admins.help"))
def admins() -> None:
    pass


@admins.command("list", help=say("admins.list"))
@common
def list_admins(session: Session) -> None:
    found = client.admin(session.state).call("GET", "admins", AdminList)
    if session.as_json:
        session.encoded(found)
        return
    columns = ("id", "name", "role", "tail", "made", "by", "state")
    table("", [say(f"admins.col.{c}") for c in columns], [_row(info) for info in found.rows])


def _row(a: AdminInfo) -> list[str]:
    state = say("admins.revoked") if a.revoked else say("admins.active")
    tail = f"…{a.tail}" if a.tail else "-"
    return [a.id, a.name or "-", a.role, tail, moment(a.created_wall_s), a.made_by or "-", state]


@admins.command("create", help=say("admins.create"))
@click.option("--role", type=click.Choice(ROLES), required=True, help=say("admins.opt.role"))
@click.option("--name", default="", help=say("admins.opt.name"))
@common
def create(session: Session, role: str, name: str) -> None:
    body = msgspec.json.encode(msgspec.convert({"role": role, "name": name}, NewAdmin))
    made = client.admin(session.state).call("POST", "admins", CreatedAdmin, body=body)
    if session.as_json:
        session.encoded(made)
        return
    session.note(say("admins.once", id=made.info.id, role=made.info.role))
    click.echo(made.token)


@admins.command("revoke", help=say("admins.revoke"))
@click.argument("admin_id", metavar="ID")
@common
def revoke(session: Session, admin_id: str) -> None:
    gone = client.admin(session.state).call("DELETE", f"admins/{quote(admin_id, safe='')}", AdminInfo)
    if session.as_json:
        session.encoded(gone)
    else:
        click.echo(say("admins.gone", id=gone.id, name=gone.name or "-"))
