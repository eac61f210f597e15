"""`neaptide models push | pull | stored | prune`: models by content, and what this host keeps of them (0028)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from neaptide.cli.draw import moment, size, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say

if TYPE_CHECKING:
    from neaptide.config import StoreSettings
    from neaptide.models.store import DirectoryStore, Tell

SHORT = 12  # digits of a digest that people are shown


def placed(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --file and --store, which say where the store is."""
    verb = click.option("--store", "root", metavar="DIR|URL", help=say("models.root"))(verb)
    file = click.Path(dir_okay=False, path_type=Path)
    return click.option("-f", "--file", type=file, help=say("models.file"))(verb)


@click.command("push", help=say("models.push"))
@click.argument("source", metavar="DIR|ID")
@click.argument("name", metavar="NAME")
@placed
@common
def push(session: Session, source: str, name: str, file: Path | None, root: str | None) -> None:
    from neaptide.models import store
    from neaptide.models.sources import resolve

    store.parse_ref(name)
    into = _directory(_settings(session, file, root))
    model = resolve(source, session.state / "cache", session.note)
    with _bar(say("models.pushing")) as tell:
        pushed = store.push(model.path, name, into, tell)
    if session.as_json:
        told = {"name": name, "digest": pushed.ref.digest, "bytes": pushed.manifest.size, "new_bytes": pushed.new_bytes}
        session.data(told)
        return
    sizes = {"size": size(pushed.manifest.size), "new": size(pushed.new_bytes)}
    click.echo(say("models.pushed", name=name, digest=pushed.ref.digest, **sizes))
    click.echo(say("models.pin", name=name, digest=pushed.ref.digest))


@click.command("pull", help=say("models.pull"))
@click.argument("ref", metavar="NAME[@DIGEST]")
@click.option("--verify", is_flag=True, help=say("models.verify"))
@placed
@common
def pull(session: Session, ref: str, verify: bool, file: Path | None, root: str | None) -> None:
    from neaptide.models.sources import node_cache, opened
    from neaptide.models.store import parse_ref

    settings, wanted = _settings(session, file, root), parse_ref(ref)
    with _bar(say("models.pulling")) as tell:
        path = node_cache(settings).pull(opened(settings), wanted, session.note, tell, verify=verify)
    if session.as_json:
        session.data({"name": wanted.name, "path": str(path)})
    else:
        click.echo(path)


@click.command("stored", help=say("models.stored"))
@placed
@common
def stored(session: Session, file: Path | None, root: str | None) -> None:
    from neaptide.models.sources import node_cache

    settings = _settings(session, file, root)
    cache = node_cache(settings)
    here = {(e.name, e.digest): e for e in cache.entries()}
    rows = []
    for name, digest, is_latest in _in_store(settings, list(here)):
        kept = here.get((name, digest))
        row = {"name": name, "digest": digest, "latest": is_latest, "here": kept is not None and kept.whole}
        row |= {"bytes": kept.size if kept else None, "in_use": kept is not None and kept.in_use}
        rows.append(row | {"used_wall_s": kept.used_wall_s if kept else None})
    used = {"used_bytes": cache.used_bytes(), "most_bytes": cache.most_bytes}
    if session.as_json:
        session.data({"store": settings.root, "cache": str(cache.root), **used, "rows": rows})
        return
    columns = ("name", "digest", "latest", "here", "used")
    table("", [say(f"models.store.{c}") for c in columns], [_row(row) for row in rows])
    sizes = {"used": size(cache.used_bytes()), "most": size(cache.most_bytes)}
    click.echo(say("models.kept", cache=cache.root, **sizes))


def _row(row: dict[str, Any]) -> list[str]:
    when = say("models.in_use") if row["in_use"] else moment(row["used_wall_s"] or 0.0)
    here = size(row["bytes"]) if row["here"] else "-"
    return [row["name"], row["digest"][:SHORT], "*" if row["latest"] else "", here, when]


def _in_store(settings: StoreSettings, here: list[tuple[str, str]]) -> Iterator[tuple[str, str, bool]]:
    """(name, digest, whether it is the latest) of all that is known: a store over http tells no list, and is not
    asked for one."""
    from neaptide.models.store import DirectoryStore, Ref, at

    where = at(settings.root) if settings.root else None
    there = where.refs() if isinstance(where, DirectoryStore) else []
    latest = {name: where.latest(name) for name in {r.name for r in there}} if where else {}
    for ref in sorted({*there, *(Ref(*r) for r in here)}):
        yield ref.name, ref.digest, latest.get(ref.name) == ref.digest


@click.command("prune", help=say("models.prune"))
@click.option("--keep-gib", type=click.FloatRange(min=0), default=0.0, help=say("models.keep"))
@placed
@common
def prune(session: Session, keep_gib: float, file: Path | None, root: str | None) -> None:
    from neaptide.models.sources import node_cache

    cache = node_cache(_settings(session, file, root))
    freed = cache.prune(int(keep_gib * (1 << 30)))
    if session.as_json:
        session.data({"cache": str(cache.root), "freed_bytes": freed, "used_bytes": cache.used_bytes()})
    else:
        click.echo(say("models.freed", size=size(freed), left=size(cache.used_bytes()), cache=cache.root))


def _settings(session: Session, file: Path | None, root: str | None) -> StoreSettings:
    """`store:` of --file, else of the configuration in force, else of ./neaptide.yaml; --store replaces its root."""
    import msgspec

    from neaptide.cli.checks import in_force
    from neaptide.config import load, parse, placed_store

    kept = None if file else in_force(session.state / "config.json")
    if kept is None:
        path = file or (Path("neaptide.yaml") if Path("neaptide.yaml").exists() else None)
        settings = load(path).store
    else:
        text, path = kept
        settings = parse(text, str(path), path.parent).store
    return placed_store(msgspec.structs.replace(settings, root=root), Path()) if root else settings


def _directory(settings: StoreSettings) -> DirectoryStore:
    from neaptide.errors import ModelError
    from neaptide.models.sources import opened
    from neaptide.models.store import DirectoryStore

    found = opened(settings)
    if isinstance(found, DirectoryStore):
        return found
    why = "a store over http is read only: a web server shows a directory"
    raise ModelError(f"nothing can be put into {settings.root}", why=why, fix="pass --store DIR", code="E235")


@contextmanager
def _bar(label: str) -> Iterator[Tell]:
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with click.progressbar(length=1000, label=label, file=sys.stderr) as bar:
        yield lambda done, total: bar.update(max(0, 1000 * done // total - bar.pos))
