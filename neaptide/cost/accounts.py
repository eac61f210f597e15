"""Whom usage is booked to: organisations, teams, projects and the rows of their keys. Hashes only; what a key is and
how it is hashed is not known here."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from neaptide.cost import schema
from neaptide.cost.database import Database


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Until when a key is good, for what, and for how much; the columns of these names. None: without end or limit."""

    expires_s: float | None = None  # wall time
    inside: bool = False  # its requests never go to a replica that is outside
    scopes: tuple[str, ...] = ()  # empty: all
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None


class KeyRecord(Terms, frozen=True, kw_only=True):
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
            "disabled": False,
            "last_four": key.last_four,
            "created_s": key.created_s,
            **_columns(key),
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
        return self.key_by_id(key_id)

    def set_terms(self, key_id: str, terms: Terms) -> KeyRecord | None:
        """The key with these terms instead of its own; None where there is none."""
        column = schema.keys.c
        with self._database.write() as connection:
            connection.execute(schema.keys.update().where(column.id == key_id).values(**_columns(terms)))
        return self.key_by_id(key_id)

    def key_by_id(self, key_id: str) -> KeyRecord | None:
        found = self._keys(schema.keys.c.id == key_id)
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
        expires_s=fields["expires_s"],
        scopes=tuple(msgspec.json.decode(fields["scopes"], type=list[str])),
        rpm=fields["rpm"],
        tpm=fields["tpm"],
        concurrency=fields["concurrency"],
    )


def _columns(terms: Terms) -> dict[str, object]:
    found: dict[str, object] = {name: getattr(terms, name) for name in Terms.__struct_fields__}
    return {**found, "scopes": msgspec.json.encode(terms.scopes).decode()}
