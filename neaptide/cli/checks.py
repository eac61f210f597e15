"""The checks of `neaptide doctor`. Each looks at one thing, changes nothing, and tells ok, warn or fail with a fix."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from neaptide.cli import client
from neaptide.cli.draw import size
from neaptide.cli.host import free_gib, vector_unit
from neaptide.clock import wall_s
from neaptide.config import GpuSource, ModelSettings, Settings, StoreSettings, host_port, load, parse
from neaptide.control.backup import quick_check
from neaptide.control.port import Status
from neaptide.cost.prices import rates
from neaptide.errors import ConfigError, NeaptideError
from neaptide.fleet.cores import quota as cores_allowed
from neaptide.fleet.state import StateDir
from neaptide.tls.context import serving
from neaptide.tls.served import DAY_S, LOW_DAYS
from neaptide.tls.settings import ListenTls

OPENVINO_S = 60.0  # a cold import from a slow disk
MIN_DISK, LOW_DISK = 256 << 20, 2 << 30
MIN_FREE_GIB, LOW_FREE_GIB = 0.25, 1.0
LOW_FILES = 4096
BUILT_AFTER_S = 1_735_689_600.0  # 2025-01-01: a clock before it was never set
PROBE = (  # OpenVINO's import loads openvino-telemetry where it is installed; None there makes it use its stub
    "import json, sys; sys.modules['openvino_telemetry'] = None; import openvino as ov; core = ov.Core(); "
    "print(json.dumps({'version': ov.__version__, 'devices': core.available_devices, "
    "'cpu': core.get_property('CPU', 'FULL_DEVICE_NAME')}))"
)


class Check(NamedTuple):
    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def checks(state: Path, file: Path | None) -> Iterator[Check]:
    """Every check in turn. One that cannot be made is itself a warning, never a crash."""
    settings, parsed = _config(state, file)
    directory = StateDir(state)
    looks: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
        ("python", _python),
        ("cpu", _cpu),
        ("openvino", _openvino),
        ("memory", _memory),
        ("disk", lambda: _disk(directory)),
        ("files", _open_files),
        ("clock", _clock),
        ("config", lambda: [parsed]),
        ("models", lambda: _models(settings)),
        ("gpus", lambda: _gpus(settings)),
        ("state", lambda: _state(directory)),
        ("stale", lambda: _stale(directory)),
        ("tls", lambda: _tls(settings)),
        ("ports", lambda: _ports(settings, directory)),
        ("ledger", lambda: _ledger(settings, directory)),
        ("server", lambda: _server(directory)),
        ("telemetry", _telemetry),
    )
    for name, look in looks:
        try:
            yield from look()
        except OSError as e:
            yield Check(name, "warn", f"could not be looked at: {e}")


def _python() -> list[Check]:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] > (3, 13):
        return [Check("python", "warn", f"{text}: not tested", "use Python 3.11, 3.12 or 3.13")]
    return [Check("python", "ok", text)]


def _cpu() -> list[Check]:
    cores = len(os.sched_getaffinity(0))
    units = vector_unit()
    text = f"{cores} cores, {units[0] if units else 'no vector unit found'}"
    if not units and platform.machine() in ("x86_64", "AMD64"):
        return [Check("cpu", "warn", text, "int8 models run slowly without AVX2; use another machine for own replicas")]
    quota = cores_allowed()
    if quota is not None and quota < cores:
        fix = "set models.NAME.options.threads to the quota"
        return [Check("cpu", "warn", f"{text}; a cgroup allows {quota:.1f} of them", fix)]
    return [Check("cpu", "ok", text)]


def _openvino() -> list[Check]:
    """In a process of its own: a wheel for another CPU kills whoever imports it."""
    fix = "pip install 'neaptide[cpu]' (needed only for own replicas)"
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=OPENVINO_S)
    except subprocess.TimeoutExpired:
        return [Check("openvino", "fail", f"its import takes more than {OPENVINO_S:g} s", "look at the disk's speed")]
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
        absent = "No module named" in lines[-1]
        return [Check("openvino", "warn" if absent else "fail", lines[-1], fix)]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    text = f"{told['version']}, devices {', '.join(told['devices'])} ({told['cpu']})"
    return [Check("openvino", "ok" if "CPU" in told["devices"] else "fail", text)]


def _memory() -> list[Check]:
    free = free_gib()
    level: Literal["ok", "warn", "fail"] = "fail" if free < MIN_FREE_GIB else "warn" if free < LOW_FREE_GIB else "ok"
    fix = "" if level == "ok" else "end other programs, or set models.NAME.options.kv_mib"
    return [Check("memory", level, f"{free:.1f} GiB available", fix)]


def _disk(state: StateDir) -> list[Check]:
    place = next(p for p in (state.root, *state.root.parents) if p.exists())
    usage = shutil.disk_usage(place)
    text = f"{size(usage.free)} of {size(usage.total)} free at {place}"
    if usage.free < MIN_DISK:
        return [Check("disk", "fail", text, "free some space: requests are refused when the journal cannot be written")]
    if usage.free < LOW_DISK:
        return [Check("disk", "warn", text, "free some space, or lower ledger.retention_days")]
    return [Check("disk", "ok", text)]


def _open_files() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {soft} (raised to {'unlimited' if hard == resource.RLIM_INFINITY else hard} at start)"
    low = hard != resource.RLIM_INFINITY and hard < LOW_FILES
    return [Check("files", "warn" if low else "ok", text, f"ulimit -Hn {LOW_FILES} or more" if low else "")]


def _clock() -> list[Check]:
    if wall_s() < BUILT_AFTER_S:
        return [Check("clock", "fail", "the wall clock was never set", "set the time (timedatectl set-ntp true)")]
    return [Check("clock", "ok", "the wall clock is set")]


def _config(state: Path, file: Path | None) -> tuple[Settings | None, Check]:
    """The configuration: --file, what the state directory keeps in force, ./neaptide.yaml, or the defaults."""
    path = file or (Path("neaptide.yaml") if Path("neaptide.yaml").exists() else None)
    try:
        kept = None if file else in_force(state / "config.json")
        if kept is None:
            settings = load(path)
        else:
            text, path = kept
            settings = parse(text, str(path), path.parent)
        rates(settings.prices)
    except NeaptideError as e:
        return None, Check("config", "fail", f"[{e.code}] {e.what}", e.fix)
    names = ", ".join(settings.models)
    return settings, Check("config", "ok", f"{path or 'the defaults'}: models {names}")


def in_force(kept: Path) -> tuple[str, Path] | None:
    """(text, where it came from) of the configuration that the last `up` or `apply` kept; None where there is none."""
    try:
        tree = json.loads(kept.read_text(encoding="utf-8"))
        return tree["text"], Path(tree["origin"])
    except (OSError, ValueError, KeyError):
        return None


def _models(settings: Settings | None) -> list[Check]:
    if settings is None:
        return []
    return [_model(name, model, settings.store) for name, model in settings.models.items()]


def _model(name: str, model: ModelSettings, store: StoreSettings) -> Check:
    from neaptide.models import directory
    from neaptide.models.sources import GUIDE, HUB_ID, STORED, opened
    from neaptide.models.store import parse_ref

    if model.replicas:
        return Check("model", "ok", f"{name}: {len(model.replicas)} replicas that somebody else runs")
    if model.engine == "echo":
        return Check("model", "ok", f"{name}: echo, no weights")
    if (model.source or "").startswith(STORED):
        try:
            latest = opened(store).latest(parse_ref((model.source or "").removeprefix(STORED)).name)
        except NeaptideError as e:
            return Check("model", "warn" if e.code == "E231" else "fail", f"{name}: [{e.code}] {e.what}", e.fix)
        return Check("model", "ok", f"{name}: {model.source}; the store's latest is {latest[:12]}")
    path = GUIDE if model.source in (None, "guide") else Path(model.source or "").expanduser()
    if not path.exists() and HUB_ID.fullmatch(model.source or ""):
        return Check("model", "warn", f"{name}: {model.source} comes from the Hugging Face hub at the first start")
    try:
        found = directory.read(path, name)
    except NeaptideError as e:
        return Check("model", "fail", f"{name}: [{e.code}] {e.what}", e.fix)
    need, free = found.weight_bytes / (1 << 30), free_gib()
    text = f"{name}: {found.precision}, {size(found.weight_bytes)}, context {found.context_tokens}"
    if need * 1.2 > free:
        return Check(
            "model", "warn", f"{text}; {free:.1f} GiB of memory are free", "convert it to int4, or free memory"
        )
    return Check("model", "ok", text)


def _gpus(settings: Settings | None) -> list[Check]:
    models = settings.models.items() if settings is not None else ()
    return [_gpu(name, source) for name, model in models for source in model.gpus]


def _gpu(model: str, source: GpuSource) -> Check:
    from neaptide.observe.gpus import read

    try:
        told = asyncio.run(read(source))
    except NeaptideError as e:
        return Check("gpus", "warn", f"{model}: [{e.code}] {e.what}", e.fix)
    use = ", ".join(f"{share:.0%}" for share in told)
    return Check("gpus", "ok", f"{model}: GPUs at {use} by {source.url}")


def _state(state: StateDir) -> list[Check]:
    if not state.root.exists():
        return [Check("state", "ok", f"{state.root} will be made")]
    if not os.access(state.root, os.W_OK | os.X_OK):
        return [Check("state", "fail", f"{state.root} is not writable", "run as its owner, or pass --state DIR")]
    secrets = (state.root, state.key, state.admin_token, state.admins, state.pepper, state.audit)
    wide = [p for p in secrets if p.exists() and _others(p)]
    if wide:
        fix = f"chmod go= {' '.join(str(p) for p in wide)}"
        return [Check("state", "fail", f"others may read {', '.join(str(p) for p in wide)}", fix)]
    return [Check("state", "ok", f"{state.root} is private")]


def _others(path: Path) -> bool:
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def _stale(state: StateDir) -> list[Check]:
    if state.up_json.exists() and not state.locked():
        return [Check("stale", "warn", f"{state.up_json} is of a service that has ended", "neaptide up (it cleans up)")]
    return [Check("stale", "ok", "no files of an ended service")]


def _tls(settings: Settings | None) -> list[Check]:
    listeners = {"tls": settings.tls, "admin.tls": settings.admin.tls} if settings is not None else {}
    return [_certificate(key, tls) for key, tls in listeners.items() if tls is not None]


def _certificate(key: str, tls: ListenTls) -> Check:
    try:
        _, leaf = serving(tls)
    except NeaptideError as e:
        return Check("tls", "fail", f"{key}: [{e.code}] {e.what}", e.fix)
    left = (leaf.not_after_s - wall_s()) / DAY_S
    if left <= 0:
        return Check("tls", "fail", f"{key}: {leaf.subject} has expired", f"put a new one into {tls.cert}")
    text = f"{key}: {leaf.subject}, {left:.0f} days left"
    if left < LOW_DAYS:
        return Check("tls", "warn", text, f"put a new one into {tls.cert}")
    return Check("tls", "ok", text)


def _ports(settings: Settings | None, state: StateDir) -> list[Check]:
    if settings is None or state.locked():
        return []  # what runs here holds its own ports; whether it answers is the server check's
    listens = {"listen": settings.listen, "admin.listen": settings.admin.listen or "127.0.0.1:8001"}
    return [_port(key, *host_port(listen, key)) for key, listen in listens.items()]


def _port(key: str, host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            fix = f"neaptide up --port {port + 10}, or change {key}"
            return Check("port", "fail", f"{key} {host}:{port}: {e.strerror}", fix)
    return Check("port", "ok", f"{key} {host}:{port} is free")


def _ledger(settings: Settings | None, state: StateDir) -> list[Check]:
    if settings is not None and settings.ledger.url.startswith("postgres"):
        return [Check("ledger", "ok", "in PostgreSQL; see `neaptide status`")]
    path = state.root / "ledger.db"
    if not path.exists():
        return [Check("ledger", "ok", "none yet")]
    problem = quick_check(path)
    if problem:
        return [Check("ledger", "fail", f"{path}: {problem}", "neaptide backup restore ARCHIVE")]
    return [Check("ledger", "ok", f"{path}: {size(path.stat().st_size)}, sound")]


def _server(state: StateDir) -> list[Check]:
    if not state.up_json.exists():
        return [Check("server", "ok", "not running")]
    try:
        seen = client.own(state.root, timeout_s=10.0).call("GET", "status", Status)
    except ConfigError as e:
        return [Check("server", "fail", e.what, e.fix)]
    except NeaptideError as e:
        level: Literal["warn", "fail"] = "fail" if state.locked() else "warn"
        return [Check("server", level, e.what, e.fix or "neaptide up")]
    failing = [f"{d.model}: {d.failing.splitlines()[0]}" for d in seen.deployments if d.failing]
    if not seen.ready:
        return [Check("server", "fail", "; ".join(failing) or f"{seen.api_url} is not ready", "neaptide status")]
    return [Check("server", "warn" if failing else "ok", "; ".join([f"ready at {seen.api_url}", *failing]))]


def _telemetry() -> list[Check]:
    """Neaptide sends nothing. OpenVINO's own command line tools do, where this user has agreed to it."""
    consent = Path.home() / "intel" / "openvino_telemetry"
    with contextlib.suppress(OSError):
        if consent.read_text(encoding="utf-8").strip() == "1":
            text = f"Neaptide sends nothing, but {consent} agrees to OpenVINO's telemetry"
            return [Check("telemetry", "warn", text, "opt_in_out --opt_out")]
    return [Check("telemetry", "ok", "off: Neaptide sends nothing, and OpenVINO's tools have no consent")]
