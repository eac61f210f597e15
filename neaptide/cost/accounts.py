"""Whom usage is booked to: organisations, teams, projects and the rows of their keys. Hashes only; what a key is and
how it is hashed is not known here."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from neaptide.cost import schema
from neaptide.cost.database import Database


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table keys."""

    id: str
    digest: str
    name: str
    tenant: str
    team: str
    project: str
    priority: str
    models: tuple[str, ...]
    last_four: str
    created_s: float
    inside: bool = False
    disabled_s: float | None = None

    @property
    def disabled(self) -> bool:
        return self.disabled_s is not None


class Accounts:
    """Over the ledger's database; every method is one transaction and raises StorageError when the database fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: KeyRecord) -> bool:
        """Stores a new key; its organisation, team and project come into being with their first key. False, and
        nothing stored, where the project is another team's."""
        row = {
            "id": key.id,
            "digest": key.digest,
            "name": key.name,
            "organisation_id": key.tenant,
            "team_id": key.team,
            "project_id": key.project,
            "priority": key.priority,
            "models": msgspec.json.encode(key.models).decode(),
            "inside": key.inside,
            "disabled": False,
            "last_four": key.last_four,
            "created_s": key.created_s,
        }
        with self._database.write() as connection:
            if self._place(connection, key) != key.team:
                return False
            connection.execute(schema.keys.insert(), [row])
        return True

    def _place(self, connection: sa.Connection, key: KeyRecord) -> str:
        """The team of the key's project, all made where absent."""
        made = {"name": key.project, "created_s": key.created_s}
        projects = schema.projects.c
        where = (projects.organisation_id == key.tenant, projects.id == key.project)
        found: str | None = connection.scalar(sa.select(projects.team_id).where(*where))
        if found is not None:
            return found
        within = {"organisation_id": key.tenant, "created_s": key.created_s}
        organisation = {"id": key.tenant, "name": key.tenant, "created_s": key.created_s}
        self._database.insert_new(connection, schema.organisations, [organisation])
        self._database.insert_new(connection, schema.teams, [{**within, "id": key.team, "name": key.team}])
        self._database.insert_new(
            connection, schema.projects, [{**within, **made, "id": key.project, "team_id": key.team}]
        )
        return key.team

    def all_keys(self) -> tuple[KeyRecord, ...]:
        """All of them, the disabled too, oldest first."""
        return self._keys(sa.true())

    def key_by_digest(self, digest: str) -> KeyRecord | None:
        found = self._keys(schema.keys.c.digest == digest)
        return found[0] if found else None

    def disable(self, key_id: str, now_s: float) -> KeyRecord | None:
        """The key as it stands after, disabled at the first call's time; None where there is none."""
        column = schema.keys.c
        with self._database.write() as connection:
            connection.execute(
                schema.keys.update()
                .where(column.id == key_id, column.disabled.is_(False))
                .values(disabled=True, disabled_s=now_s)
            )
        found = self._keys(column.id == key_id)
        return found[0] if found else None

    def fact(self, name: str, value: str) -> str:
        """What is kept under `name` in the table meta: `value` if nothing was."""
        column = schema.meta.c
        with self._database.write() as connection:
            self._database.insert_new(connection, schema.meta, [{"name": name, "value": value}])
            return str(connection.scalar(sa.select(column.value).where(column.name == name)))

    def _keys(self, condition: sa.ColumnElement[bool]) -> tuple[KeyRecord, ...]:
        query = sa.select(schema.keys).where(condition).order_by(schema.keys.c.created_s, schema.keys.c.id)
        with self._database.read() as connection:
            return tuple(_record(row) for row in connection.execute(query))


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    fields = row._asdict()
    return KeyRecord(
        id=fields["id"],
        digest=fields["digest"],
        name=fields["name"],
        tenant=fields["organisation_id"],
        team=fields["team_id"],
        project=fields["project_id"],
        priority=fields["priority"],
        models=tuple(msgspec.json.decode(fields["models"], type=list[str])),
        inside=fields["inside"],
        last_four=fields["last_four"],
        created_s=fields["created_s"],
        disabled_s=fields["disabled_s"],
    )
