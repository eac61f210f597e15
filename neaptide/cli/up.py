"""`neaptide up`: start the service, here or as a daemon; say what was measured; stop cleanly."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neaptide.cli.session import Session, common
from neaptide.cli.words import say

if TYPE_CHECKING:
    from neaptide.assemble import Up
    from neaptide.fleet.supervisor import Report


@click.command(help=say("verb.up"))
@click.option("-f", "--file", "file", type=click.Path(dir_okay=False, path_type=Path), help=say("up.file"))
@click.option("-d", "--detach", is_flag=True, help=say("up.detach"))
@click.option("--port", type=click.IntRange(0, 65535), help=say("up.port"))
@click.option("--grace-s", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help=say("up.grace"))
@click.option("--no-self-test", is_flag=True, help=say("up.no_self_test"))
@click.option("--report-fd", type=int, hidden=True)  # where a detached service reports
@common
def up(
    session: Session,
    file: Path | None,
    detach: bool,
    port: int | None,
    grace_s: float,
    no_self_test: bool,
    report_fd: int | None,
) -> None:
    """Serve until Ctrl-C; with -d, until `neaptide down`."""
    if detach:
        detached(session, file, port, grace_s)
        return
    from neaptide.assemble import UpOptions
    from neaptide.assemble import up as run

    options = UpOptions(config=file, state=session.state, port=port, grace_s=grace_s)
    voice: Voice = Wire(report_fd) if report_fd is not None else Terminal(session, not no_self_test)
    voice.hello()
    try:
        run(options, voice.say, voice.ready)
    except BaseException as e:
        voice.failed(e)
        raise
    voice.ended()


class Voice:
    """How a starting service speaks; the base says nothing."""

    def hello(self) -> None: ...
    def say(self, report: Report) -> None: ...
    def ready(self, up: Up) -> None: ...
    def failed(self, error: BaseException) -> None: ...
    def ended(self) -> None: ...


class Wire(Voice):
    """To the process that detached us: JSON lines on an inherited pipe."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._pipe = os.fdopen(fd, "w", encoding="utf-8")

    def _line(self, tree: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more: we go on
            self._pipe.write(json.dumps(tree) + "\n")
            self._pipe.flush()

    def say(self, report: Report) -> None:
        self._line({"stage": report.stage, "text": report.text, "seconds": report.seconds})

    def ready(self, up: Up) -> None:
        import msgspec

        self._line({"ready": msgspec.to_builtins(up)})
        with contextlib.suppress(OSError):
            self._pipe.close()

    def failed(self, error: BaseException) -> None:
        from neaptide.errors import NeaptideError

        fields = error.as_dict() if isinstance(error, NeaptideError) else {"code": "E999", "what": repr(error)}
        self._line({"error": fields, "exit": getattr(error, "exit_code", 1)})


class Terminal(Voice):
    """To a person: progress on stderr with --json, else on stdout."""

    def __init__(self, session: Session, self_test: bool) -> None:
        self._session, self._self_test = session, self_test

    def _print(self, text: str) -> None:
        click.echo(text, err=self._session.as_json)

    def hello(self) -> None:
        from neaptide import __version__
        from neaptide.cli.host import summary

        self._print(f"neaptide {__version__} · {summary()}")

    def say(self, report: Report) -> None:
        self._print(progress(report.stage, report.text, report.seconds))

    def ready(self, up: Up) -> None:
        if self._session.as_json:
            import msgspec

            click.echo(json.dumps(msgspec.to_builtins(up)))
            return
        threading.Thread(target=self._welcome, args=(up,), daemon=True).start()  # the loop must go on serving

    def _welcome(self, up: Up) -> None:
        if self._self_test:
            from neaptide.cli.client import api_leaf
            from neaptide.cli.selftest import self_test

            self._print(self_test(up.api, up.key, api_leaf(self._session.state)))
        self._print("\n".join([*welcome(up, self._session.state), say("up.stop")]))

    def ended(self) -> None:
        self._print(say("up.stopped"))


def progress(stage: str, text: str, seconds: float) -> str:
    """`✓ replica    guide-0            0.6 s`."""
    label = say(f"up.stage.{stage}") if stage in ("config", "model", "replica", "died") else stage
    took = f"{seconds:8.1f} s" if seconds else ""
    return f"{'!' if stage == 'died' else '✓'} {label:<10} {text:<44}{took}".rstrip()


def welcome(up: Up, state: Path) -> list[str]:
    """The lines a newcomer copies from; the export line is ready to paste."""
    return [
        say("up.ready", seconds=up.ready_s),
        f"API        {up.api}",
        admin_line(up, state),
        say("up.key", tail=up.key[-4:], state=state),
        f"export OPENAI_BASE_URL={up.api} OPENAI_API_KEY={up.key}",
        say("up.try"),
    ]


def admin_line(up: Up, state: Path) -> str:
    """With a link that signs in, while control makes one."""
    from neaptide.cli import client
    from neaptide.cli.dashboard import link
    from neaptide.errors import NeaptideError

    try:
        made = link(client.own(state, timeout_s=10.0))
    except NeaptideError:
        return say("up.admin", admin=up.admin, state=state)
    return say("up.dashboard", url=made.url, minutes=made.valid_s / 60)


def detached(session: Session, file: Path | None, port: int | None, grace_s: float) -> None:
    """Start ourselves in a process session of its own, nothing inherited but the report's pipe; wait for its word."""
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-P", "-m", "neaptide.cli", "up", "--state", str(session.state)]
    command += ["--grace-s", str(grace_s), "--report-fd", str(write_fd)]
    command += ["-f", str(file)] if file is not None else []
    command += ["--port", str(port)] if port is not None else []
    null = subprocess.DEVNULL
    service = subprocess.Popen(
        command, stdin=null, stdout=null, stderr=null, pass_fds=(write_fd,), start_new_session=True
    )
    os.close(write_fd)
    from neaptide.errors import NeaptideError, ProcessError

    with os.fdopen(read_fd, encoding="utf-8") as reports:
        for line in reports:
            try:
                if _heard(json.loads(line), session):
                    return
            except NeaptideError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    service.wait(grace_s)  # it says why before it has gone; whoever tries again must find nothing
                raise

    raise ProcessError("the service ended before it was ready", fix=f"read {session.state}/log", code="E305")


def _heard(said: dict[str, Any], session: Session) -> bool:
    """One report of the detached service; True once it is ready. Raises the error it ended with."""
    if "error" in said:
        from neaptide.errors import NeaptideError

        e = said["error"]
        error = NeaptideError(e["what"], why=e.get("why", ""), fix=e.get("fix", ""), code=e.get("code"))
        error.exit_code = said.get("exit", 1)
        raise error
    if "ready" not in said:
        session.note(progress(said["stage"], said["text"], said["seconds"]))
        return False
    if session.as_json:
        click.echo(json.dumps(said["ready"]))
        return True
    from neaptide.assemble import Up

    click.echo("\n".join([*welcome(Up(**said["ready"]), session.state), say("up.stop_detached", state=session.state)]))
    return True
