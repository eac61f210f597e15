"""Asks the exported guide every held-out prompt, greedily, and scores the replies by the facts they must hold.

    python -m tools.guide.evaluate --model neaptide/models/guide [--prompts FILE] [--show] [--json FILE]

Right answers and refusals are counted apart: a model that declines everything must not pass, nor one that never does.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from tokenizers import Tokenizer

HERE = Path(__file__).parent
REFUSALS = ("don't know", "do not know", "不知道")
MAX_NEW_TOKENS = 120
END = 2


class Asker:
    def __init__(self, model: Path, threads: int = 1) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.dynamic_split_fuse = True
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._asked = 0

    def ask(self, text: str) -> str:
        """The greedy reply to a first message."""
        prompt = f"<|begin|><|user|>{text}<|end|><|assistant|>"
        ids = np.array([self._tokenizer.encode(prompt, add_special_tokens=False).ids], dtype=np.int64)
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = MAX_NEW_TOKENS, False
        config.eos_token_id, config.stop_token_ids = END, {END}
        self._asked += 1
        handle = self._pipeline.add_request(self._asked, ov.Tensor(ids), config)
        out: list[int] = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            while handle.can_read():
                for piece in handle.read().values():
                    out += piece.generated_ids
        return self._tokenizer.decode(out)


def verdict(prompt: dict, reply: str) -> str:
    """right | wrong | refused (where an answer was wanted) | invented (where a refusal was wanted)."""
    refused = any(mark in reply.lower() for mark in REFUSALS)
    if prompt["kind"] == "refuse":
        return "right" if refused else "invented"
    if refused:
        return "refused"
    held = all(any(fact.lower() in reply.lower() for fact in group) for group in prompt["facts"])
    return "right" if held else "wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=HERE / "heldout.toml", help="dev.toml while improving")
    parser.add_argument("--show", action="store_true", help="print every reply")
    parser.add_argument("--json", type=Path, help="write the rates here")
    arguments = parser.parse_args()
    prompts = tomllib.loads(arguments.prompts.read_text(encoding="utf-8"))["prompt"]
    asker = Asker(arguments.model)
    counts: dict[str, dict[str, int]] = {}
    for prompt in prompts:
        reply = asker.ask(prompt["text"])
        mark = verdict(prompt, reply)
        row = counts.setdefault(f"{prompt['kind']} {prompt['lang']}", {})
        row[mark] = row.get(mark, 0) + 1
        row["asked"] = row.get("asked", 0) + 1
        if arguments.show:
            print(f"{mark:9} {prompt['text']}  ->  {reply}")
    for name, row in counts.items():
        rest = ", ".join(f"{n} {mark}" for mark, n in sorted(row.items()) if mark not in ("right", "asked"))
        print(f"{name:10} {row.get('right', 0):2} of {row['asked']:2} right" + (f" ({rest})" if rest else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
