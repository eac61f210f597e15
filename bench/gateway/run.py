"""The gateway against nginx: both forward to the same three mock replicas, one core each side, phases interleaved.

    .venv/bin/python -m bench.gateway.run [--repeat 5] [--duration 8] [--phases rps,big,lat,fast,paced]

Phases: rps (64 connections, 1 KB bodies), big (32 KB bodies), lat (open loop, 300/s; minus the direct path), fast (64
streams unpaced), paced (N streams at 20 ms a token). Load and mocks run on core 0, the side under test on core 1. CPU
microseconds are exact run time of the side's processes: quote them first, they hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import kit

MOCK_PORTS = (9101, 9102, 9103)
PACE_MS = 20
TALK = "Tell me about foxes. "


@dataclass(frozen=True)
class Side:
    name: str
    port: int
    pids: list[int]
    key: str = ""


def body(size: int, **fields: Any) -> dict[str, Any]:
    """About `size` bytes of chat completion."""
    return kit.chat("mock", (TALK * (size // len(TALK) + 1))[: max(1, size - 130)], temperature=0.7, **fields)


def loads(args: argparse.Namespace) -> dict[str, list[kit.Load]]:
    """What each phase asks; `paced` has one run for each number of streams."""
    streaming = {"stream": True, "max_tokens": 64}
    paced = body(1000, stream=True, max_tokens=100, seed=PACE_MS)  # the mock paces by seed, ms a token
    common = {"duration_s": args.duration, "warmup_s": args.warmup}
    return {
        "rps": [kit.Load(body=body(1000), conns=64, **common)],
        "big": [kit.Load(body=body(32_000), conns=64, **common)],
        "lat": [kit.Load(body=body(1000), mode="open", conns=256, options={"rate": 300}, **common)],
        "fast": [kit.Load(body=body(1000, **streaming), mode="stream", conns=64, **common)],
        "paced": [
            kit.Load(
                body=paced,
                mode="stream",
                conns=n,
                duration_s=args.duration,
                warmup_s=max(3.0, args.warmup) if args.duration > 2 else args.warmup,
                options={"pace-ms": PACE_MS, "ramp": min(2.0, args.duration)},
            )
            for n in args.streams
        ],
    }


@contextmanager
def nginx(ports: tuple[int, ...]) -> Iterator[Side]:
    port = kit.free_port()
    with tempfile.TemporaryDirectory(prefix="bench-nginx-") as prefix:
        servers = " ".join(f"server 127.0.0.1:{p};" for p in ports)
        text = (Path(__file__).parent / "nginx.conf").read_text().replace("# SERVERS", servers)
        if os.getuid() == 0:  # else the worker is `nobody`, who may not write its body files here
            text = f"user root;\n{text}"
        Path(prefix, "nginx.conf").write_text(text.replace("PORT;", f"{port};"))
        command = ["nginx", "-p", prefix, "-c", "nginx.conf", "-e", "stderr"]
        with kit.running(command, core=kit.SERVE_CORE, ready=lambda: kit.listening(port), what="nginx") as pid:
            pids = kit.tree([pid])
            kit.pin(pids, kit.SERVE_CORE)
            yield Side("nginx", port, pids)


@contextmanager
def neaptide(ports: tuple[int, ...]) -> Iterator[Side]:
    replicas = ", ".join(f"{{url: 'http://127.0.0.1:{p}/v1'}}" for p in ports)
    with kit.up(f"models:\n  mock: {{replicas: [{replicas}]}}\n") as server:
        kit.pin(server.group("supervisor", "control"), kit.LOAD_CORE)
        gateway = server.group("gateway")
        kit.pin(gateway, kit.SERVE_CORE)
        yield Side("neaptide", server.port, gateway, server.key)


def one(side: Side, load: kit.Load, mock: int) -> dict[str, Any]:
    """One run, with the CPU time a request or token of the side under test worked out."""
    quiet = [*side.pids, mock] if load.mode == "open" else []
    result = kit.drive(load, side.port, key=side.key, watch={"side": side.pids, "mock": [mock]}, realtime=quiet)
    spent = result["cpu_s"]["side"] * 1e6
    if load.mode == "stream":
        result["us_per_token"] = spent / max(1, result["tokens"])
        result["delivered"] = result["tok_s"] / (load.conns * 1000 / PACE_MS) if "seed" in load.body else None
    else:
        result["us_per_request"] = spent / max(1, result["ok"])
    result["rss_mib"] = round(kit.rss_mib(side.pids), 1)
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """{phase: {side: [results, one a repetition]}}; a paced phase is named paced-N."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        program = kit.build("mock")["mock"]
        ports = tuple(args.ports)
        mock = stack.enter_context(
            kit.running(
                [program, *ports], core=kit.LOAD_CORE, ready=lambda: all(map(kit.listening, ports)), what="the mock"
            )
        )
        sides = [stack.enter_context(neaptide(ports))]
        if shutil.which("nginx"):
            sides.append(stack.enter_context(nginx(ports)))
        else:
            print("nginx is not installed (apt-get install nginx-light): no ratios")
        direct = Side("direct", ports[0], [mock])
        for repetition in range(args.repeat):
            for phase, runs in loads(args).items():
                if phase not in args.phases.split(","):
                    continue
                for load in runs:
                    name = f"{phase}-{load.conns}" if phase == "paced" else phase
                    turns = sides if repetition % 2 == 0 else sides[::-1]  # neither side always runs second
                    for side in [*turns, direct] if phase == "lat" else turns:
                        result = one(side, load, mock)
                        found.setdefault(name, {}).setdefault(side.name, []).append(result)
                        print(f"{repetition + 1}/{args.repeat} {name} {side.name}: {said(result)}", flush=True)
    return found


