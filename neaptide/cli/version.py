"""`neaptide version`: what is installed, the engine's libraries included."""

from __future__ import annotations

import platform
from importlib import metadata

import click

from neaptide import __version__
from neaptide.cli.session import Session, common
from neaptide.cli.words import say

PACKAGES = ("openvino", "openvino-genai", "msgspec", "uvloop", "starlette", "SQLAlchemy")


@click.command("version", help=say("verb.version"))
@common
def version(session: Session) -> None:
    found = {
        "neaptide": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        **{name: _installed(name) for name in PACKAGES},
    }
    if session.as_json:
        session.data(found)
        return
    for name, value in found.items():
        click.echo(f"{name:<15} {value or say('version.absent')}")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
