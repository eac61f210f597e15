"""`neaptide models`: what is served, what a model directory holds, how one is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from neaptide.cli import client
from neaptide.cli.draw import count, size, span, table
from neaptide.cli.session import Session, common
from neaptide.cli.store import prune, pull, push, stored
from neaptide.cli.words import say
from neaptide.control.port import DeploymentStatus, Models, NotFoundError


@click.group("models", no_args_is_help=False, help=say("models.help"))
def models() -> None:
    pass


for verb in (push, pull, stored, prune):
    models.add_command(verb)


@models.command("list", help=say("models.list"))
@common
def list_models(session: Session) -> None:
    found = client.admin(session.state).call("GET", "models", Models)
    if session.as_json:
        session.encoded(found)
        return
    columns = ("model", "aliases", "engine", "precision", "context", "scale", "ready", "note")
    table("", [say(f"models.col.{c}") for c in columns], [_row(d) for d in found.rows])


def _row(d: DeploymentStatus) -> list[str]:
    engine = d.engine or say("status.remote")
    scale = f"{d.scale.min}-{d.scale.max}" if d.engine else "-"
    aliases = ", ".join(d.aliases) or "-"
    return [d.model, aliases, engine, d.precision or "-", count(d.context_tokens), scale, str(d.ready), d.failing]


@models.command("show", help=say("models.show"))
@click.argument("name", metavar="MODEL|DIR")
@common
def show(session: Session, name: str) -> None:
    if Path(name).is_dir():
        _show_directory(session, Path(name))
        return
    found = client.admin(session.state).call("GET", "models", Models)
    for d in found.rows:
        if name == d.model or name in d.aliases:
            if session.as_json:
                session.encoded(d)
            else:
                _fields(_deployment(d))
            return
    names = ", ".join(d.model for d in found.rows)
    raise NotFoundError(f"no model {name!r} is served", why=f"there are: {names}", fix="neaptide models list")


def _deployment(d: DeploymentStatus) -> dict[str, str]:
    return {
        "model": d.model,
        "aliases": ", ".join(d.aliases) or "-",
        "revision": d.revision or "-",
        "source": d.source or "-",
        "engine": d.engine or say("status.remote"),
        "precision": d.precision or "-",
        "context": count(d.context_tokens),
        "scale": f"{d.scale.min}-{d.scale.max}",
        "slo": f"TTFT {span(d.slo.ttft_s)} · TPOT {span(d.slo.tpot_s)} · {d.slo.attainment:.1%}",
        "ready": str(d.ready),
        "note": d.failing or "-",
    }


def _show_directory(session: Session, path: Path) -> None:
    from neaptide.models import directory

    found = directory.read(path)
    told: dict[str, Any] = {
        "path": str(found.path),
        "precision": found.precision,
        "weight_bytes": found.weight_bytes,
        "context_tokens": found.context_tokens,
        "vocab_size": found.vocab_size,
        "layers": found.layers,
        "kv_bytes_per_token": found.kv_bytes_per_token(),
        "chat_template": found.chat_template is not None,
        "digest": found.digest,
    }
    if session.as_json:
        session.data(told)
        return
    per_token = size(round(found.kv_bytes_per_token()))
    shown = {**told, "weight_bytes": size(found.weight_bytes), "kv_bytes_per_token": per_token}
    _fields({k: str(v) for k, v in shown.items()})


@models.command("convert", help=say("models.convert"))
@click.argument("source", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--to", "to", type=click.Choice(["int4", "int8", "bf16"]), required=True, help=say("models.to"))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=say("models.out"))
@common
def convert(session: Session, source: Path, to: Literal["int4", "int8", "bf16"], out: Path | None) -> None:
    from neaptide.models.convert import convert as run

    target = out or source.with_name(f"{source.resolve().name}-{to}-ov")
    made = run(source, target, to, report=session.note)
    if session.as_json:
        session.data(
            {
                "source": str(made.source),
                "out": str(made.out),
                "to": made.to,
                "precision": made.model.precision,
                "weight_bytes": made.model.weight_bytes,
                "source_bytes": made.source_bytes,
                "seconds": made.seconds,
            }
        )
        return
    share = f"{made.model.weight_bytes / made.source_bytes:.0%}" if made.source_bytes else "-"
    click.echo(say("models.made", out=made.out, size=size(made.model.weight_bytes), share=share))
    click.echo(say("models.next", name=made.out.name, out=made.out))


def _fields(rows: dict[str, str]) -> None:
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")
