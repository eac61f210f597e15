"""`neaptide backup`: make, check and put back an archive of the state directory. Works while Neaptide runs, and when
it does not."""

from __future__ import annotations

from pathlib import Path

import click

from neaptide.cli.draw import size, span
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control import backup as archives
from neaptide.control.port import BackupReport

_ARCHIVE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group("backup", no_args_is_help=False, help=say("backup.help"))
def backup() -> None:
    pass


@backup.command("create", help=say("backup.create"))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help=say("backup.out"))
@common
def create(session: Session, out: Path | None) -> None:
    _show(session, archives.create(session.state, out), "backup.made")


@backup.command("verify", help=say("backup.verify"))
@click.argument("archive", type=_ARCHIVE)
@common
def verify(session: Session, archive: Path) -> None:
    _show(session, archives.verify(archive), "backup.good")


@backup.command("restore", help=say("backup.restore"))
@click.argument("archive", type=_ARCHIVE)
@click.option("--yes", is_flag=True, help=say("backup.yes"))
@common
def restore(session: Session, archive: Path, yes: bool) -> None:
    if not yes and session.state.exists() and any(session.state.iterdir()):
        click.confirm(say("backup.sure", state=session.state), abort=True, err=True)
    _show(session, archives.restore(archive, session.state), "backup.restored")


def _show(session: Session, report: BackupReport, words: str) -> None:
    if session.as_json:
        session.encoded(report)
        return
    text = say(words, files=report.files, size=size(report.bytes), span=span(report.duration_s))
    click.echo(f"{report.path}  {text}\nsha256  {report.sha256}")
    for note in report.notes:
        click.echo(note)
