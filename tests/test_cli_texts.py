"""The command line speaks two languages, starts light, and ends with a code that says how it went."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

from neaptide.cli import VERBS, words
from neaptide.control.openapi import catalogue as page_catalogue
from tests.cli_run import cli, environment

CLI = Path(words.__file__).parent
CALL = re.compile(r"""say\(\s*f?["']([^"']+)["']""")
HEAVY = ("rich", "starlette", "sqlalchemy", "msgspec", "yaml", "uvicorn", "openvino", "asyncio", "http.client")


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("catalogue", [words.catalogue(), page_catalogue()], ids=["cli", "pages"])
def test_every_text_exists_in_both_languages_with_the_same_placeholders(catalogue: dict[str, dict[str, str]]) -> None:
    for key, texts in catalogue.items():
        assert set(texts) == set(words.LANGUAGES), key
        assert all(text.strip() for text in texts.values()), key
        assert placeholders(texts["en"]) == placeholders(texts["zh"]), key


def test_every_text_that_the_code_asks_for_is_in_the_catalogue_and_none_is_left_over() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in CLI.glob("*.py"))
    asked = set(CALL.findall(source))
    whole = {key for key in asked if "{" not in key}
    families = {key.partition("{")[0] for key in asked if "{" in key}
    known = set(words.catalogue())
    assert whole <= known
    assert all(any(key.startswith(family) for key in known) for family in families)
    by_name = {key for key in known if f'"{key}"' in source}  # chosen by a condition, or handed on
    assert {k for k in known - whole - by_name if not any(k.startswith(f) for f in families)} == set()


def test_table_headers_that_are_built_from_names_are_in_the_catalogue() -> None:
    for path in CLI.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        family = re.search(r'say\(f"(\w+)\.col\.\{c\}"\)', text)
        if family is None:
            continue
        named = re.findall(r'columns = \(([^)]*)\)|columns = "([^"]*)"|_titled\(\s*"\w+",\s*"([^"]*)"', text)
        columns = {word for group in named for part in group for word in re.findall(r"\w+", part)}
        assert columns, path
        for column in columns:
            assert f"{family[1]}.col.{column}" in words.catalogue(), (path.name, column)


def test_the_entry_imports_nothing_heavy() -> None:
    script = f"import sys, neaptide.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_runs_without_importing_any_verb() -> None:
    script = (
        "import sys, neaptide.cli\n"
        "try: neaptide.cli.main(['--help'])\n"
        f"except SystemExit: print([m for m in (*{HEAVY!r}, *{[v.partition(':')[0] for v in VERBS.values()]!r})"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_lists_every_verb_with_its_line() -> None:
    done = cli("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S", done.stdout, re.M), verb


def test_no_verb_at_all_is_a_call_for_help() -> None:
    assert (cli().returncode, cli().stdout) == (0, cli("--help").stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = cli(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: neaptide {verb}" in done.stdout


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (("--lang", "zh", "--help"), {}),
        (("--lang=zh", "--help"), {}),
        (("--help",), {"NEAPTIDE_LANG": "zh"}),
        (("--help",), {"LC_ALL": "zh_CN.UTF-8"}),
    ],
)
def test_chinese_is_spoken_when_a_flag_the_variable_or_the_locale_asks(
    args: tuple[str, ...], env: dict[str, str]
) -> None:
    assert "启动服务" in cli(*args, **env).stdout


def test_the_flag_wins_over_the_locale() -> None:
    assert "Start the service" in cli("--lang", "en", "--help", LC_ALL="zh_CN.UTF-8").stdout


def test_a_language_may_follow_the_verb() -> None:
    assert "状态目录" in cli("status", "--lang", "zh", "--help").stdout


@pytest.mark.parametrize(
    "args",
    [
        ("stauts",),
        ("status", "--nonsense"),
        ("--lang", "fr", "status"),
        ("models", "convert", "x"),
        ("keys",),
        ("keys", "x"),
    ],
)
def test_a_mistyped_command_exits_2_and_names_the_help(args: tuple[str, ...]) -> None:
    done = cli(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error[E110]: ")
    assert "--help" in done.stderr


def test_an_unknown_option_is_a_json_error_on_stderr_with_json() -> None:
    done = cli("status", "--nonsense", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert json.loads(done.stderr)["error"]["code"] == "E110"


def test_version_tells_ours_and_the_engines() -> None:
    told = json.loads(cli("version", "--json").stdout)
    assert set(told) >= {"neaptide", "python", "openvino"}
    assert cli("--version").stdout.split() == ["neaptide", told["neaptide"]]


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m neaptide.cli version --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert done.stderr == ""


def test_an_unexpected_error_is_one_line_with_where_to_look_and_a_traceback_only_on_demand(tmp_path: Path) -> None:
    state = tmp_path / "s"
    (state / "log").mkdir(parents=True)
    (state / "log" / "access.jsonl").write_text('{"at":"yesterday","status":200}\n')
    short, long = (cli("logs", "--state", str(state), *more) for more in ((), ("--debug",)))
    assert short.returncode == long.returncode == 1
    assert short.stderr.startswith("error[E999]: ValueError")
    assert "Traceback" not in short.stderr
    assert "--debug" in short.stderr
    assert "Traceback" in long.stderr


def test_shell_completion_offers_the_verbs() -> None:
    done = cli(_NEAPTIDE_COMPLETE="bash_complete", COMP_WORDS="neaptide st", COMP_CWORD="1")
    assert "plain,status" in done.stdout.splitlines()
