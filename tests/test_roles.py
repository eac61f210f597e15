"""Who may do what on the admin listener: every route stands in the table, and each role gets what it says."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from neaptide.clock import RealClock
from neaptide.control import admins as tokens
from neaptide.control.admin import build_app
from neaptide.control.admins import Admins
from neaptide.control.guard import AdminError
from neaptide.control.roles import HOST, NEEDS, ROLES, NewAdmin, may
from neaptide.errors import StorageError
from neaptide.fleet.state import StateDir
from tests.admin_fake import FakeControl, access, admin_server
from tests.cli_run import cli
from tests.dashboard_kit import BEARER, Site, events, look, site

FILLED = {"{id}": "k1", "{admin}": "adm_none", "{name}": "docs.css", "{name:path}": "app.js"}
GUARDED = [key for key, need in NEEDS.items() if need.least]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("roles")) as running:
        yield running


def made(here: Site, role: str, name: str = "") -> tuple[dict[str, str], str]:
    """The headers of a fresh token of this role, and its id."""
    body = json.dumps({"role": role, "name": name}).encode()
    status, _, raw = here.ask("POST", "/api/v1/admins", BEARER, body)
    assert status == 201
    told = json.loads(raw)
    return {"Authorization": f"Bearer {told['token']}"}, told["info"]["id"]


def answered(here: Site, method: str, template: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """(status, error) of a route; streams are not read to their end."""
    path = template
    for place, word in FILLED.items():
        path = path.replace(place, word)
    connection, response = here.open(method, path, headers, b"{}" if method == "POST" else None)
    raw = response.read() if response.status >= 400 else b""
    connection.close()
    is_error = response.status >= 400 and response.getheader("content-type") == "application/json"
    return response.status, json.loads(raw)["error"] if is_error else {}


# ------------------------------------------------------------------------------------------------------- the table


def test_every_route_of_the_app_is_in_the_table_and_no_other(here: Site) -> None:
    app = build_app(here.control, access(here.control.state), front=here.board)
    served = {(m, r.path) for r in app.routes if isinstance(r, Route) for m in (r.methods or set()) - {"HEAD"}}
    assert len(served) >= len(app.routes)
    assert served == set(NEEDS)


def test_a_route_that_is_not_in_the_table_is_not_served(tmp_path: Path) -> None:
    async def endpoint(request: Request) -> Response:
        return Response("secret")

    forgotten = Route("/forgotten", endpoint)
    with pytest.raises(LookupError, match="GET /forgotten is not in NEEDS"):
        build_app(FakeControl(tmp_path), access(tmp_path), pages=(forgotten,))


def test_what_changes_something_has_a_name_in_the_audit_log() -> None:
    spends = {("POST", "/ui/play")}  # a chat: its row is the ledger's
    unnamed = {key for key, need in NEEDS.items() if key[0] != "GET" and not need.action}
    assert unnamed == spends


def test_each_role_may_what_those_before_it_may() -> None:
    assert [[may(role, least) for least in ROLES] for role in ROLES] == [
        [True, False, False], [True, True, False], [True, True, True],
    ]  # fmt: skip
    assert [may(None, least) for least in (None, *ROLES)] == [True, False, False, False]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_gets_what_the_table_says_and_else_a_reason_and_a_remedy(here: Site, role: str) -> None:
    headers, _ = made(here, role, "ann")
    for method, template in GUARDED:
        least = NEEDS[method, template].least
        status, error = answered(here, method, template, headers)
        if may(role, least):  # type: ignore[arg-type]
            assert status not in (401, 403), (method, template, error)
        else:
            assert (status, error["code"]) == (403, "E620"), (method, template)
            assert role in error["why"]
            assert f"neaptide admins create --role {least}" in error["fix"]


def test_nothing_is_answered_without_a_token_but_what_the_table_opens(here: Site) -> None:
    for (method, template), need in NEEDS.items():
        for headers in ({}, {"Authorization": "Bearer na-guess"}):
            status, error = answered(here, method, template, headers)
            if need.least is None:
                assert status == (401 if template == "/" else 200), (method, template)  # the page says how to sign in
            else:
                assert (status, error["code"], bool(error["fix"])) == (401, "E602", True), (method, template)


# ---------------------------------------------------------------------------------------------------------- tokens


def test_a_token_is_shown_once_and_kept_as_a_hash_for_its_owner_alone(here: Site) -> None:
    headers, admin = made(here, "viewer", "ann")
    token, path = headers["Authorization"].removeprefix("Bearer "), here.control.state / "admins.json"
    assert token.startswith(tokens.PREFIX)
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listed = here.ask("GET", "/api/v1/admins", BEARER)[2].decode()
    assert token not in listed
    (row,) = [r for r in json.loads(listed)["rows"] if r["id"] == admin]
    assert (row["name"], row["role"], row["tail"], row["made_by"]) == ("ann", "viewer", token[-4:], "host")


def test_a_revoked_token_is_refused_and_so_are_the_sessions_of_its_links(here: Site) -> None:
    headers, admin = made(here, "operator")
    link = json.loads(here.ask("POST", "/ui/ticket", headers)[2])["url"]
    _, told, _ = here.ask("GET", link.removeprefix(here.source.admin_url.rstrip("/")))
    browser = {"Cookie": told["set-cookie"].partition(";")[0], "Sec-Fetch-Site": "same-origin"}
    assert [here.ask("GET", "/api/v1/status", h)[0] for h in (headers, browser)] == [200, 200]
    streams = [here.open("GET", "/ui/live", h) for h in (headers, browser, BEARER)]
    heard = [events(response) for _, response in streams]
    assert [next(told)[0] for told in heard] == ["snapshot"] * 3
    assert here.ask("DELETE", f"/api/v1/admins/{admin}", BEARER)[0] == 200
    here.beat(look(1))
    assert [next(told, ("end", None))[0] for told in heard] == ["end", "end", "tick"]
    for connection, _ in streams:
        connection.close()
    assert [here.ask("GET", "/api/v1/status", h)[0] for h in (headers, browser)] == [401, 401]
    assert here.ask("DELETE", f"/api/v1/admins/{admin}", BEARER)[0] == 200  # a second time changes nothing


def test_the_hosts_own_token_cannot_be_revoked(here: Site) -> None:
    status, error = here.ask("DELETE", "/api/v1/admins/host", BEARER)[::2]
    assert (status, json.loads(error)["error"]["code"]) == (409, "E621")
    assert here.ask("GET", "/api/v1/status", BEARER)[0] == 200


@pytest.mark.parametrize("body", [b"{}", b'{"role": "root"}', b'{"role": "viewer", "name": "\\n"}', b'{"role": null}'])
def test_a_token_is_asked_for_strictly(here: Site, body: bytes) -> None:
    status, _, raw = here.ask("POST", "/api/v1/admins", BEARER, body)
    assert (status, json.loads(raw)["error"]["code"]) == (400, "E605")


def test_tokens_outlive_a_restart(here: Site) -> None:
    headers, admin = made(here, "viewer")
    again = access(here.control.state)
    assert again.find(headers["Authorization"].removeprefix("Bearer ")) == (admin, "", "viewer", "token")
    assert again.find("na-other") is None


async def filled(state: StateDir) -> Admins:
    found = Admins(state, RealClock())
    for _ in range(tokens.MAX_ROWS):
        await found.create(NewAdmin(role="viewer"), HOST)
    return found


def test_tokens_are_bounded_and_a_revoked_one_makes_room(tmp_path: Path) -> None:
    async def body() -> None:
        found = await filled(StateDir(tmp_path))
        with pytest.raises(AdminError, match="there are 256"):
            await found.create(NewAdmin(role="viewer"), HOST)
        first = (await found.list()).rows[1]
        await found.revoke(first.id)
        await found.create(NewAdmin(role="viewer"), HOST)
        assert first.id not in {r.id for r in (await found.list()).rows}

    asyncio.run(body())


@pytest.mark.parametrize("content", [b"{", b'[{"id": "a"}]', b'[{"role": "root"}]'])
def test_a_damaged_file_of_tokens_is_named_with_its_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admins.json").write_bytes(content)
    with pytest.raises(StorageError) as refused:
        access(tmp_path)
    assert refused.value.code == "E551"
    assert "backup" in refused.value.fix


# ---------------------------------------------------------------------------------------------------- the browser


def test_a_link_signs_in_with_the_role_of_its_token_or_less(here: Site) -> None:
    viewer, _ = made(here, "viewer")
    for headers, asked, got in (
        (BEARER, b"", "admin"), (BEARER, b'{"role": "viewer"}', "viewer"), (viewer, b"", "viewer"),
    ):  # fmt: skip
        url = json.loads(here.ask("POST", "/ui/ticket", headers, asked)[2])["url"]
        _, told, _ = here.ask("GET", url.removeprefix(here.source.admin_url.rstrip("/")))
        browser = {"Cookie": told["set-cookie"].partition(";")[0], "Sec-Fetch-Site": "same-origin"}
        session = json.loads(here.ask("GET", "/ui/session", browser)[2])
        assert session["role"] == got
        signed = {**browser, session["header"]: session["token"]}
        status = here.ask("POST", "/api/v1/keys", signed, b'{"name": "x"}')[0]
        assert status == (201 if got == "admin" else 403)


def test_a_link_of_a_higher_role_than_its_token_is_refused(here: Site) -> None:
    viewer, _ = made(here, "viewer")
    status, _, raw = here.ask("POST", "/ui/ticket", viewer, b'{"role": "operator"}')
    assert (status, json.loads(raw)["error"]["code"]) == (403, "E620")


# ------------------------------------------------------------------------------------------------ the command line


def test_the_verbs_make_list_and_revoke_tokens_and_the_environment_names_one(tmp_path: Path) -> None:
    control = FakeControl(tmp_path / "state")
    with admin_server(control) as url:
        at = ("--state", str(control.state))
        done = cli("admins", "create", "--role", "viewer", "--name", "ann", *at)
        assert "not shown again" in done.stderr
        token = done.stdout.strip()
        assert token.startswith(tokens.PREFIX)

        def elsewhere(*args: str) -> subprocess.CompletedProcess[str]:
            nowhere = ("--state", str(tmp_path / "nowhere"))
            return cli(*args, *nowhere, NEAPTIDE_ADMIN_URL=url, NEAPTIDE_ADMIN_TOKEN=token)

        listed = json.loads(elsewhere("admins", "list", "--json").stdout)["rows"]
        refused = elsewhere("keys", "create")
        assert (refused.returncode, "error[E620]" in refused.stderr) == (4, True)
        assert cli("admins", "revoke", listed[1]["id"], *at).returncode == 0
        assert elsewhere("status").returncode == 4


def test_an_address_without_a_token_is_not_given_the_hosts_own(tmp_path: Path) -> None:
    done = cli("status", "--state", str(tmp_path), NEAPTIDE_ADMIN_URL="http://127.0.0.1:9/")
    assert (done.returncode, "error[E106]" in done.stderr) == (2, True)
