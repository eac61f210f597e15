"""What every verb shares: --state, --json, --lang, --debug, and how answers and progress are written."""

from __future__ import annotations

import functools
import getpass
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from neaptide.cli.words import LANGUAGES, say


class Session(NamedTuple):
    """One call of the command line."""

    state: Path  # the state directory, as given
    as_json: bool

    def data(self, value: Any) -> None:
        """The answer, as indented JSON on stdout."""
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))

    def encoded(self, value: Any) -> None:
        """The answer, a msgspec struct, as indented JSON on stdout."""
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())

    def line(self, value: Any) -> None:
        """One struct of many, as one line of JSON, written at once."""
        import msgspec

        click.echo(msgspec.json.encode(value).decode())
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Progress, on stderr: stdout holds data only."""
        click.echo(text, err=True)


def common(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the shared options to a command; its function gets a Session first."""

    @click.option(
        "--state",
        type=click.Path(file_okay=False, path_type=Path),
        default=".neaptide",
        envvar="NEAPTIDE_STATE",
        show_default=True,
        show_envvar=True,
        help=say("opt.state"),
    )
    @click.option("--json", "as_json", is_flag=True, help=say("opt.json"))
    @click.option("--lang", type=click.Choice(LANGUAGES), expose_value=False, help=say("opt.lang"))
    @click.option("--debug", is_flag=True, expose_value=False, help=say("opt.debug"))
    @functools.wraps(verb)
    def run(*args: Any, state: Path, as_json: bool, **rest: Any) -> Any:
        return verb(Session(state, as_json), *args, **rest)

    return run


def user() -> str:
    """Who calls, for what is set by hand; "" where nobody can tell."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def colours() -> bool:
    """Whether stdout is a terminal that may be painted (NO_COLOR: https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
