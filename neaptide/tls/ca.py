"""A local certificate authority: a key and a certificate in a folder, and what they have signed.

The only file that imports cryptography, inside its functions, so that everything else runs without it.

    E133  cryptography is not installed
    E134  there is no authority in the folder, or one already
    E135  a name is taken, or is none
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neaptide.errors import ConfigError
from neaptide.tls.context import check_key

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA = "ca"  # ca.crt and ca.key
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HOST = re.compile(
    r"(?=.{1,253}\Z)(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.I
)
EARLY = datetime.timedelta(minutes=5)  # for clocks that are behind
CA_DAYS, DAYS = 3650, 90
NAME_CHARS = 64  # of a common name, by X.520


class Issued(NamedTuple):
    """A certificate in the folder."""

    name: str
    cert: str  # paths
    key: str
    names: tuple[str, ...]  # "DNS:api.local", "IP:127.0.0.1", "URI:..."
    usage: tuple[str, ...]  # server, client
    serial: str
    not_after_s: float


class Wish(NamedTuple):
    """What a certificate is to be for."""

    dns: Sequence[str] = ()
    ips: Sequence[str] = ()
    server: bool = False
    client: bool = False
    days: int = DAYS


def init(folder: Path, subject: str, now_s: float, days: int = CA_DAYS) -> Path:
    """A new authority in `folder`; the path of its certificate. ConfigError E134: never over another."""
    lib = _library()
    cert, key_path = folder / f"{CA}.crt", folder / f"{CA}.key"
    there = [path for path in (cert, key_path) if path.exists()]
    if len(there) == 1:
        what = f"{folder} holds half of an authority already: {there[0]}"
        raise ConfigError(what, code="E134", fix=f"remove {there[0]}: an init was broken off")
    if there:
        what = f"{folder} holds an authority already"
        raise ConfigError(what, code="E134", fix="neaptide ca issue NAME, or another --dir", why=f"{key_path} is kept")
    if not 1 <= len(subject) <= NAME_CHARS:
        what = f"an authority's name has 1 to {NAME_CHARS} characters"
        raise ConfigError(what, code="E135", fix="neaptide ca init --name NAME")
    key = lib.ec.generate_private_key(lib.ec.SECP256R1())
    name = lib.x509.Name([lib.x509.NameAttribute(lib.x509.NameOID.COMMON_NAME, subject)])
    builder = _builder(name, name, key.public_key(), now_s, days)
    builder = builder.add_extension(lib.x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs=True), critical=True)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _create(key_path, _private_pem(key), 0o600)
    _create(cert, _sign(builder, key), 0o644)
    return cert


def issue(folder: Path, name: str, wish: Wish, now_s: float, renew: bool = False) -> Issued:
    """NAME.crt and NAME.key, signed by the authority in `folder`. `renew`: in place of the pair that is there, for the
    same names and usage where `wish` says nothing of them. ConfigError E134, E135."""
    lib = _library()
    if not NAME.fullmatch(name) or name == CA:
        raise ConfigError(f"{name!r} is not a name for a certificate", code="E135", fix="letters, digits, . _ -")
    authority, authority_key = _authority(folder)
    cert, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    if renew:
        wish = _as_before(cert, wish)
    elif there := [path for path in (cert, key_path) if path.exists()]:
        raise ConfigError(f"{there[0]} exists", code="E135", fix=f"neaptide ca issue {name} --renew, and all it is for")
    names = _names(name, wish)
    end_s = authority.not_valid_after_utc.timestamp()
    days = min(wish.days, (end_s - now_s) / 86_400)
    if days <= 0:
        raise ConfigError(f"the authority in {folder} has expired", code="E134", fix="neaptide ca init --dir DIR")
    key = lib.ec.generate_private_key(lib.ec.SECP256R1())
    subject = lib.x509.Name([lib.x509.NameAttribute(lib.x509.NameOID.COMMON_NAME, name)])
    builder = _builder(subject, authority.subject, key.public_key(), now_s, days, authority_key.public_key())
    builder = builder.add_extension(lib.x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs=False), critical=True)
    builder = builder.add_extension(lib.x509.ExtendedKeyUsage(_usages(wish)), critical=False)
    builder = builder.add_extension(names, critical=False)
    write = _replace if renew else _create
    write(key_path, _private_pem(key), 0o600)
    write(cert, _sign(builder, authority_key), 0o644)
    return _read(cert)


def issued(folder: Path) -> list[Issued]:
    """The authority's own and all that it has signed, as far as they lie in the folder. ConfigError E134."""
    _authority(folder)
    return [_read(path) for path in sorted(folder.glob("*.crt"), key=lambda p: (p.stem != CA, p.stem))]


# -- certificates ----------------------------------------------------------------------------------------------------


class _Library(NamedTuple):
    """The modules of cryptography that are used here."""

    x509: Any
    ec: Any
    serialization: Any


