"""What is said of TLS in neaptide.yaml, and told to processes as it stands: paths, never what is in the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from neaptide.errors import ConfigError


class ListenTls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS of a listener; PEM files."""

    cert: str  # the certificate, then those between it and its authority
    key: str  # not encrypted, 0600
    client_ca: str = ""  # who signs clients' certificates
    client_auth: Literal["none", "optional", "required"] = "none"

    def paths(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.cert, self.key, self.client_ca)))


class ReplicaTls(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS towards somebody else's replica; PEM files."""

    ca: str = ""  # whom to trust instead of the system's store
    cert: str = ""  # what we show of ourselves
    key: str = ""
    server_name: str = ""  # the name in its certificate; "" = the host in its URL
    verify: bool = True

    def paths(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.ca, self.cert, self.key)))


T = TypeVar("T", ListenTls, ReplicaTls)


def placed_listener(tls: ListenTls | None, key: str, base: Path) -> ListenTls | None:
    """Paths made absolute; ConfigError on contradictions. Whether the files are any good is for who loads them."""
    if tls is None:
        return None
    if bool(tls.client_ca) != (tls.client_auth != "none"):
        what = f"{key}: client_auth {tls.client_auth} {'with' if tls.client_ca else 'without'} client_ca"
        raise ConfigError(what, code="E108", fix="give client_ca: FILE and client_auth: required, or neither")
    return _placed(tls, base, "cert", "key", "client_ca")


def placed_replica(tls: ReplicaTls | None, url: str, key: str, base: Path) -> ReplicaTls | None:
    """As placed_listener, for the replica at `url`."""
    if tls is None:
        return None
    if not url.startswith("https://"):
        raise ConfigError(f"{key}: {url} is not https", code="E108", fix="write https:// in its url, or remove tls")
    if bool(tls.cert) != bool(tls.key):
        raise ConfigError(f"{key}: cert and key go together", code="E108", fix=f"give both {key}.cert and {key}.key")
    if not tls.verify and (tls.ca or tls.server_name):
        what = f"{key}: verify: false beside ca or server_name"
        raise ConfigError(what, code="E108", fix="remove verify: false, or what would not be looked at")
    return _placed(tls, base, "ca", "cert", "key")


def _placed(tls: T, base: Path, *fields: str) -> T:
    """Symbolic links stay: whoever renews certificates may do it by turning one."""
    paths = {f: os.path.abspath(base / Path(getattr(tls, f)).expanduser()) for f in fields if getattr(tls, f)}
    return msgspec.structs.replace(tls, **paths)
