"""What serving costs on top of the engine: a 113M model over HTTP against the same pipeline driven raw.

    .venv/bin/python -m bench.serve [--model DIR] [--streams 16,32] [--duration 20] [--repeat 3] [--only throughput,...]

The engine has one thread, pinned to core 1, on both sides; gateway, replica I/O, control and load generator share core
0. With --threads 2 the engine has both cores and shares one with them. Every stream asks for the same prompt length and
--tokens tokens with ignore_eos, in a closed loop; the raw side (bench/engine_raw.py) keeps as many sequences running
and detokenises them. Both alternate; medians, and the median of the ratios pair by pair.

    throughput   tokens/s at each --streams, HTTP over raw; one stream too, for what batching gives
    overhead     with the built-in guide, CPU microseconds a token of all our processes minus those of the raw run
    prefix       time to first token of a prompt of 1,000 shared tokens: first seen against seen before
    idle         time to first token of the guide with nothing else running

Without --model a random-weight model is made in build/bench-model (tools/random_model.py; a few minutes, once).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import kit

ROLES = ("gateway", "replica", "engine", "control")
MODEL = kit.ROOT / "build" / "bench-model"
GUIDE = kit.ROOT / "neaptide" / "models" / "guide"
PROMPT = "Explain in your own words how a harbour keeps its ships level while the tide goes out and comes back in. " * 3


def made_model() -> Path:
    """The default model's directory; made when it is not there yet."""
    if not (MODEL / "int8").exists():
        print(f"making a random-weight model in {MODEL} ...", flush=True)
        subprocess.run([sys.executable, str(kit.ROOT / "tools" / "random_model.py"), "--out", str(MODEL)], check=True)
    return MODEL / "int8"


def engine_cpus(threads: int) -> list[int]:
    """One thread has a core of its own; two share both with everything else."""
    return [kit.SERVE_CORE] if threads == 1 else [kit.LOAD_CORE, kit.SERVE_CORE]


def config(name: str, source: Path | None, threads: int) -> str:
    options = {
        "threads": threads,
        "cpus": engine_cpus(threads),
        "io_cpus": [kit.LOAD_CORE],
        "max_running": 64,
    }
    model: dict[str, Any] = {"options": options}
    if source is not None:
        model["source"] = str(source.resolve())
    return json.dumps({"models": {name: model}})  # JSON is YAML


def place(server: kit.Up) -> None:
    """Everything but the engine to core 0; replica I/O and engine are where the options say."""
    kit.pin(server.group("supervisor", "control", "gateway"), kit.LOAD_CORE)


def over_http(server: kit.Up, model: str, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """tok_s counts tokens, not chunks: a chunk that carries several is weighed by the usage of whole answers."""
    body = kit.chat(model, PROMPT, stream=True, max_tokens=args.tokens, ignore_eos=True, temperature=0)
    # Long enough that every stream is decoding and no longer waits for its first prefill.
    load = kit.Load(body=body, mode="sse", conns=streams, warmup_s=args.warmup, duration_s=args.duration)
    result = kit.drive(load, server.port, key=server.key, watch={role: server.group(role) for role in ROLES})
    weight = result["usage_tokens"] / result["usage_chunks"] if result["usage_chunks"] else 1.0
    result["tok_s"] *= weight
    result["tokens"] *= weight
    for role in ROLES:
        result[f"{role}_us_per_token"] = result["cpu_s"][role] * 1e6 / max(1.0, result["tokens"])
    result["us_per_token"] = sum(result[f"{role}_us_per_token"] for role in ROLES)
    return result


def raw(model: Path, streams: int, args: argparse.Namespace) -> dict[str, Any]:
    """The same pipeline without us, in a process of its own: {"tok_s", "us_per_token", ...}."""
    command = [sys.executable, "-m", "bench.engine_raw", "--model", model, "--streams", streams]
    command += ["--duration", args.duration, "--warmup", args.warmup, "--tokens", args.tokens, "--prompt", PROMPT]
    cpus = ",".join(map(str, engine_cpus(args.threads)))
    command += ["--threads", args.threads, "--cpu", cpus, "--json"]
    done = subprocess.run([str(part) for part in command], cwd=kit.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise kit.BenchError(f"bench.engine_raw failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def alternate(
    server: kit.Up, name: str, model: Path, streams: list[int], args: argparse.Namespace
) -> dict[int, dict[str, Any]]:
    """args.repeat runs of each side at each number of streams, turn by turn, so that the machine's moods fall on all of
    them alike. The served engine idles while the raw one runs."""
    found: dict[int, dict[str, Any]] = {n: {"http": [], "raw": []} for n in streams}
    for turn in range(args.repeat):
        for n in streams:
            for side in ("http", "raw") if turn % 2 == 0 else ("raw", "http"):
                result = over_http(server, name, n, args) if side == "http" else raw(model, n, args)
                found[n][side].append(result)
                print(f"{name} {n} streams, {side}: {result['tok_s']:.0f} tokens/s", flush=True)
    for one in found.values():
        for measure in ("tok_s", "us_per_token"):
            for side in ("http", "raw"):
                one[f"{side}_{measure}"] = kit.median([r[measure] for r in one[side]])
        one["ratio"] = kit.median([h["tok_s"] / r["tok_s"] for h, r in zip(one["http"], one["raw"])])
    return found


def throughput(model: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[str]]]:
    with kit.up(config("bench", model, args.threads)) as server:
        place(server)
        found = alternate(server, "bench", model, sorted({1, *args.streams}), args)
    rows = [
        [f"tokens/s, {n} streams", f"{x['http_tok_s']:.0f}", f"{x['raw_tok_s']:.0f}", f"{x['ratio']:.3f}"]
        for n, x in found.items()
    ]
    most = max(args.streams)
    gains = {
        side: kit.median([a["tok_s"] / b["tok_s"] for a, b in zip(found[most][side], found[1][side])])
        for side in ("http", "raw")
    }
    rows.append([f"tokens/s, {most} streams over 1", f"{gains['http']:.2f}", f"{gains['raw']:.2f}", ""])
    return {**{str(n): x for n, x in found.items()}, "gain": gains}, rows


def overhead(_: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[str]]]:
    most = max(args.streams)
    with kit.up(config("guide", None, args.threads)) as server:
        place(server)
        found = alternate(server, "guide", GUIDE, [most], args)[most]
    more = found["http_us_per_token"] - found["raw_us_per_token"]
    row = [
        "CPU us/token, guide; last: ours minus raw",
        *(f"{found[f'{s}_us_per_token']:.0f}" for s in ("http", "raw")),
        f"{more:.0f}",
    ]
    return found, [row]


