"""Keys: shown once, kept as a keyed hash, gone from the gateways' table when revoked."""

import re
import secrets
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neaptide.clock import VirtualClock
from neaptide.config import parse
from neaptide.control.desired import slow_part
from neaptide.control.keys import KeyStore, digest
from neaptide.cost.accounts import Terms
from neaptide.cost.ledger import Ledger, open_ledger
from neaptide.errors import RequestError, StorageError
from neaptide.table import KeyRow, Quota

PEPPER = secrets.token_hex(32)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger("", tmp_path, VirtualClock())
    yield opened
    opened.close()


@pytest.fixture
def store(ledger: Ledger) -> KeyStore:
    return KeyStore(ledger, PEPPER, VirtualClock(wall_s=1_790_000_000.0))


def test_a_key_is_returned_once_and_stored_as_a_keyed_hash(store: KeyStore, ledger: Ledger, tmp_path: Path) -> None:
    made = store.create("ci", priority="high", models=("guide", "small"))
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", made.secret)
    expected = blake2b(made.secret.encode(), key=bytes.fromhex(PEPPER), digest_size=32).hexdigest()
    assert store.rows() == (
        KeyRow(
            id=made.info.id,
            digest=expected,
            name="ci",
            tenant="default",
            project="default",
            priority="high",
            models=("guide", "small"),
        ),
    )
    assert store.list() == (made.info,)
    assert made.info.last_four == made.secret[-4:]
    ledger.close()
    for path in tmp_path.iterdir():
        assert made.secret.encode() not in path.read_bytes()
        assert made.secret[:20].encode() not in path.read_bytes()


def test_keys_are_all_different(store: KeyStore) -> None:
    made = [store.create() for _ in range(20)]
    assert len({m.secret for m in made}) == len({m.info.id for m in made}) == 20
    assert len(store.rows()) == 20


def test_a_revoked_key_is_kept_for_the_books_and_gone_from_the_table(store: KeyStore) -> None:
    first, second = store.create("a"), store.create("b")
    revoked = store.revoke(first.info.id)
    assert revoked.disabled
    assert revoked.disabled_s == 1_790_000_000.0
    assert store.revoke(first.info.id) == revoked
    assert [r.id for r in store.rows()] == [second.info.id]
    assert [k.disabled for k in sorted(store.list(), key=lambda k: k.name)] == [True, False]
    with pytest.raises(RequestError, match="no key 'nothing'") as caught:
        store.revoke("nothing")
    assert caught.value.status == 404


def test_a_given_key_is_adopted_once_and_stays_revoked(store: KeyStore) -> None:
    given = "sk-" + secrets.token_urlsafe(32)
    info = store.adopt(given, "default")
    assert store.adopt(given, "again") == info
    assert store.rows()[0].digest == digest(given, PEPPER)
    store.revoke(info.id)
    assert store.adopt(given, "again").disabled
    assert store.rows() == ()


