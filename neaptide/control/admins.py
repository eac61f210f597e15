"""Admin tokens: made once, shown once, kept as a keyed hash in admins.json (0600) of the state directory.

The host's own token is not among them: it stands in admin-token, made by the first `neaptide up`, for the command line
on the same host. It is an admin and cannot be revoked.
"""

from __future__ import annotations

import hmac
import secrets

import msgspec

from neaptide.clock import Clock
from neaptide.control.guard import AdminError
from neaptide.control.keys import MAX_NAME, digest
from neaptide.control.port import NotFoundError
from neaptide.control.roles import HOST, AdminInfo, AdminList, CreatedAdmin, NewAdmin, Role, Who
from neaptide.errors import ConfigError, StorageError
from neaptide.fleet.state import StateDir, write_private

PREFIX = "na-"
MAX_ROWS = 256  # past it the oldest revoked one is forgotten
SHORTEST = 16  # characters; a shorter token could be guessed


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One token in admins.json."""

    id: str
    name: str
    role: Role
    digest: str
    last_four: str
    created_wall_s: float
    made_by: str
    revoked_wall_s: float | None = None


class Admins:
    """The tokens of one state directory. StorageError E551 when their file cannot be read or written: nothing has
    changed then."""

    def __init__(self, state: StateDir, clock: Clock) -> None:
        self._path, self._clock = state.admins, clock
        self._host, self._pepper = state.secret(state.admin_token), state.secret(state.pepper)
        if len(self._host) < SHORTEST:
            what = f"{state.admin_token} has fewer than {SHORTEST} characters"
            raise ConfigError(what, code="E106", fix="remove it: the next start makes another")
        self._rows: tuple[Row, ...] = self._read()

    def _read(self) -> tuple[Row, ...]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=tuple[Row, ...])
        except FileNotFoundError:
            return ()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
            fix = "restore it from a backup, or remove it: then the host's own token is the only one"
            raise StorageError(f"{self._path} cannot be read: {e}", code="E551", fix=fix) from e

    def find(self, token: str) -> Who | None:
        """Whose token this is; None for one that nobody has, or that was revoked."""
        if hmac.compare_digest(token.encode(), self._host.encode()):
            return HOST
        hashed = digest(token, self._pepper)
        return next((_who(r) for r in self._rows if r.digest == hashed and r.revoked_wall_s is None), None)

    def stands(self, who: Who) -> bool:
        """Whether the token behind a session has not been revoked since."""
        return who.id == HOST.id or any(r.id == who.id and r.revoked_wall_s is None for r in self._rows)

    async def list(self) -> AdminList:
        host = AdminInfo(id=HOST.id, name=HOST.name, role="admin", tail="", created_wall_s=0.0, made_by="",
                         revoked=False)  # fmt: skip
        return AdminList(rows=(host, *map(_info, self._rows)))

    async def create(self, new: NewAdmin, by: Who) -> CreatedAdmin:
        """AdminError 400 for a name that is none, 409 when there are MAX_ROWS that stand."""
        if len(new.name) > MAX_NAME or not new.name.isprintable():
            raise AdminError(400, "E605", f"a name is at most {MAX_NAME} printable characters", fix="choose another")
        token = PREFIX + secrets.token_urlsafe(32)
        row = Row(
            id="adm_" + secrets.token_hex(8),
            name=new.name,
            role=new.role,
            digest=digest(token, self._pepper),
            last_four=token[-4:],
            created_wall_s=self._clock.wall_s(),
            made_by=by.id,
        )
        self._write((*self._with_room(), row))
        return CreatedAdmin(token=token, info=_info(row))

    def _with_room(self) -> tuple[Row, ...]:
        if len(self._rows) < MAX_ROWS:
            return self._rows
        gone = next((r for r in self._rows if r.revoked_wall_s is not None), None)
        if gone is None:
            raise AdminError(409, "E621", f"there are {MAX_ROWS} admin tokens", fix="neaptide admins revoke ID")
        return tuple(r for r in self._rows if r is not gone)

    async def revoke(self, admin: str) -> AdminInfo:
        """As it stands after; a second time changes nothing. NotFoundError; AdminError 409 for the host's own."""
        if admin == HOST.id:
            why = "the command line on this host uses it"
            fix = "stop the service, remove admin-token from the state directory, start it again"
            raise AdminError(409, "E621", "the host's own token cannot be revoked", why=why, fix=fix)
        found = next((r for r in self._rows if r.id == admin), None)
        if found is None:
            raise NotFoundError(f"there is no admin token {admin!r}", fix="neaptide admins list")
        if found.revoked_wall_s is not None:
            return _info(found)
        gone = msgspec.structs.replace(found, revoked_wall_s=self._clock.wall_s())
        self._write(tuple(gone if r is found else r for r in self._rows))
        return _info(gone)

    def _write(self, rows: tuple[Row, ...]) -> None:
        try:
            write_private(self._path, msgspec.json.encode(rows).decode())
        except OSError as e:
            raise StorageError(f"{self._path} cannot be written: {e.strerror}", code="E551", fix="free space") from e
        self._rows = rows


def _who(row: Row) -> Who:
    return Who(row.id, row.name, row.role, "token")


def _info(row: Row) -> AdminInfo:
    return AdminInfo(
        id=row.id, name=row.name, role=row.role, tail=row.last_four, created_wall_s=row.created_wall_s,
        made_by=row.made_by, revoked=row.revoked_wall_s is not None,
    )  # fmt: skip
