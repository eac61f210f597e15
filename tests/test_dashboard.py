"""The live page's server side: who gets in, what is told, what the playground passes on."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import string
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from neaptide.clock import VirtualClock
from neaptide.control.port import NewOverride
from neaptide.control.reasons import reason
from neaptide.dashboard.app import MAX_PAGES
from neaptide.dashboard.pages import UI
from neaptide.dashboard.sessions import MAX_SESSIONS, MAX_TICKETS, SESSION_S, TICKET_S, Sessions, matches
from neaptide.types import Choice, Override, Plan
from tests.admin_fake import write_state
from tests.cli_run import cli
from tests.dashboard_kit import BEARER, Site, events, look, site
from tools import vendor_ui

CHANGE = b'{"name": "x"}'  # the body of POST /api/v1/keys


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as running:
        yield running


# ------------------------------------------------------------------------------------------- tickets and sessions


def test_a_ticket_works_once() -> None:
    sessions = Sessions(VirtualClock())
    ticket = sessions.ticket()
    assert sessions.redeem(ticket)
    assert sessions.redeem(ticket) is None
    assert sessions.redeem("made up") is None


def test_a_ticket_ends_after_ten_minutes() -> None:
    clock = VirtualClock()
    sessions = Sessions(clock)
    late, in_time = sessions.ticket(), sessions.ticket()
    clock.advance(TICKET_S - 1)
    assert sessions.redeem(in_time)
    clock.advance(1)
    assert sessions.redeem(late) is None


def test_a_session_ends_after_twelve_hours() -> None:
    clock = VirtualClock()
    sessions = Sessions(clock)
    cookie = sessions.redeem(sessions.ticket())
    assert cookie
    clock.advance(SESSION_S - 1)
    assert sessions.find(cookie)
    clock.advance(1)
    assert sessions.find(cookie) is None
    assert len(sessions) == 0


def test_tickets_and_sessions_are_bounded_and_the_oldest_goes() -> None:
    sessions = Sessions(VirtualClock())
    tickets = [sessions.ticket() for _ in range(MAX_TICKETS + 1)]
    assert sessions.redeem(tickets[0]) is None
    assert sessions.redeem(tickets[1])
    cookies = [sessions.redeem(sessions.ticket()) or "" for _ in range(MAX_SESSIONS + 5)]
    assert len(sessions) == MAX_SESSIONS
    assert sessions.find(cookies[0]) is None
    assert sessions.find(cookies[-1])


def test_each_session_has_a_token_of_its_own() -> None:
    sessions = Sessions(VirtualClock())
    one, other = (sessions.find(sessions.redeem(sessions.ticket()) or "") for _ in range(2))
    assert one is not None
    assert other is not None
    assert matches(one, one.token)
    assert not matches(one, other.token)
    assert not matches(one, "")


# --------------------------------------------------------------------------------------------------- the way in


def test_without_a_session_the_page_says_how_to_get_a_link(here: Site) -> None:
    status, headers, raw = here.ask("GET", "/")
    assert status == 401
    assert "neaptide dashboard" in raw.decode()
    assert headers["content-type"].startswith("text/html")
    assert "set-cookie" not in headers


def test_a_link_needs_the_bearer_token(here: Site) -> None:
    assert here.ask("POST", "/ui/ticket")[0] == 401
    browser = here.sign_in()
    assert here.ask("POST", "/ui/ticket", {**browser, **here.token(browser)})[0] == 401
    assert here.ask("GET", here.link())[0] == 200


def test_a_link_opens_the_page_once_and_hands_out_a_strict_cookie(here: Site) -> None:
    link = here.link()
    status, headers, raw = here.ask("GET", link)
    assert status == 200
    assert b'<div id="page">' in raw
    assert headers["cache-control"] == "no-store"
    name, _, flags = headers["set-cookie"].partition("=")
    assert name == here.cookie_name  # cookies do not know ports
    assert {f.strip() for f in flags.split(";")[1:]} == {"Path=/", "HttpOnly", "SameSite=Strict", "Max-Age=43200"}
    assert here.ask("GET", link)[0] == 401
    cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
    assert here.ask("GET", link, cookie)[0] == 200  # reloading the page with its old address
    assert here.ask("GET", "/", cookie)[0] == 200


def test_a_link_that_is_old_opens_nothing(here: Site) -> None:
    link = here.link()
    here.clock.advance(TICKET_S)
    status, headers, _ = here.ask("GET", link)
    assert (status, "set-cookie" in headers) == (401, False)


def test_a_session_knows_who_asked_for_its_link(here: Site) -> None:
    status, _, raw = here.ask("POST", "/ui/ticket", BEARER, b'{"by": "ann"}')
    assert status == 201
    _, headers, _ = here.ask("GET", json.loads(raw)["url"].removeprefix(here.source.admin_url.rstrip("/")))
    cookie = {"Cookie": headers["set-cookie"].partition(";")[0]}
    assert json.loads(here.ask("GET", "/ui/session", cookie)[2])["by"] == "ann"
    assert json.loads(here.ask("GET", "/ui/session", here.sign_in())[2])["by"] == ""


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"by": 1}', b'{"by": "x", "role": "root"}', b'{"by": "%s"}' % (b"x" * 65)]
)
def test_a_link_is_asked_for_strictly(here: Site, body: bytes) -> None:
    status, _, raw = here.ask("POST", "/ui/ticket", BEARER, body)
    assert (status, json.loads(raw)["error"]["code"]) == (400, "E605")


def test_a_count_is_set_by_hand_with_the_sessions_token_alone(here: Site) -> None:
    browser, body = here.sign_in(), b'{"model": "guide", "replicas": 2, "for_s": 900, "by": "ann"}'
    place, clear = "/api/v1/scale/override", "/api/v1/scale/override?model=guide"
    signed = {**browser, **here.token(browser)}
    guessed, foreign = {**browser, "x-neaptide-session": "guess"}, {**signed, "Sec-Fetch-Site": "cross-site"}
    for headers in ({}, browser, guessed, foreign):
        assert here.ask("POST", place, headers, body)[0] == 401
        assert here.ask("DELETE", clear, headers)[0] == 401
    assert here.control.asked == []
    assert here.ask("POST", place, signed, b'{"model": "guide", "replicas": "2"}')[0] == 400
    assert here.ask("POST", place, signed, body)[0] == 200
    assert here.ask("DELETE", clear, signed)[0] == 200
    assert here.control.asked == [NewOverride(model="guide", replicas=2, for_s=900, by="ann"), ("clear", "guide")]


def test_a_count_that_is_set_by_hand_is_told_to_every_page(here: Site) -> None:
    browser = here.sign_in()
    here.beat(look(0))
    connection, response = here.open("GET", "/ui/live", browser)
    stream = events(response)
    assert next(stream)[1]["state"]["models"][0]["override"] is None
    here.beat(look(1, override=Override(count=2, until_wall_s=1_760_003_600.0, by="ann")))
    told = dict([next(stream), next(stream)])
    connection.close()
    assert told["state"]["models"][0]["override"] == {"count": 2, "until_wall_s": 1_760_003_600.0, "by": "ann"}


def test_a_session_may_read_and_with_its_token_change(here: Site) -> None:
    browser = here.sign_in()
    assert here.ask("GET", "/api/v1/keys", browser)[0] == 200
    assert here.ask("POST", "/api/v1/keys", browser, CHANGE)[0] == 401
    assert here.ask("POST", "/api/v1/keys", {**browser, "x-neaptide-session": "guess"}, CHANGE)[0] == 401
    assert here.ask("DELETE", "/api/v1/keys/k1", browser)[0] == 401
    assert here.control.asked == []
    assert here.ask("POST", "/api/v1/keys", {**browser, **here.token(browser)}, CHANGE)[0] == 201


def test_another_sessions_token_changes_nothing(here: Site) -> None:
    one, other = here.sign_in(), here.sign_in()
    assert here.ask("POST", "/api/v1/keys", {**one, **here.token(other)}, CHANGE)[0] == 401


@pytest.mark.parametrize("asker", ["cross-site", "same-site"])
def test_a_page_of_another_origin_or_port_gets_nothing(here: Site, asker: str) -> None:
    browser = here.sign_in()
    foreign = {**browser, **here.token(browser), "Sec-Fetch-Site": asker}
    for path in ("/api/v1/status", "/ui/session", "/ui/live", "/ui/history"):
        assert here.ask("GET", path, foreign)[0] == 401, path
    assert here.ask("POST", "/api/v1/keys", foreign, CHANGE)[0] == 401


def test_a_browser_that_does_not_say_who_asks_is_known_by_its_origin(here: Site) -> None:
    cookie = {"Cookie": here.sign_in()["Cookie"]}
    assert here.ask("GET", "/ui/session", cookie)[0] == 200
    assert here.ask("GET", "/ui/session", {**cookie, "Origin": f"http://127.0.0.1:{here.port}"})[0] == 200
    assert here.ask("GET", "/ui/session", {**cookie, "Origin": "http://127.0.0.1:1"})[0] == 401


def test_the_bearer_token_works_as_before(here: Site) -> None:
    assert here.ask("POST", "/api/v1/keys", BEARER, CHANGE)[0] == 201
    assert here.ask("GET", "/ui/history", BEARER)[0] == 200


def test_signing_out_ends_the_session(here: Site) -> None:
    browser = here.sign_in()
    status, headers, _ = here.ask("DELETE", "/ui/session", {**browser, **here.token(browser)})
    assert status == 204
    assert "Max-Age=0" in headers["set-cookie"]
    assert here.ask("GET", "/api/v1/status", browser)[0] == 401


@pytest.mark.parametrize("path", ["/ui/live", "/ui/history", "/ui/session", "/ui/nothing", "/ui/vendor/vendor.json"])
def test_what_the_page_asks_for_needs_the_session(here: Site, path: str) -> None:
    assert here.ask("GET", path)[0] == 401


def test_damaged_cookies_open_nothing(here: Site) -> None:
    for cookie in (f"{here.cookie_name}=", f"{here.cookie_name}=x; ;;=", "\x80\xff=1", f"{here.cookie_name}[]=1"):
        assert here.ask("GET", "/ui/session", {"Cookie": cookie})[0] == 401


def test_the_command_prints_a_link_that_opens_the_page(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        write_state(tmp_path, "http://127.0.0.1:9/v1", here.source.admin_url)
        told = json.loads(cli("dashboard", "--state", str(tmp_path), "--json").stdout)
        assert told["valid_s"] == TICKET_S
        assert here.ask("GET", told["url"].removeprefix(here.source.admin_url.rstrip("/")))[0] == 200


def test_the_command_says_when_nothing_runs(tmp_path: Path) -> None:
    done = cli("dashboard", "--state", str(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert "E401" in done.stderr


# ------------------------------------------------------------------------------------------------- the page's files


def test_the_policy_allows_our_own_files_and_the_import_map_by_its_hash(here: Site) -> None:
    _, headers, raw = here.ask("GET", here.link())
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    (inline,) = re.findall(r"<script(?![^>]*src)[^>]*>(.*?)</script>", raw.decode(), re.S)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'" in policy
    for target in json.loads(inline)["imports"].values():
        assert here.ask("GET", target)[0] == 200


def test_files_are_open_compressed_and_known_again(here: Site) -> None:
    status, headers, plain = here.ask("GET", "/ui/vendor/uplot.js")
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    _, packed, raw = here.ask("GET", "/ui/vendor/uplot.js", {"Accept-Encoding": "gzip"})
    assert packed["content-encoding"] == "gzip"
    assert len(raw) < len(plain) / 2
    status, _, nothing = here.ask("GET", "/ui/vendor/uplot.js", {"If-None-Match": headers["etag"]})
    assert (status, nothing) == (304, b"")


@pytest.mark.parametrize("path", ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui//etc/passwd", "/ui/index.html"])
def test_no_other_file_is_served(here: Site, path: str) -> None:
    assert here.ask("GET", path, BEARER)[0] == 404


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        assert "style" not in told
        assert not [name for name in told if name.startswith("on")]
        self.targets += [value for name in ("src", "href") if (value := told.get(name))]


def test_the_page_names_no_other_host() -> None:
    for document in ("index.html", "signin.html"):
        assert all(t.startswith("/") for t in Links((UI / document).read_text(encoding="utf-8")).targets)
    for path in UI.glob("*.*s"):
        text = path.read_text(encoding="utf-8")
        assert re.findall(r"(?:https?:)?//[\w-]+\.\w+", text.replace("// ", "")) == [], path.name
        assert "@import" not in text


def test_the_vendored_libraries_are_those_that_were_published() -> None:
    assert vendor_ui.complaints(vendor_ui.VENDOR) == []
    notice = (UI.parents[2] / "NOTICE").read_text(encoding="utf-8")
    for package in json.loads((vendor_ui.VENDOR / "vendor.json").read_text(encoding="utf-8")):
        assert package["name"] in notice
        assert package["licence"] in ("MIT", "Apache-2.0")
        assert any(f["from"] == "LICENSE" for f in package["files"])


# ----------------------------------------------------------------------------------------------------- its texts

CATALOGUE: dict[str, dict[str, str]] = json.loads((UI / "words.json").read_text(encoding="utf-8"))
SCRIPTS = "\n".join(p.read_text(encoding="utf-8") for p in sorted(UI.glob("*.js")))


def test_every_text_stands_in_both_languages_with_the_same_placeholders() -> None:
    def placeholders(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for key, texts in CATALOGUE.items():
        assert set(texts) == {"en", "zh"}, key
        assert all(text.strip() for text in texts.values()), key
        assert placeholders(texts["en"]) == placeholders(texts["zh"]), key


def test_every_text_that_the_page_asks_for_is_there_and_none_is_left_over() -> None:
    asked = set(re.findall(r"""\bt\("([\w.]+)\"""", SCRIPTS))
    families = set(re.findall(r"\bt\(`([\w.]+)\.\$\{", SCRIPTS))
    assert asked - set(CATALOGUE) == set()
    assert all(any(key.startswith(f"{family}.") for key in CATALOGUE) for family in families)
    assert {k for k in set(CATALOGUE) - asked if k.rpartition(".")[0] not in families} == set()


