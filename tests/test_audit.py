"""The audit log: every change leaves one line, whatever happens when, and a line that is changed or gone shows."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.clock import VirtualClock
from neaptide.control import backup, gate
from neaptide.control.audit import AuditLog, head_of, lines, newest, segments, verify
from neaptide.control.chain import START, AuditQuery, AuditRow, Head, check, parsed, sealed
from neaptide.control.roles import NEEDS
from neaptide.errors import StorageError
from tests.admin_fake import TOKEN, write_state
from tests.cli_run import cli, environment
from tests.conftest import Service
from tests.dashboard_kit import BEARER, Site, site
from tests.traffic import admin, wait_for

ROOT = Path(__file__).parent.parent


def log_in(directory: Path, *, file_bytes: int = 1 << 20, kept_files: int = 16) -> AuditLog:
    return AuditLog(directory, VirtualClock(), file_bytes=file_bytes, kept_files=kept_files)


def written(directory: Path) -> list[AuditRow]:
    """All lines, oldest first."""
    return list(reversed(newest(directory, AuditQuery(limit=1_000_000))))


def row(request: str, action: str = "createKey") -> AuditRow:
    return AuditRow(request=request, action=action, who="host")


# ------------------------------------------------------------------------------------------------------- the chain


def chain(n: int) -> tuple[list[bytes], Head]:
    out, head = [], Head()
    for i in range(n):
        line, head = sealed(row(f"r{i}"), head)
        out.append(line.removesuffix(b"\n"))
    return out, head


def test_lines_that_follow_each_other_are_whole() -> None:
    log, head = chain(5)
    found = check(log, [head])
    assert (found.lines, found.first, found.last, found.head, found.problem) == (5, 1, 5, head.hash, "")
    assert check([], [Head()]).problem == ""


@given(n=st.integers(1, 8), at=st.data(), how=st.sampled_from(["change", "remove", "swap", "repeat", "cut"]))
def test_whatever_is_done_to_a_line_is_found(n: int, at: st.DataObject, how: str) -> None:
    log, head = chain(n)
    i = at.draw(st.integers(0, n - 1))
    if how == "change":
        other = msgspec.structs.replace(parsed(log[i]) or row(""), who="somebody")
        log[i] = msgspec.json.encode(other)
    elif how == "remove":
        del log[i]
    elif how == "swap":
        j = at.draw(st.integers(0, n - 1).filter(lambda j: j != i)) if n > 1 else i
        log[i], log[j] = log[j], log[i]
        if n == 1:
            del log[0]
    elif how == "repeat":
        log.insert(i, log[i])
    else:
        log[i] = log[i][:-1]
    assert check(log, [head]).problem


def test_a_beginning_that_was_cut_off_is_found_and_one_that_was_dropped_is_not() -> None:
    log, head = chain(4)
    assert "no line says" in check(log[2:], [head]).problem
    third = parsed(log[2])
    assert third is not None
    told, after = sealed(AuditRow(action="dropped", before="2", after=third.prev), head)
    assert check([*log[2:], told.removesuffix(b"\n")], [after]).problem == ""


def test_an_end_that_was_cut_off_is_found() -> None:
    log, head = chain(4)
    assert check(log[:3], [head]).problem == "lines 4 to 4 are gone"


def test_a_chain_that_was_computed_anew_is_found_by_a_head_kept_elsewhere() -> None:
    log, head = chain(4)
    _, kept = chain(2)
    line, forged = sealed(row("another"), Head())
    assert check([line.removesuffix(b"\n")], [forged]).problem == ""
    assert check([line.removesuffix(b"\n")], [forged, kept]).problem
    assert check(log, [head, kept]).problem == ""


# -------------------------------------------------------------------------------------------------------- the disk


def test_a_change_has_an_intent_before_it_and_one_line_after_it(tmp_path: Path) -> None:
    log = log_in(tmp_path / "audit")
    log.begin(row("r1"))
    assert (tmp_path / "audit" / "open-r1.json").exists()
    assert written(tmp_path / "audit") == []
    log.end(msgspec.structs.replace(row("r1"), status=201))
    assert not (tmp_path / "audit" / "open-r1.json").exists()
    (line,) = written(tmp_path / "audit")
    assert (line.n, line.prev, line.request, line.status) == (1, START, "r1", 201)
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "audit").iterdir()} == {0o600}


def test_a_change_during_which_control_was_killed_is_a_line_with_an_unknown_outcome(tmp_path: Path) -> None:
    log_in(tmp_path).begin(row("r1"))
    for _ in range(2):  # a second start adds nothing
        log_in(tmp_path)
        assert [(r.request, r.outcome) for r in written(tmp_path)] == [("r1", "unknown")]
    assert verify(tmp_path).problem == ""


def test_an_intent_that_has_its_line_already_adds_none(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.begin(row("r1"))
    intent = (tmp_path / "open-r1.json").read_bytes()
    log.end(row("r1"))
    (tmp_path / "open-r1.json").write_bytes(intent)  # killed after the line, before the intent had gone
    log_in(tmp_path)
    assert [(r.request, r.outcome) for r in written(tmp_path)] == [("r1", "done")]
    assert list(tmp_path.glob("open-*")) == []


@pytest.mark.parametrize("kept", [1, 100, -1], ids=["one byte", "half", "all but the newline"])
def test_a_line_that_was_cut_off_is_cut_away_and_a_line_says_so(tmp_path: Path, kept: int) -> None:
    log = log_in(tmp_path)
    for i in range(3):
        log.add(row(f"r{i}"))
    line, _ = sealed(row("torn"), head_of(tmp_path))
    with segments(tmp_path)[-1].open("ab") as f:
        f.write(line[:kept])
    assert verify(tmp_path).problem == ""  # as while it is being written
    log_in(tmp_path).add(row("r3"))
    assert [r.request or r.action for r in written(tmp_path)] == ["r0", "r1", "r2", "mended", "r3"]
    assert verify(tmp_path).problem == ""


def test_an_end_that_is_gone_at_the_next_start_stays_a_problem(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    for i in range(3):
        log.add(row(f"r{i}"))
    (file,) = segments(tmp_path)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    log_in(tmp_path).add(row("r3"))
    assert "were gone when the log was opened" in verify(tmp_path).problem
    file.unlink()
    log_in(tmp_path)
    assert written(tmp_path)[0].action == "lost"


def test_files_are_bounded_and_what_is_dropped_is_told(tmp_path: Path) -> None:
    log = log_in(tmp_path, file_bytes=2000, kept_files=3)
    for i in range(60):
        log.add(row(f"r{i}"))
    files = segments(tmp_path)
    assert len(files) == 3
    assert all(f.stat().st_size <= 2000 for f in files)
    told = [r for r in written(tmp_path) if r.action == "dropped"]
    found = verify(tmp_path)
    assert (found.problem, found.first) == ("", int(told[-1].before) + 1)
    log_in(tmp_path, file_bytes=2000, kept_files=3)
    assert verify(tmp_path).problem == ""
    files[0].unlink()
    assert "no line says" in verify(tmp_path).problem


SCRIPT = """
import sys
from pathlib import Path
from neaptide.clock import RealClock
from neaptide.control.audit import AuditLog
from neaptide.control.chain import AuditRow
log = AuditLog(Path(sys.argv[1]), RealClock(), file_bytes=3000, kept_files=1000)
for n in range(1, 1_000_000):
    row = AuditRow(request=f"r{n}", action="createKey")
    log.begin(row)
    print("begun", n, flush=True)
    log.end(row)
    print("ended", n, flush=True)