def said(r: dict[str, Any]) -> str:
    if "us_per_token" in r:
        words = (
            f"{r['tok_s']:.0f} tokens/s, {r['us_per_token']:.2f} us/token, transit p50 {r['transit_ms']['p50']:.2f} ms"
        )
    else:
        words = f"{r['rps']:.0f}/s, {r['us_per_request']:.1f} us/request, p50 {r['lat_ms']['p50']:.3f} ms"
    return f"{words}, {r['err']} errors, {r['rss_mib']} MiB, others {r['others_cpu_s']} CPU-s"


def sustained(r: dict[str, Any]) -> bool:
    """Every token came, within a step's length of its time."""
    return bool(r["delivered"] > 0.95 and r["jitter_ms"]["p99"] < PACE_MS and r["err"] == 0)


def summary(found: dict[str, Any]) -> list[list[str]]:
    """Rows of medians: measure, neaptide, nginx, ratio."""

    def middle(phase: str, side: str, *path: str) -> float:
        def value(r: Any) -> float:
            for part in path:
                r = r[part]
            return float(r)

        return kit.median([value(r) for r in found[phase].get(side, [])])

    rows: list[list[str]] = []

    def add(label: str, ours: float, theirs: float, form: str) -> None:
        ratio = f"{ours / theirs:.2f}" if theirs == theirs and theirs else "-"
        rows.append([label, format(ours, form), format(theirs, form) if theirs == theirs else "-", ratio])

    for phase in found:
        both = ("neaptide", "nginx")
        if phase in ("rps", "big"):
            size = "1 KB" if phase == "rps" else "32 KB"
            add(f"requests/s, {size}", *(middle(phase, s, "rps") for s in both), ".0f")
            add(f"CPU us/request, {size}", *(middle(phase, s, "us_per_request") for s in both), ".1f")
        elif phase == "lat":
            for q in ("p50", "p99"):
                added = [middle(phase, s, "lat_ms", q) - middle(phase, "direct", "lat_ms", q) for s in both]
                add(f"added latency {q}, ms, 300/s", *added, ".3f")
        else:
            add(f"tokens/s, {phase}", *(middle(phase, s, "tok_s") for s in both), ".0f")
            add(f"CPU us/token, {phase}", *(middle(phase, s, "us_per_token") for s in both), ".2f")
            if phase.startswith("paced"):
                share = [kit.median([float(sustained(r)) for r in found[phase].get(s, [])]) for s in both]
                add(f"sustained, {phase} (1 = yes)", *share, ".0f")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--duration", type=float, default=8.0, help="seconds measured in each run")
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--phases", default="rps,big,lat,fast,paced")
    parser.add_argument("--streams", type=lambda s: [int(n) for n in s.split(",")], default=[400, 800, 1200])
    parser.add_argument("--ports", type=lambda s: [int(n) for n in s.split(",")], default=list(MOCK_PORTS))
    args = parser.parse_args()
    found = measure(args)
    rows = summary(found)
    kit.table(["medians", "neaptide", "nginx", "ratio"], rows)
    kit.save("gateway", {"repeat": args.repeat, "summary": rows, "runs": found})


if __name__ == "__main__":
    main()
