"""How long until many replicas answer, and until one that is not there does.

.venv/bin/python -m bench.scale_out [--replicas 100] [--from-zero 10] [--json]

scale out   an echo model at zero is set to --replicas. Meanwhile requests go through the gateway one by one;
            the time is when the last replica had answered its first one, as the access log tells which replica it
            was. Beside it CPU seconds of each kind of process, from the order to that moment.
from zero   the guide is at zero; a streamed request; seconds to its first token. The first start calibrates, and
            is told apart; then --from-zero times, after a return to zero each.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from bench import kit
from bench.serve import first_token_s
from neaptide.cli import client
from neaptide.control.port import NewOverride, ScaleRow, Status

MOST = 1000  # the config's maximum: what is asked for is set by hand
BETWEEN_S = 0.005  # two requests once all are ready
STARTING_S = 0.05  # while replicas start: answering and metering takes processor time from the starts
LOOK_S = 0.2  # into the access log
COUNT_S = 1.0  # of the ready ones, meanwhile
LIMIT_S = 300.0
MARKS = (0.01, 0.1, 0.5, 0.9, 1.0)  # shares of the replicas
GOAL_SCALE_OUT_S, GOAL_FROM_ZERO_S = 45.0, 2.0  # the first on two cores
ROLES = ("supervisor", "control", "gateway")


class Line(msgspec.Struct):
    """What is read of an access log's line."""

    class Row(msgspec.Struct):
        class Attempt(msgspec.Struct):
            replica: str

        request_id: str
        attempts: list[Attempt] = []

    usage: Row | None = None


