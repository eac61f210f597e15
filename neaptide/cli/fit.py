"""`neaptide fit`: what an engine's steps take, learnt from its step log, as a setup for `neaptide simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.errors import ConfigError
from neaptide.simulate.learn import Error, Learnt, engine


@click.command("fit", help=say("fit.help"))
@click.argument("logs", metavar="STEPLOG...", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help=say("fit.out"))
@click.option("--form", type=click.Choice(("linear", "grid")), help=say("fit.form"))
@common
def fit(session: Session, logs: tuple[Path, ...], out: Path | None, form: Any) -> None:
    traits, found = engine(logs, form)
    setup = {"engine": msgspec.to_builtins(traits)}
    if found is not None and not session.as_json:
        _tell(session, found)
    if out is not None:
        _write(out, _yaml(setup))
        session.note(say("fit.written", file=out))
    if session.as_json:
        session.data({"setup": setup, "fit": None if found is None else _quality(found)})
    elif out is None:
        click.echo(_yaml(setup), nl=False)


def _tell(session: Session, found: Learnt) -> None:
    for form, error in (("linear", found.linear), ("grid", found.grid)):
        mark = "*" if form == found.form else " "
        session.note(say("fit.error", mark=mark, form=say(f"fit.{form}"), **_shares(error)))
    stalled = f"{found.stalled_s:.2f}"
    session.note(say("fit.steps", steps=f"{found.steps:,d}", stalls=f"{found.stalls:,d}", seconds=stalled))


def _shares(error: Error) -> dict[str, str]:
    return {
        "median": f"{100 * error.median:.1f}",
        "p95": f"{100 * error.p95:.1f}",
        "total": f"{100 * error.total:+.1f}",
    }


def _quality(found: Learnt) -> dict[str, Any]:
    return {
        "form": found.form,
        "steps": found.steps,
        "stalls": found.stalls,
        "stalled_s": found.stalled_s,
        "linear": found.linear._asdict(),
        "grid": found.grid._asdict(),
    }


def _yaml(setup: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(setup, sort_keys=False, default_flow_style=None, width=120)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{out} cannot be written", why=e.strerror or "", code="E110", fix="-o FILE") from e
