"""The engine library alone: no HTTP, no gateway, no engine process; the floor under every number of the full stack.

    python bench/engine_raw.py --model DIR --streams 1,16,32 --threads 1 [--cpus 1] --json

It builds its pipeline by the engine's own code, with the same options, drives it in one thread and detokenises with
tokenizers.DecodeStream, as a replica does. A closed loop: as many sequences as --streams run at all times, greedy and
past the end of sequence, each replaced when it has its --tokens; prefill is part of it. CPU is this process's, all
threads. With several counts it also tells what batching gives, and the time to the first token of a long prompt whose
beginning was seen before. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GUIDE = ROOT / "neaptide" / "models" / "guide"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(GUIDE), help="OpenVINO model directory")
    parser.add_argument("--streams", type=numbers, default=[1, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", "--cpu", type=numbers, default=[], help="pin this process, as engine_cpus does")
    parser.add_argument("--max-running", type=int, default=64, help="what the pipeline is built for; the default is")
    parser.add_argument("--prompt", default="", help="every request's text; default: distinct --prompt-tokens")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--duration", type=float, default=5.0, help="seconds measured for each of --streams")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before that")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the shared beginning")
    parser.add_argument("--repeat", type=int, default=5, help="first tokens timed of each kind; the median is told")
    parser.add_argument("--json", action="store_true", help="on one line")
    return parser.parse_args()


class Raw:
    """A pipeline, the model's tokenizer, and requests to it."""

    def __init__(self, args: argparse.Namespace) -> None:
        import msgspec
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream

        from neaptide.engine import openvino_pipeline
        from neaptide.specs import ReplicaSpec

        options = {"threads": args.threads, "max_running": max(args.max_running, *args.streams)}
        spec = ReplicaSpec(
            id="raw", epoch=0, model="raw", revision="raw", engine="openvino", source=args.model,
            options={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()},
            engine_cpus=tuple(args.cpus),
        )  # fmt: skip
        self.library = openvino_pipeline
        self.plan, self.pipeline = openvino_pipeline.load(openvino_pipeline.plan(spec), spec, {})
        self.tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
        self._stream = DecodeStream
        self._serial = 0
        self._running: list[list[Any]] = []  # [handle, text, tokens left]

    def distinct(self, tokens: int) -> list[int]:
        """Never the same twice, so that the prefix cache answers only where it is meant to."""
        self._serial += 1
        vocabulary = self.plan.files.vocab_size
        return [(self._serial * 7919 + i * 104729) % vocabulary for i in range(tokens)]

    def add(self, prompt: list[int], max_tokens: int) -> None:
        from neaptide.engine.protocol import Sampling

        self._serial += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        config = self.library.generation_config(sampling, max_tokens, 0, frozenset())
        handle = self.pipeline.add_request(self._serial, self.library.token_tensor(prompt), config)
        self._running.append([handle, self._stream(skip_special_tokens=True), max_tokens])

    def step(self) -> int:
        """One step; the number of tokens it made, all turned into text."""
        self.pipeline.step()
        made, tokenizer, finished = 0, self.tokenizer, False
        for entry in self._running:
            handle, text, left = entry
            if handle.can_read():
                for output in handle.read().values():
                    for token in output.generated_ids:
                        text.step(tokenizer, token)
                        made += 1
                        left -= 1
                entry[2] = left
                finished = finished or left <= 0
        if finished:
            self._running = [entry for entry in self._running if entry[2] > 0]
        return made

    def running(self) -> int:
        return len(self._running)


def prompts(raw: Raw, args: argparse.Namespace) -> Callable[[], list[int]]:
    if args.prompt:
        ids = raw.tokenizer.encode(args.prompt).ids
        return lambda: ids
    return lambda: raw.distinct(args.prompt_tokens)


def closed_loop(raw: Raw, streams: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s and CPU microseconds a token with `streams` answers always running."""
    next_prompt = prompts(raw, args)

    def run(seconds: float) -> tuple[int, float, float]:
        made, wall_s, cpu_s = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - wall_s < seconds:
            while raw.running() < streams:
                raw.add(next_prompt(), args.tokens)
            made += raw.step()
        return made, time.perf_counter() - wall_s, time.process_time() - cpu_s

    run(args.warmup)
    made, wall_s, cpu_s = run(args.duration)
    while raw.running():
        raw.step()
    return {
        "streams": streams,
        "tokens": made,
        "tok_s": round(made / wall_s, 1),
        "us_per_token": round(cpu_s / max(1, made) * 1e6, 1),
    }


def first_token_s(raw: Raw, prompt: list[int]) -> float:
    started_s = time.perf_counter()
    raw.add(prompt, 1)
    while raw.running():
        raw.step()
    return time.perf_counter() - started_s


def prefix(raw: Raw, args: argparse.Namespace) -> dict[str, float]:
    """Time to the first token of a long prompt: unseen, and with all but its last 20 tokens seen before."""
    tokens = min(args.prefix, raw.plan.files.context_tokens - 64)
    cold, warm = [], []
    for _ in range(args.repeat):
        shared = raw.distinct(tokens)
        cold.append(first_token_s(raw, shared + raw.distinct(20)))
        warm.append(first_token_s(raw, shared + raw.distinct(20)))
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    return {
        "prefix_tokens": tokens,
        "cold_ttft_s": round(cold_s, 5),
        "warm_ttft_s": round(warm_s, 5),
        "warm_to_cold": round(warm_s / cold_s, 4),
    }


def main() -> None:
    args = arguments()
    if args.cpus:
        os.sched_setaffinity(0, args.cpus)
    raw = Raw(args)
    counts = [closed_loop(raw, streams, args) for streams in args.streams]
    result = {
        "model": args.model, "threads": args.threads, "cpus": args.cpus, "precision": raw.plan.precision,
        "chunk_tokens": raw.plan.batched_tokens, "answer_tokens": args.tokens, "duration_s": args.duration,
    }  # fmt: skip
    if len(counts) == 1:
        result |= counts[0]
    else:
        result |= {"decode": counts, "batch_ratio": round(counts[-1]["tok_s"] / counts[0]["tok_s"], 2)}
        result["prefix"] = prefix(raw, args)
    print(json.dumps(result, indent=None if args.json else 2), flush=True)
    os._exit(0)  # the library complains of blocks in its prefix cache when it is torn down


if __name__ == "__main__":
    main()
