"""What is written down while the day is played: requests, the fleet, decisions, the kill, the ledger's rows."""

from __future__ import annotations

from typing import Any

import msgspec

from neaptide.demo.story import Story


class Visit(msgspec.Struct, kw_only=True):
    """Times are seconds from the day's begin; None: it never came."""

    at_s: float
    first_s: float | None = None
    end_s: float = 0.0
    tokens: int = 0
    request_id: str = ""
    error: str = ""  # "": answered to its end

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None of fewer than two."""
        if self.first_s is None or self.tokens < 2:
            return None
        return (self.end_s - self.first_s) / (self.tokens - 1)


class Sample(msgspec.Struct, kw_only=True):
    """The fleet at a moment, seconds from the day's begin."""

    at_s: float
    ready: int
    starting: int
    leaving: int  # they drain, and still cost
    wanted: int
    in_flight: int
    capacity_rps: float  # of one replica, as control has learnt it

    @property
    def paid(self) -> int:
        return self.ready + self.starting + self.leaving


class Decided(msgspec.Struct, kw_only=True):
    """A launch or a drain."""

    at_s: float
    before: int
    after: int
    said: dict[str, str]  # by language
    numbers: dict[str, float]
    change_per_hour: float


class Killed(msgspec.Struct, kw_only=True):
    at_s: float
    replica: str
    pid: int
    running: int  # requests on it, as control knew
    back_s: float | None = None  # when a successor was ready


class Seen(msgspec.Struct, kw_only=True):
    """All that the watcher saw."""

    samples: list[Sample] = []
    decided: list[Decided] = []
    killed: Killed | None = None
    blind: int = 0  # looks that got no answer
    ended_s: float = 0.0


class Row(msgspec.Struct, kw_only=True):
    """What of the ledger's row is used here."""

    request_id: str
    outcome: str
    queued_s: float
    replicas: tuple[str, ...]  # that it was sent to, in order


class Played(msgspec.Struct, kw_only=True):
    """A day that was played; what the bill is made from."""

    story: Story
    ready_s: float  # that the service took to start
    visits: list[Visit]
    seen: Seen
    rows: list[Row]
    shadows: list[dict[str, Any]]  # as the admin API tells them
    played_s: float