class Answers:
    """Sends requests one by one, over one connection; `first_s`: when each replica's first answer had come."""

    def __init__(self, server: kit.Up, model: str) -> None:
        self._link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT_S)
        self._headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
        self._body = json.dumps(kit.chat(model, "tide", max_tokens=1))
        self._log = server.state / "log"
        self._read: dict[Path, int] = {}
        self._ended_s: dict[str, float] = {}
        self._looked_s = 0.0
        self.first_s: dict[str, float] = {}
        self.sent = 0

    def ask(self) -> None:
        self._link.request("POST", "/v1/chat/completions", self._body, self._headers)
        answer = self._link.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise kit.BenchError(f"{answer.status}: {told[:300]!r}")
        self._ended_s[answer.headers["x-neaptide-request-id"]] = time.monotonic()
        self.sent += 1

    def look(self) -> None:
        """Which replicas they were, as far as the log is written; now and then."""
        if time.monotonic() < self._looked_s + LOOK_S:
            return
        for row in self._rows():
            ended_s = self._ended_s.get(row.request_id)
            if ended_s is not None and row.attempts:
                replica = row.attempts[-1].replica
                self.first_s[replica] = min(ended_s, self.first_s.get(replica, ended_s))
        self._looked_s = time.monotonic()

    def _rows(self) -> Iterator[Line.Row]:
        for path in self._log.glob("access*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                while (line := file.readline()).endswith(b"\n"):
                    self._read[path] = file.tell()
                    if (row := msgspec.json.decode(line, type=Line).usage) is not None:
                        yield row

    def close(self) -> None:
        self._link.close()


def set_count(admin: client.Admin, model: str, count: int) -> None:
    body = msgspec.json.encode(NewOverride(model=model, replicas=count, for_s=3600.0))
    admin.call("POST", "scale/override", ScaleRow, body=body)


def ready_now(admin: client.Admin) -> int:
    return sum(replica.state == "ready" for replica in admin.call("GET", "status", Status).replicas)


def to_zero(admin: client.Admin, model: str) -> None:
    set_count(admin, model, 0)
    kit.wait_for(lambda: not admin.call("GET", "status", Status).replicas, 60.0, f"{model} at zero")


def replica_cpu_s(server: kit.Up) -> dict[str, float]:
    """CPU seconds of all replicas' processes so far: their I/O and their engines."""
    found = {"replica": 0.0, "engine": 0.0}
    for pid in kit.tree(server.group("supervisor")):
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.NoSuchProcess:
            continue
        for kind, module in (("replica", "neaptide.engine.replica"), ("engine", "neaptide.engine.core")):
            found[kind] += kit.cpu_s([pid]) if module in words else 0.0
    return found


def scale_out(replicas: int) -> dict[str, Any]:
    scale = {"min": 0, "max": MOST}
    with kit.up(json.dumps({"models": {"echo": {"engine": "echo", "scale": scale}}})) as server:
        admin, answers = client.admin(server.state), Answers(server, "echo")
        to_zero(admin, "echo")
        before = {role: kit.cpu_s(server.group(role)) for role in ROLES} | {"this": time.process_time()}
        began_s = time.monotonic()
        set_count(admin, "echo", replicas)
        ready, counted_s = 0, began_s
        while len(answers.first_s) < replicas:
            answers.ask()
            answers.look()
            if ready < replicas and time.monotonic() > counted_s + COUNT_S:
                ready, counted_s = ready_now(admin), time.monotonic()
            if time.monotonic() > began_s + LIMIT_S:
                raise kit.BenchError(f"{len(answers.first_s)} of {replicas} replicas answered in {LIMIT_S:.0f} s")
            time.sleep(BETWEEN_S if ready >= replicas else STARTING_S)
        cpu_s = {role: kit.cpu_s(server.group(role)) - before[role] for role in ROLES}
        cpu_s |= replica_cpu_s(server) | {"this": time.process_time() - before["this"]}
        rss_mib = kit.rss_mib(kit.tree(server.group("supervisor")))
        answers.close()
    times = sorted(at_s - began_s for at_s in answers.first_s.values())
    marks = {f"{max(1, round(share * replicas))}": times[max(1, round(share * replicas)) - 1] for share in MARKS}
    return {
        "replicas": replicas, "all_answered_s": times[-1], "answered_s": marks, "requests": answers.sent,
        "cpu_s": {kind: round(seconds, 2) for kind, seconds in cpu_s.items()}, "rss_mib": rss_mib,
        "goal_s": GOAL_SCALE_OUT_S, "met": times[-1] <= GOAL_SCALE_OUT_S,
    }  # fmt: skip


def from_zero(repeat: int) -> dict[str, Any]:
    body = kit.chat("guide", "What is time to first token?", stream=True, max_tokens=16)
    found = []
    with kit.up(json.dumps({"models": {"guide": {"scale": {"min": 0, "max": 1}}}})) as server:
        admin = client.admin(server.state)
        for _ in range(repeat + 1):
            to_zero(admin, "guide")
            admin.call("DELETE", "scale/override", ScaleRow, query={"model": "guide"})
            found.append(first_token_s(server, body))
            print(f"from zero to the first token: {found[-1]:.2f} s", flush=True)
    first, *rest = found
    return {
        "first_s": first, "first_token_s": rest, "median_s": kit.median(rest), "worst_s": max(rest, default=first),
        "goal_s": GOAL_FROM_ZERO_S, "met": max(rest, default=first) <= GOAL_FROM_ZERO_S,
    }  # fmt: skip


def rows(found: dict[str, Any]) -> list[list[str]]:
    out, zero = found["scale_out"], found["from_zero"]
    shown = [[f"0 to {out['replicas']} echo replicas, each has answered", f"{out['all_answered_s']:.1f} s"]]
    shown += [[f"the first {count} of them", f"{at_s:.1f} s"] for count, at_s in out["answered_s"].items()]
    shown += [[f"CPU of {kind}", f"{seconds:.2f} s"] for kind, seconds in out["cpu_s"].items()]
    shown.append(["memory of all processes then", f"{out['rss_mib']:.0f} MiB"])
    shown.append(["guide, zero to first token: median", f"{zero['median_s']:.2f} s"])
    shown.append(["guide, zero to first token: worst", f"{zero['worst_s']:.2f} s"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--from-zero", type=int, default=10, help="times")
    parser.add_argument("--json", action="store_true", help="the numbers as the last line")
    args = parser.parse_args()
    found = {"scale_out": scale_out(args.replicas), "from_zero": from_zero(args.from_zero)}
    kit.table(["scale out", ""], rows(found))
    kit.save("scale_out", found)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
