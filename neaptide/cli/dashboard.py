"""`neaptide dashboard`: a fresh one-time link to the live page."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from neaptide.cli import client
from neaptide.cli.session import Session, common, user
from neaptide.cli.words import say

LINK = "/ui/ticket"  # not of the API: it serves this verb and `up`


@click.command("dashboard", help=say("dashboard.help"))
@click.option("--open", "show", is_flag=True, help=say("dashboard.open"))
@common
def dashboard(session: Session, show: bool) -> None:
    made = link(session.state)
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


def link(state: Path, timeout_s: float = 10.0) -> Link:
    """A new link to what runs in `state`; NeaptideError when nothing runs there or it refuses."""
    endpoint = client.Endpoint.of(client.running(state).admin, client.admin_leaf(state))
    headers = {"Authorization": f"Bearer {client.secret_file(state / 'admin-token')}"}
    body = msgspec.json.encode({"by": user()[:64]})
    status, _, told = client.exchange(endpoint, "POST", f"{endpoint.path}{LINK}", headers, body, timeout_s)
    if status >= 400:
        raise client.refused(status, told, endpoint)
    return msgspec.json.decode(told, type=Link)
