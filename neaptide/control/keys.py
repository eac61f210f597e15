"""API keys: made once, shown once, kept as a keyed hash. Gateways get rows(), never a key.

The hash is blake2b keyed with the installation's pepper: a copied ledger alone tells nothing about the keys, and a
gateway checks one in a microsecond (keys are 256 random bits: no slow hash is needed against guessing).
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from neaptide.clock import Clock
from neaptide.cost.accounts import Accounts, KeyRecord, Terms
from neaptide.cost.ledger import Ledger
from neaptide.errors import RequestError, StorageError
from neaptide.table import KeyRow, quotas
from neaptide.types import Priority

PREFIX = "sk-"
PEPPER_BYTES = 32
MAX_NAME = 128
MAX_MODELS = 128
MAX_KEY = 256
KEY = re.compile(rf"[\x21-\x7e]{{16,{MAX_KEY}}}")  # what a header can carry; short ones could be guessed
PRIORITIES = ("low", "normal", "high")
SCOPES = ("inference", "models", "tokenize")
MOST = 10**12  # of a limit
DOOMSDAY_S = 253_402_300_800.0  # the year 10000


class KeyInfo(Terms, frozen=True, kw_only=True):
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
    that the ledger's keys were hashed with: every key would be refused without a reason."""

    def __init__(self, ledger: Ledger, pepper: str, clock: Clock) -> None:
        if not re.fullmatch(rf"[0-9a-f]{{{2 * PEPPER_BYTES}}}", pepper):
            raise StorageError(
                f"the file pepper does not hold {PEPPER_BYTES} bytes in hex",
                fix="restore it from a backup",
                code="E532",
            )
        self._accounts, self._pepper, self._clock = Accounts(ledger.database), pepper, clock
        mine = digest("pepper", pepper)
        if not hmac.compare_digest(self._accounts.fact("pepper_check", mine), mine):
            raise StorageError(
                "the pepper in the state directory is not the one that the ledger's keys were hashed with",
                why="every API key would be refused",
                fix="restore the file pepper that belongs to this ledger",
                code="E533",
            )

    def create(
        self,
        name: str = "",
        *,
        tenant: str = "default",
        team: str = "default",
        project: str = "default",
        priority: Priority = "normal",
        models: tuple[str, ...] = (),
        terms: Terms = Terms(),  # noqa: B008  (frozen)
    ) -> NewKey:
        """A new key. `priority` is the highest class it may ask for, `models` what it may use (empty: all).
        RequestError 400 for an unknown project, priority or an over-long name, and for terms that make no sense."""
        secret = PREFIX + secrets.token_urlsafe(32)
        return NewKey(secret, self._add(secret, name, tenant, team, project, priority, models, terms))

    def adopt(self, secret: str, name: str, *, priority: Priority = "high") -> KeyInfo:
        """The given key as one of the default project; the same call again changes nothing. A key that was revoked
        stays revoked. RequestError 400 for what cannot be a key."""
        if not KEY.fullmatch(secret):
            raise RequestError(400, f"A key is 16 to {MAX_KEY} visible ASCII characters.", slug="invalid_key")
        found = self._accounts.key_by_digest(digest(secret, self._pepper))
        if found is not None:
            return _info(found)
        return self._add(secret, name, "default", "default", "default", priority, (), Terms())

    def list(self) -> tuple[KeyInfo, ...]:
        """All keys, the revoked too, oldest first."""
        return tuple(map(_info, self._accounts.all_keys()))

    def set(self, key_id: str, changes: Mapping[str, Any]) -> KeyInfo:
        """The key with some of its terms changed. RequestError 404 where there is none, 400 for a revoked one and for
        terms that make no sense."""
        found = self._accounts.key_by_id(key_id)
        if found is None:
            raise _no_key(key_id)
        if found.disabled:
            raise RequestError(400, f"The key {key_id!r} was revoked, for good.", param="id", fix="Make another one.")
        terms = Terms(**{name: changes.get(name, getattr(found, name)) for name in Terms.__struct_fields__})
        _check_terms(terms, self._clock.wall_s() if "expires_s" in changes else 0.0)
        return _info(self._accounts.set_terms(key_id, terms) or found)

    def revoke(self, key_id: str) -> KeyInfo:
        """Disables a key for good; a second time changes nothing. RequestError 404 where there is none."""
        found = self._accounts.disable(key_id, self._clock.wall_s())
        if found is None:
            raise _no_key(key_id)
        return _info(found)

    def rows(self) -> tuple[KeyRow, ...]:
        """For the table that gateways hold. Revoked keys are left out: to a gateway they do not exist."""
        return tuple(_row(key) for key in self._accounts.all_keys() if not key.disabled)

    def _add(
        self,
        secret: str,
        name: str,
        tenant: str,
        team: str,
        project: str,
        priority: str,
        models: tuple[str, ...],
        terms: Terms,
    ) -> KeyInfo:
        _check(name, tenant, priority, (*models, tenant, team, project))
        _check_terms(terms, self._clock.wall_s())
        key = KeyRecord(
            id="key_" + secrets.token_hex(8),
            digest=digest(secret, self._pepper),
            name=name,
            tenant=tenant,
            team=team,
            project=project,
            priority=priority,
            models=models,
            last_four=secret[-4:],
            created_s=self._clock.wall_s(),
            **msgspec.structs.asdict(terms),
        )
        if not self._accounts.add(key):
            raise RequestError(
                400, f"The project {project!r} of organisation {tenant!r} is another team's.", param="project"
            )
        return _info(key)


