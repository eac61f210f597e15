"""Certificates on disk: what is wrong with them is said before they serve, and changes are taken up whole or not."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.cli.checks import _tls
from neaptide.clock import wall_s
from neaptide.config import parse
from neaptide.control.listen import hosts
from neaptide.errors import ConfigError
from neaptide.tls.context import serving, subject
from neaptide.tls.served import Served, Settling
from neaptide.tls.settings import ListenTls, ReplicaTls
from tests.tls_kit import DAY_S, House


def refused(tls: ListenTls) -> ConfigError:
    with pytest.raises(ConfigError) as e:
        serving(tls)
    assert e.value.fix
    assert "PRIVATE" not in str(e.value)
    return e.value


def settled(served: Served, now_s: float) -> None:
    """Two looks: the second finds the files left alone since the first."""
    served.poll(now_s)
    served.poll(now_s)


def test_the_admin_listener_is_reached_by_what_its_operator_calls_it(tmp_path: Path) -> None:
    tls = House(tmp_path).issue("gw", dns=("Admin.example.com", "*.ops.example.com"), ips=("10.0.0.5",), server=True)
    served = Served(ListenTls(cert=tls.cert, key=tls.key), "admin.listen", str(tmp_path / "told.crt"))
    names = hosts("https://10.0.0.5:8001/", "gate.internal:8001", served)
    assert names == ("10.0.0.5", "gate.internal", "admin.example.com", "*.ops.example.com")
    assert hosts("http://127.0.0.1:8001/", None, None) == ("127.0.0.1",)


def test_a_good_pair_tells_whose_it_is_and_until_when(tmp_path: Path) -> None:
    context, leaf = serving(House(tmp_path).listen())
    assert leaf.subject == "CN=gateway"
    assert abs(leaf.not_after_s - wall_s() - 90 * DAY_S) < 600
    assert "PRIVATE" not in leaf.pem
    assert context.minimum_version.name == "TLSv1_2"


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o666])
def test_a_key_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    tls = House(tmp_path).listen()
    Path(tls.key).chmod(mode)
    error = refused(tls)
    assert error.code == "E132"
    assert "chmod 600" in error.fix


def test_a_key_that_the_group_may_read_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tls = House(tmp_path).listen()
    Path(tls.key).chmod(0o640)
    serving(tls)
    assert "group" in caplog.text


def test_files_that_are_no_pair_are_refused_each_with_its_reason(tmp_path: Path) -> None:
    house = House(tmp_path)
    good, other = house.listen(), house.issue("other")
    alice = house.issue("alice", client=True)
    junk = tmp_path / "junk"
    junk.write_text("not a certificate")
    junk.chmod(0o600)
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", good.key, "-aes256", "-passout", "stdin", "-out", str(locked)]
    subprocess.run(command, input=b"secret\n", check=True, capture_output=True)
    assert refused(ListenTls(cert=good.cert, key=str(tmp_path / "none"))).code == "E130"
    assert refused(ListenTls(cert=str(tmp_path / "none"), key=good.key)).code == "E130"
    assert refused(ListenTls(cert=str(junk), key=good.key)).code == "E130"
    assert refused(ListenTls(cert=good.cert, key=str(junk))).code == "E130"
    assert refused(ListenTls(cert=good.cert, key=other.key)).code == "E131"
    assert "passphrase" in refused(ListenTls(cert=good.cert, key=str(locked))).what
    assert refused(ListenTls(cert=alice.cert, key=alice.key)).code == "E131"  # for clients alone
    mutual = ListenTls(cert=good.cert, key=good.key, client_ca=str(junk), client_auth="required")
    assert refused(mutual).code == "E130"


def test_a_new_pair_is_taken_once_both_files_have_been_left_alone(tmp_path: Path) -> None:
    house = House(tmp_path)
    served = Served(house.listen(), "listen", str(tmp_path / "told.crt"))
    before = served.context
    new = house.issue("gateway", renew=True)
    served.poll(wall_s())
    assert served.context is before  # it has only just changed
    served.poll(wall_s())
    assert served.context is not before
    assert Path(tmp_path / "told.crt").read_text().strip() == served.leaf.pem
    assert served.leaf.pem in Path(new.cert).read_text()


def test_a_pair_that_does_not_fit_leaves_the_old_one_in_force_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(tmp_path)
    tls = house.listen()
    served = Served(tls, "listen")
    before, cert = served.context, Path(tls.cert).read_bytes()
    Path(tls.cert).write_bytes(Path(house.issue("other").cert).read_bytes())
    settled(served, wall_s())
    assert served.context is before
    assert tls.key in served.refused
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    settled(served, wall_s())
    assert len(caplog.records) == 1  # said once, not at every look
    Path(tls.cert).write_bytes(cert)
    settled(served, wall_s())
    assert served.refused == ""


def test_an_expired_pair_does_not_replace_one_that_is_valid(tmp_path: Path) -> None:
    house = House(tmp_path)
    served = Served(house.listen(), "listen")
    before = served.leaf
    house.issue("gateway", days_ago=100, renew=True, dns=("localhost",), server=True, days=10)
    settled(served, wall_s())
    assert served.leaf == before
    assert "expired" in served.refused


def test_a_certificate_that_is_about_to_expire_is_warned_of_once_a_day(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Served(House(tmp_path).listen(), "listen")
    end_s = served.leaf.not_after_s
    served.poll(end_s - 14.1 * DAY_S)
    assert caplog.records == []
    served.poll(end_s - 13.9 * DAY_S)
    served.poll(end_s - 13.5 * DAY_S)
    assert len(caplog.records) == 1
    served.poll(end_s + DAY_S)
    assert "has expired" in caplog.records[-1].message


def test_a_link_that_is_turned_to_new_files_is_a_change(tmp_path: Path) -> None:
    old, new = House(tmp_path / "old"), House(tmp_path / "new")
    for house in (old, new):
        house.listen()
    link = tmp_path / "live"
    link.symlink_to("old")
    text = f"models: {{guide: {{}}}}\ntls: {{cert: {link}/gateway.crt, key: {link}/gateway.key}}\n"
    tls = parse(text, "t", tmp_path).tls
    assert tls is not None
    served = Served(tls, "listen")
    turned = tmp_path / "turned"
    turned.symlink_to("new")
    os.replace(turned, link)
    settled(served, wall_s())
    assert served.leaf.pem in (tmp_path / "new" / "gateway.crt").read_text()


@given(st.lists(st.integers(0, 3), max_size=30))
def test_every_change_that_lasts_is_told_once_and_no_other(numbers: list[int]) -> None:
    settling = Settling(((0, 0, 0),))
    told = [n for n in numbers if settling.is_due(((n, 0, 0),))]
    assert all(a != b for a, b in zip([0, *told], told))  # nothing is told twice in a row
    if len(numbers) >= 2 and numbers[-1] == numbers[-2]:
        assert [0, *told][-1] == numbers[-1]  # what lasts has been told


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        ({"subject": ((("commonName", "alice"),), (("organizationName", "team"),))}, "CN=alice,O=team"),
        ({"subjectAltName": (("URI", "urn:x"), ("DNS", "y"))}, "URI:urn:x"),
        ({"subject": ((("commonName", "x" * 999),),)}, "CN=" + "x" * 253),
        ({}, ""),
        (None, ""),
    ],
)
def test_a_subject_is_short_and_bounded(certificate: object, said: str) -> None:
    assert subject(certificate) == said


MODEL = "models: {m: {replicas: [{url: %s, tls: %s}]}}\n"


@pytest.mark.parametrize(
    "text",
    [
        "models: {guide: {}}\ntls: {cert: a, key: b, client_ca: c}\n",
        "models: {guide: {}}\ntls: {cert: a, key: b, client_auth: required}\n",
        "models: {guide: {}}\nadmin: {tls: {cert: a, key: b, client_auth: optional}}\n",
        MODEL % ('"http://h/v1"', "{ca: a}"),
        MODEL % ('"https://h/v1"', "{cert: a}"),
        MODEL % ('"https://h/v1"', "{verify: false, ca: a}"),
        MODEL % ('"https://h/v1"', "{verify: false, server_name: a}"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse(text, "t")
    assert e.value.code == "E108"
    assert e.value.fix


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = "tls: {cert: tls/a.crt, key: /k}\n" + MODEL % ('"https://h/v1"', "{ca: ca.crt}")
    s = parse(text, "t", tmp_path)
    assert s.tls == ListenTls(cert=f"{tmp_path}/tls/a.crt", key="/k")
    assert s.models["m"].replicas[0].tls == ReplicaTls(ca=f"{tmp_path}/ca.crt")


def test_doctor_tells_what_it_thinks_of_certificates(tmp_path: Path) -> None:
    house = House(tmp_path, days_ago=200)
    levels = []
    for name, days_ago in (("good", 0), ("late", 80), ("gone", 100)):
        made = house.issue(name, days_ago=days_ago)
        text = f"models: {{guide: {{}}}}\nadmin: {{tls: {{cert: {made.cert}, key: {made.key}}}}}\n"
        (check,) = _tls(parse(text, "t"))
        levels.append(check.level)
    Path(made.key).chmod(0o644)
    (check,) = _tls(parse(text, "t"))
    assert [*levels, check.level] == ["ok", "warn", "fail", "fail"]
    assert "E132" in check.text
    assert _tls(parse("models: {guide: {}}", "t")) == []
