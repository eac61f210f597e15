"""API keys: made once, shown once, kept as a keyed hash. Gateways get rows(), never a key.

The hash is blake2b keyed with the installation's pepper: a copied ledger alone tells nothing about the keys, and a
gateway checks one in a microsecond (keys are 256 random bits: no slow hash is needed against guessing).
"""

from __future__ import annotations

import hmac
import re
import secrets
from hashlib import blake2b
from typing import NamedTuple

import msgspec
import sqlalchemy as sa

from neaptide.clock import Clock
from neaptide.cost import schema
from neaptide.cost.ledger import Ledger
from neaptide.errors import RequestError, StorageError
from neaptide.table import KeyRow
from neaptide.types import Priority

PREFIX = "sk-"
PEPPER_BYTES = 32
MAX_NAME = 128
MAX_KEY = 256
KEY = re.compile(rf"[\x21-\x7e]{{16,{MAX_KEY}}}")  # what a header can carry; short ones could be guessed
PRIORITIES = ("low", "normal", "high")


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What may be shown of a key."""

    id: str
    name: str
    tenant: str
    team: str
    project: str
    priority: str
    models: tuple[str, ...]
    disabled: bool
    last_four: str
    created_s: float
    disabled_s: float | None


class NewKey(NamedTuple):
    """`secret` is returned here and nowhere else, ever."""

    secret: str
    info: KeyInfo


def digest(key: str, pepper: str) -> str:
    """What is stored of a key and looked up by gateways: 64 hex digits."""
    return blake2b(key.encode(), key=bytes.fromhex(pepper), digest_size=32).hexdigest()


class KeyStore:
    """Keys in the ledger. `pepper` is the hex text of the state directory's file; StorageError when it is not the one
    that the ledger's keys were hashed with."""

    def __init__(self, ledger: Ledger, pepper: str, clock: Clock) -> None:
        if not re.fullmatch(rf"[0-9a-f]{{{2 * PEPPER_BYTES}}}", pepper):
            raise StorageError(
                f"the file pepper does not hold {PEPPER_BYTES} bytes in hex",
                fix="restore it from a backup",
                code="E532",
            )
        self._ledger, self._pepper, self._clock = ledger, pepper, clock
        self._check_pepper()

    def create(
        self,
        name: str = "",
        *,
        tenant: str = "default",
        team: str = "default",
        project: str = "default",
        priority: Priority = "normal",
        models: tuple[str, ...] = (),
    ) -> NewKey:
        """A new key. `priority` is the highest class it may ask for, `models` what it may use (empty: all).
        RequestError 400 for an unknown project, priority or an over-long name."""
        secret = PREFIX + secrets.token_urlsafe(32)
        return self._add(secret, name, tenant, team, project, priority, models)

    def adopt(self, secret: str, name: str, *, priority: Priority = "high") -> KeyInfo:
        """The given key as one of the default project; the same call again changes nothing. A key that was revoked
        stays revoked. RequestError 400 for what cannot be a key."""
        if not KEY.fullmatch(secret):
            raise RequestError(400, f"A key is 16 to {MAX_KEY} visible ASCII characters.", slug="invalid_key")
        found = self._by_digest(digest(secret, self._pepper))
        return found or self._add(secret, name, "default", "default", "default", priority, ()).info

    def list(self) -> tuple[KeyInfo, ...]:
        """All keys, the revoked too, oldest first."""
        table = schema.keys
        with self._ledger.database.read() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.created_s, table.c.id))
            return tuple(_info(row) for row in rows)

    def revoke(self, key_id: str) -> KeyInfo:
        """Disables a key for good; a second time changes nothing. RequestError 404 where there is none."""
        table = schema.keys
        with self._ledger.database.write() as connection:
            connection.execute(
                table.update()
                .where(table.c.id == key_id, table.c.disabled.is_(False))
                .values(disabled=True, disabled_s=self._clock.wall_s())
            )
            row = connection.execute(sa.select(table).where(table.c.id == key_id)).one_or_none()
        if row is None:
            raise RequestError(404, f"There is no key {key_id!r}.", slug="key_not_found", param="id")
        return _info(row)

    def rows(self) -> tuple[KeyRow, ...]:
        """For the table that gateways hold. Revoked keys are left out: to a gateway they do not exist."""
        table = schema.keys
        query = sa.select(table).where(table.c.disabled.is_(False)).order_by(table.c.id)
        with self._ledger.database.read() as connection:
            return tuple(_table_row(row) for row in connection.execute(query))

    def _add(
        self, secret: str, name: str, tenant: str, team: str, project: str, priority: str, models: tuple[str, ...]
    ) -> NewKey:
        _checked(name, priority, (*models, tenant, team, project))
        row = {
            "id": "key_" + secrets.token_hex(8),
            "digest": digest(secret, self._pepper),
            "name": name,
            "organisation_id": tenant,
            "team_id": team,
            "project_id": project,
            "priority": priority,
            "models": msgspec.json.encode(models).decode(),
            "disabled": False,
            "last_four": secret[-4:],
            "created_s": self._clock.wall_s(),
        }
        with self._ledger.database.write() as connection:
            _check_place(connection, tenant, team, project)
            connection.execute(schema.keys.insert(), [row])
            stored = connection.execute(sa.select(schema.keys).where(schema.keys.c.id == row["id"])).one()
        return NewKey(secret, _info(stored))

    def _by_digest(self, value: str) -> KeyInfo | None:
        with self._ledger.database.read() as connection:
            row = connection.execute(sa.select(schema.keys).where(schema.keys.c.digest == value)).one_or_none()
        return None if row is None else _info(row)

    def _check_pepper(self) -> None:
        """A lost pepper would refuse every key without saying why."""
        mine = digest("pepper", self._pepper)
        column = schema.meta.c
        with self._ledger.database.write() as connection:
            self._ledger.database.insert_new(connection, schema.meta, [{"name": "pepper_check", "value": mine}])
            kept = connection.scalar(sa.select(column.value).where(column.name == "pepper_check")) or ""
        if not hmac.compare_digest(kept, mine):
            raise StorageError(
                "the pepper in the state directory is not the one that the ledger's keys were hashed with",
                why="every API key would be refused",
                fix="restore the file pepper that belongs to this ledger",
                code="E533",
            )


