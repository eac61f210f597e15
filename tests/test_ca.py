"""`neaptide ca`: a local authority whose certificates others' software takes, and whose key nobody else reads."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from neaptide.clock import wall_s
from neaptide.errors import ConfigError
from neaptide.tls import ca
from tests.cli_run import cli
from tests.tls_kit import DAY_S, HOST, House


def read(path: str | Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(Path(path).read_bytes())


def refused(folder: Path, name: str = "x", **wish: object) -> str:
    with pytest.raises(ConfigError) as e:
        ca.issue(folder, name, ca.Wish(**wish), wall_s())  # type: ignore[arg-type]
    assert e.value.fix
    return e.value.code


def test_an_authority_may_sign_certificates_and_nothing_else(tmp_path: Path) -> None:
    cert = read(House(tmp_path / "ca").ca)
    constraints = cert.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = cert.extensions.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    key = cert.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    made = house.issue("gateway")
    for key in (house.folder / "ca.key", Path(made.key)):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(house.folder.stat().st_mode) == 0o700


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    before = (house.folder / "ca.key").read_bytes()
    with pytest.raises(ConfigError) as e:
        House(tmp_path / "ca")
    assert e.value.code == "E134"
    (house.folder / "ca.crt").unlink()  # half of one is one, too
    with pytest.raises(ConfigError, match="already"):
        House(tmp_path / "ca")
    assert (house.folder / "ca.key").read_bytes() == before


def test_a_certificate_says_for_whom_and_what_it_is(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    made = house.issue("api", dns=("API.local", "*.api.local"), ips=("127.0.0.1", "::1"), server=True)
    cert, authority = read(made.cert), read(house.ca)
    cert.verify_directly_issued_by(authority)
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["api.local", "*.api.local"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    usage = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert cert.serial_number.bit_length() > 64
    assert cert.serial_number != read(house.issue("other").cert).serial_number


def test_a_client_that_is_no_host_still_has_a_name(tmp_path: Path) -> None:
    made = House(tmp_path / "ca").issue("alice", client=True)
    assert (made.names, made.usage) == (("URI:urn:neaptide:alice",), ("client",))


def test_what_makes_no_certificate_is_refused_with_a_fix(tmp_path: Path) -> None:
    assert refused(tmp_path / "ca", **HOST) == "E134"  # no authority yet
    house = House(tmp_path / "ca")
    house.issue("taken")
    assert refused(house.folder, "taken", **HOST) == "E135"
    with pytest.raises(ConfigError, match="characters"):
        ca.init(tmp_path / "long", "x" * 65, wall_s())
    assert refused(house.folder, "ca", **HOST) == "E135"
    assert refused(house.folder, "../up", **HOST) == "E135"
    assert refused(house.folder, server=True) == "E135"  # no name that a client could compare
    assert refused(house.folder, dns=("localhost",)) == "E135"  # neither server nor client
    assert refused(house.folder, dns=("no host",), server=True) == "E135"
    assert refused(house.folder, ips=("300.1.1.1",), server=True) == "E135"
    (house.folder / "ca.key").chmod(0o644)
    assert refused(house.folder, **HOST) == "E132"


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    old = House(tmp_path / "old", days_ago=3600)
    made = old.issue("gateway")
    assert made.not_after_s == read(old.ca).not_valid_after_utc.timestamp()
    gone = House(tmp_path / "gone", days_ago=4000)
    assert refused(gone.folder, **HOST) == "E134"


def test_a_renewed_pair_is_for_the_same_names_with_a_new_key(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    old = house.issue("gateway", days_ago=60)
    key = Path(old.key).read_bytes()
    new = ca.issue(house.folder, "gateway", ca.Wish(), wall_s(), renew=True)
    assert (new.names, new.usage) == (old.names, old.usage)
    assert new.not_after_s > old.not_after_s + 50 * DAY_S
    assert Path(new.key).read_bytes() != key
    assert stat.S_IMODE(Path(new.key).stat().st_mode) == 0o600
    Path(new.cert).write_text("rubbish")
    assert house.issue("gateway", renew=True).names == old.names  # told in whole: what is there need not be good
    with pytest.raises(ConfigError, match="does not exist"):
        ca.issue(house.folder, "never", ca.Wish(), wall_s(), renew=True)


def test_what_was_broken_off_between_key_and_certificate_can_be_mended(tmp_path: Path) -> None:
    house = House(tmp_path / "ca")
    Path(house.issue("gateway").cert).unlink()
    with pytest.raises(ConfigError, match=r"gateway\.key exists") as e:
        house.issue("gateway")
    assert "--renew" in e.value.fix
    mended = house.issue("gateway", renew=True)
    assert read(mended.cert).public_key() == load_pem_private_key(Path(mended.key).read_bytes(), None).public_key()
    Path(house.ca).unlink()
    with pytest.raises(ConfigError) as e:
        House(tmp_path / "ca")
    assert e.value.fix == f"remove {house.folder / 'ca.key'}: an init was broken off"


def test_the_verb_makes_and_lists_and_tells_no_secret(tmp_path: Path) -> None:
    made = cli("ca", "init", "--dir", "ca", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    issued = cli("ca", "issue", "gw", "--server", "--dns", "localhost", "--ip", "::1", "--dir", "ca", cwd=tmp_path)
    assert issued.stdout.split() == ["ca/gw.crt", "ca/gw.key"]
    again = cli("ca", "issue", "gw", "--server", "--dns", "localhost", "--dir", "ca", cwd=tmp_path)
    assert again.returncode == 2
    assert "--renew" in again.stderr
    listed = cli("ca", "list", "--dir", "ca", "--json", cwd=tmp_path)
    rows = json.loads(listed.stdout)
    assert [(r["name"], r["usage"]) for r in rows] == [("ca", ["authority"]), ("gw", ["server"])]
    assert 89 < rows[1]["days_left"] <= 90
    said = "".join(d.stdout + d.stderr for d in (made, issued, again, listed))
    assert "PRIVATE" not in said
