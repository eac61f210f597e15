"""`neaptide down`: stop a service that runs in the background, within its grace."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

import click


@click.command()
@click.option(
    "--state", type=click.Path(path_type=Path), default=".neaptide", envvar="NEAPTIDE_STATE", show_default=True
)
@click.option("--grace-s", type=click.FloatRange(0, 3600), help="Kill after this long (default: what `up` was given).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def down(state: Path, grace_s: float | None, as_json: bool) -> None:
    """Let running answers finish, then stop everything; returns when the last process has ended."""
    from neaptide.clock import mono_s

    began_s = mono_s()
    pid = supervisor_pid(state)
    if pid is None:
        message = {"stopped": False, "reason": "not running"}
        click.echo(json.dumps(message) if as_json else f"nothing runs on {state}")
        return
    killed = stop(pid, grace_s)
    took_s = round(mono_s() - began_s, 3)
    result = {"stopped": True, "pid": pid, "seconds": took_s, "killed": killed}
    click.echo(json.dumps(result) if as_json else f"stopped in {took_s:.1f} s" + (" (killed)" if killed else ""))


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
