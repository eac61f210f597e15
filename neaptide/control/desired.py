"""From settings to what should be: deployments, the table's slow part, what a new configuration changes. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from neaptide.config import ModelSettings, PoolSettings, Settings, TenantSettings
from neaptide.control.port import ApplyReport, Change
from neaptide.specs import MemberSpec
from neaptide.table import DeploymentRow, KeyRow, Prices, Slow, quotas
from neaptide.types import Deployment, Revision, Slo

AT_NEXT_UP = ("listen", "tls", "admin", "gateways", "access_log", "journal.segment_mib", "ledger.url")
NO_PRICES = Prices()
# A URL whose first part and whose query may hold a password.
DATABASE = re.compile(r"(?s)\A(?P<who>[^:]*://[^:/]*(:[^@]*)?@([^?]*@)?)?(?P<where>[^?]*).*")
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


def pool(name: str, settings: PoolSettings, members: Sequence[Deployment]) -> Deployment:
    """One deployment of several models: as strict as the strictest, as slow to leave as the slowest."""
    raw = msgspec.json.encode([d.stable.id for d in members])
    engine = members[0].stable.engine
    return Deployment(
        model=name,
        stable=Revision(id=f"{name}-{hashlib.sha256(raw).hexdigest()[:8]}", model=name, source="", engine=engine),
        scale=settings.scale,
        slo=Slo(
            ttft_s=min(d.slo.ttft_s for d in members),
            tpot_s=min(d.slo.tpot_s for d in members),
            attainment=max(d.slo.attainment for d in members),
        ),
        drain_s=max(d.drain_s for d in members),
        members=tuple(d.model for d in members),
    )


def grouped(settings: Settings, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """What is started, counted and priced as one: the pools, and the models that are in none."""
    by_model = {d.model: d for d in deployments}
    pools = tuple(pool(name, p, [by_model.pop(m) for m in p.models]) for name, p in settings.pools.items())
    return (*by_model.values(), *pools)


def members(settings: Settings, unit: Deployment, paths: Mapping[str, str], ids: Mapping[str, str]) -> list[MemberSpec]:
    """What a replica of `unit` is told of each model; `paths`: where its weights lie, `ids`: its revision."""
    return [_member(name, settings.models[name], paths[name], ids[name]) for name in unit.models]


def _member(name: str, m: ModelSettings, path: str, revision_id: str) -> MemberSpec:
    options = {
        k: msgspec.Raw(msgspec.json.encode(v))
        for k, v in msgspec.to_builtins(m.options).items()
        if v is not None and k not in ("cpus", "io_cpus")
    }
    return MemberSpec(
        model=name,
        revision=revision_id,
        source=path,
        options=options,
        slo_tpot_s=m.slo.tpot_s,
        prefix_cache=m.prefix_cache,
        max_tokens_default=m.max_tokens_default,
    )


def slow_part(
    settings: Settings,
    deployments: Iterable[Deployment],
    keys: tuple[KeyRow, ...],
    failing: Mapping[str, str],
    created_s: Mapping[str, int],
    prices: Prices = NO_PRICES,
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
                traffic=m.traffic,
                slo_tpot_s=d.slo.tpot_s,
                adaptive=m.concurrency == "adaptive",
                affinity=m.prefix_cache == "shared",
                cache=m.cache,
                degrade=m.degrade,
            )
        )
    return Slow(
        deployments=tuple(rows),
        keys=_limited(_classed(keys, settings), settings.tenants),
        limits=settings.limits,
        cors=settings.cors,
        auth=settings.auth == "keys",
        weights={name: tenant.weight for name, tenant in settings.tenants.items()},
        prices=prices,
    )


def _classed(keys: tuple[KeyRow, ...], settings: Settings) -> tuple[KeyRow, ...]:
    """A tenant whose data stays inside has no key that says otherwise."""
    inside = {name for name, tenant in settings.tenants.items() if tenant.data == "inside"}
    if not inside:
        return keys
    return tuple(msgspec.structs.replace(k, inside=True) if k.tenant in inside else k for k in keys)


def _limited(keys: tuple[KeyRow, ...], tenants: Mapping[str, TenantSettings]) -> tuple[KeyRow, ...]:
    """`keys`, each with its tenant's limits beside its own."""
    theirs = {name: quotas("tenant", t.rpm, t.tpm, t.concurrency) for name, t in tenants.items()}
    if not any(theirs.values()):
        return keys
    return tuple(
        msgspec.structs.replace(k, quotas=k.quotas + theirs[k.tenant]) if theirs.get(k.tenant) else k for k in keys
    )


def difference(old: Settings, new: Settings, replicas: Mapping[str, list[str]], dry_run: bool) -> ApplyReport:
    """What `apply` of `new` over `old` means; `replicas`: ids that run now, per model or pool."""
    had, has = old.models, new.models
    changed = [m for m in has if m in had and has[m] != had[m]]
    gone = [m for m in had if m not in has]
    runs, will = _shapes(old), _shapes(new)
    leaving = [name for name in runs if runs[name] != will.get(name)]
    differs = [c.key for c in _changes(msgspec.to_builtins(old), msgspec.to_builtins(new))]  # in secrets, too
    later = [k for k in AT_NEXT_UP if any(key == k or key.startswith(f"{k}.") for key in differs)]
    return ApplyReport(
        dry_run=dry_run,
        added=tuple(m for m in has if m not in had),
        changed=tuple(changed),
        removed=tuple(gone),
        unchanged=tuple(m for m in has if m in had and m not in changed),
        changes=tuple(_changes(redacted(old), redacted(new))),
        restarts=tuple(r for name in leaving for r in replicas.get(name, ())),
        notes=tuple(f"{k} takes effect at the next `neaptide up`" for k in later),
    )


def _shapes(settings: Settings) -> dict[str, list[object]]:
    """What makes the revision of each pool and of each model in none: weights, engine and how they run."""
    pooled = {m for p in settings.pools.values() for m in p.models}
    alone = {m: (m,) for m in settings.models if m not in pooled}
    units = alone | {name: p.models for name, p in settings.pools.items()}
    return {
        name: [(m, *(getattr(settings.models[m], k) for k in REVISION_KEYS)) for m in models]
        for name, models in units.items()
    }


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
    if isinstance(ledger, dict):
        ledger["url"] = DATABASE.sub(lambda url: ("***@" if url["who"] else "") + url["where"], str(ledger["url"]))
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
