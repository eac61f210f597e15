"""neaptide.yaml and the environment -> frozen settings, parsed once at the edge and passed by part.

Unknown keys are errors that name the key, the place and the keys that exist there. `env:NAME` and `file:PATH` values
are read here, so that nothing below reads the environment.
"""

from __future__ import annotations

import datetime
import difflib
import math
import os
import re
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import yaml

from neaptide.elastic import check_scale, check_told
from neaptide.errors import ConfigError
from neaptide.remotes import check_traffic
from neaptide.specs import EngineOptions
from neaptide.table import Caching, Cors, Degrade, Limits, Timeouts, unsound
from neaptide.tls.settings import ListenTls, ReplicaTls, placed_listener, placed_replica
from neaptide.types import Event, Rule, Scale, Slo, Spares, Standby

DEFAULT_TEXT = """\
# neaptide.yaml: what `neaptide up` serves. docs/configuration.md lists every key.
listen: 127.0.0.1:8000
# admin: {listen: 127.0.0.1:8001}   # the default; a free port with `up --port`
models:
  guide: {}   # the built-in model
"""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
PASSWORD = re.compile(r"[^:]*://[^:/]*:[^@]+@")  # in a database's URL, as SQLAlchemy reads it
POOLED = 4  # models in one replica, at most
MOST_UNEQUAL = (0.01, 100.0)  # weights of tenants
FULL_USE = {  # a metric's value at full use, where its exporter fixes it
    "DCGM_FI_DEV_GPU_UTIL": 100.0,
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": 1.0,
    "npu_chip_info_utilization": 100.0,
}
T = TypeVar("T")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the settings' nodes."""


class RemoteReplica(Part, frozen=True, kw_only=True):
    url: str  # http://host:port/v1
    model: str = ""  # its id there; default: the deployment's name
    key: str = ""  # env:NAME, file:PATH; resolved on load
    max_running: int | None = None  # absent = unlimited; adaptive concurrency stays below it
    tls: ReplicaTls | None = None
    resumes: bool = False  # it continues a chat's last message where `continue_final_message` says so, as vLLM does
    revision: str = ""  # default: the deployment's
    outside: bool | None = None  # absent: unless the URL names this host


class GpuSource(Part, frozen=True, kw_only=True):
    """GPUs that an exporter of Prometheus' text format tells of."""

    url: str  # http://host:9400/metrics
    metric: str = "DCGM_FI_DEV_GPU_UTIL"  # a gauge with one sample a GPU
    labels: dict[str, str] = {}  # of the samples that are meant; empty: all
    full: float | None = None  # the metric's value at full use; None: known by its name

    @property
    def full_use(self) -> float:
        return self.full or FULL_USE[self.metric]


class ModelSettings(Part, frozen=True, kw_only=True):
    source: str | None = None  # directory, Hugging Face id; None = the built-in model of that name
    engine: Literal["openvino", "echo"] | None = None  # None: openvino; ignored for remote replicas
    options: EngineOptions = EngineOptions()
    scale: Scale = Scale()
    slo: Slo = Slo()
    replicas: tuple[RemoteReplica, ...] = ()
    concurrency: Literal["adaptive", "fixed"] = "adaptive"  # of `replicas`: learnt, or max_running alone
    gpus: tuple[GpuSource, ...] = ()  # that its replicas run on, as far as exporters tell of them
    traffic: dict[str, int] = {}  # percent by revision, of such replicas; empty: whichever has room
    aliases: tuple[str, ...] = ()
    timeouts: Timeouts = Timeouts()
    max_waiting: int = 1024
    max_wait_s: float = 60.0
    max_tokens_default: int = 1024
    prefix_cache: Literal["shared", "tenant", "off"] = "shared"
    cache: Caching = Caching()
    degrade: tuple[Degrade, ...] = ()  # under pressure


class PoolSettings(Part, frozen=True, kw_only=True):
    """Several small models in each of its replicas."""

    models: tuple[str, ...]  # at most POOLED
    scale: Scale = Scale()  # of the pool; its models have none of their own


class AdminSettings(Part, frozen=True, kw_only=True):
    listen: str | None = None  # None: 127.0.0.1:8001, or a free port when `up --port` is given
    tls: ListenTls | None = None


class JournalSettings(Part, frozen=True, kw_only=True):
    segment_mib: int = 8
    retention_days: float = 7.0  # of segments the ledger has taken


