"""`neaptide down`: stop a service that runs in the background, within its grace."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

import click

from neaptide.cli.session import Session, common
from neaptide.cli.words import say


@click.command(help=say("verb.down"))
@click.option("--grace-s", type=click.FloatRange(0, 3600), help=say("down.grace"))
@common
def down(session: Session, grace_s: float | None) -> None:
    """Let running answers finish, then stop everything; returns when the last process has ended."""
    from neaptide.clock import mono_s

    began_s = mono_s()
    pid = supervisor_pid(session.state)
    if pid is None:
        missing = {"stopped": False, "reason": "not running"}
        click.echo(json.dumps(missing) if session.as_json else say("down.nothing", state=session.state))
        return
    killed = stop(pid, grace_s)
    took_s = round(mono_s() - began_s, 3)
    if session.as_json:
        click.echo(json.dumps({"stopped": True, "pid": pid, "seconds": took_s, "killed": killed}))
    else:
        click.echo(say("down.killed" if killed else "down.stopped", seconds=took_s))


def supervisor_pid(state: Path) -> int | None:
    """The supervisor that holds `state` now; None when none does."""
    from neaptide.fleet.state import StateDir

    directory = StateDir(state)
    if not directory.locked():
        return None
    text = (directory.run / "lock").read_text(encoding="ascii").strip()
    return int(text) if text.isdigit() else None


def stop(pid: int, grace_s: float | None) -> bool:
    """SIGTERM and wait; the supervisor keeps its own grace. True when `grace_s` passed and it had to be killed."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        os.kill(pid, signal.SIGTERM)
        if _ended(fd, grace_s):
            return False
        os.kill(pid, signal.SIGKILL)  # its children end by themselves: their lifeline is cut
        _ended(fd, 5.0)
        return True
    finally:
        os.close(fd)


def _ended(pidfd: int, within_s: float | None) -> bool:
    """Whether the process ended; a pidfd becomes readable when it does."""
    return bool(select.select([pidfd], [], [], within_s)[0])
