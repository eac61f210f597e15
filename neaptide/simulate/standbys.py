"""What a simulated policy lets go stands by, decided by the function that decides it live (control/standby.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from neaptide.control.standby import pool
from neaptide.simulate.replica import Replica
from neaptide.simulate.settings import Setup
from neaptide.types import Deployment, Revision, Scale, Traits

MODEL = "simulated"
REVISION = Revision(id=MODEL, model=MODEL, source="")


class Moves(NamedTuple):
    """What becomes of those that stand by and of those that are let go."""

    wakes: Sequence[Replica] = ()
    parks: Sequence[Replica] = ()
    drains: Sequence[Replica] = ()  # of those that stood by


NONE = Moves()


class WarmPool:
    def __init__(self, setup: Setup) -> None:
        scale = Scale(min=0, max=setup.max_replicas, standby=setup.standby)
        self._deployment = Deployment(model=MODEL, stable=REVISION, scale=scale)
        self._traits = Traits(cold_start_s=setup.cold_start_s)

    def moves(
        self, standing: Sequence[Replica], leaving: Sequence[Replica], missing: int, want: int, now_s: float
    ) -> Moves:
        """As `control.standby.pool`, of a run's replicas."""
        if not self._deployment.scale.standby.max:
            return NONE
        found = pool(
            self._deployment,
            self._traits,
            [r.told(str(r.number), MODEL, MODEL) for r in standing],
            [r.told(str(r.number), MODEL, MODEL) for r in leaving],
            missing,
            want,
            now_s,
        )
        by_id = {str(r.number): r for r in (*standing, *leaving)}
        return Moves(*([by_id[id] for id in ids] for ids in (found.wakes, found.parks, found.drains)))