def _checked(name: str, priority: str, models: tuple[str, ...]) -> None:
    if len(name) > MAX_NAME or not name.isprintable():
        raise RequestError(400, f"A name is at most {MAX_NAME} printable characters.", param="name")
    if priority not in PRIORITIES:
        raise RequestError(400, f"priority is one of {', '.join(PRIORITIES)}, not {priority!r}.", param="priority")
    if len(models) > MAX_NAME or any(len(m) > MAX_NAME or not m.isprintable() for m in models):
        raise RequestError(400, "models, tenant, team and project are short printable names.", param="models")


def _check_place(connection: sa.Connection, tenant: str, team: str, project: str) -> None:
    table = schema.projects.c
    place = (table.id == project, table.organisation_id == tenant, table.team_id == team)
    if connection.scalar(sa.select(table.id).where(*place)) is None:
        raise RequestError(
            400, f"There is no project {project!r} of team {team!r} in organisation {tenant!r}.", param="project"
        )


def _info(row: sa.Row[tuple[object, ...]]) -> KeyInfo:
    fields = row._asdict()
    return KeyInfo(
        id=fields["id"],
        name=fields["name"],
        tenant=fields["organisation_id"],
        team=fields["team_id"],
        project=fields["project_id"],
        priority=fields["priority"],
        models=tuple(msgspec.json.decode(fields["models"], type=list[str])),
        disabled=fields["disabled"],
        last_four=fields["last_four"],
        created_s=fields["created_s"],
        disabled_s=fields["disabled_s"],
    )


def _table_row(row: sa.Row[tuple[object, ...]]) -> KeyRow:
    info = _info(row)
    return KeyRow(
        id=info.id,
        digest=row._asdict()["digest"],
        name=info.name,
        tenant=info.tenant,
        project=info.project,
        priority=info.priority,
        models=info.models,
    )