def _check(name: str, tenant: str, priority: str, names: tuple[str, ...]) -> None:
    if len(name) > MAX_NAME or not name.isprintable():
        raise RequestError(400, f"A name is at most {MAX_NAME} printable characters.", param="name")
    if "/" in tenant:  # `project:TENANT/NAME` is the scope of a project's budgets
        raise RequestError(400, "A tenant's name has no '/' in it.", param="tenant", fix="Write it with - or _.")
    if priority not in PRIORITIES:
        raise RequestError(400, f"priority is one of {', '.join(PRIORITIES)}, not {priority!r}.", param="priority")
    if len(names) > MAX_MODELS or any(len(m) > MAX_NAME or not m.isprintable() for m in names):
        raise RequestError(400, "models, tenant, team and project are short printable names.", param="models")


def _check_terms(terms: Terms, now_s: float) -> None:
    for name in ("rpm", "tpm", "concurrency"):
        value: int | None = getattr(terms, name)
        if value is not None and not 1 <= value <= MOST:
            raise RequestError(400, f"{name} is a number from 1 to {MOST}, not {value}.", param=name)
    unknown = [scope for scope in terms.scopes if scope not in SCOPES]
    if unknown or len(set(terms.scopes)) < len(terms.scopes):
        shown = ", ".join(terms.scopes)[:100]
        raise RequestError(400, f"scopes are of {', '.join(SCOPES)}, each once, not {shown!r}.", param="scopes")
    if terms.expires_s is not None and not now_s < terms.expires_s < DOOMSDAY_S:
        raise RequestError(400, "A key expires at a time to come, before the year 10000.", param="expires_wall_s")


def _no_key(key_id: str) -> RequestError:
    return RequestError(404, f"There is no key {key_id!r}.", slug="key_not_found", param="id")


def _info(key: KeyRecord) -> KeyInfo:
    shown = {name: getattr(key, name) for name in KeyInfo.__struct_fields__}
    return KeyInfo(**shown)


def _row(key: KeyRecord) -> KeyRow:
    return KeyRow(
        id=key.id,
        digest=key.digest,
        name=key.name,
        tenant=key.tenant,
        project=key.project,
        priority=key.priority,
        models=key.models,
        inside=key.inside,
        expires_wall_s=key.expires_s,
        scopes=key.scopes,
        quotas=quotas("key", key.rpm, key.tpm, key.concurrency),
    )