def test_every_name_that_is_put_together_is_in_the_catalogue() -> None:
    heads = {"models": "overview.js", "replica": "capacity.js", "shadow": "shadows.js"}
    for family, script in heads.items():
        (names,) = re.findall(r"const heads = (\[[^\]]*\]);", (UI / script).read_text(encoding="utf-8"))
        assert {f"{family}.{name}" for name in json.loads(names)} <= set(CATALOGUE)
    states = {f"state.{s}" for s in ("starting", "ready", "draining", "dead")}
    others = {f"action.{a}" for a in ("launch", "drain", "hold")} | {"range.15m", "range.24h"}
    others |= {f"clamp.{c}" for c in ("budget", "max", "min", "override")}
    others |= {f"shadow.{kind}" for kind in ("ran", "alone", "same", "more", "less")}
    links = {f"link.{s}" for s in ("connecting", "live", "paused", "lost")}
    assert states | others | links <= set(CATALOGUE)


# ---------------------------------------------------------------------------------------------------- the stream


def test_the_stream_begins_with_a_snapshot_and_goes_on_by_the_second(here: Site) -> None:
    browser = here.sign_in()
    here.beat(look(0))
    here.beat(look(1, arrivals=4, done=4, firsts=4, ttft_sum_s=0.8, late=1))
    connection, response = here.open("GET", "/ui/live", browser)
    assert response.headers["content-type"].startswith("text/event-stream")
    stream = events(response)
    kind, told = next(stream)
    assert kind == "snapshot"
    assert len(told["history"]["t"]) == 2
    assert told["state"]["models"][0]["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1, "attainment": 0.99}
    here.beat(look(2, arrivals=10, done=10, firsts=10, ttft_sum_s=2.0, late=1, running=3))
    kind, tick = next(stream)
    connection.close()
    assert kind == "tick"
    row = dict(zip(told["fields"], tick["now"]["m"]))
    assert row["arrivals_per_s"] == pytest.approx(10 / 3, rel=1e-3)  # three seconds were looked at
    assert row["ttft_s"] == pytest.approx(0.2)
    assert row["share_in_slo"] == pytest.approx(0.9)
    assert row["replica_cost_per_hour"] == pytest.approx(3.6)
    assert row["ttft_p95_s"] is None  # nobody told: missing, not 0


def test_a_page_that_comes_back_gets_only_what_it_missed(here: Site) -> None:
    browser = here.sign_in()
    for second in range(5):
        here.beat(look(second))
    connection, response = here.open("GET", "/ui/live?since=1760000002.0", browser)
    _, told = next(events(response))
    connection.close()
    assert told["history"]["t"] == [1760000003.0, 1760000004.0]


def test_a_decision_comes_as_a_flag_with_its_sentence(here: Site) -> None:
    browser = here.sign_in()
    here.beat(look(0))
    connection, response = here.open("GET", "/ui/live", browser)
    stream = events(response)
    next(stream)
    choice = Choice(
        model="m", action="launch", before=1, after=2, sentence="", why=(reason("set", n=2),), currency="CNY",
        numbers={"capacity_rps": 4.0}, cost_per_hour=7.2, cost_change_per_hour=3.6,
    )  # fmt: skip
    here.beat(look(1, plan=Plan(choices=(choice,))))
    told = dict([next(stream), next(stream)])
    connection.close()
    (flag,) = told["flags"]
    assert flag["sentences"] == {
        "en": ["m: 1 to 2 replicas: set to 2, one replica serves 4.0; +¥3.60/h"],
        "zh": ["m：副本由 1 个增至 2 个：手动设为 2 个；单副本每秒可处理 4.0 个请求；每小时多花 ¥3.60"],
    }
    assert (flag["before"], flag["after"], flag["cost_per_hour"]) == (1, 2, 7.2)


def test_open_pages_are_bounded(here: Site) -> None:
    browser = here.sign_in()
    opened = [here.open("GET", "/ui/live", browser) for _ in range(MAX_PAGES)]
    for _, response in opened:
        next(events(response))  # it is being served
    assert here.ask("GET", "/ui/live", browser)[0] == 429
    for connection, _ in opened:
        connection.close()


def test_the_ledger_is_asked_only_when_something_may_be_new(here: Site) -> None:
    for second in range(20):
        here.beat(look(second, done=0))
    idle = here.source.asked
    for second in range(20, 40):
        here.beat(look(second, done=second))
    assert idle <= 1
    assert 3 <= here.source.asked - idle <= 5  # each five seconds


# ------------------------------------------------------------------------------------------------- the playground


class Gateway:
    """A server of one answer that notes what it was asked."""

    def __init__(self, *pieces: bytes) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.heard, self.gone = b"", threading.Event()
        self.pieces = pieces
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        peer, _ = self.listener.accept()
        with peer:
            while b"\r\n\r\n{" not in self.heard:
                self.heard += peer.recv(65536)
            for piece in self.pieces:
                peer.sendall(piece)
            while peer.recv(65536):
                pass
        self.gone.set()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-neaptide-request-id: r1\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
ASKED = b'{"model": "m", "messages": []}'


def test_the_playground_passes_on_what_the_gateway_says(tmp_path: Path) -> None:
    gateway = Gateway(CHUNKED, b"7\r\ndata: a\r\n", b"2\r\n\n\n\r\n0\r\n\r\n")
    with site(tmp_path, gateway.url) as here:
        browser = here.sign_in()
        status, headers, raw = here.ask("POST", "/ui/play", {**browser, **here.token(browser)}, ASKED)
    assert (status, raw) == (200, b"data: a\n\n")
    assert (headers["content-type"], headers["x-neaptide-request-id"]) == ("text/event-stream", "r1")
    assert b"POST /v1/chat/completions HTTP/1.1" in gateway.heard
    assert b"authorization: Bearer sk-of-the-service" in gateway.heard
    assert here.cookie_name.encode() not in gateway.heard


def test_the_playground_passes_on_a_refusal(tmp_path: Path) -> None:
    body = b'{"error": {"message": "busy"}}'
    head = b"HTTP/1.1 429 x\r\nretry-after: 3\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    gateway = Gateway(head % len(body) + body)
    with site(tmp_path, gateway.url) as here:
        browser = here.sign_in()
        status, headers, raw = here.ask("POST", "/ui/play", {**browser, **here.token(browser)}, ASKED)
    assert (status, headers["retry-after"], raw) == (429, "3", body)


def test_the_playground_says_when_no_gateway_answers(here: Site) -> None:
    browser = here.sign_in()
    status, _, raw = here.ask("POST", "/ui/play", {**browser, **here.token(browser)}, ASKED)
    assert (status, json.loads(raw)["error"]["code"]) == (502, "E404")


def test_stopping_an_answer_stops_it_in_the_gateway(tmp_path: Path) -> None:
    gateway = Gateway(CHUNKED, b"7\r\ndata: a\r\n")  # and no end
    with site(tmp_path, gateway.url) as here:
        browser = here.sign_in()
        connection, response = here.open("POST", "/ui/play", {**browser, **here.token(browser)}, ASKED)
        assert response.read(7) == b"data: a"
        connection.sock and connection.sock.shutdown(socket.SHUT_RDWR)
        response.close()
        connection.close()
        assert gateway.gone.wait(20)


def test_the_playground_needs_the_sessions_token(here: Site) -> None:
    assert here.ask("POST", "/ui/play", here.sign_in(), ASKED)[0] == 401
