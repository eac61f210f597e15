"""Asks the exported guide every held-out prompt, greedily, and scores the replies by the facts they must hold.

    python -m tools.guide.evaluate --model neaptide/models/guide [--prompts heldout.toml|dev] [--show] [--json FILE]

Right answers and refusals are counted apart: a model that declines everything must not pass, nor one that never does.
The booking demo's dialogues are played with the guide's own answers as context.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from tokenizers import Tokenizer

from tools.guide.bank import load, prompts

REFUSALS = ("don't know", "do not know", "不知道")
MAX_NEW_TOKENS = 160
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

    def ask(self, text: str, before: list[str] | None = None) -> str:
        """The greedy reply to `text`, after the earlier messages `before` (the user's and the guide's in turn)."""
        turns = [*(before or []), text]
        said = "".join(f"<|{('user', 'assistant')[i % 2]}|>{turn}<|end|>" for i, turn in enumerate(turns))
        ids = self._tokenizer.encode(f"<|begin|>{said}<|assistant|>", add_special_tokens=False).ids
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = MAX_NEW_TOKENS, False
        config.eos_token_id, config.stop_token_ids = END, {END}
        self._asked += 1
        handle = self._pipeline.add_request(self._asked, ov.Tensor(np.array([ids], dtype=np.int64)), config)
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


def book(asker: Asker, booking: dict) -> tuple[str, list[str]]:
    """Plays a booking: right or wrong, and all that was said."""
    said: list[str] = []
    for turn in booking["say"]:
        said += [turn, asker.ask(turn, said)]
    right = all(fact.lower() in said[-1].lower() for fact in booking["facts"])
    return "right" if right else "wrong", said


def score(asker: Asker, asked: list[dict], bookings: list[dict], show: bool) -> dict[str, Counter[str]]:
    """{"kind lang": {verdict: count}}."""
    counts: dict[str, Counter[str]] = {}
    for prompt in asked:
        reply = asker.ask(prompt["text"], prompt.get("before"))
        mark = verdict(prompt, reply)
        counts.setdefault(f"{prompt['kind']} {prompt.get('home', prompt['lang'])}", Counter())[mark] += 1
        if show:
            print(f"{mark:9} {prompt.get('subject', '-')}: {prompt['text']}  ->  {reply}")
    for booking in bookings:
        mark, said = book(asker, booking)
        counts.setdefault(f"booking {booking['lang']}", Counter())[mark] += 1
        if show:
            print(f"{mark:9} booking: {' | '.join(said)}")
    return counts


def report(counts: dict[str, Counter[str]]) -> None:
    for name, row in sorted(counts.items()):
        rest = ", ".join(f"{n} {mark}" for mark, n in sorted(row.items()) if mark != "right")
        print(f"{name:10} {row['right']:3} of {row.total():3} right" + (f" ({rest})" if rest else ""))
    for title, kinds in (("in scope", ("answer", "chat")), ("declined", ("refuse",))):
        rows = [row for name, row in counts.items() if name.startswith(kinds)]
        right, asked = sum(row["right"] for row in rows), sum(row.total() for row in rows)
        if asked:
            print(f"{title:10} {right:3} of {asked:3} right: {right / asked:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", default="heldout.toml", help="a list file or a folder; dev while improving")
    parser.add_argument("--show", action="store_true", help="print every reply")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    bookings = load("heldout_booking.toml")["booking"] if arguments.prompts == "heldout.toml" else []
    counts = score(Asker(arguments.model), prompts(arguments.prompts), bookings, arguments.show)
    report(counts)
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
