"""The watcher: looks at the admin API twice a second, tells each decision once, kills a replica when its time comes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from neaptide.clock import mono_s, wall_s
from neaptide.control.port import Choices, ReplicaStatus, Scales, Status
from neaptide.control.reasons import LANGUAGES, sentence
from neaptide.demo.records import Decided, Killed, Sample, Seen, Visit
from neaptide.demo.story import MODEL, Story
from neaptide.errors import NeaptideError

EVERY_S = 0.5
TRAFFIC_S = 15.0  # between two lines about traffic
BACK_S = 30.0  # that a killed replica's successor is waited for
ALONE = 0.1  # of a day: so long the kill waits for a second replica
T = TypeVar("T")
Tell = Callable[[str, dict[str, Any]], None]


class Ask(Protocol):
    """One GET of the admin API; NeaptideError."""

    def __call__(self, path: str, kind: type[T], query: dict[str, Any]) -> T: ...


class Watch:
    """A thread; `seen` is its alone until `stop` has returned."""

    def __init__(self, ask: Ask, story: Story, tell: Tell) -> None:
        self.seen = Seen()
        self.visits: Sequence[Future[Visit]] = ()
        self._ask, self._story, self._tell = ask, story, tell
        self._ends, self._settled = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._began_s = self._began_wall_s = self._told_s = 0.0
        self._pids: set[int] = set()

    def start(self, began_s: float) -> None:
        self._began_s, self._began_wall_s = began_s, wall_s()
        self._thread.start()

    def wait_for_kill(self) -> None:
        """Until the killed replica's successor is ready; not for ever, and not where nobody was killed."""
        if self.seen.killed is not None:
            self._settled.wait(BACK_S)

    def stop(self) -> None:
        if self._thread.ident is None or self._ends.is_set():
            return
        self._ends.set()
        self._thread.join()
        self.seen.ended_s = self._now_s()

    def _now_s(self) -> float:
        return mono_s() - self._began_s

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._look()
            except NeaptideError:
                self.seen.blind += 1
            self._ends.wait(EVERY_S)

    def _look(self) -> None:
        status = self._ask("status", Status, {})
        (row,) = self._ask("scale", Scales, {}).rows
        count = {s: sum(r.state == s for r in status.replicas) for s in ("ready", "starting", "draining")}
        sample = Sample(
            at_s=self._now_s(), ready=count["ready"], starting=count["starting"], leaving=count["draining"],
            wanted=row.wanted, in_flight=row.in_flight or 0, capacity_rps=row.capacity_rps,
        )  # fmt: skip
        self.seen.samples.append(sample)
        self._kill(status.replicas, sample.at_s)
        self._decisions()
        self._traffic(sample)

    # --- decisions ----------------------------------------------------------------------------------------------

    def _decisions(self) -> None:
        known = {(d.at_s, d.before, d.after) for d in self.seen.decided}
        told = self._ask("scale/why", Choices, {"model": MODEL, "limit": 40}).rows
        for row in reversed(told):
            c, at_s = row.choice, row.wall_s - self._began_wall_s
            if c.action == "hold" or c.before == c.after or (at_s, c.before, c.after) in known:
                continue
            said = {language: sentence(c, language) for language in LANGUAGES}
            made = Decided(at_s=at_s, before=c.before, after=c.after, said=said, numbers=c.numbers,
                           change_per_hour=c.cost_change_per_hour)  # fmt: skip
            self.seen.decided.append(made)
            self._tell("decided", {"decided": made})

    def _traffic(self, sample: Sample) -> None:
        if sample.at_s - self._told_s < TRAFFIC_S:
            return
        since_s, self._told_s = self._told_s, sample.at_s
        ended = [v.result() for v in self.visits if v.done() and not v.cancelled()]
        late = sorted(v.ttft_s for v in ended if v.ttft_s is not None and v.end_s >= since_s)
        came = sum(since_s <= g.at_s < sample.at_s for g in self._story.guests)
        rate = came / (sample.at_s - since_s)
        if late:
            self._tell("traffic", {"at_s": sample.at_s, "rate": rate, "replicas": sample.ready,
                                   "ttft_s": late[len(late) // 2]})  # fmt: skip

    # --- the kill -----------------------------------------------------------------------------------------------

    def _kill(self, replicas: Sequence[ReplicaStatus], now_s: float) -> None:
        """The busiest replica, once its time has come and another one is there; on a slow machine the only one."""
        killed, ready = self.seen.killed, [r for r in replicas if r.state == "ready" and r.pid]
        due_s = self._story.kill_s + (0.0 if len(ready) > 1 else ALONE * self._story.day_s)
        if killed is None and ready and now_s >= due_s:
            victim = max(ready, key=lambda r: r.running)
            if victim.running and victim.pid:
                self._pids = {r.pid for r in replicas if r.pid}
                os.kill(victim.pid, signal.SIGKILL)
                self.seen.killed = Killed(at_s=now_s, replica=victim.id, pid=victim.pid, running=victim.running)
                self._tell("kill", {"killed": self.seen.killed})
        elif killed is not None and killed.back_s is None and any(r.pid not in self._pids for r in ready):
            killed.back_s = now_s
            self._settled.set()
            self._tell("back", {"killed": killed})
