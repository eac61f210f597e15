"""The engine library alone: no HTTP, no gateway, no engine process; the floor under every number of the full stack.

    python bench/engine_raw.py --model DIR --streams 1,16,32 --threads 1 [--cpus 1] --json

It builds its pipeline by the engine's own code, with the same options, drives it in one thread and detokenises with
tokenizers.DecodeStream, as a replica does. Requests are greedy, ignore the end of sequence and all start together; the
time of their prefill counts. CPU is this process's, all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GUIDE = ROOT / "neaptide" / "models" / "guide"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(GUIDE), help="OpenVINO model directory")
    parser.add_argument("--streams", type=numbers, default=[1, 16, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpus", type=numbers, default=[], help="pin this process, as engine_cpus does")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens of the shared prefix")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind; the median is told")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class Raw:
    """A pipeline, the model's tokenizer, and ids for requests."""

    def __init__(self, args: argparse.Namespace) -> None:
        import msgspec
        from tokenizers import Tokenizer

        from neaptide.engine import openvino_pipeline
        from neaptide.specs import ReplicaSpec

        options = {"threads": args.threads, "max_running": max(args.streams)}
        spec = ReplicaSpec(
            id="raw", epoch=0, model="raw", revision="raw", engine="openvino", source=args.model,
            options={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in options.items()},
            engine_cpus=tuple(args.cpus),
        )  # fmt: skip
        self.library = openvino_pipeline
        self.plan, self.pipeline = openvino_pipeline.load(openvino_pipeline.plan(spec), spec, {})
        self.tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
        self._serial = 0

    def prompt(self, tokens: int) -> list[int]:
        """Never the same twice, so that the prefix cache answers only where it is meant to."""
        self._serial += 1
        vocabulary = self.plan.files.vocab_size
        return [(self._serial * 7919 + i * 104729) % vocabulary for i in range(tokens)]

    def add(self, prompt: list[int], max_tokens: int) -> Any:
        from neaptide.engine.protocol import Sampling

        self._serial += 1
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        config = self.library.generation_config(sampling, max_tokens, 0, frozenset())
        return self.pipeline.add_request(self._serial, self.library.token_tensor(prompt), config)

    def drive(self, handles: list[Any]) -> Iterator[int]:
        """Step until all have finished; yields the tokens that each step made, already turned into text."""
        from tokenizers.decoders import DecodeStream

        running = [(handle, DecodeStream(skip_special_tokens=True)) for handle in handles]
        while running:
            self.pipeline.step()
            made = 0
            for handle, text in running:
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            text.step(self.tokenizer, token)
                            made += 1
            running = [pair for pair in running if pair[0].get_status() == self.library.RUNNING]
            yield made


def decode(raw: Raw, streams: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s and CPU microseconds a token of `streams` answers begun together."""
    walls, cpus = [], []
    for _ in range(args.repeat):
        handles = [raw.add(raw.prompt(args.prompt), args.tokens) for _ in range(streams)]
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        made = sum(raw.drive(handles))
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        if made != streams * args.tokens:
            raise SystemExit(f"{made} tokens came instead of {streams * args.tokens}: the run is void")
        walls.append(made / wall_s)
        cpus.append(cpu_s / made * 1e6)
    return {
        "streams": streams,
        "tokens_per_s": round(statistics.median(walls), 1),
        "cpu_us_per_token": round(statistics.median(cpus), 1),
    }


def first_token_s(raw: Raw, prompt: list[int]) -> float:
    handle = raw.add(prompt, 1)
    started_s = time.perf_counter()
    for _ in raw.drive([handle]):
        pass
    return time.perf_counter() - started_s


def prefix(raw: Raw, args: argparse.Namespace) -> dict[str, float]:
    """Time to the first token of a long prompt: unseen, and with all but its end seen before."""
    tokens = min(args.prefix, raw.plan.files.context_tokens - 64)
    cold, warm = [], []
    for _ in range(args.repeat):
        shared = raw.prompt(tokens)
        cold.append(first_token_s(raw, shared + raw.prompt(20)))
        warm.append(first_token_s(raw, shared + raw.prompt(20)))
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
    decoded = [decode(raw, streams, args) for streams in args.streams]
    result = {
        "model": args.model,
        "threads": args.threads,
        "cpus": args.cpus,
        "precision": raw.plan.precision,
        "chunk_tokens": raw.plan.batched_tokens,
        "prompt_tokens": args.prompt,
        "answer_tokens": args.tokens,
        "repeat": args.repeat,
        "decode": decoded,
        "batch_ratio": round(decoded[-1]["tokens_per_s"] / decoded[0]["tokens_per_s"], 2),
        "prefix": prefix(raw, args),
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=2), flush=True)
    os._exit(0)  # the library complains of blocks in its prefix cache when it is torn down


if __name__ == "__main__":
    main()
