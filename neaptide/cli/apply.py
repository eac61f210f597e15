"""`neaptide apply`: give the running Neaptide a new configuration, without dropping a stream."""

from __future__ import annotations

from pathlib import Path

import click

from neaptide.cli import client
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import ApplyReport
from neaptide.errors import ConfigError


@click.command("apply", help=say("apply.help"))
@click.option("-f", "--file", type=click.Path(path_type=Path), default="neaptide.yaml", show_default=True,
              help=say("apply.file"))  # fmt: skip
@click.option("--dry-run", is_flag=True, help=say("apply.dry_run"))
@common
def apply(session: Session, file: Path, dry_run: bool) -> None:
    try:
        text = file.read_bytes()
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {e.strerror}", code="E101", fix="pass -f FILE") from e
    api = client.admin(session.state, timeout_s=120.0)
    report = api.call(
        "POST",
        "apply",
        ApplyReport,
        body=text,
        query={"dry_run": 1 if dry_run else None, "origin": str(file.absolute())},
    )
    if session.as_json:
        session.encoded(report)
    else:
        click.echo("\n".join(lines(report)))


def lines(report: ApplyReport) -> list[str]:
    """The difference, one line a fact."""
    out = [say("apply.dry")] if report.dry_run else []
    for sign, names in (("+", report.added), ("~", report.changed), ("-", report.removed)):
        out += [f"{sign} {name}" for name in names]
    out += [f"    {c.key}: {c.old or say('apply.absent')} -> {c.new or say('apply.absent')}" for c in report.changes]
    if not (report.added or report.changed or report.removed or report.changes):
        out.append(say("apply.same"))
    if report.restarts:
        out.append(say("apply.restarts", names=", ".join(report.restarts)))
    return out + list(report.notes)
