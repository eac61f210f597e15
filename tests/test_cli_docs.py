"""The reference pages miss nothing: every key of the configuration with its default, every verb, option and code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from neaptide import config
from neaptide.cli import build
from neaptide.specs import EngineOptions
from neaptide.table import Caching, Cors, Degrade, Limits, Timeouts
from neaptide.tls.settings import ListenTls, ReplicaTls
from neaptide.types import Event, Rule, Scale, Slo, Spares, Standby

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "neaptide").rglob("*.py"))
# Where each part of the settings stands; a part whose fields are rows themselves has no row of its own.
PLACES: dict[str, type[msgspec.Struct]] = {
    "": config.Settings,
    "tls.": ListenTls,
    "admin.": config.AdminSettings,
    "admin.tls.": ListenTls,
    "models.NAME.": config.ModelSettings,
    "models.NAME.options.": EngineOptions,
    "models.NAME.scale.": Scale,
    "models.NAME.scale.standby.": Standby,
    "models.NAME.scale.rules[].": Rule,
    "models.NAME.scale.calendar[].": Event,
    "models.NAME.slo.": Slo,
    "models.NAME.timeouts.": Timeouts,
    "models.NAME.cache.": Caching,
    "models.NAME.degrade[].": Degrade,
    "models.NAME.replicas[].": config.RemoteReplica,
    "models.NAME.replicas[].tls.": ReplicaTls,
    "models.NAME.gpus[].": config.GpuSource,
    "pools.NAME.": config.PoolSettings,
    "tenants.NAME.": config.TenantSettings,
    "limits.": Limits,
    "cors.": Cors,
    "journal.": config.JournalSettings,
    "ledger.": config.LedgerSettings,
    "store.": config.StoreSettings,
    "spares.": Spares,
    "prices.MODEL.": config.Price,
}
PARENTS = {place.rstrip(".").removesuffix(".NAME").removesuffix(".MODEL") for place in PLACES} - {
    "models.NAME.replicas[]"
}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def keys() -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    for place, kind in PLACES.items():
        for field in msgspec.structs.fields(kind):
            if f"{place}{field.name}" not in PARENTS:
                yield f"{place}{field.name}", field


def test_every_part_of_the_settings_has_its_place() -> None:
    assert set(PLACES.values()) >= set(config.Part.__subclasses__())


@pytest.mark.parametrize(("key", "field"), list(keys()), ids=lambda x: x if isinstance(x, str) else "")
def test_a_configuration_key_is_documented_with_its_default(key: str, field: msgspec.structs.FieldInfo) -> None:
    row = re.search(rf"^\| `{re.escape(key)}` \| .+? \| (.+?) \| (.+) \|$", page("configuration.md"), re.M)
    assert row is not None, f"docs/configuration.md has no row for {key}"
    if field.required:
        expected = "required"
    else:
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        expected = "absent" if default is None else f"`{msgspec.json.encode(default).decode()}`"
    assert row[1] == expected


def test_no_documented_key_is_unknown() -> None:
    documented = set(re.findall(r"^\| `([\w.\[\]]+)` \| .+? \| .+? \|", page("configuration.md"), re.M))
    assert {key for key in documented if not key.isupper()} == {key for key, _ in keys()}


def test_the_example_in_the_page_is_a_valid_configuration(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-remote")
    (example,) = re.findall(r"```yaml\n(.*?)```", page("configuration.md"), re.S)
    example = example.replace("env:REMOTE_KEY", f"file:{tmp_path}/key")  # the tester's environment has none
    settings = config.parse(example, "docs/configuration.md", tmp_path)
    assert set(settings.models) == {"guide", "small", "elsewhere"}


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def test_every_verb_and_option_is_documented() -> None:
    text = page("cli.md")
    shared = text.partition("\n## ")[0]
    sections = dict(re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", text, re.M | re.S))
    for path, command in commands(build()):
        section = sections[path[0]]
        if len(path) > 1:
            assert f"neaptide {' '.join(path)}" in section, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                long = [name for name in parameter.opts if name.startswith("--")]
                assert any(f"`{n}" in section or f"`{n}" in shared for n in long), (path, parameter.opts)


def used_codes() -> set[str]:
    """Every E### that stands as a string of its own in the code."""
    found: set[str] = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"E\d{3}", node.value):
                found.add(node.value)
    return found


def test_every_error_code_of_the_code_is_documented_once_and_no_other() -> None:
    documented = re.findall(r"^\| (E\d{3}) \|", page("errors.md"), re.M)
    assert len(documented) == len(set(documented))
    assert set(documented) == used_codes()


def test_every_code_of_the_inference_api_is_documented() -> None:
    """`slug="..."` where requests are answered; control's answers carry E-codes instead."""
    listed = set(re.findall(r"`([a-z_]+)`", page("errors.md").partition("## Codes of the inference API")[2]))
    spoken: set[str] = set()
    for source in SOURCES:
        if source.relative_to(ROOT).parts[1] in ("gateway", "engine", "wire"):
            spoken |= set(re.findall(r'slug="([a-z_]+)"', source.read_text(encoding="utf-8")))
    assert spoken - listed == set()


def test_exit_codes_are_the_ones_that_errors_carry() -> None:
    from neaptide import errors

    assert errors.ConfigError.exit_code == 2
    assert errors.UnreachableError.exit_code == 3
    assert errors.RequestError.exit_code == 4
    for code in (0, 1, 2, 3, 4, 130):
        assert f"\n| {code} | " in page("errors.md")
