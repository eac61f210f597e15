"""What a fleet is to control: a list of replicas and six verbs, all repeatable after a crash.

One contract suite (tests/test_driver_contract.py) holds for every driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from neaptide.table import ReplicaRow
from neaptide.types import Deployment, Launch, Replica


class Driver(Protocol):
    async def observe(self) -> Sequence[Replica]:
        """Every replica that exists or died since it was last forgotten. Cheap: called every tick."""

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        """Start a replica; one of that id that exists already is left alone. Returns once it is on its way, or in line
        to be: a `starting` replica that observe tells as `queued`."""

    async def drain(self, id: str) -> None:
        """Let it finish what runs, for as long as its deployment's `drain_s`, and end; unknown ids are ignored. Returns
        at once. A queued one is gone with it."""

    async def park(self, id: str) -> None:
        """A ready replica stands by from now on: it finishes what runs and is given no requests. Any other is left
        alone."""

    async def wake(self, id: str) -> None:
        """A standby serves again. Any other is left alone."""

    async def keep_spares(self, wanted: Mapping[str, int]) -> None:
        """From now on as many processes as `wanted` says, by engine, are up without a model; others end, and a launch
        becomes the oldest one. Cheap: called every tick."""

    async def forget(self, id: str) -> None:
        """Its death has been taken note of."""

    def rows(self) -> Mapping[str, ReplicaRow]:
        """What gateways need to reach the replicas that take requests."""

    async def close(self) -> None: ...
