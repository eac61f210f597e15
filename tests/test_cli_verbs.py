"""The verbs that ask a running service, as real processes against the real admin app."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from neaptide.cli.keys import until
from neaptide.control.port import KeyChange, KeyInfo, NewBudget, NewKey, UsageFilter
from neaptide.errors import StorageError
from tests.admin_fake import FakeControl, admin_server, write_state
from tests.cli_run import cli, environment


@pytest.fixture
def control(tmp_path: Path) -> Iterator[FakeControl]:
    fake = FakeControl(tmp_path / "state")
    with admin_server(fake):
        yield fake


def ask(control: FakeControl, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return cli(*args, "--state", str(control.state), **env)


def told(control: FakeControl, *args: str) -> object:
    done = ask(control, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_status_shows_replicas_gateways_ledger_and_disk(control: FakeControl) -> None:
    shown = ask(control, "status").stdout
    for fact in (
        "guide-0",
        "load 1.50 s",
        "900 (90%)",
        "gateway-0",
        "7/7 3/3",
        "2.0 KiB behind",
        "10.0 GiB of 100.0 GiB",
    ):
        assert fact in shown
    assert shown.startswith("neaptide 0.1.0  ready")


def test_status_as_json_is_the_answer_of_the_admin_api(control: FakeControl) -> None:
    status = told(control, "status")
    assert isinstance(status, dict)
    assert status["ready"] is True
    assert status["replicas"][0]["stages"] == [{"name": "spawn", "seconds": 0.12}, {"name": "load", "seconds": 1.5}]


def test_status_watch_writes_one_json_line_a_round(control: FakeControl) -> None:
    command = [sys.executable, "-m", "neaptide.cli", "status", "--watch", "--interval", "0.2", "--json"]
    watching = subprocess.Popen(
        [*command, "--state", str(control.state)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert watching.stdout is not None
        rounds = [json.loads(watching.stdout.readline()) for _ in range(2)]
    finally:
        watching.terminate()
        watching.communicate(timeout=10)
    assert [r["version"] for r in rounds] == ["0.1.0", "0.1.0"]


def test_the_state_directory_may_come_from_the_environment(control: FakeControl) -> None:
    assert cli("status", NEAPTIDE_STATE=str(control.state)).returncode == 0


def test_apply_prints_the_difference_and_a_dry_run_changes_nothing(control: FakeControl, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("models: {small: {engine: echo}}\n")
    dry = ask(control, "apply", "-f", str(file), "--dry-run")
    assert dry.stdout.splitlines()[:3] == ["dry run: nothing was changed", "+ small", "- guide"]
    assert "models.small.scale.max: 1 -> 4" in dry.stdout
    assert control.text == "models: {guide: {}}\n"
    assert told(control, "apply", "-f", str(file)) == told(control, "apply", "-f", str(file)) | {
        "added": ["small"], "removed": ["guide"], "unchanged": [],
        "changes": [{"key": "models.small.scale.max", "old": "1", "new": "4"}],
    }  # fmt: skip
    assert "small" in control.text


def test_a_refused_configuration_keeps_its_code_and_exits_2(control: FakeControl, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("modles: {}\n")
    done = ask(control, "apply", "-f", str(file))
    assert done.returncode == 2
    assert "error[E104]" in done.stderr
    assert "did you mean 'models'?" in done.stderr


def test_apply_without_a_file_exits_2(control: FakeControl, tmp_path: Path) -> None:
    done = ask(control, "apply", "-f", str(tmp_path / "absent.yaml"))
    assert (done.returncode, "error[E101]" in done.stderr) == (2, True)


def test_keys_create_prints_the_key_alone_on_stdout(control: FakeControl) -> None:
    done = ask(control, "keys", "create", "--name", "laptop", "--priority", "high", "--model", "guide")
    assert done.stdout == "sk-neap-secretwxyz\n"
    assert "not shown again" in done.stderr
    assert control.asked == [NewKey(name="laptop", priority="high", models=("guide",))]


def test_keys_list_never_shows_a_key(control: FakeControl) -> None:
    ask(control, "keys", "create")
    listed = ask(control, "keys", "list")
    assert "…wxyz" in listed.stdout
    assert "secret" not in listed.stdout


def test_a_key_whose_data_stays_inside_is_made_and_listed_as_such(control: FakeControl) -> None:
    assert ask(control, "keys", "create", "--inside").returncode == 0
    assert control.asked == [NewKey(inside=True)]
    (row,) = [line for line in ask(control, "keys", "list").stdout.splitlines() if "…wxyz" in line]
    assert "active, inside" in row


def test_keys_create_tells_until_when_for_what_and_how_much(control: FakeControl) -> None:
    limits = ("--rpm", "60", "--tpm", "12000", "--concurrency", "4")
    ask(
        control,
        "keys",
        "create",
        "--expires",
        "2026-12-31T18:00+08:00",
        "--scope",
        "models",
        "--scope",
        "inference",
        *limits,
    )
    (asked,) = control.asked
    at = 1_798_711_200.0
    assert asked == NewKey(expires_wall_s=at, scopes=("models", "inference"), rpm=60, tpm=12_000, concurrency=4)
    listed = ask(control, "keys", "list").stdout
    assert "60 rpm, 12,000 tpm, 4 at once" in listed
    assert "models, inference" in listed


def test_keys_list_marks_what_has_expired(control: FakeControl) -> None:
    control.held = [KeyInfo(id="old", expires_wall_s=1_000_000_000.0), KeyInfo(id="new", expires_wall_s=9e9)]
    lines = ask(control, "keys", "list").stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["expired", "active"]


def test_keys_set_changes_what_is_named(control: FakeControl) -> None:
    told(control, "keys", "set", "k1", "--rpm", "5", "--tpm", "none", "--expires", "never", "--scope", "all")
    assert control.asked == [KeyChange(rpm=5, tpm=None, expires_wall_s=None, scopes=())]
    assert (control.held[0].rpm, control.held[0].concurrency) == (5, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "nothing to set"),
        (("--rpm", "0"), "--rpm '0' is no limit"),
        (("--tpm", "1.5"), "--tpm '1.5' is no limit"),
        (("--expires", "2026-12-31T10:00"), "--expires '2026-12-31T10:00' is not a time"),
        (("--expires", "soon"), "--expires 'soon' is not a time"),
    ],
)
def test_keys_set_refuses_what_it_does_not_understand(
    control: FakeControl, options: tuple[str, ...], said: str
) -> None:
    done = ask(control, "keys", "set", "k1", *options)
    assert (done.returncode, said in done.stderr) == (2, True)
    assert control.asked == []


def test_an_expiry_is_a_span_a_day_or_a_time_with_its_zone() -> None:
    assert until("90m", 1000.0) == 1000.0 + 5400
    assert until("30d", 1000.0) == 1000.0 + 30 * 86400
    assert until("2026-12-31", 0.0) == until("2026-12-31T00:00Z", 0.0) == until("2026-12-31T08:00+08:00", 0.0)


def test_keys_revoke_disables_it(control: FakeControl) -> None:
    assert told(control, "keys", "revoke", "k1") == told(control, "keys", "revoke", "k1")
    assert control.held[0].disabled


def test_an_unknown_key_fails_with_1(control: FakeControl) -> None:
    done = ask(control, "keys", "revoke", "k 9")
    assert (done.returncode, "error[E601]: no key 'k 9'" in done.stderr) == (1, True)


def test_budgets_are_set_listed_and_removed(control: FakeControl) -> None:
    assert ask(control, "budgets", "set", "tenant:acme", "--money", "12.5").stdout == "set tenant:acme:money:month\n"
    ask(control, "budgets", "set", "project:a/b", "--tokens", "1000", "--period", "day", "--strict")
    asked = [NewBudget(scope="tenant:acme", unit="money", amount=12.5)]
    asked += [NewBudget(scope="project:a/b", unit="tokens", amount=1000, period="day", strict=True)]
    assert control.asked == asked
    lines = ask(control, "budgets", "list").stdout.splitlines()
    assert lines[1].split()[:7] == ["tenant:acme:money:month", "CNY", "12.50", "CNY", "3.125", "CNY", "1.25"]
    assert lines[2].split()[:5] == ["project:a/b:tokens:day", "1,000", "250", "100", "750"]
    assert "removed project:a/b:tokens:day" in ask(control, "budgets", "remove", "project:a/b:tokens:day").stdout
    gone = ask(control, "budgets", "remove", "project:a/b:tokens:day")
    assert (gone.returncode, "error[E601]" in gone.stderr) == (1, True)


def test_a_budget_is_of_money_or_of_tokens(control: FakeControl) -> None:
    for amounts in ((), ("--money", "1", "--tokens", "1")):
        done = ask(control, "budgets", "set", "all", *amounts)
        assert (done.returncode, "--money or --tokens" in done.stderr) == (2, True)
    assert not control.asked


def test_usage_totals_and_their_filter(control: FakeControl) -> None:
    shown = ask(control, "usage", "--by", "day", "--model", "guide", "--since", "2026-05-01", "--outcome", "ok")
    assert "CNY 0.005" in shown.stdout
    assert "day (UTC)" in shown.stdout
    (asked,) = control.asked
    assert isinstance(asked, tuple)
    where = asked[0]
    assert isinstance(where, UsageFilter)
    assert (where.model, where.outcome, asked[1]) == ("guide", "ok", "day")
    assert where.since_s is not None


def test_usage_rows_come_in_pages_and_go_on_by_cursor(control: FakeControl) -> None:
    first = told(control, "usage", "--rows", "--limit", "4")
    assert isinstance(first, dict)
    rest = told(control, "usage", "--rows", "--cursor", first["next"])
    assert isinstance(rest, dict)
    ids = [row["usage"]["request_id"] for page in (first, rest) for row in page["rows"]]
    assert ids == [f"r{i}" for i in range(7)]
    assert rest["next"] is None


@pytest.mark.parametrize("since", ["yesterday", "5y", "2026-13-01", "-2h"])
def test_a_time_that_is_none_exits_2(control: FakeControl, since: str) -> None:
    done = ask(control, "usage", f"--since={since}")
    assert (done.returncode, "error[E110]" in done.stderr) == (2, True)


def test_models_list_and_show_by_alias(control: FakeControl) -> None:
    assert "gpt-4o-mini" in ask(control, "models", "list").stdout
    shown = told(control, "models", "show", "gpt-4o-mini")
    assert isinstance(shown, dict)
    assert shown["model"] == "mock"
    missing = ask(control, "models", "show", "nobody")
    assert (missing.returncode, "guide, mock" in missing.stderr) == (1, True)


def test_models_show_checks_a_directory(tmp_path: Path) -> None:
    done = cli("models", "show", str(tmp_path))
    assert (done.returncode, "error[E20" in done.stderr) == (1, True)


def test_convert_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    done = cli("models", "convert", str(tmp_path), "--to", "int8", "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr.splitlines()[-1])["error"]["code"] == "E203"


def test_nothing_running_exits_3_and_says_how_to_start(tmp_path: Path) -> None:
    done = cli("status", "--state", str(tmp_path / "none"))
    assert done.returncode == 3
    assert done.stderr.startswith("error[E401]: nothing runs in")
    assert f"fix  neaptide up --state {tmp_path / 'none'}" in done.stderr


def test_a_service_that_has_died_exits_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    write_state(tmp_path, "http://127.0.0.1:1/v1", f"http://127.0.0.1:{port}/")
    done = cli("keys", "list", "--state", str(tmp_path), "--json")
    assert done.returncode == 3
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["what"]) == ("E401", f"no server answers at http://127.0.0.1:{port}")


def test_a_stranger_on_the_port_exits_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        write_state(tmp_path, "http://127.0.0.1:1/v1", f"http://127.0.0.1:{stranger.getsockname()[1]}/")
        done = subprocess.Popen(
            [sys.executable, "-m", "neaptide.cli", "status", "--state", str(tmp_path)],
            stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        peer, _ = stranger.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
            _, stderr = done.communicate(timeout=30)
    assert (done.returncode, "error[E402]" in stderr) == (3, True)


def test_a_wrong_admin_token_exits_4(control: FakeControl) -> None:
    (control.state / "admin-token").write_text("x" * 64)
    done = ask(control, "status")
    assert (done.returncode, "error[E602]" in done.stderr) == (4, True)


def test_a_failure_of_the_service_exits_1_with_its_words(control: FakeControl) -> None:
    control.broken = StorageError("the ledger is locked", why="another writer", fix="neaptide doctor", code="E510")
    done = ask(control, "status")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error[E510]: the ledger is locked",
        "  why  another writer",
        "  fix  neaptide doctor",
    ]


def test_a_terminal_gets_colour_unless_no_color_is_set(control: FakeControl) -> None:
    assert "\x1b[" in on_terminal(control)
    assert "\x1b[3" not in on_terminal(control, NO_COLOR="1")


def on_terminal(control: FakeControl, **env: str) -> str:
    """What `models list` writes to a pseudo terminal."""
    master, slave = os.openpty()
    command = [sys.executable, "-m", "neaptide.cli", "status", "--state", str(control.state)]
    shown = b""
    with subprocess.Popen(
        command, stdout=slave, env=environment(TERM="xterm-256color", COLUMNS="150", **env)
    ) as running:
        os.close(slave)
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux reports the closed other end as EIO
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert running.returncode == 0
    return shown.decode()
