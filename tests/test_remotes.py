"""Replicas that somebody else runs, from the configuration to the table: revisions, shares, and what is outside."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from neaptide.clock import VirtualClock
from neaptide.config import parse
from neaptide.control.desired import deployment, slow_part
from neaptide.control.keys import KeyStore
from neaptide.cost.ledger import open_ledger
from neaptide.errors import ConfigError
from neaptide.fleet.static import remote_rows
from neaptide.remotes import is_outside
from neaptide.table import KeyRow

TWO = """
models:
  m:
    replicas:
      - {url: "http://10.0.0.7:8000/v1", revision: may, outside: false}
      - {url: "http://10.0.0.8:8000/v1", revision: june}
    traffic: {may: 90, june: 10}
tenants:
  clinic: {data: inside}
"""


def test_shares_and_data_class_come_from_the_configuration_into_the_table() -> None:
    settings = parse(TWO, "test")
    made = deployment("m", settings.models["m"], "")
    keys = (KeyRow(id="k0", digest="", tenant="clinic"), KeyRow(id="k1", digest="", tenant="other"))
    slow = slow_part(settings, [made], keys, {}, {})
    assert slow.deployments[0].traffic == {"may": 90, "june": 10}
    assert [key.inside for key in slow.keys] == [True, False]
    rows = remote_rows("m", settings.models["m"], made.stable.id)
    assert [(r.revision, r.outside) for r in rows] == [("may", False), ("june", True)]


def test_replicas_that_name_no_revision_have_the_models_own() -> None:
    settings = parse("models: {m: {replicas: [{url: 'http://127.0.0.1:1/v1'}, {url: 'http://h/v1'}]}}", "test")
    rows = remote_rows("m", settings.models["m"], "m-1234")
    assert [(r.revision, r.outside) for r in rows] == [("m-1234", False), ("m-1234", True)]


@pytest.mark.parametrize(
    ("url", "outside"),
    [
        ("http://127.0.0.1:9101/v1", False),
        ("http://127.8.0.1/v1", False),
        ("http://[::1]:9101/v1", False),
        ("http://localhost:9101/v1", False),
        ("http://10.0.0.7:8000/v1", True),
        ("http://localhost.example/v1", True),
        ("http://127.0.0.1.example/v1", True),
        ("http://127.0.0.1@example/v1", True),
        ("https://api.example/v1", True),
        ("http://0.0.0.0/v1", True),
        ("http://[::1/v1", True),
    ],
)
def test_what_is_not_on_this_host_is_outside_unless_the_operator_says_otherwise(url: str, outside: bool) -> None:
    assert is_outside(url) is outside


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("june: 10", "june: 20", "sum to 100"),
        ("may: 90, june: 10", "may: 110, june: -10", "sum to 100"),
        ("june: 10", "july: 10", "no replica is of the revision 'july'"),
        (", revision: june", "", "has no revision"),
        ("revision: june", "revision: 'june 1'", "letters, digits"),
        ("clinic: {data: inside}", "clinic: {data: insid}", "Invalid enum value"),
        ("models:", "auth: 'off'\nmodels:", "auth: keys"),
    ],
)
def test_shares_that_do_not_fit_the_replicas_are_refused(old: str, new: str, said: str) -> None:
    assert old in TWO
    with pytest.raises(ConfigError) as caught:
        parse(TWO.replace(old, new), "test")
    assert said in str(caught.value)


def test_own_replicas_run_one_revision_and_share_nothing() -> None:
    with pytest.raises(ConfigError, match="traffic without replicas"):
        parse("models: {m: {engine: echo, traffic: {a: 100}}}", "test")


def test_a_key_made_for_inside_says_so_wherever_it_is_told(tmp_path: Path) -> None:
    ledger = open_ledger("", tmp_path, VirtualClock())
    store = KeyStore(ledger, secrets.token_hex(32), VirtualClock())
    store.create("open")
    made = store.create("closed", inside=True)
    assert made.info.inside
    assert {key.name: key.inside for key in store.list()} == {"open": False, "closed": True}
    assert {row.name: row.inside for row in store.rows()} == {"open": False, "closed": True}
    ledger.close()
