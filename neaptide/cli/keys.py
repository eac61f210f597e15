"""`neaptide keys`: API keys. A key is shown once, when it is made; later only its id and last four characters."""

from __future__ import annotations

from urllib.parse import quote

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.draw import moment, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import CreatedKey, KeyInfo, Keys, NewKey


@click.group("keys", no_args_is_help=False, help=say("keys.help"))
def keys() -> None:
    pass


@keys.command("list", help=say("keys.list"))
@common
def list_keys(session: Session) -> None:
    found = client.admin(session.state).call("GET", "keys", Keys)
    if session.as_json:
        session.encoded(found)
        return
    columns = ("id", "name", "tail", "tenant", "priority", "models", "made", "state")
    table("", [say(f"keys.col.{c}") for c in columns], [_row(info) for info in found.rows])


def _row(k: KeyInfo) -> list[str]:
    state = say("keys.revoked") if k.disabled else say("keys.active")
    scope = f"{k.tenant}/{k.project}" if k.project else k.tenant
    models = ", ".join(k.models) or "*"
    state += f", {say('keys.inside')}" if k.inside else ""
    return [k.id, k.name or "-", f"…{k.tail}", scope, k.priority, models, moment(k.created_wall_s), state]


@keys.command("create", help=say("keys.create"))
@click.option("--name", default="", help=say("keys.opt.name"))
@click.option("--tenant", default="default", show_default=True, help=say("keys.opt.tenant"))
@click.option("--project", default="", help=say("keys.opt.project"))
@click.option(
    "--priority",
    type=click.Choice(["low", "normal", "high"]),
    default="normal",
    show_default=True,
    help=say("keys.opt.priority"),
)
@click.option("--model", "models", multiple=True, help=say("keys.opt.model"))
@click.option("--inside", is_flag=True, help=say("keys.opt.inside"))
@common
def create(
    session: Session, name: str, tenant: str, project: str, priority: str, models: tuple[str, ...], inside: bool
) -> None:
    asked = {"name": name, "tenant": tenant, "project": project, "priority": priority, "models": models}
    asked["inside"] = inside
    body = msgspec.json.encode(msgspec.convert(asked, NewKey))
    made = client.admin(session.state).call("POST", "keys", CreatedKey, body=body)
    if session.as_json:
        session.encoded(made)
        return
    session.note(say("keys.once", id=made.info.id))
    click.echo(made.key)


@keys.command("revoke", help=say("keys.revoke"))
@click.argument("key_id", metavar="ID")
@common
def revoke(session: Session, key_id: str) -> None:
    gone = client.admin(session.state).call("DELETE", f"keys/{quote(key_id, safe='')}", KeyInfo)
    if session.as_json:
        session.encoded(gone)
    else:
        click.echo(say("keys.gone", id=gone.id, tail=gone.tail))
