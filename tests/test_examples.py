"""The examples are run as a reader runs them: against a live service, told only its address and key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from neaptide.config import load
from tests.cli_lines import complaint, lines
from tests.conftest import Service

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh") and p.name != "guide.py")
CONFIGS = sorted((EXAMPLES / "config").glob("*.yaml"))
SAID = {
    "openai_sdk.py": ["served: echo", "What is time to first token?", "tokens in"],
    "stream.py": ["Tell me about the tide", "tokens, the first after", "left after 3 chunks"],
    "errors.py": ["404 model_not_found", "401 invalid_api_key", "stop"],
    "curl.sh": ['"id":"echo"', '"finish_reason"', "data: [DONE]", "# HELP"],
}


def run(script: str, service: Service) -> str:
    tell = {"OPENAI_BASE_URL": service.api, "OPENAI_API_KEY": service.key, "PATH": os.environ["PATH"]}
    command = [sys.executable] if script.endswith(".py") else ["sh"]
    done = subprocess.run(
        [*command, str(EXAMPLES / script)], env=tell, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_against_a_live_service(script: str, echo_service: Service) -> None:
    if script.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("needs curl")
    said = run(script, echo_service)
    assert [part for part in SAID[script] if part not in said] == [], said


def test_the_guide_s_example_answers_every_suggestion(serve: Callable[..., Service]) -> None:
    pytest.importorskip("openvino_genai", reason="the extra `cpu` is not installed")
    said = run("guide.py", serve("models: {guide: {}}\n"))
    assert "demo model" in said
    answers = said.strip().split("\n\n")[1:]
    assert len(answers) == 12
    assert [a for a in answers if len(a.splitlines()) < 2 or "don't know" in a or "不知道" in a] == [], said


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_an_example_configuration_is_accepted(config: Path, tmp_path: Path) -> None:
    # Secrets come from the environment; a file takes its place here.
    key = tmp_path / "key"
    key.write_text("sk-remote\n")
    copy = tmp_path / config.name
    copy.write_text(config.read_text().replace("env:REMOTE_KEY", f"file:{key}"))
    assert load(copy).models


def test_every_example_is_in_the_readme_and_its_commands_exist() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    assert [name for name in (*SCRIPTS, "guide.py") if f"`{name}`" not in readme] == []
    assert [c.name for c in CONFIGS if f"`config/{c.name}`" not in readme] == []
    texts = [readme, *(c.read_text() for c in CONFIGS)]
    assert [c for text in texts for line in lines(text) if (c := complaint(line))] == []
