"""What the admin API tells of the running service: gathered from control's parts, nothing decided."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from neaptide import __version__
from neaptide.clock import mono_s, wall_s
from neaptide.control.port import (
    CertificateStatus,
    DeploymentStatus,
    DiskStatus,
    GatewayStatus,
    ProcessStatus,
    ReplicaStatus,
    Stage,
    Status,
)
from neaptide.tls.served import DAY_S

if TYPE_CHECKING:
    from neaptide.control.app import Control

PAGE = os.sysconf("SC_PAGE_SIZE")


async def status(control: Control) -> Status:
    """The whole picture, from memory and /proc."""
    c = control
    return Status(
        version=__version__,
        ready=c.whole() and bool(c.publisher.gateways),
        now_wall_s=wall_s(),
        started_wall_s=c.started_wall_s,
        api_url=c.spec.api_url,
        admin_url=c.spec.admin_url,
        config_path=str(c.origin),
        fast=c.publisher.table.fast.version,
        slow=c.publisher.table.slow.version,
        processes=tuple(processes(c)),
        deployments=deployments(c),
        replicas=tuple(replicas(c)),
        gateways=tuple(gateways(c)),
        ledger=await c.books.status(),
        disks=(disk(c.state.root),),
        certificates=tuple(certificates(c)),
    )


def processes(c: Control) -> list[ProcessStatus]:
    mine = [ProcessStatus(role="supervisor", id="supervisor", pid=os.getppid(), rss_bytes=rss_bytes(os.getppid()))]
    for child in c.processes:
        mine.append(
            ProcessStatus(
                role=child.kind,
                id=child.id,
                pid=child.pid,
                started_wall_s=child.started_wall_s,
                restarts=c.restarts.get(child.id, 0),
                rss_bytes=rss_bytes(child.pid),
            )
        )
        if child.kind in ("replica", "spare"):
            mine += [
                ProcessStatus(role="engine", id=child.id, pid=pid, rss_bytes=rss_bytes(pid))
                for pid in children(child.pid)
            ]
    return mine


def replicas(c: Control) -> list[ReplicaStatus]:
    pids, watched = c.local.pids(), {p.id: p for p in c.processes}
    loads, notes = c.load_of, c.left_out()
    out = []
    for r in c.replicas:
        child, about = watched.get(r.id), c.local.about(r.id)
        out.append(
            ReplicaStatus(
                id=r.id,
                deployment=r.deployment,
                revision=r.revision,
                state=r.state,
                queued=r.queued,
                endpoint=r.endpoint,
                remote=not r.endpoint.startswith("link:"),
                epoch=r.epoch,
                pid=pids.get(r.id),
                started_wall_s=child.started_wall_s if child else 0.0,
                running=loads().get(r.id, 0),
                waiting=r.waiting,
                free_kv_tokens=r.free_kv_tokens,
                restarts=c.restarts.get(r.id, 0),
                kv_tokens=about.description.kv_tokens if about.description else None,
                stages=tuple(Stage(name=k, seconds=v) for k, v in about.stages.items()),
                error=r.error or notes.get(r.id, ""),
            )
        )
    return out


def deployments(c: Control) -> tuple[DeploymentStatus, ...]:
    running, waiting = c.running_of(), c.waiting_of()
    out = []
    for d in c.deployments:
        m = c.settings.models[d.model]
        unit = c.unit_of(d.model)
        mine = [r for r in c.replicas if r.deployment == unit.model]
        weights = c.sources[d.model]
        about = [c.local.about(r.id) for r in mine]
        traits = next((t for a in about if (t := a.members.get(d.model, a.description))), None)
        out.append(
            DeploymentStatus(
                model=d.model,
                aliases=m.aliases,
                revision=d.stable.id,
                engine=d.stable.engine,
                source=weights.path or (m.source or ""),
                context_tokens=traits.context_tokens if traits else None,
                precision=weights.precision,
                pool=unit.model if unit.members else "",
                scale=unit.scale,
                slo=d.slo,
                ready=sum(r.state == "ready" for r in mine),
                starting=sum(r.state == "starting" for r in mine),
                standby=sum(r.state == "standby" for r in mine),
                running=running.get(d.model, 0),
                waiting=waiting.get(d.model, 0),
                failing=c.failing.get(d.model, ""),
            )
        )
    return tuple(out)


def gateways(c: Control) -> list[GatewayStatus]:
    out = []
    for child in c.processes:
        if child.kind != "gateway":
            continue
        heard = c.publisher.gateways.get(child.id)
        told = heard.gauges if heard else None
        out.append(
            GatewayStatus(
                id=child.id,
                pid=child.pid,
                epoch=child.epoch,
                connected=heard is not None,
                heard_s=mono_s() - heard.heard_s if heard else None,
                connections=told.connections if told else 0,
                in_flight=sum(told.replicas.values()) if told else 0,
                waiting=sum(m.waiting for m in told.models.values()) if told else 0,
                fast=told.fast if told else 0,
                slow=told.slow if told else 0,
                disk=told.disk if told else "",
            )
        )
    return out


def disk(path: Path) -> DiskStatus:
    usage = shutil.disk_usage(path)
    return DiskStatus(path=str(path), free_bytes=usage.free, total_bytes=usage.total)


def rss_bytes(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE
    except (OSError, IndexError):
        return None


def children(pid: int) -> list[int]:
    """Direct children: a replica has one, its engine process."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(x) for x in text.split()]


def certificates(c: Control) -> list[CertificateStatus]:
    """Control's own, and those that gateways tell of."""
    out = []
    if c.served is not None:
        out.append(_certificate("admin", c.served.leaf.subject, c.served.leaf.not_after_s, c.served.refused))
    for g in c.publisher.gateways.values():
        told = g.gauges.certificate if g.gauges else None
        if told is not None:
            out.append(_certificate(g.id, told.subject, told.not_after_s, told.refused))
    return out


def _certificate(listener: str, subject: str, not_after_s: float, refused: str) -> CertificateStatus:
    left = (not_after_s - wall_s()) / DAY_S
    return CertificateStatus(
        listener=listener, subject=subject, not_after_wall_s=not_after_s, days_left=round(left, 2), refused=refused
    )
