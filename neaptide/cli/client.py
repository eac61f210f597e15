"""A small blocking HTTP client for the admin API and any OpenAI endpoint, on the standard library.

No server, a refused answer and a strange answer are three errors: UnreachableError E401-E404, the server's own error
with its code, E402.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from neaptide.errors import ConfigError, ModelError, NeaptideError, ProcessError, StorageError, UnreachableError
from neaptide.tls.context import ANY_TIME, check_key, first_pem, load_pair, pinned
from neaptide.tls.trust import why_untrusted

MAX_ANSWER = 64 << 20  # bytes of one answer kept in memory
MAX_LINE = 1 << 20  # bytes of one SSE line
CONNECT_S = 5.0
URL, TOKEN = "NEAPTIDE_ADMIN_URL", "NEAPTIDE_ADMIN_TOKEN"
T = TypeVar("T")


class UpFile(msgspec.Struct):
    """run/up.json, written by `neaptide up` once everything is ready."""

    api: str
    admin: str
    pids: dict[str, list[int]] = {}
    ready_s: float = 0.0
    started_wall_s: float = 0.0


class Endpoint(NamedTuple):
    """A base URL, split; `path` has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str
    leaf: Path | None = None  # the certificate that a service of this host shows; None: the system's store tells

    @classmethod
    def of(cls, url: str, leaf: Path | None = None) -> Endpoint:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not an http(s) URL", code="E103", fix="write it as http://host:port/v1")
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as e:
            raise ConfigError(f"{url!r}: {e}", code="E103", fix="write it as http://host:port/v1") from e
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/"), leaf)

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """An open connection; UnreachableError E401 or E403."""
        if self.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self.host, self.port, timeout=min(CONNECT_S, timeout_s), context=_context(self.leaf)
            )
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=min(CONNECT_S, timeout_s))
        try:
            connection.connect()
        except TimeoutError as e:
            raise UnreachableError(f"{self} does not answer within {CONNECT_S:g} s", code="E403") from e
        except ssl.SSLError as e:
            raise _untrusted(self, e) from e
        except OSError as e:
            raise _nobody(str(self), e) from e
        opened: socket.socket = connection.sock
        opened.settimeout(timeout_s)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def _context(leaf: Path | None) -> ssl.SSLContext:
    """Our own services are known by the very certificate that they left in the state directory. ConfigError E130 to
    E132."""
    context = pinned(first_pem(str(leaf)), ANY_TIME) if leaf is not None else ssl.create_default_context()
    if cert := os.environ.get("NEAPTIDE_CLIENT_CERT"):
        key = os.environ.get("NEAPTIDE_CLIENT_KEY") or cert
        check_key(key)
        load_pair(context, cert, key)
    return context


class Admin:
    """The admin API of one running Neaptide."""

    def __init__(self, url: str, token: str, timeout_s: float = 30.0, leaf: Path | None = None) -> None:
        self.endpoint, self.timeout_s = Endpoint.of(url, leaf), timeout_s
        self._headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}

    def call(
        self, method: str, path: str, kind: type[T], *, body: bytes | None = None, query: dict[str, Any] | None = None
    ) -> T:
        """The answer of /api/v1/`path` as `kind`; the server's NeaptideError, or UnreachableError."""
        raw = self.raw(method, path, body=body, query=query)
        try:
            return msgspec.json.decode(raw, type=kind)
        except ValueError as e:
            raise _strange(self.endpoint, str(e)) from e

    def raw(self, method: str, path: str, *, body: bytes | None = None, query: dict[str, Any] | None = None) -> bytes:
        given = {k: str(v) for k, v in (query or {}).items() if v is not None}
        return self.at(method, f"/api/v1/{path}" + (f"?{urlencode(given)}" if given else ""), body)

    def at(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer of any path of the listener."""
        target = f"{self.endpoint.path}{path}"
        status, _, answer = exchange(self.endpoint, method, target, self._headers, body, self.timeout_s)
        if status >= 400:
            raise refused(status, answer, self.endpoint)
        return answer


def running(state: Path) -> UpFile:
    """What `neaptide up` left in the state directory; UnreachableError E401 when nothing runs there."""
    path = state / "run" / "up.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=UpFile)
    except FileNotFoundError:
        raise UnreachableError(
            f"nothing runs in {state}", why=f"{path} does not exist", fix=_up(state), code="E401"
        ) from None
    except (OSError, ValueError) as e:
        raise UnreachableError(f"{path} cannot be read: {e}", fix=_up(state), code="E401") from e


def admin(state: Path, timeout_s: float = 30.0) -> Admin:
    """The admin API that the environment names, with its token; else of what runs in `state`, with the host's own.
    ConfigError E106 for an address without a token: the host's own is no other host's business."""
    url, token = os.environ.get(URL), os.environ.get(TOKEN)
    if url and not token:
        raise ConfigError(f"{URL} is set and {TOKEN} is not", code="E106", fix=f"export {TOKEN}, or unset {URL}")
    if not token:
        return own(state, timeout_s)
    if url:
        return Admin(url, token, timeout_s)
    return Admin(running(state).admin, token, timeout_s, admin_leaf(state))


def own(state: Path, timeout_s: float = 30.0) -> Admin:
    """The admin API of what runs in `state`, with the host's own token."""
    return Admin(running(state).admin, secret_file(state / "admin-token"), timeout_s, admin_leaf(state))


def api_leaf(state: Path) -> Path:
    """Where the certificate in force at the inference listener stands, if that speaks TLS."""
    return state / "run" / "api.crt"


def admin_leaf(state: Path) -> Path:
    return state / "run" / "admin.crt"


def secret_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be read: {e.strerror}", code="E106", fix="run as the user that ran `neaptide up`"
        ) from e


