"""Who may come in: keys, models, priority, deadline. Pure functions of the table and the head; they take `now`."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from neaptide.errors import RequestError
from neaptide.remotes import REVISION
from neaptide.table import KeyRow
from neaptide.types import Priority

CLASSES: tuple[Priority, ...] = ("low", "normal", "high")
SEEN_AT_MOST = 4096
SCOPE_OF = {"tokenize": "tokenize"}  # by route; the others are inference
ANYBODY = KeyRow(id="", digest="", priority="high")  # who calls where the config says `auth: off`


def digest(key: bytes, pepper: bytes) -> str:
    """The keyed hash under which a key is stored: 32 bytes of BLAKE2b, in hex."""
    return hashlib.blake2b(key, key=pepper, digest_size=32).hexdigest()


class Keys:
    """The table's keys, found by Authorization header. A bounded cache of accepted headers saves the hash (1.2 us);
    rejected ones are never kept, so a flood of guesses costs no memory."""

    __slots__ = ("_by_digest", "_pepper", "_seen", "required")

    def __init__(self, rows: Iterable[KeyRow], pepper: bytes, required: bool = True) -> None:
        self._by_digest = {row.digest: row for row in rows}
        self._pepper = pepper
        self._seen: dict[bytes, KeyRow] = {}
        self.required = required

    def find(self, authorization: bytes | None, wall_s: float) -> KeyRow:
        """The key's row. RequestError 401 when it is absent, malformed, unknown, disabled or expired."""
        if not self.required:
            return ANYBODY
        if authorization is None:
            raise _unauthorised("no API key was sent", "missing_api_key")
        row = self._seen.get(authorization) or self._look_up(authorization)
        if row.expires_wall_s is not None and wall_s >= row.expires_wall_s:
            self._seen.pop(authorization, None)
            when = datetime.fromtimestamp(row.expires_wall_s, UTC).isoformat(" ", "seconds")
            raise _unauthorised(f"the API key expired at {when}", "expired_api_key")
        return row

    def _look_up(self, authorization: bytes) -> KeyRow:
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() != b"bearer" or not key:
            raise _unauthorised("the Authorization header is not a bearer token", "invalid_api_key")
        wanted = digest(key, self._pepper)
        row = self._by_digest.get(wanted)
        if row is None or not hmac.compare_digest(row.digest, wanted):
            raise _unauthorised("the API key is not known", "invalid_api_key")
        if row.disabled:
            raise _unauthorised("the API key is disabled", "disabled_api_key")
        if len(self._seen) >= SEEN_AT_MOST:
            self._seen.clear()
        self._seen[authorization] = row
        return row


class Terms(NamedTuple):
    """What a head asks of how its request is served: its class, whether it sets a deadline, whether its answer may come
    from the cache (None: if it is no matter of chance), and whether it may be made less under pressure."""

    priority: Priority
    timed: bool
    revision: str = ""  # the one that it is to be answered by; "": any
    cache: bool | None = None
    degrade: bool = True


def terms(headers: Mapping[bytes, bytes], key: KeyRow) -> Terms:
    """RequestError 400 for a class or a revision that is none, or a choice that is neither yes nor no."""
    timed = b"x-neaptide-deadline-ms" in headers or b"x-stainless-read-timeout" in headers
    pinned = headers.get(b"x-neaptide-revision")
    return Terms(
        priority(headers.get(b"x-neaptide-priority"), key),
        timed,
        revision(pinned) if pinned else "",
        choice(headers, b"x-neaptide-cache", "invalid_cache"),
        choice(headers, b"x-neaptide-degrade", "invalid_degrade") is not False,
    )


def choice(headers: Mapping[bytes, bytes], name: bytes, slug: str) -> bool | None:
    """What a header says that is yes or no; None where it is absent. RequestError 400 for anything else."""
    said = headers.get(name)
    if said is None:
        return None
    if said.lower() not in (b"yes", b"no"):
        what = f"{name.decode()} is {said[:32].decode('latin-1')!r}: it must be yes or no."
        raise RequestError(400, what, slug=slug, fix=f"Send `{name.decode()}: yes` or `no`, or leave it out.")
    return said.lower() == b"yes"


def check_model(key: KeyRow, model: str) -> None:
    """RequestError 403 where `key` may not use the deployment `model`."""
    if key.models and model not in key.models:
        raise RequestError(
            403, f"This API key may not use the model '{model}'.", slug="model_not_allowed", param="model"
        )


def check_scope(key: KeyRow, scope: str) -> None:
    """RequestError 403 where `key` has scopes and this is none of them."""
    if key.scopes and scope not in key.scopes:
        has = ", ".join(key.scopes)
        raise RequestError(
            403,
            f"This needs a key with the scope '{scope}'; this API key has: {has}.",
            slug="scope_not_allowed",
            fix="Use another key, or have the scope added: `neaptide keys set`.",
        )


def priority(asked: bytes | None, key: KeyRow) -> Priority:
    """The class asked for (normal when none was), clamped to the highest that the key allows."""
    if asked is None:
        return "low" if key.priority == "low" else "normal"
    highest = CLASSES.index(key.priority) if key.priority in CLASSES else 1
    name = asked.decode("latin-1").lower()
    if name not in CLASSES:
        raise RequestError(
            400, f"x-neaptide-priority is {name[:32]!r}: it must be low, normal or high.", slug="invalid_priority"
        )
    return CLASSES[min(CLASSES.index(name), highest)]


def revision(asked: bytes) -> str:
    """The revision that a client names; RequestError 400 for what cannot be one."""
    name = asked.decode("latin-1")
    if not REVISION.fullmatch(name):
        raise RequestError(
            400,
            "x-neaptide-revision is no revision's name: letters, digits and . _ : / -, at most 160.",
            slug="invalid_revision",
            fix="Leave it out, or name a revision that `neaptide status --json` lists.",
        )
    return name


def deadline_s(headers: Mapping[bytes, bytes], stream: bool, arrived_s: float) -> float:
    """The monotonic time by which the answer must have ended; inf where the client set none. For a call that does
    not stream, the read timeout that OpenAI's SDK announces counts too: nobody listens after it."""
    due = float("inf")
    if (value := headers.get(b"x-neaptide-deadline-ms")) is not None:
        if not value.isdigit() or len(value) > 12 or int(value) == 0:
            raise RequestError(
                400, "x-neaptide-deadline-ms must be a whole number of milliseconds above 0.", slug="invalid_deadline"
            )
        due = arrived_s + int(value) / 1000.0
    if not stream and (value := headers.get(b"x-stainless-read-timeout")) is not None:
        seconds = _seconds(value)
        if seconds is not None:
            due = min(due, arrived_s + seconds)
    return due


def _seconds(value: bytes) -> float | None:
    """An SDK's float; None for what it writes when no timeout is set ("None", "NOT_GIVEN")."""
    whole, _, fraction = value.partition(b".")
    if len(value) > 12 or not whole.isdigit() or (fraction and not fraction.isdigit()):
        return None
    return float(value) or None


def _unauthorised(why: str, slug: str) -> RequestError:
    return RequestError(
        401, f"Authentication failed: {why}.", slug=slug, fix="Send `Authorization: Bearer <your key>`."
    )