"""


@pytest.mark.parametrize("changes", [3, 11])
def test_a_kill_in_the_middle_of_writing_loses_nothing_and_doubles_nothing(tmp_path: Path, changes: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    writing = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
    assert writing.stdout is not None
    said = [writing.stdout.readline() for _ in range(2 * changes)]
    writing.send_signal(signal.SIGKILL)
    said += writing.stdout.read().splitlines(keepends=True)
    writing.wait(10)
    log_in(tmp_path)
    rows = [r for r in written(tmp_path) if r.request]
    counts = Counter(r.request for r in rows)
    begun = {f"r{line.split()[1]}" for line in said if line.startswith("begun") and line.endswith("\n")}
    ended = {f"r{line.split()[1]}" for line in said if line.startswith("ended") and line.endswith("\n")}
    assert set(counts.values()) == {1}
    assert begun <= set(counts)
    assert ended <= {r.request for r in rows if r.outcome == "done"}
    assert len(counts) <= len(begun) + 1  # killed before it could say so
    assert verify(tmp_path).problem == ""


def test_a_line_that_finds_no_room_waits_and_so_does_every_change(tmp_path: Path) -> None:
    log = log_in(tmp_path, file_bytes=1)  # a file a line
    log.add(row("r0"))
    log.begin(row("r1"))
    following = tmp_path / "0000000002.jsonl"
    following.symlink_to("/dev/full")  # every write there says that the disk is full
    log.end(row("r1"))
    with pytest.raises(StorageError, match="No space left") as refused:
        log.begin(row("r2"))
    assert (refused.value.code, refused.value.status) == ("E550", 507)
    assert (tmp_path / "open-r1.json").exists()
    following.unlink()
    log.begin(row("r2"))
    log.end(row("r2"))
    assert [r.request for r in written(tmp_path)] == ["r0", "r1", "r2"]
    assert list(tmp_path.glob("open-*")) == []
    assert verify(tmp_path).problem == ""


# -------------------------------------------------------------------------------------------------- over the API


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as running:
        yield running


def told(here: Site) -> list[AuditRow]:
    return written(here.control.state / "audit")


def asked(here: Site, method: str, template: str) -> tuple[str, dict[str, str], bytes | None]:
    """(path, headers, body) of a call that changes something and succeeds."""
    bodies = {
        "/api/v1/apply": b"models: {guide: {}}\n",
        "/api/v1/keys": b'{"name": "laptop"}',
        "/api/v1/keys/{id}": b'{"rpm": 60}',
        "/api/v1/budgets": b'{"scope": "tenant:acme", "unit": "money", "amount": 100, "period": "month"}',
        "/api/v1/admins": b'{"role": "viewer", "name": "ann"}',
        "/api/v1/scale/override": b'{"model": "guide", "replicas": 2, "by": "ann"}',
    }
    body, headers = bodies.get(template) if method in ("POST", "PATCH") else None, BEARER
    if "{admin}" in template:
        made = json.loads(here.ask("POST", "/api/v1/admins", BEARER, b'{"role": "viewer"}')[2])
        template = template.replace("{admin}", made["info"]["id"])
    if method == "DELETE" and template == "/api/v1/scale/override":
        template += "?model=guide"
    if method == "DELETE" and template == "/api/v1/budgets":
        here.ask("POST", template, BEARER, bodies[template])
        template += "?id=tenant:acme:money:month"
    if template == "/":
        return here.link(), {}, None
    if template == "/ui/session":
        browser = here.sign_in()
        headers = {**browser, **here.token(browser)}
    return template.replace("{id}", "k1"), headers, body


@pytest.mark.parametrize(("method", "template"), [key for key, need in NEEDS.items() if need.action])
def test_every_route_that_changes_something_leaves_one_line(here: Site, method: str, template: str) -> None:
    path, headers, body = asked(here, method, template)
    before = len(told(here))
    status, answer, _ = here.ask(method, path, headers, body)
    assert status < 300
    (line,) = told(here)[before:]
    assert line.action == NEEDS[method, template].action
    assert (line.outcome, line.status, line.peer, line.who, line.role) == ("done", status, "127.0.0.1", "host", "admin")
    assert line.request == answer["x-neaptide-request-id"]
    assert verify(here.control.state / "audit").problem == ""
    assert list((here.control.state / "audit").glob("open-*")) == []


def test_a_line_says_on_what_and_what_was_before_and_after(here: Site) -> None:
    here.ask("POST", "/api/v1/keys", BEARER, b'{"name": "laptop", "priority": "high"}')
    here.ask("DELETE", "/api/v1/keys/k1", BEARER)
    here.ask("POST", "/api/v1/scale/override", BEARER, b'{"model": "guide", "replicas": 4, "by": "ann"}')
    here.ask("DELETE", "/api/v1/scale/override?model=guide", BEARER)
    here.ask("POST", "/api/v1/apply", BEARER, b"models: {small: {engine: echo}}\n")
    made, revoked, held, cleared, applied = told(here)
    assert (made.object, made.after) == ("k2", '{"name":"laptop","priority":"high"}')
    assert (revoked.object, revoked.before, revoked.after) == ("k1", "active", "revoked")
    assert (held.object, held.before) == ("guide", "2 by slo")
    assert held.after.startswith("4 until ")
    assert held.after.endswith("by hand of ann")
    assert (cleared.before, cleared.after) == (held.after, "2 by slo")
    assert applied.after == "+small; -guide; models.small.scale.max: 1 -> 4"


def test_changed_terms_and_budgets_are_told_as_they_were_and_are(here: Site) -> None:
    budget = b'{"scope": "tenant:acme", "unit": "%s", "amount": %d}'
    here.ask("PATCH", "/api/v1/keys/k1", BEARER, b'{"rpm": 60}')
    here.ask("PATCH", "/api/v1/keys/k1", BEARER, b'{"rpm": null, "inside": true}')
    here.ask("POST", "/api/v1/budgets", BEARER, budget % (b"money", 100))
    here.ask("POST", "/api/v1/budgets", BEARER, budget % (b"money", 20))
    here.ask("DELETE", "/api/v1/budgets?id=tenant:acme:money:month", BEARER)
    limited, freed, made, lowered, removed = told(here)
    assert (limited.object, limited.before, limited.after) == ("k1", '{"rpm":null}', '{"rpm":60}')
    assert (freed.before, freed.after) == ('{"inside":false,"rpm":60}', '{"inside":true,"rpm":null}')
    assert {r.object for r in (made, lowered, removed)} == {"tenant:acme:money:month"}
    assert [r.before for r in (made, lowered, removed)] == ["", '{"amount":100.0}', '{"amount":20.0}']
    assert '"amount":20' in lowered.after


def test_a_change_that_fails_says_so(here: Site) -> None:
    here.ask("DELETE", "/api/v1/keys/k9", BEARER)
    here.ask("POST", "/api/v1/keys", BEARER, b"{")
    unknown, bad = told(here)
    assert (unknown.object, unknown.outcome, unknown.status, unknown.code) == ("k9", "refused", 404, "E601")
    assert (bad.action, bad.outcome, bad.status, bad.code) == ("createKey", "refused", 400, "E605")


def test_reading_leaves_no_line(here: Site) -> None:
    browser = here.sign_in()
    before = len(told(here))
    for path in ("/api/v1/status", "/api/v1/audit", "/api/v1/keys", "/ui/session", "/", "/docs"):
        assert here.ask("GET", path, browser)[0] == 200
    assert len(told(here)) == before


def test_a_session_is_known_by_its_token_and_by_who_asked_for_the_link(here: Site) -> None:
    browser = here.sign_in()
    here.ask("DELETE", "/api/v1/keys/k1", {**browser, **here.token(browser)})
    link, signed_in, revoked = told(here)
    assert [r.action for r in (link, signed_in, revoked)] == ["createLink", "signIn", "revokeKey"]
    assert [r.via for r in (link, signed_in, revoked)] == ["token", "link", "link"]
    assert revoked.who == "host"


def test_refusals_are_lines_and_a_flood_of_them_is_counted(here: Site) -> None:
    viewer = json.loads(here.ask("POST", "/api/v1/admins", BEARER, b'{"role": "viewer", "name": "ann"}')[2])
    flood = gate.BURST + 7
    for _ in range(flood):
        assert here.ask("GET", "/api/v1/status", {"Authorization": "Bearer na-guess"})[0] == 401
    assert here.ask("POST", "/api/v1/down", {"Authorization": f"Bearer {viewer['token']}"})[0] == 403
    assert here.ask("GET", "/api/v1/status", {**BEARER, "Host": "evil.example"})[0] == 403
    here.clock.advance(gate.EVERY_S)
    assert here.ask("GET", "/?ticket=guess")[0] == 401
    _, *nobody, ann, guess = told(here)
    assert len(nobody) == gate.BURST
    assert {(r.action, r.object, r.who, r.status, r.code) for r in nobody} == {
        ("denied", "GET /api/v1/status", "", 401, "E602")
    }
    assert (ann.action, ann.object, ann.name, ann.role) == ("denied", "POST /api/v1/down", "ann", "viewer")
    assert (ann.outcome, ann.code, ann.skipped) == ("refused", "E620", 7)
    assert (guess.action, guess.outcome, guess.status, guess.skipped) == ("signIn", "refused", 401, 1)
    assert ("down", 20.0) not in here.control.asked


def test_no_secret_stands_in_the_log(here: Site) -> None:
    made = json.loads(here.ask("POST", "/api/v1/admins", BEARER, b'{"role": "admin"}')[2])["token"]
    key = json.loads(here.ask("POST", "/api/v1/keys", BEARER, b"{}")[2])["key"]
    here.ask("DELETE", f"/api/v1/keys/sk-{'s' * 43}", BEARER)  # a key in place of its id
    here.ask("DELETE", f"/api/v1/admins/{made}", BEARER)
    link = here.link()
    here.ask("GET", link)
    here.ask("GET", "/api/v1/status", {"Authorization": "Bearer na-wrong-but-secret"})
    text = b"".join(p.read_bytes() for p in (here.control.state / "audit").iterdir()).decode()
    for secret in (made, key, "s" * 20, link.partition("=")[2], "na-wrong-but-secret", TOKEN):
        assert secret not in text


def test_a_change_that_cannot_be_recorded_is_refused(here: Site) -> None:
    audit = here.control.state / "audit"
    audit.rename(here.control.state / "aside")
    audit.write_text("no directory")
    status, _, raw = here.ask("POST", "/api/v1/keys", BEARER, b'{"name": "x"}')
    error = json.loads(raw)["error"]
    assert (status, error["code"], bool(error["why"]), bool(error["fix"])) == (507, "E550", True, True)
    assert here.control.asked == []
    assert here.ask("GET", "/api/v1/status", BEARER)[0] == 200
    audit.unlink()
    (here.control.state / "aside").rename(audit)
    assert here.ask("POST", "/api/v1/keys", BEARER, b'{"name": "x"}')[0] == 201
    assert [r.action for r in told(here)] == ["createKey"]


def test_the_api_tells_the_newest_first_in_pages_and_by_action_or_token(here: Site) -> None:
    for _ in range(3):
        here.ask("POST", "/api/v1/keys", BEARER, b"{}")
    here.ask("DELETE", "/api/v1/keys/k1", BEARER)

    def page(query: str) -> list[int]:
        return [r["n"] for r in json.loads(here.ask("GET", f"/api/v1/audit?{query}", BEARER)[2])["rows"]]

    assert page("") == [4, 3, 2, 1]
    assert page("limit=2") == [4, 3]
    assert page("limit=2&before=3") == [2, 1]
    assert page("action=revokeKey") == [4]
    assert page("who=nobody") == []
    assert page("since_s=9999999999") == []
    assert here.ask("GET", "/api/v1/audit?limit=0", BEARER)[0] == 400


def test_the_verb_shows_and_checks_the_log(tmp_path: Path) -> None:
    with site(tmp_path) as here:
        write_state(tmp_path, "http://127.0.0.1:9/v1", here.source.admin_url)
        here.ask("POST", "/api/v1/keys", BEARER, b'{"name": "laptop"}')
        shown = cli("audit", "--since", "2023-01-01", "--state", str(tmp_path)).stdout
        assert "createKey" in shown
        assert '{"name":"laptop"}' in shown
        later = cli("audit", "--since", "1d", "--state", str(tmp_path), "--json").stdout
        assert json.loads(later) == {"rows": []}  # that clock stands still, years ago
    at = ("--state", str(tmp_path))
    whole = json.loads(cli("audit", "--check", "--json", *at).stdout)
    assert (whole["lines"], whole["problem"]) == (1, "")
    head = f"{whole['last']}:{whole['head']}"
    assert head in cli("audit", "--head", head, *at).stdout
    (file,) = segments(tmp_path / "audit")
    file.write_bytes(file.read_bytes().replace(b"laptop", b"tablet"))
    bad = cli("audit", "--check", *at)
    assert (bad.returncode, "error[E552]" in bad.stderr) == (1, True)


def test_a_backup_holds_the_tokens_and_the_log(here: Site, tmp_path: Path) -> None:
    made = json.loads(here.ask("POST", "/api/v1/admins", BEARER, b'{"role": "viewer"}')[2])
    backup.create(here.control.state, tmp_path / "b.tar.gz")
    new = tmp_path / "new"
    backup.restore(tmp_path / "b.tar.gz", new)
    assert verify(new / "audit") == verify(here.control.state / "audit")
    assert made["info"]["id"] in (new / "admins.json").read_text()
    assert list(lines(segments(new / "audit")))


def is_back(service: Service) -> bool:
    try:
        return bool(admin(service, "api/v1/status")["ready"])
    except OSError:
        return False


def test_a_service_goes_on_with_its_log_and_tokens_when_control_is_killed(serve: Callable[..., Service]) -> None:
    service = serve()
    service.run("keys", "create", "--name", "laptop")
    viewer = service.run("admins", "create", "--role", "viewer").stdout.strip()
    os.kill(service.pids["control"][0], signal.SIGKILL)
    wait_for(lambda: is_back(service), "the admin API is back")
    refused = cli("keys", "create", "--state", str(service.state), NEAPTIDE_ADMIN_TOKEN=viewer)
    assert "error[E620]" in refused.stderr
    link = json.loads(service.run("dashboard", "--json").stdout)["url"]
    with urllib.request.urlopen(link, timeout=20) as page:
        assert page.status == 200
    rows = json.loads(service.run("audit", "--json").stdout)["rows"]
    assert [r["action"] for r in rows] == ["signIn", "createLink", "denied", "createAdmin", "createKey"]
    assert verify(service.state / "audit").problem == ""


def test_opening_a_log_clears_what_the_killed_left_half_written(tmp_path: Path) -> None:
    (tmp_path / f".open-r1.json.{os.getpid()}").write_bytes(b"{")
    (tmp_path / "open-r2.json").write_bytes(b"{")
    log_in(tmp_path).add(row("r3"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000000001.jsonl", "head.json"]
