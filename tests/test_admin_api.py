"""The admin API over real sockets: who gets in, what is refused, and what is answered."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neaptide.clock import RealClock
from neaptide.control.admin import OPERATIONS, build_app
from neaptide.control.admins import Admins
from neaptide.control.guard import MAX_BODY
from neaptide.control.port import Status
from neaptide.errors import ConfigError, StorageError
from neaptide.fleet.state import StateDir
from tests.admin_fake import TOKEN, FakeControl, access, admin_server

BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Api:
    """The server under test, asked with raw HTTP."""

    def __init__(self, control: FakeControl, url: str) -> None:
        self.control, self.port = control, urlsplit(url).port

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """(status, headers in lower case, JSON or text) with the admin token unless `headers` are given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, BEARER if headers is None else headers)
        answer = connection.getresponse()
        raw = answer.read()
        connection.close()
        told = {k.lower(): v for k, v in answer.getheaders()}
        is_json = told.get("content-type") == "application/json"
        return answer.status, told, json.loads(raw) if is_json else raw.decode()

    def error(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        """(status, code) of an answer that must be an error of the admin API."""
        status, _, told = self.ask(method, path, body, headers)
        assert set(told) == {"error"}, told
        assert set(told["error"]) == {"code", "what", "why", "fix"}
        return status, told["error"]["code"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    control = FakeControl(tmp_path_factory.mktemp("admin"))
    with admin_server(control) as url:
        yield Api(control, url)


EVERY = [(op.method, f"/api/v1{op.path}".replace("{id}", "k1").replace("{admin}", "adm_none")) for op in OPERATIONS]


@pytest.mark.parametrize(("method", "path"), EVERY)
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}x"}],
    ids=["none", "wrong", "basic", "longer"],
)
def test_every_operation_needs_the_token(api: Api, method: str, path: str, headers: dict[str, str]) -> None:
    asked = len(api.control.asked)
    assert api.error(method, path, b"{}", headers) == (401, "E602")
    assert len(api.control.asked) == asked


def test_a_refused_token_names_the_scheme(api: Api) -> None:
    assert api.ask("GET", "/api/v1/status", headers={})[1]["www-authenticate"] == "Bearer"


def test_health_and_documents_need_no_token(api: Api) -> None:
    for path in ("/health", "/docs", "/docs/docs.css", "/docs/docs.js", "/openapi.json", "/openapi-inference.json"):
        assert api.ask("GET", path, headers={})[0] == 200, path


@pytest.mark.parametrize(
    "path", ["/docs/../api/v1/status", "/docs/%2e%2e/api/v1/status", "//api/v1/status", "/docs/words.json"]
)
def test_no_odd_path_leads_around_the_token(api: Api, path: str) -> None:
    status, _, told = api.ask("GET", path, headers={})
    assert status in (401, 404)
    assert "replicas" not in told


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_a_foreign_host_is_refused_even_with_the_token(api: Api, host: str) -> None:
    assert api.error("GET", "/api/v1/status", headers={**BEARER, "Host": host}) == (403, "E603")
    assert api.ask("GET", "/docs", headers={"Host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8001", "127.0.0.1:9", "[::1]:8001", "10.1.2.3"])
def test_local_names_and_addresses_are_served(api: Api, host: str) -> None:
    assert api.ask("GET", "/api/v1/status", headers={**BEARER, "Host": host})[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("a.ops.example.com:8001", 200),
        ("A.OPS.example.com", 200),
        ("ops.example.com", 403),
        ("b.a.ops.example.com", 403),
    ],
)
def test_a_name_of_the_certificate_is_served(tmp_path: Path, host: str, status: int) -> None:
    app = build_app(FakeControl(tmp_path), access(tmp_path), ("*.ops.example.com",))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, str]:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"host", host.encode())],
             "query_string": b"", "client": None}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == status


