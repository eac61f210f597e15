"""Plays the story: starts a service in a directory of its own, sends the guests, watches, kills a replica, stops all.

One thread a request in flight and one that watches; the caller's thread keeps the script's time. Whatever happens, the
service has ended when `play` returns.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from neaptide.clock import mono_s
from neaptide.control.port import Shadows, UsagePage
from neaptide.demo.records import Played, Row, Visit
from neaptide.demo.story import MODEL, Story, body, configuration
from neaptide.demo.visit import Open, visit
from neaptide.demo.watch import Ask, Tell, Watch
from neaptide.errors import NeaptideError, ProcessError

START_S, STOP_S = 90.0, 40.0
AT_ONCE = 256  # requests in flight, at most: threads
ROWS_S = 15.0  # within which the ledger has every row
PAGE = 500  # rows


class Doors(NamedTuple):
    """How a running service is spoken to; the command line's own clients."""

    ask: Callable[[Path], Ask]  # the admin API of what runs in that state directory
    opens: Callable[[str, str], Open]  # (API's URL, key)


def play(story: Story, doors: Doors, tell: Tell) -> Played:
    """The whole day; NeaptideError when the service cannot be started. `tell(kind, values)` hears what happens."""
    with tempfile.TemporaryDirectory(prefix="neaptide-demo-") as root:
        tell("start", {})
        with _service(story, Path(root)) as up:
            tell("ready", {"seconds": up["ready_s"], "api": up["api"]})
            state = Path(root, "state")
            watch = Watch(doors.ask(state), story, tell)
            visits = _visits(story, doors.opens(up["api"], up["key"]), watch, tell)
            tell("count", {})
            ask = doors.ask(state)
            rows = _rows(ask, sum(bool(v.request_id) for v in visits))
            shadows = _shadows(ask)
            tell("stop", {})
        return Played(
            story=story, ready_s=up["ready_s"], visits=visits, seen=watch.seen, rows=rows, shadows=shadows,
            played_s=watch.seen.ended_s,
        )  # fmt: skip


# --- the service ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _service(story: Story, root: Path) -> Iterator[dict[str, Any]]:
    """`neaptide up --json` on free ports, out of reach of our terminal's Ctrl-C; what it says once it is ready."""
    config = root / "neaptide.yaml"
    config.write_text(configuration(story), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "neaptide.cli", "up", "--json", "--no-self-test", "-f", str(config)]
    command += ["--state", str(root / "state"), "--port", "0", "--grace-s", "10"]
    with open(root / "up.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    try:
        yield _ready(process, root / "up.log")
    finally:
        _stop(process)


def _ready(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    late = threading.Timer(START_S, process.kill)
    late.start()
    try:
        line = process.stdout.readline() if process.stdout else b""
    finally:
        late.cancel()
    if not line.strip():
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ProcessError("the demo's service did not start", why=said[-1] if said else "", fix="neaptide doctor",
                           code="E305")  # fmt: skip
    up: dict[str, Any] = json.loads(line)
    return up


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()


# --- the guests -------------------------------------------------------------------------------------------------------


def _visits(story: Story, opens: Open, watch: Watch, tell: Tell) -> list[Visit]:
    """Send everybody at their time, and stay until the last answer, and the day, have ended."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="guest")
    coming: list[Future[Visit]] = []
    began_s = mono_s()
    watch.start(began_s)
    try:
        scenes = list(story.scenes)
        for guest in story.guests:
            while scenes and scenes[0].at_s <= guest.at_s:
                _until(began_s + scenes[0].at_s)
                tell("scene", {"name": scenes[0].name, "at_s": scenes[0].at_s})
                scenes.pop(0)
            _until(began_s + guest.at_s)
            coming.append(pool.submit(visit, opens, body(guest), began_s))
            watch.visits = coming
        found = [f.result() for f in coming]
        _until(began_s + story.end_s)
        watch.wait_for_kill()
        return found
    finally:
        watch.stop()
        pool.shutdown(wait=False, cancel_futures=True)


def _until(when_s: float) -> None:
    if (rest_s := when_s - mono_s()) > 0:
        time.sleep(rest_s)


# --- the books --------------------------------------------------------------------------------------------------------


def _rows(ask: Ask, wanted: int) -> list[Row]:
    """Every row of the ledger, once it has `wanted` or ROWS_S have passed."""
    deadline_s = mono_s() + ROWS_S
    while True:
        rows = _all_rows(ask)
        if len(rows) >= wanted or mono_s() > deadline_s:
            return rows
        time.sleep(0.2)


def _all_rows(ask: Ask) -> list[Row]:
    rows: list[Row] = []
    cursor = None
    while True:
        page = ask("usage", UsagePage, {"limit": PAGE, "cursor": cursor})
        for row in page.rows:
            of = row.usage
            replicas = tuple(a.replica for a in of.attempts)
            rows.append(Row(request_id=of.request_id, outcome=of.outcome, queued_s=of.queued_s, replicas=replicas))
        cursor = page.next
        if cursor is None:
            return rows


def _shadows(ask: Ask) -> list[dict[str, Any]]:
    try:
        told = ask("scale/shadows", Shadows, {"model": MODEL, "days": 2})
    except NeaptideError:
        return []
    return [{"policy": r.policy, "real": r.real, "replica_hours": r.replica_hours, "cost": r.cost,
             "arrivals": r.arrivals, "attainment": r.attainment} for r in told.rows]  # fmt: skip
