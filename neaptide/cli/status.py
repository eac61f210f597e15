"""`neaptide status`: what runs, how it does, and what waits for whom."""

from __future__ import annotations

import sys
import time

import click

from neaptide.cli import client
from neaptide.cli.draw import count, paint, size, span, table
from neaptide.cli.session import Session, common
from neaptide.cli.words import say
from neaptide.control.port import CertificateStatus, DeploymentStatus, GatewayStatus, ReplicaStatus, Status

LOW_DAYS = 14.0  # of a certificate: time to renew it


@click.command("status", help=say("status.help"))
@click.option("--watch", is_flag=True, help=say("status.watch"))
@click.option("--interval", "interval_s", type=click.FloatRange(0.2), default=1.0, show_default=True,
              help=say("status.interval"))  # fmt: skip
@common
def status(session: Session, watch: bool, interval_s: float) -> None:
    api = client.admin(session.state)
    while True:
        seen = api.call("GET", "status", Status)
        if session.as_json:
            session.line(seen) if watch else session.encoded(seen)
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            draw(seen)
        if not watch:
            return
        time.sleep(interval_s)


def draw(s: Status) -> None:
    """The whole picture, one table a subject."""
    state = paint(say("status.ready"), "green") if s.ready else paint(say("status.not_ready"), "red")
    up = span(max(0.0, s.now_wall_s - s.started_wall_s))
    click.echo(f"neaptide {s.version}  {state}  {say('status.up_for', span=up)}  {s.api_url}  {s.admin_url}")
    for draw_part in (_deployments, _replicas, _gateways, _processes):
        draw_part(s)
    for line in _footer(s):
        click.echo(line)


def _titled(name: str, columns: str, rows: list[list[str]]) -> None:
    if rows:
        click.echo()
        table(say(f"status.{name}"), [say(f"status.col.{c}") for c in columns.split()], rows)


def _deployments(s: Status) -> None:
    _titled(
        "deployments", "model revision engine scale ready running waiting note", [_deployment(d) for d in s.deployments]
    )


def _deployment(d: DeploymentStatus) -> list[str]:
    name = f"{d.model} ({', '.join(d.aliases)})" if d.aliases else d.model
    name += f" @ {d.pool}" if d.pool else ""
    ready = f"{d.ready}+{d.starting}" if d.starting else str(d.ready)
    ready += f" ({say('scale.standby', n=d.standby)})" if d.standby else ""
    scale = f"{d.scale.min}-{d.scale.max}" if d.engine else "-"
    return [name, d.revision or "-", d.engine or say("status.remote"), scale, ready, count(d.running),
            count(d.waiting), d.failing]  # fmt: skip


def _replicas(s: Status) -> None:
    _titled(
        "replicas", "replica state epoch running waiting kv restarts stages note", [_replica(r) for r in s.replicas]
    )


def _replica(r: ReplicaStatus) -> list[str]:
    kv = count(r.free_kv_tokens)
    if r.free_kv_tokens is not None and r.kv_tokens:
        kv = f"{count(r.free_kv_tokens)} ({r.free_kv_tokens / r.kv_tokens:.0%})"
    stages = " · ".join(f"{stage.name.removesuffix('_s')} {span(stage.seconds)}" for stage in r.stages) or "-"
    note = say("status.queued") if r.queued else r.error
    return [r.id, r.state, count(r.epoch), count(r.running), count(r.waiting), kv, count(r.restarts), stages, note]


def _gateways(s: Status) -> None:
    columns = "gateway state connections in_flight waiting tables heard note"
    _titled("gateways", columns, [_gateway(g, s) for g in s.gateways])


def _gateway(g: GatewayStatus, s: Status) -> list[str]:
    state = "ok" if g.connected else say("status.silent")
    tables = f"{g.fast}/{s.fast} {g.slow}/{s.slow}"
    return [g.id, state, count(g.connections), count(g.in_flight), count(g.waiting), tables, span(g.heard_s), g.disk]


def _processes(s: Status) -> None:
    rows = [[p.id, p.role, str(p.pid), p.state, str(p.restarts), size(p.rss_bytes)] for p in s.processes]
    _titled("processes", "process role pid state restarts memory", rows)


def _footer(s: Status) -> list[str]:
    out = [""]
    if s.ledger is not None:
        lag = say("status.lag", size=size(s.ledger.lag_bytes), span=span(s.ledger.lag_s))
        out.append(f"{say('status.ledger')}  {s.ledger.url}  {lag}" + (f"  {s.ledger.error}" if s.ledger.error else ""))
    for disk in s.disks:
        free = say("status.free", free=size(disk.free_bytes), total=size(disk.total_bytes))
        out.append(f"{say('status.disk')}  {disk.path}  {free}")
    out += [_certificate(c) for c in s.certificates]
    return out


def _certificate(c: CertificateStatus) -> str:
    left = say("status.days_left", days=f"{c.days_left:.1f}") if c.days_left > 0 else say("status.expired")
    colour = "red" if c.days_left <= 0 else "yellow"
    parts = [say("status.certificate"), c.listener, c.subject, left if c.days_left >= LOW_DAYS else paint(left, colour)]
    return "  ".join([*parts, paint(say("status.refused", why=c.refused), "yellow")] if c.refused else parts)
