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

if TYPE_CHECKING:
    from neaptide.assemble import Up
    from neaptide.fleet.supervisor import Report


@click.command()
@click.option("-f", "--file", "file", type=click.Path(path_type=Path), help="Configuration (default: neaptide.yaml).")
@click.option("-d", "--detach", is_flag=True, help="Return when ready; the service goes on in the background.")
@click.option(
    "--state", type=click.Path(path_type=Path), default=".neaptide", envvar="NEAPTIDE_STATE", show_default=True
)
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the API (0: a free one).")
@click.option(
    "--grace-s", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help="For streams at the end."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout once ready.")
@click.option("--no-self-test", is_flag=True, help="Do not ask the first model a question.")
@click.option("--report-fd", type=int, hidden=True, help="Where a detached service reports.")
def up(
    file: Path | None,
    detach: bool,
    state: Path,
    port: int | None,
    grace_s: float,
    as_json: bool,
    no_self_test: bool,
    report_fd: int | None,
) -> None:
    """Serve the models of neaptide.yaml until Ctrl-C (or, with -d, until `neaptide down`)."""
    if detach:
        detached(file, state, port, grace_s, as_json)
        return
    from neaptide.assemble import UpOptions
    from neaptide.assemble import up as run

    options = UpOptions(config=file, state=state, port=port, grace_s=grace_s)
    voice: Voice = Wire(report_fd) if report_fd is not None else Terminal(state, as_json, not no_self_test)
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
        self._pipe = os.fdopen(fd, "w", encoding="utf-8")
        os.set_inheritable(fd, False)

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

    def __init__(self, state: Path, as_json: bool, self_test: bool) -> None:
        self._state, self._as_json, self._self_test = state, as_json, self_test

    def _print(self, text: str) -> None:
        click.echo(text, err=self._as_json)

    def hello(self) -> None:
        from neaptide import __version__
        from neaptide.cli.host import summary

        self._print(f"neaptide {__version__} · {summary()}")

    def say(self, report: Report) -> None:
        took = f"{report.seconds:>8.1f} s" if report.seconds else ""
        self._print(f"{'!' if report.stage == 'died' else '✓'} {report.stage:<10} {report.text:<44}{took}".rstrip())

    def ready(self, up: Up) -> None:
        if self._as_json:
            import msgspec

            click.echo(json.dumps(msgspec.to_builtins(up)))
            return
        threading.Thread(target=self._welcome, args=(up,), daemon=True).start()  # the loop must go on serving

    def _welcome(self, up: Up) -> None:
        if self._self_test:
            from neaptide.cli.selftest import self_test

            self._print(self_test(up.api, up.key))
        self._print(welcome(up, self._state))

    def ended(self) -> None:
        self._print("stopped")


def welcome(up: Up, state: Path) -> str:
    """The lines a newcomer copies from."""
    return "\n".join(
        [
            f"✓ ready      {up.ready_s:.1f} s",
            f"API        {up.api}",
            f"Admin      {up.admin}docs     (token: {state}/admin-token)",
            f"Key        …{up.key[-4:]}  (kept 0600 in {state}/key; `neaptide keys create` for more)",
            f"export OPENAI_BASE_URL={up.api} OPENAI_API_KEY={up.key}",
            'Try  neaptide chat "什么是首字延迟?"',
            "Stop with Ctrl-C (once: running answers finish; twice: at once)",
        ]
    )


def detached(file: Path | None, state: Path, port: int | None, grace_s: float, as_json: bool) -> None:
    """Start ourselves in a process session of its own and wait for its report."""
    from neaptide.errors import NeaptideError, ProcessError

    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-P", "-m", "neaptide.cli", "up", "--state", str(state), "--grace-s", str(grace_s)]
    command += ["--report-fd", str(write_fd)]
    command += ["-f", str(file)] if file is not None else []
    command += ["--port", str(port)] if port is not None else []
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write_fd,),
        start_new_session=True,
    )
    os.close(write_fd)
    with os.fdopen(read_fd, encoding="utf-8") as reports:
        for line in reports:
            said: dict[str, Any] = json.loads(line)
            if "ready" in said:
                click.echo(json.dumps(said["ready"]) if as_json else _detached_text(said["ready"], state))
                return
            if "error" in said:
                e = said["error"]
                error = NeaptideError(e["what"], why=e.get("why", ""), fix=e.get("fix", ""), code=e.get("code"))
                error.exit_code = said.get("exit", 1)
                raise error
            Terminal(state, as_json, False)._print(f"✓ {said['stage']:<10} {said['text']}") if as_json else None
    raise ProcessError("the service ended before it was ready", fix=f"read {state}/log", code="E305")


def _detached_text(ready: dict[str, Any], state: Path) -> str:
    from neaptide.assemble import Up

    lines = welcome(Up(**ready), state).splitlines()
    return "\n".join([*lines[:-1], f"Stop with  neaptide down --state {state}"])