class LedgerSettings(Part, frozen=True, kw_only=True):
    url: str = ""  # "" = sqlite in the state directory; postgresql://...; one with a password by env:NAME
    retention_days: float = 400.0


class StoreSettings(Part, frozen=True, kw_only=True):
    """Where `source: store:NAME` comes from, and what this host keeps of it."""

    root: str = ""  # a directory, or an http(s) URL to read from
    cache: str = "~/.cache/neaptide/store"  # on a disk of this host
    cache_gib: float = 100.0


class Price(Part, frozen=True, kw_only=True):
    """Per 10^6 tokens, in the config's currency; a decimal string or number."""

    prompt: float = 0.0
    cached: float | None = None  # None = prompt
    output: float = 0.0


class TenantSettings(Part, frozen=True, kw_only=True):
    weight: float = 1.0  # of tokens, where several tenants wait for the same model
    data: Literal["any", "inside"] = "any"  # inside: its requests never go to a replica that is outside
    rpm: int | None = None  # of all its keys together: requests in any minute; None: no limit
    tpm: int | None = None  # tokens in any minute, of prompts and answers
    concurrency: int | None = None  # requests at once, those that wait included


class Settings(Part, frozen=True, kw_only=True):
    listen: str = "127.0.0.1:8000"
    tls: ListenTls | None = None
    admin: AdminSettings = AdminSettings()
    models: dict[str, ModelSettings] = {}
    pools: dict[str, PoolSettings] = {}
    auth: Literal["keys", "off"] = "keys"
    tenants: dict[str, TenantSettings] = {}
    limits: Limits = Limits()
    cors: Cors = Cors()
    journal: JournalSettings = JournalSettings()
    ledger: LedgerSettings = LedgerSettings()
    store: StoreSettings = StoreSettings()
    spares: Spares = Spares()
    currency: str = "CNY"
    prices: dict[str, Price] = {}
    gateways: int = 1
    access_log: bool = True


def load(path: Path | None) -> Settings:
    """Settings of `path`, or the defaults (the built-in model). ConfigError names key, value and fix."""
    if path is None:
        return parse(DEFAULT_TEXT, "the defaults")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", code="E101", fix="pass -f FILE, or run `neaptide up` to create one"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}", code="E101") from e
    return parse(text, str(path), path.parent)


def parse(text: str, origin: str, base: Path = Path()) -> Settings:
    """Strict: duplicate and unknown keys, wrong types and dangling references are errors."""
    tree = strict_yaml(text, origin)
    tree = _dated(_listed_models(tree or {}))
    if isinstance(tree, dict) and isinstance(tree.get("models"), dict):
        for name, model in tree["models"].items():  # one by one: msgspec names no dictionary key in its errors
            _convert(model, ModelSettings, origin, f"models.{name}")
    if isinstance(tree, dict) and isinstance(tree.get("pools"), dict):
        for name, pool in tree["pools"].items():
            _convert(pool, PoolSettings, origin, f"pools.{name}")
    if isinstance(tree, dict) and isinstance(tree.get("tenants"), dict):
        for name, tenant in tree["tenants"].items():
            _convert(tenant, TenantSettings, origin, f"tenants.{name}")
    return _checked(_convert(tree, Settings, origin), origin, base)


def strict_yaml(text: str, origin: str) -> object:
    """The tree of a YAML text in which no key stands twice. ConfigError E102 names the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader subclass)
    except (yaml.YAMLError, ValueError, TypeError) as e:  # no such date, a list as a key
        mark = getattr(e, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{origin}{where}: {getattr(e, 'problem', e)}", code="E102", fix="correct the YAML") from e


def host_port(listen: str, key: str = "listen") -> tuple[str, int]:
    """ "127.0.0.1:8000" -> ("127.0.0.1", 8000); IPv6 in brackets. ConfigError otherwise."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{key}: {listen!r} is not host:port", code="E103", fix=f"write it as {key}: 127.0.0.1:8000")
    return host, int(port)


