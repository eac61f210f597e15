"""PEM files -> a listener's ssl.SSLContext, tried before it is given out; what is wrong with them, in words.

E130  a file cannot be read, or is not what it should be
E131  certificate and key do not belong together, or cannot serve
E132  others may read the key
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
from pathlib import Path
from typing import Any, NamedTuple

from neaptide.errors import ConfigError
from neaptide.tls.settings import ListenTls

log = logging.getLogger("neaptide.tls")

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2, forward secret and authenticated; those of 1.3 all are
ANY_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which ssl has no name for
FLIGHTS = 4  # more than any handshake has
SUBJECT_CHARS = 256
SHORT = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}
FIRST_PEM = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")


class Leaf(NamedTuple):
    """Whose a certificate is, and until when (wall seconds)."""

    subject: str
    not_after_s: float
    pem: str
    names: tuple[str, ...] = ()  # DNS names; "*." in front stands for one label


def serving(tls: ListenTls) -> tuple[ssl.SSLContext, Leaf]:
    """The context of a listener, and the certificate that it shows. ConfigError E130 to E132."""
    check_key(tls.key)
    pem = first_pem(tls.cert)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    load_pair(context, tls.cert, tls.key)
    leaf = _tried(context, pem, tls.cert)  # while it asks for no client certificate
    if tls.client_ca:
        load_authorities(context, tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED if tls.client_auth == "required" else ssl.CERT_OPTIONAL
    return context, leaf


def check_key(path: str) -> None:
    """As ssh does: a key that others can read is no secret."""
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise _unreadable(path, e) from e
    if mode & 0o027:
        raise ConfigError(
            f"others may read or change {path} (mode {mode & 0o777:o})",
            why="whoever has the key can pass for this host",
            fix=f"chmod 600 {path}",
            code="E132",
        )
    if mode & 0o040:
        log.warning("the group may read the key %s; chmod 600 unless that is meant", path)


def first_pem(path: str) -> str:
    """The first certificate in a file: the one that is shown, where the file is a chain."""
    try:
        text = Path(path).read_text(encoding="ascii", errors="replace")
    except OSError as e:
        raise _unreadable(path, e) from e
    found = FIRST_PEM.search(text)
    if found is None:
        raise ConfigError(f"{path} holds no certificate", code="E130", fix="a PEM file: -----BEGIN CERTIFICATE-----")
    return found[0]


def load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Have `context` show `cert`. ConfigError E130, E131."""
    try:
        context.load_cert_chain(cert, key, password=_passphrase)
    except ssl.SSLError as e:
        reason = getattr(e, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            fix = "name the key that the certificate was made for"
            raise ConfigError(f"{key} is not the key of {cert}", code="E131", fix=fix) from e
        what = f"{cert} and {key} cannot be used: {reason or 'no PEM'}"
        raise ConfigError(what, code="E130", fix="a certificate and its key, as PEM files") from e
    except OSError as e:
        raise _unreadable(f"{cert} or {key}", e) from e
    except _Encrypted as e:
        fix = f"write it without one: openssl pkey -in {key} -out PLAIN, and chmod 600 PLAIN"
        raise ConfigError(f"{key} is encrypted with a passphrase", code="E130", fix=fix) from e


def load_authorities(context: ssl.SSLContext, path: str) -> None:
    """Have `context` trust the certificates of a file. ConfigError E130."""
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as e:
        what = f"{path} holds no certificate of an authority"
        raise ConfigError(what, code="E130", fix="a PEM file: -----BEGIN CERTIFICATE-----") from e
    except OSError as e:
        raise _unreadable(path, e) from e


def pinned(pem: str, flags: int = 0) -> ssl.SSLContext:
    """A client's context that takes this certificate and no other, under whatever name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags = ssl.VerifyFlags(ssl.VERIFY_X509_PARTIAL_CHAIN | flags)
    context.load_verify_locations(cadata=pem)
    return context


def subject(certificate: Any) -> str:
    """ "CN=alice,O=team" of what getpeercert() tells; its first other name where it has no subject; "" of nothing."""
    if not certificate:
        return ""
    parts = [f"{SHORT.get(k, k)}={v}" for names in certificate.get("subject", ()) for k, v in names]
    if not parts:
        parts = [f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ())[:1]]
    return ",".join(parts)[:SUBJECT_CHARS]


def _tried(context: ssl.SSLContext, pem: str, cert: str) -> Leaf:
    """A handshake with ourselves in memory: what passes can serve, whatever the hour. ConfigError E131."""
    inwards, outwards = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(inwards, outwards, server_side=True)
    try:
        client = pinned(pem, ANY_TIME).wrap_bio(outwards, inwards)
        for side in (client, server) * FLIGHTS:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        told: Any = client.getpeercert()
    except (ssl.SSLError, ValueError) as e:
        why = getattr(e, "verify_message", "") or getattr(e, "reason", "") or str(e)
        fix = "a certificate for servers (extended key usage serverAuth): neaptide ca issue NAME --server"
        raise ConfigError(f"{cert} cannot serve: {why}", code="E131", fix=fix) from e
    names = tuple(value for kind, value in told.get("subjectAltName", ()) if kind == "DNS")
    return Leaf(subject(told), float(ssl.cert_time_to_seconds(told["notAfter"])), pem, names)


class _Encrypted(Exception):
    """A key asks for a passphrase."""


def _passphrase() -> str:
    raise _Encrypted  # else OpenSSL would ask the terminal for it


def _unreadable(path: str, e: OSError) -> ConfigError:
    fix = "correct the path, or who may read it"
    return ConfigError(f"{path} cannot be read: {e.strerror or e}", code="E130", fix=fix)