def test_two_hosts_in_one_request_are_refused(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
        assert raw.recv(4096).split(b" ")[1] in (b"400", b"403")


def test_errors_carry_the_security_headers_too_and_no_cors(api: Api) -> None:
    for headers in (BEARER, {}, {**BEARER, "Origin": "https://evil.example"}):
        _, told, _ = api.ask("GET", "/api/v1/status", headers=headers)
        assert "default-src 'self'" in told["content-security-policy"]
        assert told["x-content-type-options"] == "nosniff"
        assert told["cache-control"] == "no-store"
        assert not any(name.startswith("access-control-") for name in told)
    assert api.ask("OPTIONS", "/api/v1/status", headers={**BEARER, "Origin": "https://evil.example"})[0] == 405


def test_status_is_the_struct_that_control_gave(api: Api) -> None:
    status, _, told = api.ask("GET", "/api/v1/status")
    assert status == 200
    assert set(told) == set(Status.__struct_fields__)


def test_apply_takes_the_text_and_dry_run(api: Api) -> None:
    text = b"models: {small: {engine: echo}}\n"
    _, _, told = api.ask("POST", "/api/v1/apply?dry_run=1", text)
    assert (told["dry_run"], told["added"], told["removed"]) == (True, ["small"], ["guide"])
    assert api.control.asked[-1] == ("apply", text.decode(), True)


def test_a_wrong_configuration_is_400_with_the_configs_own_code(api: Api) -> None:
    assert api.error("POST", "/api/v1/apply", b"modles: {}") == (400, "E104")


def test_a_text_that_is_not_utf8_is_refused(api: Api) -> None:
    assert api.error("POST", "/api/v1/apply", b"\xff\xfe") == (400, "E605")


def test_keys_are_made_listed_and_revoked(api: Api) -> None:
    status, _, made = api.ask("POST", "/api/v1/keys", b'{"name": "laptop", "models": ["guide"]}')
    assert (status, made["key"]) == (201, "sk-neap-secretwxyz")
    rows = api.ask("GET", "/api/v1/keys")[2]["rows"]
    assert made["info"] in rows
    assert "secret" not in json.dumps(rows)
    assert api.ask("DELETE", f"/api/v1/keys/{made['info']['id']}")[2]["disabled"] is True
    assert api.error("DELETE", "/api/v1/keys/nobody") == (404, "E601")


def test_of_a_key_only_what_is_named_changes(api: Api) -> None:
    body = b'{"expires_wall_s": 1800000000, "scopes": ["inference"], "rpm": 60, "tpm": 9000}'
    made = api.ask("POST", "/api/v1/keys", body)[2]["info"]
    assert (made["expires_wall_s"], made["scopes"], made["rpm"], made["concurrency"]) == (
        1.8e9,
        ["inference"],
        60,
        None,
    )
    path = f"/api/v1/keys/{made['id']}"
    status, _, changed = api.ask("PATCH", path, b'{"rpm": null, "concurrency": 4, "scopes": []}')
    assert (status, changed) == (200, {**made, "rpm": None, "concurrency": 4, "scopes": []})
    assert changed in api.ask("GET", "/api/v1/keys")[2]["rows"]
    assert api.error("PATCH", "/api/v1/keys/nobody", b'{"rpm": 1}') == (404, "E601")
    for wrong in (b'{"rpm": "1"}', b'{"scopes": ["admin"]}', b'{"name": "x"}', b'{"scopes": null}'):
        assert api.error("PATCH", path, wrong) == (400, "E605")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"nmae": "x"}', b'{"name": 7}', b'{"priority": "urgent"}', b'{"name": null}']
)
def test_a_key_request_that_is_not_exact_is_refused(api: Api, body: bytes) -> None:
    held = len(api.control.held)
    assert api.error("POST", "/api/v1/keys", body) == (400, "E605")
    assert len(api.control.held) == held


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=5&limit=6", "since_s=nan", "since_s=inf", "until_s=1e999", "sort=asc"],
)
def test_a_usage_query_that_is_not_exact_is_refused(api: Api, query: str) -> None:
    asked = len(api.control.asked)
    assert api.error("GET", f"/api/v1/usage?{query}") == (400, "E605")
    assert len(api.control.asked) == asked


def test_usage_is_paged_by_cursor(api: Api) -> None:
    ids: list[str] = []
    cursor = ""
    while True:
        page = api.ask("GET", f"/api/v1/usage?limit=3{cursor}")[2]
        ids += [row["usage"]["request_id"] for row in page["rows"]]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert ids == [f"r{i}" for i in range(7)]


