"""The gateway with own replicas: what a request and a token cost it over the framed link.

    .venv/bin/python -m bench.gateway.link [--repeat 5] [--duration 8] [--streams 400,800,1200,2400]

Three mock replicas (muxmock.c) speak the link on Unix sockets, one engine step every 20 ms. The gateway process runs
alone on core 1, from a stored table: control is not needed to serve. Load and mocks run on core 0.
"""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench import kit
from bench.gateway.run import PACE_MS, Side, body, one, said, sustained
from neaptide.gateway.admit import digest
from neaptide.gateway.follow import save_table
from neaptide.specs import GatewaySpec
from neaptide.table import DeploymentRow, Fast, KeyRow, ReplicaRow, Slow, Table

REPLICAS = 3


def stored_table(path: Path, sockets: list[str], token: str, key: str, pepper: str) -> None:
    replicas = [
        ReplicaRow(id=f"mock-{i}", model="mock", endpoint=f"link:{at}", token=token) for i, at in enumerate(sockets)
    ]
    keys = (KeyRow(id="bench", digest=digest(key.encode(), bytes.fromhex(pepper))),)
    slow = Slow(version=1, deployments=(DeploymentRow(model="mock", max_waiting=100_000),), keys=keys)
    save_table(path, Table(fast=Fast(version=1, replicas=tuple(replicas)), slow=slow))


@contextmanager
def gateway(sockets: list[str], token: str, scratch: Path) -> Iterator[Side]:
    key, pepper = "sk-" + secrets.token_hex(16), secrets.token_hex(32)
    stored_table(scratch / "table.json", sockets, token, key, pepper)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    port = listener.getsockname()[1]
    spec = GatewaySpec(
        id="gateway-0",
        epoch=1,
        listen_fd=listener.fileno(),
        control_path=str(scratch / "control.sock"),
        table_path=str(scratch / "table.json"),
        journal_dir=str(scratch / "journal"),
        pepper=pepper,
        token=token,
        access_log=str(scratch / "access.log"),
    )
    command = [sys.executable, "-m", "neaptide.gateway"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], cwd=kit.ROOT) as process:
        listener.close()
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(spec))
            process.stdin.close()
            kit.wait_for(lambda: ready(port), 10, "the gateway")
            kit.pin([process.pid], kit.SERVE_CORE)
            yield Side("link", port, [process.pid], key)
        finally:
            process.terminate()


def listening(sockets: list[str]) -> bool:
    return all(os.path.exists(at) for at in sockets)


def ready(port: int) -> bool:
    """Whether the gateway answers that it holds a table."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as probe:
            probe.sendall(b"GET /health/ready HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            return b" 200 " in probe.recv(200).split(b"\r\n")[0]
    except OSError:
        return False


def loads(args: argparse.Namespace) -> dict[str, kit.Load]:
    common = {"duration_s": args.duration, "warmup_s": args.warmup}
    found = {"rps": kit.Load(body=body(1000), conns=64, **common)}
    paced = body(1000, stream=True, max_tokens=100, seed=PACE_MS)  # seed marks the load as paced; the mock's step paces
    for n in args.streams:
        options = {"pace-ms": PACE_MS, "ramp": min(2.0, args.duration)}
        slow_start = {"duration_s": args.duration, "warmup_s": max(args.warmup, min(3.0, args.duration))}
        found[f"paced-{n}"] = kit.Load(body=paced, mode="stream", conns=n, options=options, **slow_start)
    return found


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    token = secrets.token_hex(16)
    program = kit.build("muxmock")["muxmock"]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-link-")))
        sockets = [str(scratch / f"mock-{i}.link") for i in range(REPLICAS)]
        command = [program, "--token", token, "--step-ms", PACE_MS, *sockets]
        mock = stack.enter_context(
            kit.running(command, core=kit.LOAD_CORE, ready=lambda: listening(sockets), what="muxmock")
        )
        side = stack.enter_context(gateway(sockets, token, scratch))
        for repetition in range(args.repeat):
            for name, load in loads(args).items():
                result = one(side, load, mock)
                found.setdefault(name, []).append(result)
                print(f"{repetition + 1}/{args.repeat} {name}: {said(result)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--duration", type=float, default=8.0, help="seconds measured in each run")
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--streams", type=lambda s: [int(n) for n in s.split(",")], default=[400, 800, 1200, 2400])
    args = parser.parse_args()
    found = measure(args)
    rows = []
    for name, runs in found.items():
        unit, rate = ("us_per_token", "tok_s") if name != "rps" else ("us_per_request", "rps")
        held = "" if name == "rps" else ("yes" if kit.median([float(sustained(r)) for r in runs]) else "no")
        per_s, cost = kit.median([r[rate] for r in runs]), kit.median([r[unit] for r in runs])
        rows.append([name, f"{per_s:.0f}/s", f"{cost:.1f}", held])
    kit.table(["over the link", "rate", "CPU us each", "sustained"], rows)
    kit.save("gateway-link", {"repeat": args.repeat, "summary": rows, "runs": found})


if __name__ == "__main__":
    main()
