"""From settings to what should be: deployments, the table's slow part, what a new configuration changes. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from neaptide.config import ModelSettings, Settings
from neaptide.control.port import ApplyReport, Change
from neaptide.table import DeploymentRow, KeyRow, Slow
from neaptide.types import Deployment, Revision

AT_NEXT_UP = ("listen", "admin", "gateways", "journal", "access_log", "ledger")
# What makes another revision: the weights, the engine and how it runs. Prices, SLO and limits do not.
REVISION_KEYS = ("source", "engine", "options", "prefix_cache", "max_tokens_default", "replicas")


def revision(name: str, model: ModelSettings, digest: str) -> Revision:
    """Named by content: the same settings and weights give the same id. `digest` tells the weights' state apart."""
    described = {k: getattr(model, k) for k in REVISION_KEYS if k != "replicas"}
    described["replicas"] = [(r.url, r.model) for r in model.replicas]
    raw = msgspec.json.encode([name, digest, described], order="deterministic")
    engine = "" if model.replicas else (model.engine or "openvino")
    return Revision(
        id=f"{name}-{hashlib.sha256(raw).hexdigest()[:8]}", model=name, source=model.source or "", engine=engine
    )


def deployment(name: str, model: ModelSettings, digest: str) -> Deployment:
    """A replica that leaves may take as long as any request of it may: the gateway ends those that take longer."""
    return Deployment(
        model=name,
        stable=revision(name, model, digest),
        scale=model.scale,
        slo=model.slo,
        drain_s=model.timeouts.total_s,
    )


def slow_part(
    settings: Settings,
    deployments: Iterable[Deployment],
    keys: tuple[KeyRow, ...],
    failing: Mapping[str, str],
    created_s: Mapping[str, int],
) -> Slow:
    """The slow part of the table; `failing` names the deployments of which no replica starts, with the reason."""
    rows = []
    for d in deployments:
        m = settings.models[d.model]
        rows.append(
            DeploymentRow(
                model=d.model,
                aliases=m.aliases,
                revision=d.stable.id,
                timeouts=m.timeouts,
                max_waiting=m.max_waiting,
                max_wait_s=m.max_wait_s,
                created_s=created_s.get(d.model, 0),
                max_tokens_default=m.max_tokens_default,
                failing=failing.get(d.model, ""),
                slo_ttft_s=d.slo.ttft_s,
            )
        )
    return Slow(
        deployments=tuple(rows), keys=keys, limits=settings.limits, cors=settings.cors, auth=settings.auth == "keys"
    )


def difference(old: Settings, new: Settings, replicas: Mapping[str, list[str]], dry_run: bool) -> ApplyReport:
    """What `apply` of `new` over `old` means; `replicas`: ids per model that run now."""
    had, has = old.models, new.models
    changed = [m for m in has if m in had and has[m] != had[m]]
    replaced = [m for m in changed if any(getattr(has[m], k) != getattr(had[m], k) for k in REVISION_KEYS)]
    gone = [m for m in had if m not in has]
    before, after = msgspec.to_builtins(old), msgspec.to_builtins(new)
    later = [k for k in AT_NEXT_UP if before.get(k) != after.get(k)]
    return ApplyReport(
        dry_run=dry_run,
        added=tuple(m for m in has if m not in had),
        changed=tuple(changed),
        removed=tuple(gone),
        unchanged=tuple(m for m in has if m in had and m not in changed),
        changes=tuple(_changes(redacted(old), redacted(new))),
        restarts=tuple(r for m in (*replaced, *gone) for r in replicas.get(m, ())),
        notes=tuple(f"{k} takes effect at the next `neaptide up`" for k in later),
    )


def redacted(settings: Settings) -> dict[str, object]:
    """Every setting with its default, secrets as "***"."""
    tree: dict[str, object] = msgspec.to_builtins(settings)
    shown = msgspec.json.decode(msgspec.json.encode(tree), type=dict[str, object])
    models = shown.get("models")
    if isinstance(models, dict):
        for model in models.values():
            for replica in model.get("replicas", ()):
                replica["key"] = "***" if replica.get("key") else ""
    ledger = shown.get("ledger")
    if isinstance(ledger, dict) and "@" in str(ledger.get("url")):
        ledger["url"] = "***@" + str(ledger["url"]).rpartition("@")[2]
    return shown


def _changes(old: dict[str, object], new: dict[str, object]) -> Iterator[Change]:
    before, after = dict(_leaves("", old)), dict(_leaves("", new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield Change(key=key, old=before.get(key, ""), new=after.get(key, ""))


def _leaves(prefix: str, node: object) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, msgspec.json.encode(node).decode()