def test_totals_are_grouped_by_a_known_column_only(api: Api) -> None:
    assert api.ask("GET", "/api/v1/usage/totals?by=tenant")[2]["by"] == "tenant"
    assert api.error("GET", "/api/v1/usage/totals?by=password") == (400, "E605")


def test_decisions_come_newest_first_and_bounded(api: Api) -> None:
    rows = api.ask("GET", "/api/v1/decisions?limit=2")[2]["rows"]
    assert [row["reasons"] for row in rows] == [["reason 5"], ["reason 4"]]
    assert api.error("GET", "/api/v1/decisions?limit=501") == (400, "E605")


def test_scaling_is_told_explained_set_and_cleared(api: Api) -> None:
    rows = api.ask("GET", "/api/v1/scale")[2]["rows"]
    assert [(row["model"], row["wanted"], row["scalable"]) for row in rows] == [("guide", 2, True), ("mock", 1, False)]
    why = api.ask("GET", "/api/v1/scale/why?model=guide&limit=2")[2]["rows"]
    assert [row["choice"]["sentence"] for row in why] == ["guide: reason 5", "guide: reason 4"]
    body = b'{"model": "guide", "replicas": 3, "for_s": 60, "by": "ann"}'
    assert api.ask("POST", "/api/v1/scale/override", body)[2]["override"]["count"] == 3
    assert api.ask("DELETE", "/api/v1/scale/override?model=guide")[2]["override"] is None
    assert api.error("DELETE", "/api/v1/scale/override") == (400, "E605")
    assert api.error("GET", "/api/v1/scale/why?limit=201") == (400, "E605")
    assert api.error("GET", "/api/v1/scale/shadows?days=36") == (400, "E605")
    assert len(api.ask("GET", "/api/v1/scale/shadows?days=2")[2]["rows"]) == 2


def test_backup_and_down_tell_what_was_begun(api: Api) -> None:
    assert api.ask("POST", "/api/v1/backup")[0] == 201
    assert api.ask("POST", "/api/v1/down?grace_s=3")[0] == 202
    assert api.control.asked[-1] == ("down", 3.0)
    assert api.error("POST", "/api/v1/down?grace_s=-1") == (400, "E605")


def test_an_unknown_path_and_a_wrong_method_say_so(api: Api) -> None:
    assert api.error("GET", "/api/v1/nothing") == (404, "E606")
    assert api.error("PUT", "/api/v1/keys") == (405, "E607")


def test_a_body_that_announces_too_much_is_refused_before_it_is_read(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=20) as raw:
        head = f"POST /api/v1/apply HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
        raw.sendall(f"{head}content-length: {MAX_BODY + 1}\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_counted_while_it_comes(api: Api) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=20)
    parts = iter([b"#" * 65536] * (MAX_BODY // 65536 + 1))
    connection.request("POST", "/api/v1/apply", parts, BEARER, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_an_error_of_control_keeps_its_status_and_words(api: Api) -> None:
    api.control.broken = StorageError("disk full", why="0 bytes free", fix="free some", code="E501")
    try:
        status, _, told = api.ask("GET", "/api/v1/status")
    finally:
        api.control.broken = None
    assert (status, told["error"]) == (
        507,
        {"code": "E501", "what": "disk full", "why": "0 bytes free", "fix": "free some"},
    )


def test_a_defect_is_a_500_with_headers_and_without_a_traceback(api: Api) -> None:
    api.control.broken = ZeroDivisionError("x / 0")
    try:
        status, headers, told = api.ask("GET", "/api/v1/status")
    finally:
        api.control.broken = None
    assert (status, told["error"]["code"]) == (500, "E999")
    assert headers["x-frame-options"] == "DENY"
    assert "Traceback" not in json.dumps(told)


def test_a_short_token_of_the_host_is_refused(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.secret(state.admin_token, "short")
    with pytest.raises(ConfigError, match="fewer than 16"):
        Admins(state, RealClock())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "DELETE"]),
    path=st.sampled_from([p for _, p in EVERY]),
    body=st.binary(max_size=200),
)
def test_whatever_comes_is_answered_with_json_and_never_with_a_500(
    api: Api, method: str, path: str, body: bytes
) -> None:
    status, headers, _ = api.ask(method, path, body)
    assert status < 500
    assert headers["content-type"] == "application/json"
