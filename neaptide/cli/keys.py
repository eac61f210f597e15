"""`neaptide keys`: API keys. A key is shown once, when it is made; later only its id and last four characters."""

from __future__ import annotations

import datetime
import re
from typing import Any
from urllib.parse import quote

import click
import msgspec

from neaptide import clock
from neaptide.cli import client
from neaptide.cli.draw import moment, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import CreatedKey, KeyChange, KeyInfo, Keys, NewKey
from neaptide.errors import ConfigError

SCOPES = ("inference", "models", "tokenize")
UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


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
    columns = ("id", "name", "tail", "tenant", "priority", "models", "scopes", "limits", "made", "expires", "state")
    now_s = clock.wall_s()
    table("", [say(f"keys.col.{c}") for c in columns], [_row(info, now_s) for info in found.rows])


def _row(k: KeyInfo, now_s: float) -> list[str]:
    ended = k.expires_wall_s is not None and k.expires_wall_s <= now_s
    state = say("keys.revoked") if k.disabled else say("keys.expired") if ended else say("keys.active")
    state += f", {say('keys.inside')}" if k.inside else ""
    whose = f"{k.tenant}/{k.project}" if k.project else k.tenant
    limits = (("rpm", k.rpm), ("tpm", k.tpm), ("concurrency", k.concurrency))
    told = ", ".join(say(f"keys.limit.{name}", n=f"{n:,}") for name, n in limits if n is not None) or "-"
    models, scopes = ", ".join(k.models) or "*", ", ".join(k.scopes) or "*"
    return [k.id, k.name or "-", f"…{k.tail}", whose, k.priority, models, scopes, told, moment(k.created_wall_s),
            moment(k.expires_wall_s or 0.0), state]  # fmt: skip


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
@click.option("--expires", metavar="WHEN", help=say("keys.opt.expires"))
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), help=say("keys.opt.scope"))
@click.option("--rpm", type=click.IntRange(1), help=say("keys.opt.rpm"))
@click.option("--tpm", type=click.IntRange(1), help=say("keys.opt.tpm"))
@click.option("--concurrency", type=click.IntRange(1), help=say("keys.opt.concurrency"))
@common
def create(session: Session, expires: str | None, **asked: Any) -> None:
    expires_s = None if expires is None else until(expires, clock.wall_s())
    body = msgspec.json.encode(msgspec.convert({**asked, "expires_wall_s": expires_s}, NewKey))
    made = client.admin(session.state).call("POST", "keys", CreatedKey, body=body)
    if session.as_json:
        session.encoded(made)
        return
    session.note(say("keys.once", id=made.info.id))
    click.echo(made.key)


@keys.command("set", help=say("keys.set"))
@click.argument("key_id", metavar="ID")
@click.option("--expires", metavar="WHEN|never", help=say("keys.opt.expires"))
@click.option("--scope", "scopes", multiple=True, type=click.Choice((*SCOPES, "all")), help=say("keys.opt.scope"))
@click.option("--inside/--anywhere", default=None, help=say("keys.opt.inside"))
@click.option("--rpm", metavar="N|none", help=say("keys.opt.rpm"))
@click.option("--tpm", metavar="N|none", help=say("keys.opt.tpm"))
@click.option("--concurrency", metavar="N|none", help=say("keys.opt.concurrency"))
@common
def set_key(
    session: Session,
    key_id: str,
    expires: str | None,
    scopes: tuple[str, ...],
    inside: bool | None,
    **limits: str | None,
) -> None:
    asked: dict[str, Any] = {name: _limit(text, name) for name, text in limits.items() if text is not None}
    if expires is not None:
        asked["expires_wall_s"] = None if expires == "never" else until(expires, clock.wall_s())
    if scopes:
        asked["scopes"] = () if "all" in scopes else scopes
    if inside is not None:
        asked["inside"] = inside
    if not asked:
        raise ConfigError("nothing to set", code="E110", fix="name what to change: --rpm 60, --expires never ...")
    body = msgspec.json.encode(msgspec.convert(asked, KeyChange))
    info = client.admin(session.state).call("PATCH", f"keys/{quote(key_id, safe='')}", KeyInfo, body=body)
    if session.as_json:
        session.encoded(info)
    else:
        click.echo(say("keys.changed", id=info.id, tail=info.tail))


@keys.command("revoke", help=say("keys.revoke"))
@click.argument("key_id", metavar="ID")
@common
def revoke(session: Session, key_id: str) -> None:
    gone = client.admin(session.state).call("DELETE", f"keys/{quote(key_id, safe='')}", KeyInfo)
    if session.as_json:
        session.encoded(gone)
    else:
        click.echo(say("keys.gone", id=gone.id, tail=gone.tail))


def until(text: str, now_s: float) -> float:
    """Wall seconds of "30d" (from now), "2026-12-31" (its beginning, UTC) or "2026-12-31T10:00Z". ConfigError E110."""
    if span := re.fullmatch(r"(\d{1,6})([mhdw])", text):
        return now_s + int(span[1]) * UNITS[span[2]]
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is not None and when.tzinfo is None and re.fullmatch(r"[\d-]{8,10}", text):
        when = when.replace(tzinfo=datetime.UTC)
    if when is None or when.tzinfo is None:
        fix = "write 90m, 12h, 30d, 2026-12-31 (UTC), 2026-12-31T10:00Z or 2026-12-31T18:00+08:00"
        raise ConfigError(f"--expires {text!r} is not a time", code="E110", fix=fix)
    return when.timestamp()


def _limit(text: str, name: str) -> int | None:
    if text == "none":
        return None
    if not re.fullmatch(r"[1-9]\d{0,12}", text):
        raise ConfigError(f"--{name} {text!r} is no limit", code="E110", fix="write a number from 1 on, or none")
    return int(text)
