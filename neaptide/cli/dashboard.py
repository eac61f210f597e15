"""`neaptide dashboard`: a fresh one-time link to the live page."""

from __future__ import annotations

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.session import Session, common, user
from neaptide.cli.words import say
from neaptide.control.roles import ROLES

LINK = "/ui/ticket"  # not of the API: it serves this verb and `up`


@click.command("dashboard", help=say("dashboard.help"))
@click.option("--open", "show", is_flag=True, help=say("dashboard.open"))
@click.option("--role", type=click.Choice(ROLES), help=say("dashboard.role"))
@common
def dashboard(session: Session, show: bool, role: str | None) -> None:
    made = link(client.admin(session.state, timeout_s=10.0), role)
    if session.as_json:
        session.encoded(made)
    else:
        click.echo(made.url)
        session.note(say("dashboard.valid", minutes=made.valid_s / 60))
    if show and click.launch(made.url) != 0:
        session.note(say("dashboard.no_browser"))


class Link(msgspec.Struct):
    """A one-time link and how long it can be used."""

    url: str
    valid_s: float


def link(api: client.Admin, role: str | None = None) -> Link:
    """A new link, of the token's role or a lower one; NeaptideError when nothing runs there or it refuses."""
    body = msgspec.json.encode({"by": user()[:64], "role": role})
    return msgspec.json.decode(api.at("POST", LINK, body), type=Link)
