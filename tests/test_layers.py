"""Imports point down. The map below is DESIGN's order; a module that points up, or sideways into a sibling package,
fails with the map drawn and the arrow named."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "neaptide"

# Lowest first. A line is one layer; a name is a module or a package directly in neaptide/.
LAYERS = (
    ("types",),
    ("errors",),
    ("tls",),
    ("clock", "config", "wire", "link", "table", "specs", "remotes", "elastic", "lifeline", "journal"),
    ("cost", "observe"),
    ("engine", "fleet", "models", "cache"),
    ("gateway", "control"),
    ("simulate", "dashboard"),
    ("assemble",),
    ("demo",),
    ("cli",),
)
# Neighbours on one layer that may look at each other, one way only, and why.
NEIGHBOURS = {
    ("config", "table"): "the limits and timeouts an operator writes are the ones gateways are told",
    ("config", "specs"): "the options an operator writes are the ones a replica is told",
    ("config", "elastic"): "bounds, rules and calendars are checked where they are read",
    ("config", "remotes"): "shares of traffic are checked where they are read",
    ("table", "link"): "a difference is cut so that each part fits a frame",
    ("journal", "clock"): "a record's time comes from where all time comes from",
    ("engine", "models"): "what a model directory holds is read and checked in one place",
}


def depth(name: str) -> int:
    for at, layer in enumerate(LAYERS):
        if name in layer:
            return at
    raise AssertionError(
        f"neaptide/{name} has no layer yet: add it to LAYERS in tests/test_layers.py where it belongs\n{drawn()}"
    )


def drawn() -> str:
    return "\n".join(f"  {at}  {' '.join(layer)}" for at, layer in reversed(list(enumerate(LAYERS))))


def room(path: Path) -> str:
    """The name in LAYERS of a source file. An entry point (`python -m`) wires things up and is imported by nobody:
    it stands at the top."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__main__":
        return LAYERS[-1][0]
    return parts[0]


def arrows(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, imported name directly in neaptide/) of every import of ours, the ones inside functions included."""
    package = ("neaptide", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            stem = start + (node.module.split(".") if node.module else [])
            targets = [[*stem, alias.name] for alias in node.names]
        else:
            continue
        for parts in targets:
            if parts[0] == "neaptide" and len(parts) > 1 and is_ours(parts[1]):
                yield node.lineno, parts[1]


def is_ours(name: str) -> bool:
    """`from neaptide import clock` names a module; `from neaptide import __version__` a constant of the package."""
    return (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()


def sources() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def wrong(path: Path, text: str) -> list[str]:
    here = room(path)
    found = []
    for line, there in arrows(path, text):
        if there == here or depth(there) < depth(here) or (here, there) in NEIGHBOURS:
            continue
        way = "up" if depth(there) > depth(here) else "sideways"
        found.append(f"{path.relative_to(ROOT.parent)}:{line}: {here} -> {there} points {way}")
    return found


def test_imports_point_down_the_layers() -> None:
    # Given every module, when its imports of ours are looked up in the map, then none leads up or to a sibling.
    found = [arrow for path in sources() for arrow in wrong(path, path.read_text(encoding="utf-8"))]
    if found:
        pytest.fail("\n".join([*found, "the layers, highest first:", drawn()]), pytrace=False)


def test_every_module_is_in_the_map() -> None:
    for name in {room(path) for path in sources()}:
        depth(name)


@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("clock.py", "from neaptide.gateway import door", "clock -> gateway points up"),
        ("cost/ledger.py", "def f():\n    import neaptide.control.loop", "cost -> control points up"),
        ("gateway/door.py", "from neaptide import control", "gateway -> control points sideways"),
        ("gateway/door.py", "from ..control import loop", "gateway -> control points sideways"),
    ],
)
def test_an_arrow_that_points_up_or_sideways_is_caught(module: str, text: str, said: str) -> None:
    (found,) = wrong(ROOT / module, text)
    assert said in found


def test_imports_within_a_package_and_downwards_are_free() -> None:
    text = "from neaptide.gateway import queue\nfrom . import admit\nfrom neaptide import clock, __version__\n"
    assert wrong(ROOT / "gateway" / "door.py", text) == []


def test_neighbours_are_on_one_layer_say_why_and_are_needed() -> None:
    used = {(room(path), there) for path in sources() for _, there in arrows(path, path.read_text(encoding="utf-8"))}
    for (one, other), reason in NEIGHBOURS.items():
        assert depth(one) == depth(other)
        assert reason
        assert (one, other) in used


def test_no_module_imports_an_engine_or_a_driver_library_outside_its_adapter() -> None:
    # Heavy dependencies stand at the edge: one package an integration.
    allowed = {
        "openvino": {"engine", "models", "cache"},
        "openvino_genai": {"engine"},
        "tokenizers": {"engine", "models", "cache"},
        "httptools": {"gateway", "engine", "dashboard", "observe"},
        "starlette": {"control", "engine", "dashboard"},
        "uvicorn": {"control", "engine"},
        "sqlalchemy": {"cost"},
        "alembic": {"cost"},
        "rich": {"cli"},
        "click": {"cli"},
        "cryptography": {"tls"},
    }
    found = []
    for path in sources():
        for library in {name.split(".")[0] for name in imported(path)} & set(allowed):
            if room(path) not in allowed[library]:
                found.append(
                    f"{path.relative_to(ROOT.parent)} imports {library}; its place: {sorted(allowed[library])}"
                )
    assert not found, "\n".join(found)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
