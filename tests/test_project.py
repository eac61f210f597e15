"""The house rules that a machine can check, and that what is shipped and written down is what there is."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from neaptide import __version__
from tests.cli_lines import complaint, inline, lines

ROOT = Path(__file__).parent.parent
LONGEST_MODULE = 500
LONGEST_FUNCTION = 60
WRITTEN_OUT = {"_stretch"}  # simulate/plain.py: one loop over local names, a third quicker (docs/log.md)
# Written so that this file does not contain what it looks for.
FORBIDDEN = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "/wo" + "rk/", "T" + "BD"]


def tracked(*patterns: str) -> list[Path]:
    """Files under version control, or, in an unpacked archive, all that is not built or installed."""
    done = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    found = [p for pattern in patterns or ("*",) for p in ROOT.rglob(pattern.rsplit("/", 1)[-1])]
    return [p for p in found if p.is_file() and not {".venv", "build", "dist", ".git"} & set(p.parts)]


MODULES = [p for p in tracked("*.py") if p.is_relative_to(ROOT / "neaptide")]
PAGES = tracked("*.md")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_module_is_longer_than_a_reader_holds() -> None:
    sizes = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert {name: n for name, n in sizes.items() if n > LONGEST_MODULE} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    # A migration is a list of tables that is never edited again; splitting it would only hide its order.
    found = [
        f"{p.relative_to(ROOT)}:{f.lineno} {f.name}: {f.end_lineno - f.lineno + 1} lines"
        for p in MODULES
        if "migrations" not in p.parts
        for f in functions(p)
        if f.end_lineno is not None and f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION and f.name not in WRITTEN_OUT
    ]
    assert found == []


def test_no_error_is_swallowed() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            if broad and all(isinstance(s, ast.Pass | ast.Continue) for s in node.body):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_tests_join_real_objects_instead_of_patching() -> None:
    patching = re.compile(r"\bmonkeypatch\b|\bmock\.patch\b|@patch\b")
    found = [
        f"{p.relative_to(ROOT)}:{n}"
        for p in tracked("tests/*.py")
        if p != Path(__file__)
        for n, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if patching.search(line)
    ]
    assert found == []


def test_nothing_is_left_unfinished_or_bound_to_one_machine() -> None:
    words = re.compile(r"|".join(rf"(?<![A-Za-z]){re.escape(w)}" for w in FORBIDDEN))
    found = []
    for path in tracked("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.c", "*.sh", "Makefile", ".ci/run", "deploy/*"):
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if words.search(line):
                found.append(f"{path.relative_to(ROOT)}:{n}: {line.strip()[:80]}")
    assert found == []


# ------------------------------------------------------------------------------------------------ documents


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    targets = [
        t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")
    ]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_named_in_documents_exist(page: Path) -> None:
    roots = r"(?:neaptide|tests|docs|bench|tools|deploy|examples|\.ci)"
    named = re.findall(rf"`({roots}/[\w./-]*)`", without_code(page.read_text(encoding="utf-8")))
    made = ("bench/results/",)  # by running something
    assert [n for n in named if not n.startswith(made) and not (ROOT / n).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_named_in_documents_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [c for line in [*lines(text), *inline(without_code(text))] if (c := complaint(line))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_and_benchmarks_named_in_documents_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    # A sentence may contain the word; a command stands at a line's start or in backticks.
    named = set(re.findall(r"(?:^\s*|`)make ([a-z]+)\b", text, flags=re.M))
    assert named - targets == set()
    modules = set(re.findall(r"python -m (bench[.\w]*)", text))
    assert [m for m in modules if not any((ROOT / f"{m.replace('.', '/')}{end}").exists() for end in (".py", ""))] == []


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_coverage_has_one_line_for_each_row_of_the_mission() -> None:
    rows = re.findall(
        r"^\| ([A-M]\d+) \| .+ \| (yes|part|not yet) \|", (ROOT / "docs/coverage.md").read_text(), flags=re.M
    )
    counts = {"A": 10, "B": 6, "C": 6, "D": 7, "E": 3, "F": 3, "G": 5, "H": 5, "I": 6, "J": 3, "K": 4, "L": 3, "M": 2}
    assert [row for row, _ in rows] == [f"{letter}{n}" for letter, most in counts.items() for n in range(1, most + 1)]


def test_both_readmes_name_the_same_documents() -> None:
    def targets(name: str) -> set[str]:
        text = (ROOT / name).read_text(encoding="utf-8")
        return {t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("README")}

    assert targets("README.zh-CN.md") <= targets("README.md")


# ------------------------------------------------------------------------------------------------ make


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_tells_its_targets() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert targets is not None
    told = set(re.findall(r"^make ([a-z]+)", done.stdout, flags=re.M))
    assert told == set(targets.group(1).split()) - {"help"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_names_the_fix_where_no_python_will_do(tmp_path: Path) -> None:
    # Given a path with spaces and a python3 that is too old, when .venv is wanted, then the error says what to install.
    here = tmp_path / "a checkout"
    commands = here / "commands"
    commands.mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", here)
    (commands / "python3").write_text("#!/bin/sh\nexit 1\n")
    (commands / "python3").chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    environment = {"PATH": str(commands)}
    done = subprocess.run(
        [make, ".venv/bin/python"], cwd=here, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13" in done.stderr
    assert "fix" in done.stderr
    assert not (here / ".venv").exists()


# ------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what is tracked, so that neither leftovers nor a build/ directory get in."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for path in tracked("neaptide", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_everything_the_service_reads_at_run_time(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    missing = [str(p.relative_to(ROOT)) for p in tracked("neaptide") if str(p.relative_to(ROOT)) not in names]
    assert missing == []
    assert {"neaptide/py.typed", "neaptide/cli/words.json"} <= names
    assert any(n.startswith("neaptide/cost/migrations/") for n in names)
    assert any(n.startswith("neaptide/models/guide/") for n in names)


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = next(n for n in wheel.namelist() if n.endswith("METADATA"))
    told = wheel.read(info).decode()
    assert f"\nVersion: {__version__}\n" in told
    assert "\nLicense-Expression: Apache-2.0\n" in told
    assert {n.rsplit("/", 1)[-1] for n in wheel.namelist() if "/licenses/" in n} == {"LICENSE", "NOTICE"}
    assert not [n for n in wheel.namelist() if n.startswith(("tests/", "bench/", "tools/"))]


def test_what_is_pinned_is_what_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {m.lower() for m in re.findall(r"^([\w.-]+)==", pins, flags=re.M)}
    names = {re.split(r"[\[<>=! ;]", d)[0].lower().replace("_", "-") for d in asked}
    assert names - pinned == set()
    reasons = (ROOT / "docs/decisions/0002-dependencies.md").read_text(encoding="utf-8").lower().replace("_", "-")
    assert [n for n in names if n not in reasons] == []