def _library() -> _Library:
    """ConfigError E133 where it is not installed."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as e:
        fix = "pip install 'neaptide[tls]'"
        raise ConfigError("`neaptide ca` needs the package cryptography", code="E133", fix=fix) from e
    return _Library(x509, ec, serialization)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Any, now_s: float, days: float, signer: Any = None
) -> x509.CertificateBuilder:
    """All but what it is for. `signer`: the authority's public key; None: its own."""
    lib = _library()
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    builder: x509.CertificateBuilder = (
        lib.x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(lib.x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(lib.x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(lib.x509.AuthorityKeyIdentifier.from_issuer_public_key(signer or public), critical=False)
    )
    return builder


def _key_usage(signs: bool) -> x509.KeyUsage:
    lib = _library()
    usage: x509.KeyUsage = lib.x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return usage


def _usages(wish: Wish) -> list[x509.ObjectIdentifier]:
    lib = _library()
    kinds = lib.x509.ExtendedKeyUsageOID
    return [kind for kind, wanted in ((kinds.SERVER_AUTH, wish.server), (kinds.CLIENT_AUTH, wish.client)) if wanted]


def _names(name: str, wish: Wish) -> x509.SubjectAlternativeName:
    """What the far side compares; a client that is no host is named by a URI. ConfigError E135."""
    lib = _library()
    if not (wish.server or wish.client):
        raise ConfigError("neither --server nor --client", code="E135", fix="add --server, --client or both")
    if wish.server and not (wish.dns or wish.ips):
        what = "a server's certificate without a name that clients call it by"
        raise ConfigError(what, code="E135", fix="add --dns HOST or --ip ADDRESS")
    names: list[x509.GeneralName] = []
    for host in wish.dns:
        if not HOST.fullmatch(host):
            raise ConfigError(f"--dns {host!r} is not a host name", code="E135", fix="such as api.example.com")
        names.append(lib.x509.DNSName(host.lower()))
    for address in wish.ips:
        try:
            names.append(lib.x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            raise ConfigError(f"--ip {address!r} is not an address", code="E135", fix="such as 10.0.0.5") from None
    said: x509.SubjectAlternativeName = lib.x509.SubjectAlternativeName(
        names or [lib.x509.UniformResourceIdentifier(f"urn:neaptide:{name}")]
    )
    return said


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes

    lib = _library()
    pem: bytes = builder.sign(key, hashes.SHA256()).public_bytes(lib.serialization.Encoding.PEM)
    return pem


def _private_pem(key: EllipticCurvePrivateKey) -> bytes:
    lib = _library()
    pem: bytes = key.private_bytes(
        lib.serialization.Encoding.PEM, lib.serialization.PrivateFormat.PKCS8, lib.serialization.NoEncryption()
    )
    return pem


# -- files -----------------------------------------------------------------------------------------------------------


def _authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    lib = _library()
    cert, key_path = folder / f"{CA}.crt", folder / f"{CA}.key"
    if not cert.exists() or not key_path.exists():
        raise ConfigError(f"{folder} holds no authority", code="E134", fix="neaptide ca init")
    check_key(str(key_path))
    try:
        key = lib.serialization.load_pem_private_key(key_path.read_bytes(), None)
        found = lib.x509.load_pem_x509_certificate(cert.read_bytes())
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(f"the authority in {folder} cannot be read", code="E134", fix=f"restore {key_path}") from e
    if not isinstance(key, lib.ec.EllipticCurvePrivateKey) or key.public_key() != found.public_key():
        raise ConfigError(f"{key_path} is not the key of {cert}", code="E134", fix="restore the one that belongs to it")
    return found, key


def _as_before(cert: Path, wish: Wish) -> Wish:
    """`wish`, with names and usage of the certificate that is replaced where it has none."""
    if (wish.dns or wish.ips) and (wish.server or wish.client):
        return wish  # what is there may be damaged, or a key alone
    if not cert.exists():
        fix = "leave out --renew; where there is a key alone, say --server or --client and --dns or --ip, too"
        raise ConfigError(f"{cert} does not exist", code="E135", fix=fix)
    before = _read(cert)
    if not (wish.dns or wish.ips):
        dns = [n.removeprefix("DNS:") for n in before.names if n.startswith("DNS:")]
        wish = wish._replace(dns=dns, ips=[n.removeprefix("IP:") for n in before.names if n.startswith("IP:")])
    if not (wish.server or wish.client):
        wish = wish._replace(server="server" in before.usage, client="client" in before.usage)
    return wish


def _read(path: Path) -> Issued:
    lib = _library()
    try:
        found = lib.x509.load_pem_x509_certificate(path.read_bytes())
        names, usage = tuple(_said_names(found)), tuple(_said_usage(found))
    except (ValueError, lib.x509.ExtensionNotFound) as e:
        raise ConfigError(f"{path} is no certificate of ours", code="E135", fix="move it out of the folder") from e
    return Issued(
        path.stem, str(path), str(path.with_suffix(".key")), names, usage, f"{found.serial_number:x}",
        found.not_valid_after_utc.timestamp(),
    )  # fmt: skip


def _said_names(found: x509.Certificate) -> Iterator[str]:
    lib = _library()
    kinds = {lib.x509.DNSName: "DNS", lib.x509.IPAddress: "IP", lib.x509.UniformResourceIdentifier: "URI"}
    for extension in found.extensions:
        if isinstance(extension.value, lib.x509.SubjectAlternativeName):
            yield from (f"{kinds[type(n)]}:{n.value}" for n in extension.value if type(n) in kinds)


def _said_usage(found: x509.Certificate) -> Iterator[str]:
    lib = _library()
    words = {lib.x509.ExtendedKeyUsageOID.SERVER_AUTH: "server", lib.x509.ExtendedKeyUsageOID.CLIENT_AUTH: "client"}
    for extension in found.extensions:
        if isinstance(extension.value, lib.x509.ExtendedKeyUsage):
            yield from (words[kind] for kind in extension.value if kind in words)
        elif isinstance(extension.value, lib.x509.BasicConstraints) and extension.value.ca:
            yield "authority"


def _create(path: Path, data: bytes, mode: int) -> None:
    """Never over a file that is there. ConfigError E135."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise ConfigError(f"{path} exists", code="E135", fix="move it away, or choose another name") from None
    _write(fd, data, mode)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Atomically: who reads it gets the old one or the new one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    _write(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), data, mode)
    fresh.replace(path)


def _write(fd: int, data: bytes, mode: int) -> None:
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)
        file.write(data)
        file.flush()
        os.fsync(fd)
