"""One replica of a request-level run: what state it is in, what it has to do, and what it costs."""

from __future__ import annotations

import math
from typing import Literal

from neaptide import types
from neaptide.gateway.route import Target
from neaptide.simulate.cold import Stage
from neaptide.simulate.engine import Engine
from neaptide.table import ReplicaRow

State = types.ReplicaState | Literal["gone"]


class Replica:
    """`target` is what the gateway knows of it: its load is brought up to date whenever its engine has run. Seconds of
    the run; those that are not known yet are inf."""

    __slots__ = (
        "ended_s", "engine", "error", "launched_s", "number", "ready_s", "reclaimed", "stages", "state", "stood",
        "target",
    )  # fmt: skip

    def __init__(self, number: int, engine: Engine, max_running: int | None, launched_s: float) -> None:
        row = ReplicaRow(id=str(number), model="", endpoint="http://replica", max_running=max_running)
        self.number, self.engine, self.target = number, engine, Target(row)
        self.state: State = "starting"
        self.stages: tuple[Stage, ...] = ()  # that it has to go through
        self.launched_s, self.ready_s, self.ended_s = launched_s, math.inf, math.inf
        self.stood: list[list[float]] = []  # from when to when it stood by; the last one may go on
        self.reclaimed = False  # its machine goes, or is gone
        self.error = ""

    @property
    def parked_s(self) -> float:
        return self.stood[-1][0] if self.state == "standby" else 0.0

    def run(self, until_s: float) -> None:
        self.engine.run((), (), until_s)
        self.target.in_flight = self.engine.in_flight

    def told(self, id: str, deployment: str, revision: str) -> types.Replica:
        """As a driver tells of it; not of one that is gone."""
        if self.state == "gone":
            raise ValueError(f"{id} is gone")
        waiting = self.engine.waiting
        return types.Replica(
            id=id,
            deployment=deployment,
            revision=revision,
            state=self.state,
            endpoint=self.target.row.endpoint,
            epoch=self.number + 1,
            started_s=self.launched_s,
            parked_s=self.parked_s,
            running=self.engine.in_flight - waiting,
            waiting=waiting,
            error=self.error,
        )

    def paid_s(self, from_s: float, to_s: float, billing_s: float, rent: float) -> float:
        """Of this time: whole billing units from the launch on, less what standing by is cheaper."""
        whole_s = max(0.0, min(self._paid_until_s(billing_s), to_s) - max(self.launched_s, from_s))
        return whole_s - (1 - rent) * self.stood_s(from_s, to_s)

    def stood_s(self, from_s: float, to_s: float) -> float:
        return sum(max(0.0, min(end_s, to_s) - max(begin_s, from_s)) for begin_s, end_s in self.stood)

    def _paid_until_s(self, billing_s: float) -> float:
        """inf while it is there."""
        if not billing_s or self.ended_s == math.inf:
            return self.ended_s
        units = math.ceil((self.ended_s - self.launched_s) / billing_s - 1e-9)
        return self.launched_s + units * billing_s