def secret(value: str, key: str) -> str:
    """`env:NAME` and `file:PATH` read; anything else is refused, so that no secret stands in the file."""
    kind, _, rest = value.partition(":")
    if kind == "env":
        found = os.environ.get(rest)
        if not found:
            raise ConfigError(
                f"{key}: the environment has no {rest}",
                code="E106",
                fix=f"export {rest}=... before `neaptide up`",
            )
        return found
    if kind == "file":
        try:
            return Path(rest).expanduser().read_text(encoding="utf-8").strip()
        except OSError as e:
            raise ConfigError(f"{key}: {rest}: {e.strerror}", code="E106", fix=f"create {rest} (chmod 600)") from e
    raise ConfigError(f"{key}: a secret in the file itself", code="E106", fix=f"write {key}: env:NAME or file:PATH")


def placed_store(store: StoreSettings, base: Path) -> StoreSettings:
    """Paths made absolute; a store and a cache in one place would have the cache evict what the store is to keep."""
    if not 0 < store.cache_gib < math.inf:
        raise ConfigError(f"store.cache_gib: {store.cache_gib:g}", code="E108", fix="a number over 0, such as 100")
    if not store.root:
        return store
    cache = str((base / Path(store.cache).expanduser()).resolve())
    if store.root.startswith(("http://", "https://")):
        return msgspec.structs.replace(store, cache=cache)
    root = str((base / Path(store.root).expanduser()).resolve())
    if root == cache:
        fix = "name a directory of its own as store.cache"
        raise ConfigError(f"store.root and store.cache are both {root}", code="E108", fix=fix)
    return msgspec.structs.replace(store, root=root, cache=cache)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, which YAML libraries let pass."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
    loader.flatten_mapping(node)
    out: dict[object, object] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in out:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
        out[key] = loader.construct_object(value_node, deep=True)
    return out


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _listed_models(tree: object) -> object:
    """`guide:` with nothing behind it means `guide: {}`."""
    if isinstance(tree, dict) and isinstance(tree.get("models"), dict):
        tree = {**tree, "models": {k: {} if v is None else v for k, v in tree["models"].items()}}
    return tree


def _dated(tree: object) -> object:
    """YAML reads 2026-11-11 20:00 as a time; a calendar takes times and ISO texts alike."""
    parts = [tree.get(key) for key in ("models", "pools")] if isinstance(tree, dict) else []
    for model in (m for part in parts if isinstance(part, dict) for m in part.values()):
        scale = model.get("scale") if isinstance(model, dict) else None
        events = scale.get("calendar") if isinstance(scale, dict) else None
        for event in events if isinstance(events, list) else ():
            for key in ("start", "end") if isinstance(event, dict) else ():
                if isinstance(event.get(key), datetime.date):
                    event[key] = event[key].isoformat()
    return tree


def _convert(tree: object, kind: type[T], origin: str, at: str = "") -> T:
    try:
        return msgspec.convert(tree, kind, strict=True)
    except msgspec.ValidationError as e:
        text = str(e)
        place = re.search(r"at `\$(.*?)`", text)
        where = ".".join(filter(None, (at, place.group(1).lstrip(".") if place else ""))) or "the top level"
        unknown = re.search(r"unknown field `(.+?)`", text)
        if unknown:
            raise _unknown_key(unknown.group(1), where, origin) from None
        reason = text.split(" - at ")[0]
        raise ConfigError(f"{origin}: {where}: {reason}", code="E105", fix=f"correct {where}") from None


def _unknown_key(name: str, where: str, origin: str) -> ConfigError:
    known = sorted({f for kind in _parts() for f in kind.__struct_fields__})
    near = difflib.get_close_matches(name, known, 1)
    fix = f"did you mean {near[0]!r}?" if near else "remove it; docs/configuration.md lists every key"
    return ConfigError(f"{origin}: unknown key {name!r} at {where}", code="E104", fix=fix)


def _parts() -> list[type[msgspec.Struct]]:
    told = (EngineOptions, Limits, Cors, Timeouts, Caching, Degrade, Scale, Standby, Spares, Slo, Rule, Event)
    return [*Part.__subclasses__(), *told, ListenTls, ReplicaTls]


