"""What stands in deploy/ fits the program it deploys, as far as that can be told without a daemon."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from neaptide.config import Settings, parse
from tests.cli_lines import complaint, lines

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    """(NAME, rest) of the Containerfile, continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def named(name: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == name]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "neaptide.service")
    return parser


def grace_s(command: list[str]) -> float:
    return float(command[command.index("--grace-s") + 1])


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_everything_the_containerfile_copies_is_in_the_tree() -> None:
    sources: list[str] = []
    for rest in named("COPY"):
        sources += [part for part in rest.split()[:-1] if not part.startswith("--")]
    for rest in named("RUN"):
        mounts = re.findall(r"--mount=(\S+)", rest)
        sources += [
            m.group(1) for mount in mounts if "from=" not in mount and (m := re.search(r"source=([^,]+)", mount))
        ]
    assert "neaptide" in sources
    assert [s for s in sources if not (ROOT / s).exists()] == []


def test_the_build_context_holds_what_is_copied_and_no_secrets() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"  # everything else stays out, .neaptide too
    copied = [part for rest in named("COPY") for part in rest.split()[:-1] if not part.startswith("--")]
    assert set(copied) <= set(kept)
    assert [name for name in kept if not (ROOT / name).exists()] == []


def test_the_container_runs_as_nobody_in_particular_and_tells_its_health() -> None:
    last_stage = len(instructions()) - [kind for kind, _ in instructions()][::-1].index("FROM")
    kinds = dict(instructions()[last_stage:])
    assert kinds["USER"] not in ("root", "0")
    assert "/health" in kinds["HEALTHCHECK"]
    assert not {"ENV", "ARG"} & set(kinds)  # where secrets end up


def test_the_containers_command_is_one_of_ours() -> None:
    entry, command = (re.findall(r'"([^"]*)"', named(kind)[-1]) for kind in ("ENTRYPOINT", "CMD"))
    assert complaint(shlex.join([*entry, *command])) == ""
    assert grace_s(command) < seconds(compose()["services"]["neaptide"]["stop_grace_period"])


def test_inside_a_container_the_api_listens_on_all_addresses_and_admin_does_not() -> None:
    settings = parse((DEPLOY / "neaptide.container.yaml").read_text(), "container")
    assert settings.listen == "0.0.0.0:8000"
    assert settings.admin.listen == "127.0.0.1:8001"
    assert Settings().listen.startswith("127.0.0.1:")  # why the container needs a file of its own


def test_compose_mounts_and_builds_only_what_exists() -> None:
    tree = compose()
    for service in tree["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in tree["volumes"] or (DEPLOY / source).exists(), source
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")  # publishing further is the operator's decision
    build = tree["services"]["neaptide"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert scraped["targets"] == ["neaptide:8000"]


def test_the_unit_is_hardened_and_waits_longer_than_the_grace() -> None:
    service = unit()["Service"]
    wanted = {
        "Type": "exec",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "StateDirectory": "neaptide",
        "KillMode": "mixed",
    }
    assert {name: service[name] for name in wanted} == wanted
    assert int(service["LimitNOFILE"]) >= 65536
    assert grace_s(service["ExecStart"].split()) < seconds(service["TimeoutStopSec"])


@pytest.mark.parametrize("key", ["ExecStart", "ExecReload"])
def test_the_units_commands_are_ours(key: str) -> None:
    words = unit()["Service"][key].split()
    assert complaint(shlex.join(["neaptide", *words[1:]])) == ""


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_else_than_the_missing_installation() -> None:
    command = ["systemd-analyze", "verify", str(DEPLOY / "neaptide.service")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stderr.splitlines()
    ours = [line for line in said if "neaptide" in line]
    assert [line for line in ours if "is not executable" not in line] == []


def test_commands_named_in_comments_exist() -> None:
    for file in sorted(DEPLOY.iterdir()):
        text = re.sub(r"^.*\bexec neaptide (neaptide)", r"\1", file.read_text(), flags=re.M)
        assert [c for line in lines(text) if (c := complaint(line))] == [], file.name