def exchange(
    endpoint: Endpoint, method: str, target: str, headers: dict[str, str], body: bytes | None, timeout_s: float
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body) of one request on a connection of its own."""
    connection = endpoint.connect(timeout_s)
    try:
        connection.request(method, target, body=body, headers={"Connection": "close", **headers})
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER + 1)
    except TimeoutError as e:
        raise UnreachableError(f"{endpoint} does not answer within {timeout_s:g} s", code="E403") from e
    except (OSError, http.client.HTTPException) as e:
        raise _broken(endpoint, e) from e
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER:
        raise _strange(endpoint, f"more than {MAX_ANSWER} bytes")
    return response.status, {k.lower(): v for k, v in response.getheaders()}, answer


class Stream:
    """A POST whose answer comes as server-sent events; iterate for the `data:` payloads, close() to abort."""

    def __init__(self, endpoint: Endpoint, path: str, body: bytes, key: str, timeout_s: float) -> None:
        self.endpoint = endpoint
        self._connection = endpoint.connect(timeout_s)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Connection": "close"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._connection.request("POST", endpoint.path + path, body=body, headers=headers)
            self._response = self._connection.getresponse()
            told = self._response.getheader
            self.request_id = told("x-neaptide-request-id") or told("x-request-id") or ""
            self.cache = told("x-neaptide-cache") or ""
            if self._response.status >= 400:
                raise refused(self._response.status, self._response.read(MAX_LINE), endpoint)
        except BaseException as e:
            self.close()
            if isinstance(e, TimeoutError):
                raise UnreachableError(f"{endpoint} does not answer within {timeout_s:g} s", code="E403") from e
            if isinstance(e, (OSError, http.client.HTTPException)):
                raise _broken(endpoint, e) from e
            raise

    def __iter__(self) -> Iterator[bytes]:
        try:
            while line := self._response.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise _strange(self.endpoint, f"an event longer than {MAX_LINE} bytes")
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    return
                yield payload
        except (OSError, http.client.HTTPException) as e:
            raise _broken(self.endpoint, e) from e
        raise UnreachableError(
            f"{self.endpoint} ended the answer early", why="the stream closed before [DONE]", code="E404"
        )

    def close(self) -> None:
        self._connection.close()


def refused(status: int, answer: bytes, endpoint: Endpoint) -> NeaptideError:
    """The server's error: ours ({code, what, why, fix}) or OpenAI's ({message, type, code})."""
    try:
        told = json.loads(answer)["error"]
        if "what" in told:
            return _ours(told)
        message = str(told["message"])
    except (ValueError, KeyError, TypeError):
        return _strange(endpoint, f"HTTP {status}: {answer[:200].decode(errors='replace')}")
    error = NeaptideError(message, why=f"{endpoint} answered {status} {told.get('code') or ''}".strip(), code="E610")
    error.exit_code, error.status = 4, status
    return error


_KINDS: dict[str, type[NeaptideError]] = {
    "1": ConfigError,
    "2": ModelError,
    "3": ProcessError,
    "4": UnreachableError,
    "5": StorageError,
}
_FAILED = {"E601"}  # not found: it failed, nobody refused it


def _ours(told: dict[str, str]) -> NeaptideError:
    code = told.get("code", "E000")
    kind = _KINDS.get(code[1:2], NeaptideError)
    error = kind(told["what"], why=told.get("why", ""), fix=told.get("fix", ""), code=code)
    if code.startswith("E6") and code not in _FAILED:
        error.exit_code = 4
    return error


def _nobody(place: str, cause: OSError) -> UnreachableError:
    return UnreachableError(
        f"no server answers at {place}",
        why=cause.strerror or str(cause),
        fix="neaptide up, or check the address",
        code="E401",
    )


def _untrusted(endpoint: Endpoint, cause: ssl.SSLError) -> UnreachableError:
    why = why_untrusted(cause)
    fix = why.fix if endpoint.leaf is None else "neaptide down and up, or try again while a certificate changes"
    if endpoint.leaf is None and isinstance(cause, ssl.SSLCertVerificationError):
        fix = "for an authority of your own: export SSL_CERT_FILE=ca.crt"
    return UnreachableError(f"no TLS with {endpoint}: it {why.reason}", why=str(cause), fix=fix, code="E406")


def _broken(endpoint: Endpoint, cause: Exception) -> UnreachableError:
    why = str(cause) or type(cause).__name__
    if isinstance(cause, ssl.SSLError) and "CERTIFICATE" in (getattr(cause, "reason", None) or ""):
        fix = "export NEAPTIDE_CLIENT_CERT=FILE NEAPTIDE_CLIENT_KEY=FILE"
        what = f"{endpoint} wants a client certificate that it trusts"
        return UnreachableError(what, why=why, fix=fix, code="E406")
    return UnreachableError(f"the connection to {endpoint} broke", why=why, fix="neaptide status", code="E404")


def _strange(endpoint: Endpoint, why: str) -> UnreachableError:
    return UnreachableError(
        f"what answers at {endpoint} does not speak as expected", why=why, fix="check the URL", code="E402"
    )


def _up(state: Path) -> str:
    return "neaptide up" if str(state) == ".neaptide" else f"neaptide up --state {state}"