def _checked(s: Settings, origin: str, base: Path) -> Settings:
    host_port(s.listen)
    if s.admin.listen is not None:
        host_port(s.admin.listen, "admin.listen")
    if not s.models:
        raise ConfigError(f"{origin}: no models", code="E107", fix="add `models: {guide: {}}`")
    if s.spares.max < 0 or not 0 < s.spares.rent <= 1:
        what = f"{origin}: spares: max {s.spares.max}, rent {s.spares.rent:g}"
        raise ConfigError(what, code="E108", fix="max: 0 or more; rent: over 0, at most 1, such as 0.01")
    for name, tenant in s.tenants.items():
        if not MOST_UNEQUAL[0] <= tenant.weight <= MOST_UNEQUAL[1]:
            what = f"{origin}: tenants.{name}.weight: {tenant.weight:g}"
            raise ConfigError(what, code="E108", fix="a number from {:g} to {:g}; 1 is usual".format(*MOST_UNEQUAL))
        if tenant.data == "inside" and s.auth == "off":
            what = f"{origin}: tenants.{name}.data: inside, and auth is off"
            raise ConfigError(what, why="nobody's tenant is known then", code="E108", fix="set auth: keys")
        for limit, value in (("rpm", tenant.rpm), ("tpm", tenant.tpm), ("concurrency", tenant.concurrency)):
            if value is not None and not 1 <= value <= 10**12:
                what = f"{origin}: tenants.{name}.{limit}: {value}"
                raise ConfigError(what, code="E108", fix="1 or more, or leave it out for no limit")
    taken: dict[str, str] = {}
    for name, model in s.models.items():
        for label in (name, *model.aliases):
            if not NAME.fullmatch(label):
                raise ConfigError(
                    f"{origin}: models: {label!r} is not a name",
                    code="E107",
                    fix="letters, digits, . _ : / -",
                )
            if label in taken:
                raise ConfigError(f"{origin}: {label!r} names both {taken[label]} and {name}", code="E107")
            taken[label] = name
        if wrong := unsound(model.degrade, model.cache.ttl_s > 0, s.models.keys() - {name}):
            raise ConfigError(f"{origin}: models.{name}.degrade: {wrong}", code="E108", fix="docs/configuration.md")
    _check_pools(s, origin, taken)
    return msgspec.structs.replace(
        s,
        tls=placed_listener(s.tls, "tls", base),
        admin=msgspec.structs.replace(s.admin, tls=placed_listener(s.admin.tls, "admin.tls", base)),
        models={n: _resolved(n, m, base) for n, m in s.models.items()},
        ledger=_ledger(s.ledger),
        store=placed_store(s.store, base),
    )


def _check_pools(s: Settings, origin: str, taken: dict[str, str]) -> None:
    """`taken`: every name and alias of a model."""
    pool_of: dict[str, str] = {}
    for name, pool in s.pools.items():
        key = f"pools.{name}"
        if not NAME.fullmatch(name) or name in taken:
            what = f"{origin}: pools: {name!r} is {'a model, too' if name in taken else 'not a name'}"
            raise ConfigError(what, code="E107", fix="name the pool otherwise: letters, digits, . _ : / -")
        if not 1 <= len(pool.models) <= POOLED:
            what = f"{key}.models: {len(pool.models)} models"
            raise ConfigError(what, code="E108", fix=f"name 1 to {POOLED}; more models need more pools")
        for model in pool.models:
            if model not in s.models:
                raise ConfigError(f"{key}.models: no model {model!r}", code="E108", fix=f"add models.{model}")
            if model in pool_of:
                what = f"{key}.models: {model} is in {pool_of[model]} already"
                raise ConfigError(what, code="E108", fix="a model is in one pool, once")
            pool_of[model] = key
        _check_members(key, pool, s.models)
        check_scale(pool.scale, f"{key}.scale")
        check_told(pool.scale, f"{key}.scale", any(s.models[m].gpus for m in pool.models))


def _check_members(key: str, pool: PoolSettings, models: dict[str, ModelSettings]) -> None:
    """What the models of one process must agree on, and what is not theirs to say."""
    first = pool.models[0]
    for name in pool.models:
        m = models[name]
        if m.replicas:
            what, fix = f"{name} has replicas that somebody else runs", f"take {name} out of {key}.models"
        elif m.scale != Scale():
            what, fix = f"{name} has a scale of its own", f"move models.{name}.scale to {key}.scale"
        elif (m.engine or "openvino") != (models[first].engine or "openvino"):
            what, fix = f"{name} and {first} have different engines", "one engine a pool"
        elif (m.options.cpus, m.options.io_cpus) != (models[first].options.cpus, models[first].options.io_cpus):
            what, fix = f"{name} and {first} are pinned to different cpus", "the same cpus and io_cpus, or none"
        else:
            continue
        raise ConfigError(f"{key}: {what}", code="E108", fix=fix, why="its models run in one process")


