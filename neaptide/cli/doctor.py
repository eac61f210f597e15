"""`neaptide doctor`: what could keep the service from starting or serving well; each line with its fix."""

from __future__ import annotations

import click

from neaptide.cli.draw import paint
from neaptide.cli.session import Session, common
from neaptide.cli.words import say

MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}


@click.command("doctor", help=say("doctor.help"))
@click.option("-f", "--file", type=click.Path(), help=say("doctor.file"))
@common
def doctor(session: Session, file: str | None) -> None:
    from pathlib import Path

    from neaptide.cli.checks import Check, checks

    found: list[Check] = []
    for check in checks(session.state, Path(file) if file else None):
        found.append(check)
        if not session.as_json:
            mark, colour = MARKS[check.level]
            click.echo(f"{paint(mark, colour)} {check.name:<10} {check.text}")
            if check.fix:
                click.echo(f"             {say('doctor.fix')} {check.fix}")
    counts = {level: sum(c.level == level for c in found) for level in MARKS}
    if session.as_json:
        session.data({"healthy": not counts["fail"], **counts, "checks": [c._asdict() for c in found]})
    else:
        click.echo(say("doctor.sum", ok=counts["ok"], warn=counts["warn"], fail=counts["fail"]))
    if counts["fail"]:
        raise click.exceptions.Exit(1)
