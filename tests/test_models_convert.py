"""Conversion: what is refused before work begins, what an interruption leaves, and one real conversion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from neaptide.errors import ModelError
from neaptide.models.convert import convert
from neaptide.models.toolchain import REQUIREMENTS, OptimumToolchain, Precision, Report, run
from tests.test_models_sources import CONFIG, quiet

ROOT = Path(__file__).resolve().parent.parent
# argv: behaviour, source, out, precision, group size
EXPORTER = """
import json, os, sys, time
from pathlib import Path
behaviour, source, out, to, group = sys.argv[1:]
source, out = Path(source), Path(out)
print("half\\rwhole", flush=True)
out.mkdir()
(out / "openvino_model.bin").write_bytes((source / "model.safetensors").read_bytes())
if behaviour == "hang":
    (Path(os.environ["MARKER"])).write_text(str(os.getpid()))
    time.sleep(600)
if behaviour == "fail":
    sys.exit("ValueError: no such architecture")
config = json.loads((source / "config.json").read_text())
(out / "config.json").write_text(json.dumps({**config, "group": group}))
(out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
(out / "openvino_config.json").write_text(str(source))
kind = "int8" if behaviour == "wrong" else to
body = '<data element_type="bf16" />' if kind == "bf16" else f'<mode value="{kind}_asym" />'
(out / "openvino_model.xml").write_text(f"<net>{body}</net>")
"""


class FakeToolchain:
    """Real processes that stand in for the real tools."""

    def __init__(self, behaviour: str = "work", check: str = "pass") -> None:
        self.behaviour, self.check, self.made_ready = behaviour, check, 0

    def ready(self, report: Report) -> None:
        self.made_ready += 1

    def export_argv(self, source: Path, out: Path, to: Precision, group_size: int | None) -> list[str]:
        return [sys.executable, "-c", EXPORTER, self.behaviour, str(source), str(out), to, str(group_size)]

    def check_argv(self, out: Path) -> list[str]:
        return [sys.executable, "-c", self.check]


def checkpoint(path: Path, config: dict[str, object] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float32", **(config or {})}))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_the_result_appears_whole_without_the_exporter_s_notes_and_the_source_is_untouched(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    lines: list[str] = []

    done = convert(source, tmp_path / "deep" / "ov", "int8", tmp_path, lines.append, FakeToolchain())

    assert done.model.precision == "int8"
    assert done.model.path == done.out == tmp_path / "deep" / "ov"
    assert done.source_bytes == len(b"weights")
    assert not (done.out / "openvino_config.json").exists()
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["ov"]
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before
    assert {"half", "whole"} <= set(lines)  # a progress bar's carriage returns count as lines


def test_bf16_is_asked_of_the_exporter_by_the_staged_config(tmp_path: Path) -> None:
    done = convert(checkpoint(tmp_path / "hf"), tmp_path / "ov", "bf16", None, quiet, FakeToolchain())
    config = json.loads((done.out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


@pytest.mark.parametrize(
    ("change", "group"),
    [
        ({"intermediate_size": 256, "hidden_size": 256}, "128"),
        ({"intermediate_size": 704}, "64"),
        ({"intermediate_size": 1000}, "8"),
    ],
)
def test_int4_groups_divide_every_matrix(tmp_path: Path, change: dict[str, object], group: str) -> None:
    source = checkpoint(tmp_path / "hf", change)
    done = convert(source, tmp_path / "ov", "int4", None, quiet, FakeToolchain())
    assert json.loads((done.out / "config.json").read_text())["group"] == group


@pytest.mark.parametrize(
    ("toolchain", "words"),
    [
        (FakeToolchain("fail"), "no such architecture"),
        (FakeToolchain("wrong"), "int8 weights instead of int4"),
        (FakeToolchain(check="raise SystemExit('cannot compile')"), "cannot compile"),
    ],
)
def test_a_failed_export_tells_its_last_lines_and_leaves_nothing(
    tmp_path: Path, toolchain: FakeToolchain, words: str
) -> None:
    source = checkpoint(tmp_path / "hf")
    with pytest.raises(ModelError) as error:
        convert(source, tmp_path / "ov", "int4", None, quiet, toolchain)
    assert error.value.code == "E208"
    assert words in str(error.value)
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda p: (p / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda p: (p / "config.json").write_text("[1]"), "not a JSON object"),
        (lambda p: (p / "config.json").write_text('{"auto_map": {}}'), "remote code"),
        (lambda p: (p / "openvino_model.xml").write_text("<net></net>"), "already an OpenVINO model"),
    ],
)
def test_a_source_that_cannot_be_converted_is_refused_before_any_tool_is_installed(
    tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    source = checkpoint(tmp_path / "hf")
    spoil(source)
    toolchain = FakeToolchain()
    with pytest.raises(ModelError) as error:
        convert(source, tmp_path / "ov", "int8", None, quiet, toolchain)
    assert words in error.value.what
    assert (error.value.code, toolchain.made_ready) == ("E203", 0)
    assert error.value.fix


def test_an_existing_target_and_an_unknown_precision_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    (tmp_path / "ov").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        convert(source, tmp_path / "ov", "int8", None, quiet, FakeToolchain())
    with pytest.raises(ModelError, match="int3") as error:
        convert(source, tmp_path / "new", "int3", None, quiet, FakeToolchain())  # type: ignore[arg-type]
    assert "int4 | int8 | bf16" in error.value.fix


def test_a_work_directory_of_a_killed_conversion_is_cleared_and_a_running_one_s_is_not(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".ov.converting-{pid}").mkdir()
    convert(source, tmp_path / "ov", "int8", None, quiet, FakeToolchain())
    assert sorted(f.name for f in tmp_path.iterdir()) == [f".ov.converting-{os.getppid()}", "hf", "ov"]


INTERRUPTED = """
import sys
from pathlib import Path
from tests.test_models_convert import FakeToolchain
from neaptide.models.convert import convert
convert(Path(sys.argv[1]), Path(sys.argv[2]), "int8", None, lambda line: None, FakeToolchain("hang"))
"""


@pytest.mark.parametrize(("number", "left"), [(signal.SIGINT, []), (signal.SIGKILL, [".ov.converting"])])
def test_the_exporter_ends_with_the_conversion_and_only_a_kill_leaves_its_work_directory(
    tmp_path: Path, number: signal.Signals, left: list[str]
) -> None:
    source, marker = checkpoint(tmp_path / "hf"), tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "ov")],
        env={**os.environ, "MARKER": str(marker), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: marker.exists() and marker.read_text() != "")
    process.send_signal(number)
    assert process.wait(timeout=30) != 0
    wait_until(lambda: ended(int(marker.read_text())))
    assert sorted(f.name.rpartition("-")[0] or f.name for f in tmp_path.iterdir()) == [*left, "hf", "marker"]


def ended(pid: int) -> bool:
    """Gone, or a zombie that only init has still to reap."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_a_toolchain_that_could_not_be_installed_says_so_and_does_not_count_as_made(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("./no-such-wheel-here.whl\n")
    toolchain = OptimumToolchain(tmp_path / "env", requirements)
    with pytest.raises(ModelError, match="could not be made") as error:
        toolchain.ready(quiet)
    assert error.value.code == "E209"
    assert "no-such-wheel-here" in error.value.why
    assert not (toolchain.path / "complete").exists()


def test_the_tools_are_pinned_whole_and_leave_out_what_breaks_or_phones_home() -> None:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    names = {line.split("==")[0].lower() for line in lines}
    assert all("==" in line for line in lines)
    assert {"torch==2.13.0", "optimum-intel==2.2.0", "transformers==5.5.4", "openvino==2026.4.1"} <= set(lines)
    assert not names & {"torchvision", "openvino-telemetry"}


def test_a_command_s_output_is_streamed_and_its_last_lines_kept() -> None:
    lines: list[str] = []
    code, last = run([sys.executable, "-c", "print(*range(20), sep='\\n'); raise SystemExit(3)"], lines.append)
    assert (code, lines[0], lines[-1]) == (3, "0", "19")
    assert last.splitlines() == lines[-15:]


@pytest.mark.slow
def test_a_tiny_model_is_really_converted_and_answers(tmp_path: Path) -> None:
    """Uses the tools of ~/.cache/neaptide/convert-env; installing 1.5 GB is no test's business."""
    genai = pytest.importorskip("openvino_genai")
    tools = OptimumToolchain(Path.home() / ".cache" / "neaptide" / "convert-env")
    if not (tools.path / "complete").exists():
        pytest.skip("LOUD: no conversion environment; run `neaptide models convert` once to make it")
    made = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "random_model.py"),
            "--out",
            str(tmp_path / "m"),
            "--size",
            "tiny",
            "--to",
            "none",
        ],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    for to, most in (("int8", 0.75), ("int4", 0.7), ("bf16", 1.05)):
        done = convert(tmp_path / "m" / "hf", tmp_path / to, to, None, quiet, tools)
        assert done.model.precision == to
        assert done.model.weight_bytes <= most * done.source_bytes
        genai.ContinuousBatchingPipeline(str(done.out), genai.SchedulerConfig(), "CPU")