@pytest.mark.parametrize(
    "secret", ["", "short", "sk-" + "x" * 300, "sk-has space in it is long", "sk-ünïcode-is-not-a-header"]
)
def test_what_cannot_be_a_key_is_refused(store: KeyStore, secret: str) -> None:
    with pytest.raises(RequestError):
        store.adopt(secret, "x")
    assert store.list() == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": "urgent"},
        {"name": "x" * 200},
        {"name": "two\nlines"},
        {"models": ("a\0b",)},
        {"project": "nul\0"},
        {"tenant": "a/b"},  # its project c would have the budgets of project b/c of the tenant a
    ],
)
def test_a_key_that_is_not_well_described_is_refused(store: KeyStore, wrong: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        store.create(**wrong)  # type: ignore[arg-type]
    assert caught.value.status == 400
    assert store.list() == ()


def test_an_organisation_and_its_project_come_into_being_with_their_first_key(store: KeyStore) -> None:
    first = store.create("a", tenant="acme", project="search").info
    second = store.create("b", tenant="zeta", project="search").info
    assert {(k.tenant, k.project) for k in store.rows()} == {("acme", "search"), ("zeta", "search")}
    assert (first.team, second.team) == ("default", "default")


def test_a_project_of_another_team_is_refused(store: KeyStore) -> None:
    store.create("a", tenant="acme", team="red", project="search")
    with pytest.raises(RequestError) as caught:
        store.create("b", tenant="acme", team="blue", project="search")
    assert (caught.value.status, caught.value.param) == (400, "project")
    assert len(store.list()) == 1


TERMS = Terms(expires_s=1_790_000_001.0, scopes=("models",), rpm=60, tpm=9000, concurrency=4)


def test_gateways_are_told_a_key_s_terms_and_changes_of_them(store: KeyStore, ledger: Ledger) -> None:
    made = store.create("ci", terms=TERMS).info
    (row,) = store.rows()
    assert (row.expires_wall_s, row.scopes, row.quotas) == (1_790_000_001.0, ("models",), (Quota("key", 60, 9000, 4),))
    changed = store.set(made.id, {"rpm": None, "scopes": (), "expires_s": None})
    assert changed == msgspec.structs.replace(made, rpm=None, scopes=(), expires_s=None)
    (row,) = KeyStore(ledger, PEPPER, VirtualClock()).rows()
    assert (row.expires_wall_s, row.scopes, row.quotas) == (None, (), (Quota("key", None, 9000, 4),))
    store.set(made.id, {"tpm": None, "concurrency": None})
    assert store.rows()[0].quotas == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rpm": 0},
        {"tpm": -1},
        {"concurrency": 10**12 + 1},
        {"scopes": ("admin",)},
        {"scopes": ("models", "models")},
        {"expires_s": 1_790_000_000.0},
        {"expires_s": 1e300},
        {"expires_s": float("nan")},
    ],
)
def test_terms_that_make_no_sense_are_refused(store: KeyStore, wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        store.create(terms=Terms(**wrong))
    assert caught.value.status == 400
    assert store.list() == ()
    made = store.create(terms=TERMS).info
    with pytest.raises(RequestError):
        store.set(made.id, wrong)
    assert store.list() == (made,)


def test_of_an_expired_key_the_limits_can_be_changed_and_of_a_revoked_one_nothing(ledger: Ledger) -> None:
    clock = VirtualClock(wall_s=1_790_000_000.0)
    store = KeyStore(ledger, PEPPER, clock)
    made = store.create(terms=TERMS).info
    clock.advance(10.0)
    assert store.set(made.id, {"rpm": 5}).rpm == 5
    assert store.rows()[0].expires_wall_s == TERMS.expires_s  # so that gateways can say when it was
    store.revoke(made.id)
    with pytest.raises(RequestError, match="was revoked"):
        store.set(made.id, {"rpm": 6})
    with pytest.raises(RequestError, match="no key 'nothing'"):
        store.set("nothing", {"rpm": 6})


def test_a_tenant_s_limits_stand_beside_those_of_its_keys() -> None:
    settings = parse("models: {guide: {}}\ntenants: {acme: {rpm: 9, concurrency: 2}, zeta: {weight: 2}}\n", "x")
    own = Quota("key", 5)
    keys = (
        KeyRow(id="a", digest="a", tenant="acme", quotas=(own,)),
        KeyRow(id="b", digest="b", tenant="acme"),
        KeyRow(id="c", digest="c", tenant="zeta"),
    )
    told = slow_part(settings, (), keys, {}, {}).keys
    theirs = Quota("tenant", 9, None, 2)
    assert [k.quotas for k in told] == [(own, theirs), (theirs,), ()]
    assert told[2] is keys[2]


def test_another_pepper_is_noticed_before_every_key_fails(store: KeyStore, ledger: Ledger) -> None:
    store.create()
    with pytest.raises(StorageError, match="not the one that the ledger's keys were hashed with"):
        KeyStore(ledger, secrets.token_hex(32), VirtualClock())
    with pytest.raises(StorageError, match="does not hold 32 bytes"):
        KeyStore(ledger, "not hex", VirtualClock())
    assert len(KeyStore(ledger, PEPPER, VirtualClock()).rows()) == 1
