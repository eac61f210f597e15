"""The command line: click, one file a verb, imported lazily.

Nothing heavy is imported here: `neaptide --help` reads this file, click and the words, no more. `main` is the one
place where an error becomes text and an exit code: 0 ok, 1 failed, 2 usage or configuration, 3 no server answers,
4 refused.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from neaptide import __version__
from neaptide.cli import words
from neaptide.cli.words import say
from neaptide.errors import NeaptideError

# verb -> module and attribute; the order of `neaptide --help`.
VERBS = {
    "up": "neaptide.cli.up:up",
    "down": "neaptide.cli.down:down",
    "apply": "neaptide.cli.apply:apply",
    "status": "neaptide.cli.status:status",
    "dashboard": "neaptide.cli.dashboard:dashboard",
    "chat": "neaptide.cli.chat:chat",
    "models": "neaptide.cli.models:models",
    "scale": "neaptide.cli.scale:scale",
    "keys": "neaptide.cli.keys:keys",
    "budgets": "neaptide.cli.budgets:budgets",
    "admins": "neaptide.cli.admins:admins",
    "audit": "neaptide.cli.audit:audit",
    "ca": "neaptide.cli.ca:ca",
    "usage": "neaptide.cli.usage:usage",
    "logs": "neaptide.cli.logs:logs",
    "simulate": "neaptide.cli.simulate:simulate",
    "fit": "neaptide.cli.fit:fit",
    "demo": "neaptide.cli.demo:demo",
    "doctor": "neaptide.cli.doctor:doctor",
    "backup": "neaptide.cli.backup:backup",
    "version": "neaptide.cli.version:version",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


class LazyGroup(click.Group):
    """Imports a verb's module when that verb is called; its line in --help comes from the words."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = VERBS.get(cmd_name)
        if place is None:
            return None
        module, _, attribute = place.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(say("help.commands")):
            formatter.write_dl([(name, say(f"verb.{name}")) for name in VERBS])


def build() -> click.Group:
    """The command tree, in the language in force."""

    @click.group(cls=LazyGroup, help=say("help.root"), epilog=say("help.exit_codes"))
    @click.option("--lang", type=click.Choice(words.LANGUAGES), help=say("opt.lang"))
    @click.option("--debug", is_flag=True, help=say("opt.debug"))
    @click.version_option(__version__, prog_name="neaptide", message="%(prog)s %(version)s", help=say("opt.version"))
    def cli(lang: str | None, debug: bool) -> None:  # both are read by main, ahead of click
        pass

    return cli


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `neaptide argv...` and exit."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    words.use(words.wanted(_option(args, "--lang")))
    try:
        code = build().main(args, prog_name="neaptide", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Abort:
        click.echo(say("error.interrupted"), err=True)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left: no error of ours; nothing more may be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except Exception as e:
        code = _report(e, as_json="--json" in args, debug="--debug" in args)
    sys.exit(code if isinstance(code, int) else 0)


def _option(args: list[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` in raw arguments; the language must be known before click is."""
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(name + "="):
            return arg[len(name) + 1 :]
    return None


def _report(error: Exception, as_json: bool, debug: bool) -> int:
    """One error on stderr, as text or JSON; the exit code."""
    if debug:
        traceback.print_exception(error)
    known = _known(error)
    if as_json:
        click.echo(json.dumps({"error": known.as_dict()}, ensure_ascii=False), err=True)
    else:
        click.echo(str(known), err=True)
    return known.exit_code


def _known(error: Exception) -> NeaptideError:
    if isinstance(error, NeaptideError):
        return error
    if isinstance(error, click.ClickException):
        ctx = getattr(error, "ctx", None)
        known = NeaptideError(
            error.format_message(), code="E110", fix=f"{ctx.command_path if ctx else 'neaptide'} --help"
        )
        known.exit_code = 2
        return known
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return NeaptideError(what, code="E999", why=say("error.unexpected.why"), fix=say("error.unexpected.fix"))
