"""Replicas that somebody else runs: known from the configuration, never started or stopped by us."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neaptide.config import ModelSettings
from neaptide.remotes import is_outside
from neaptide.table import ReplicaRow
from neaptide.types import Deployment, Launch, Replica


class StaticDriver:
    """A driver whose replicas are always ready; whether they answer is the gateways' to find out."""

    def __init__(self, models: Mapping[str, ModelSettings], revisions: Mapping[str, str]) -> None:
        self._rows: dict[str, ReplicaRow] = {}
        self.configure(models, revisions)

    def configure(self, models: Mapping[str, ModelSettings], revisions: Mapping[str, str]) -> None:
        self._rows = {
            row.id: row for name, m in models.items() for row in remote_rows(name, m, revisions.get(name, ""))
        }

    async def observe(self) -> Sequence[Replica]:
        return [
            Replica(id=r.id, deployment=r.model, revision=r.revision, state="ready", endpoint=r.endpoint)
            for r in self._rows.values()
        ]

    async def launch(self, launch: Launch, deployment: Deployment) -> None:
        """Nothing to start: it is somebody else's."""

    async def drain(self, id: str) -> None:
        """Nothing to stop; `configure` without it takes it out of the table."""

    async def park(self, id: str) -> None:
        """It takes requests for as long as it is configured."""

    async def wake(self, id: str) -> None:
        """It never stands by."""

    async def keep_spares(self, wanted: Mapping[str, int]) -> None:
        """Nothing is started here, so nothing is kept for it."""

    async def forget(self, id: str) -> None:
        """It does not die here."""

    def rows(self) -> Mapping[str, ReplicaRow]:
        return self._rows

    async def close(self) -> None:
        self._rows = {}


def remote_rows(name: str, model: ModelSettings, revision: str) -> list[ReplicaRow]:
    """One row a configured URL; `remote_model` only where the far side knows the model by another id."""
    return [
        ReplicaRow(
            id=f"{name}@{i}",
            model=name,
            endpoint=remote.url.rstrip("/"),
            revision=remote.revision or revision,
            token=remote.key,
            remote_model=remote.model if remote.model != name else "",
            max_running=remote.max_running,
            tls=remote.tls,
            resumes=remote.resumes,
            outside=is_outside(remote.url) if remote.outside is None else remote.outside,
        )
        for i, remote in enumerate(model.replicas)
    ]
