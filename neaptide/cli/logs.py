"""`neaptide logs`: the access log, one line a request; rotated files are read through, --follow survives a rotation."""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from neaptide.cli.draw import moment, paint, span
from neaptide.cli.session import Session, common
from neaptide.cli.usage import when
from neaptide.cli.words import say
from neaptide.errors import ConfigError

POLL_S = 0.2
MAX_LINE = 1 << 20
PATHS = {"chat.completions": "/v1/chat/completions", "completions": "/v1/completions", "tokenize": "/tokenize"}


class Filter(NamedTuple):
    model: str | None
    statuses: range | None
    since_s: float | None

    def passes(self, row: dict[str, Any]) -> bool:
        return (
            (self.model is None or row.get("model") == self.model)
            and (self.statuses is None or int(row.get("status", 0)) in self.statuses)
            and (self.since_s is None or float(row.get("at", 0.0)) >= self.since_s)
        )


@click.command("logs", help=say("logs.help"))
@click.option("-f", "--follow", is_flag=True, help=say("logs.follow"))
@click.option("-n", "--lines", "last", type=click.IntRange(0, 100_000), default=50, show_default=True,
              help=say("logs.lines"))  # fmt: skip
@click.option("--model", help=say("opt.model"))
@click.option("--status", help=say("logs.status"))
@click.option("--since", metavar="WHEN", help=say("opt.since"))
@common
def logs(session: Session, follow: bool, last: int, model: str | None, status: str | None, since: str | None) -> None:
    wanted = Filter(model, None if status is None else statuses(status), when(since, "--since"))
    path = session.state / "log" / "access.jsonl"
    tails = [Tail(path), *map(Tail, sorted(path.parent.glob("access-*.jsonl")))]  # one a gateway
    if not path.exists() and not follow:
        raise ConfigError(
            f"{path} does not exist", why="nothing was served from here yet, or access_log is off", code="E111",
            fix="neaptide up, or pass --state DIR",
        )  # fmt: skip
    merged = heapq.merge(*(rows(tail.history()) for tail in tails), key=lambda row: float(row.get("at", 0.0)))
    found: Iterable[dict[str, Any]] = filter(wanted.passes, merged)
    if since is None:
        found = deque(found, maxlen=last)
    for row in found:
        _print(session, row)
    while follow:
        for row in filter(wanted.passes, rows(line for tail in tails for line in tail.fresh())):
            _print(session, row)
        time.sleep(POLL_S)


class Tail:
    """Whole lines of `path` and its rotated elders (.1 is the youngest), each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def history(self) -> Iterator[bytes]:
        """Everything there is, oldest first."""
        elders = sorted(self._path.parent.glob(f"{self._path.name}.*"), key=_age, reverse=True)
        for elder in elders:
            yield from (line for line, _ in _lines(elder, 0))
        yield from self.fresh()

    def fresh(self) -> Iterator[bytes]:
        """What was written since the last call; the rest of a file that was rotated meanwhile comes first."""
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            return
        if self._inode and inode != self._inode:
            rotated = self._path.with_name(f"{self._path.name}.1")
            if rotated.exists() and os.stat(rotated).st_ino == self._inode:
                yield from (line for line, _ in _lines(rotated, self._offset))
            self._offset = 0
        self._inode = inode
        for line, end in _lines(self._path, self._offset):
            self._offset = end
            yield line


def _age(path: Path) -> int:
    return int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0


def _lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """(a whole line from `offset` on, where it ends); a line still being written is left for next time."""
    with path.open("rb") as f:
        f.seek(offset)
        while (line := f.readline(MAX_LINE)).endswith(b"\n"):
            offset += len(line)
            yield line[:-1], offset


def rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The requests in `lines`, all of one form; a line torn by a crash is skipped."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield _flat(row)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A generation's line holds its whole usage, with defaults left out; the others have these fields themselves."""
    usage = row.get("usage")
    if not isinstance(usage, dict):
        return row
    attempts = usage.get("attempts") or [{}]
    return {
        "at": usage.get("started_wall_s", 0.0),
        "id": usage.get("request_id", ""),
        "peer": row.get("peer", ""),
        **({"client": row["client"]} if "client" in row else {}),
        "method": "POST",
        "path": PATHS.get(str(usage.get("route")), str(usage.get("route"))),
        "status": usage.get("status", 0),
        "model": usage.get("model", ""),
        "key": usage.get("key", ""),
        "outcome": usage.get("outcome", "ok"),
        "replica": attempts[-1].get("replica", ""),
        **{name: usage.get(name, 0) for name in ("queued_s", "ttft_s", "tpot_s", "duration_s")},
        **{name: usage.get(name, 0) for name in ("prompt_tokens", "cached_tokens", "output_tokens")},
        "error": usage.get("error", ""),
    }


def statuses(text: str) -> range:
    """The statuses that "429", "4xx" or "400-499" mean."""
    if one := re.fullmatch(r"\d{3}", text):
        return range(int(one[0]), int(one[0]) + 1)
    if hundred := re.fullmatch(r"(\d)xx", text):
        return range(int(hundred[1]) * 100, int(hundred[1]) * 100 + 100)
    if both := re.fullmatch(r"(\d{3})-(\d{3})", text):
        return range(int(both[1]), int(both[2]) + 1)
    raise ConfigError(f"--status {text!r}", code="E110", fix="write 429, 4xx or 500-599")


def _print(session: Session, row: dict[str, Any]) -> None:
    if session.as_json:
        click.echo(json.dumps(row, ensure_ascii=False))
        return
    status = int(row.get("status", 0))
    colour = "green" if status < 400 else "yellow" if status < 500 else "red"
    parts = [moment(float(row.get("at", 0.0))), paint(str(status), colour), str(row.get("method", ""))]
    parts += [str(row.get("path", "")), str(row.get("model", "")) or "-", str(row.get("outcome", "")) or "-"]
    parts += [
        f"{name} {span(float(row[f'{name}_s']))}" for name in ("queued", "ttft", "duration") if f"{name}_s" in row
    ]
    parts += [say("logs.tokens", n=row["output_tokens"])] if row.get("output_tokens") else []
    click.echo("  ".join([*parts, str(row.get("id", ""))]))