def _resolved(name: str, m: ModelSettings, base: Path) -> ModelSettings:
    key = f"models.{name}"
    check_scale(m.scale, f"{key}.scale")
    check_told(m.scale, f"{key}.scale", bool(m.gpus))
    if not m.cache.is_sane:
        what = f"{key}.cache: ttl_s {m.cache.ttl_s:g}, memory_mib {m.cache.memory_mib}, price {m.cache.price:g}"
        raise ConfigError(what, code="E108", fix="ttl_s: 0 (off) or more; memory_mib: 1 or more; price: 0 to 1")
    for i, exporter in enumerate(m.gpus):
        _check_gpus(exporter, f"{key}.gpus[{i}]")
    if m.replicas and m.scale.max > m.scale.min:
        raise ConfigError(
            f"{key}.scale: {m.scale.min} to {m.scale.max} replicas, and they are somebody else's",
            why="replicas that are listed under `replicas` are never started or stopped by Neaptide",
            code="E108",
            fix=f"remove {key}.scale, or let Neaptide run the replicas (source or engine instead of replicas)",
        )
    if m.replicas and (m.source or m.engine):
        raise ConfigError(
            f"{key}: replicas beside source or engine",
            code="E108",
            fix="keep either, in two models if both are meant",
        )
    if not m.replicas and m.source is None and m.engine != "echo" and name != "guide":
        raise ConfigError(f"{key}: neither source nor replicas", code="E108", fix=f"add {key}.source: DIR")
    check_traffic(key, m.traffic, [r.revision for r in m.replicas])
    remotes = tuple(_remote(r, f"{key}.replicas[{i}]", base) for i, r in enumerate(m.replicas))
    source = m.source
    if source and source.startswith((".", "~")):
        source = str((base / Path(source).expanduser()).resolve())
    return msgspec.structs.replace(m, replicas=remotes, source=source)


def _check_gpus(g: GpuSource, key: str) -> None:
    if not _is_plain_url(g.url):
        fix = "write it as http://host:9400/metrics, without a name and password"
        raise ConfigError(f"{key}.url: {g.url!r}", code="E108", fix=fix)
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", g.metric):
        what = f"{key}.metric: {g.metric!r} is no metric's name"
        raise ConfigError(what, code="E108", fix="a name such as DCGM_FI_DEV_GPU_UTIL")
    if g.full is None and g.metric not in FULL_USE:
        fix = f"add full: 100 for a metric in percent, full: 1 for a share; known are {', '.join(FULL_USE)}"
        raise ConfigError(f"{key}: the value of {g.metric} at full use is not known", code="E108", fix=fix)
    if g.full is not None and not 0 < g.full < math.inf:
        raise ConfigError(f"{key}.full: {g.full:g}", code="E108", fix="a number over 0: 100 for percent, 1 for a share")


def _is_plain_url(url: str) -> bool:
    """Whether a request can be made of it as it stands; credentials would be shown wherever settings are."""
    if not url.isascii() or not re.fullmatch(r"https?://[^/\s?#@]+([/?][^\s#]*)?", url):
        return False
    try:
        at = urlsplit(url)
        return bool(at.hostname) and at.port != 0
    except ValueError:  # a port that is none, an IPv6 address that is none
        return False


def _remote(r: RemoteReplica, key: str, base: Path) -> RemoteReplica:
    if not re.fullmatch(r"https?://[^/\s]+(/.*)?", r.url):
        raise ConfigError(f"{key}.url: {r.url!r}", code="E108", fix="write it as http://host:port/v1")
    if r.max_running is not None and r.max_running < 1:
        raise ConfigError(f"{key}.max_running: {r.max_running}", code="E108", fix="1 or more, or leave it out")
    r = msgspec.structs.replace(r, tls=placed_replica(r.tls, r.url, f"{key}.tls", base))
    return msgspec.structs.replace(r, key=secret(r.key, f"{key}.key")) if r.key else r


def _ledger(ledger: LedgerSettings) -> LedgerSettings:
    if ledger.url.startswith(("env:", "file:")):
        return msgspec.structs.replace(ledger, url=secret(ledger.url, "ledger.url"))
    if PASSWORD.match(ledger.url) or "password=" in unquote(ledger.url.partition("?")[2]):
        what = "ledger.url: a password in the file itself"
        raise ConfigError(what, code="E106", fix="write ledger.url: env:NAME or file:PATH")
    return ledger
