"""`neaptide doctor` finds what is wrong, says how to mend it, and changes nothing."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest

from neaptide.control.port import Status
from neaptide.fleet.state import StateDir
from tests.admin_fake import FakeControl, admin_server, write_state
from tests.cli_run import cli

ECHO = "listen: 127.0.0.1:{port}\nadmin: {{listen: 127.0.0.1:{admin}}}\nmodels: {{echo: {{engine: echo}}}}\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "neaptide.yaml"
    path.write_text(ECHO.format(port=free_port(), admin=free_port()))
    return path


def examined(config: Path, state: Path) -> tuple[int, dict[str, dict[str, str]]]:
    """(exit code, {name: check}) of one run; of several checks of a name the worst."""
    done = cli("doctor", "--json", "-f", str(config), "--state", str(state))
    told = json.loads(done.stdout)
    assert told["healthy"] is (done.returncode == 0)
    order = ["ok", "warn", "fail"]
    found: dict[str, dict[str, str]] = {}
    for check in told["checks"]:
        if check["name"] not in found or order.index(check["level"]) > order.index(found[check["name"]]["level"]):
            found[check["name"]] = check
    return done.returncode, found


def test_a_fit_machine_passes_and_nothing_is_made(config: Path, tmp_path: Path) -> None:
    code, found = examined(config, tmp_path / "state")
    assert code == 0, found
    assert set(found) >= {"python", "cpu", "openvino", "memory", "disk", "files", "clock", "config", "model", "state",
                          "stale", "port", "ledger", "server", "telemetry"}  # fmt: skip
    assert not (tmp_path / "state").exists()


def test_a_wrong_configuration_fails_with_its_code(config: Path, tmp_path: Path) -> None:
    config.write_text("models: {guide: {scael: {}}}\n")
    code, found = examined(config, tmp_path)
    assert code == 1
    assert found["config"]["level"] == "fail"
    assert "[E104]" in found["config"]["text"]
    assert "scale" in found["config"]["fix"]


def test_a_model_directory_without_a_model_fails(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config.write_text(f"models: {{small: {{source: {tmp_path}/empty}}}}\n")
    code, found = examined(config, tmp_path / "state")
    assert (code, found["model"]["level"]) == (1, "fail")
    assert "small: [E20" in found["model"]["text"]
    assert found["model"]["fix"]


def test_a_port_that_somebody_holds_fails(config: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        config.write_text(ECHO.format(port=held.getsockname()[1], admin=free_port()))
        code, found = examined(config, tmp_path / "state")
    assert (code, found["port"]["level"]) == (1, "fail")
    assert "--port" in found["port"]["fix"]


def test_secrets_that_others_may_read_fail_with_the_command_that_mends_it(config: Path, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    state.secret(state.key)
    state.key.chmod(0o644)
    code, found = examined(config, state.root)
    assert (code, found["state"]["fix"]) == (1, f"chmod go= {state.key}")
    assert stat.S_IMODE(state.key.stat().st_mode) == 0o644


def test_files_of_a_service_that_ended_are_a_warning(config: Path, tmp_path: Path) -> None:
    write_state(tmp_path / "state", "http://127.0.0.1:1/v1", f"http://127.0.0.1:{free_port()}/")
    code, found = examined(config, tmp_path / "state")
    assert (code, found["stale"]["level"], found["server"]["level"]) == (0, "warn", "warn")


def test_a_damaged_ledger_fails(config: Path, tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    (state.root / "ledger.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 8192)
    code, found = examined(config, state.root)
    assert (code, found["ledger"]["level"]) == (1, "fail")
    assert "backup restore" in found["ledger"]["fix"]


class NotReady(FakeControl):
    async def status(self) -> Status:
        import msgspec

        seen = await super().status()
        broken = msgspec.structs.replace(seen.deployments[0], failing="error[E202]: weights are missing\n  why  x")
        return msgspec.structs.replace(seen, ready=False, deployments=(broken,))


@pytest.mark.parametrize(("kind", "level"), [(FakeControl, "ok"), (NotReady, "fail")])
def test_the_running_service_is_asked(config: Path, tmp_path: Path, kind: type[FakeControl], level: str) -> None:
    control = kind(tmp_path / "state")
    with admin_server(control):
        lock = StateDir(control.state).lock()
        code, found = examined(config, control.state)
    assert (code, found["server"]["level"]) == (0 if level == "ok" else 1, level), lock
    if level == "fail":
        assert found["server"]["text"] == "guide: error[E202]: weights are missing"


def test_people_see_a_line_a_check_with_its_fix_beneath(config: Path, tmp_path: Path) -> None:
    config.write_text("models: {guide: {scael: {}}}\n")
    lines = cli("doctor", "-f", str(config), "--state", str(tmp_path), "--lang", "zh").stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("✗ config"))
    assert lines[at + 1].strip().startswith("处理 ")
    assert "不通过 1 项" in lines[-1]