def first_token_s(server: kit.Up, body: dict[str, Any]) -> float:
    """Seconds from sending to the first chunk with text, over a fresh connection; the answer is read to its end."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    link.connect()
    start, first = time.monotonic(), 0.0
    link.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    answer = link.getresponse()
    if answer.status != 200:
        raise kit.BenchError(f"{answer.status}: {answer.read(1000)!r}")
    for line in answer:
        if not first and b'"content":"' in line and b'"content":""' not in line:
            first = time.monotonic() - start
    link.close()
    return first


def prompt_tokens(server: kit.Up, model: str, text: str) -> int:
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    link.request("POST", "/v1/chat/completions", json.dumps(kit.chat(model, text, max_tokens=1)), headers)
    told = json.loads(link.getresponse().read())
    link.close()
    return int(told["usage"]["prompt_tokens"])


def prefix(model: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[str]]]:
    """Each trial has a prefix nobody has seen; the second request shares it and ends differently."""
    dice = random.Random(7)
    words = ["tide", "moon", "harbour", "keel", "rope", "sand", "pier", "lamp", "gull", "wave", "drift", "anchor"]
    cold, warm = [], []
    with kit.up(config("bench", model, args.threads)) as server:
        place(server)
        a_word = (prompt_tokens(server, "bench", " ".join(words * 10)) - prompt_tokens(server, "bench", "tide")) / 119
        for _ in range(max(3, args.repeat)):
            shared = " ".join(dice.choices(words, k=round(1000 / a_word)))
            for ending, times in ((" Ebb?", cold), (" Flood?", warm)):
                body = kit.chat("bench", shared + ending, stream=True, max_tokens=4, ignore_eos=True)
                times.append(first_token_s(server, body))
    ratio = kit.median(warm) / kit.median(cold)
    row = [
        "TTFT, 1,000 shared tokens: seen, new, ratio",
        *(f"{kit.median(t) * 1000:.0f} ms" for t in (warm, cold)),
        f"{ratio:.3f}",
    ]
    return {"cold_s": cold, "warm_s": warm, "ratio": ratio}, [row]


def idle(_: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[str]]]:
    with kit.up("models: {guide: {}}\n") as server:
        body = kit.chat("guide", "What is time to first token?", stream=True, max_tokens=16)
        load = kit.Load(body=body, mode="sse", conns=1, warmup_s=1, duration_s=min(args.duration, 10))
        result = kit.drive(load, server.port, key=server.key, core=None)
    times = result["ttft_ms"]
    row = ["TTFT of the guide, idle: p50, p99", f"{times['p50']:.1f} ms", f"{times['p99']:.1f} ms", ""]
    return result, [row]


PARTS = {"throughput": throughput, "overhead": overhead, "prefix": prefix, "idle": idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an OpenVINO directory")
    parser.add_argument("--streams", type=lambda s: [int(n) for n in s.split(",")], default=[16, 32])
    parser.add_argument("--threads", type=int, choices=(1, 2), default=1, help="of the engine, on both sides")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds measured in each run")
    parser.add_argument("--warmup", type=float, default=5.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    names = args.only.split(",")
    model = args.model or (made_model() if {"throughput", "prefix"} & set(names) else MODEL)
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    for name in names:
        found[name], more = PARTS[name](model, args)
        rows += more
    kit.table(["measure", "HTTP", "raw", "ratio"], rows)
    kit.save(
        "serve" if len(names) == len(PARTS) else f"serve-{'-'.join(names)}",
        {"model": str(model), "repeat": args.repeat, "summary": rows, **found},
    )


if __name__ == "__main__":
    main()
