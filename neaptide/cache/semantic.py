"""Which kept answer a question could be served with: the nearest one that no guard tells apart. Pure.

    find(vector, marks)   ->  Match: the entry and how near it is; None: nothing near enough to ask a judge about
    keep(vector, marks, answer)   a question that the model answered. One that a judge found to be the same as a kept
                                  one is kept with that one's answer: another phrasing of it

One Shelf holds what may answer each other: the same tenant, model, system prompt, sampling and earlier turns. Bounded:
the entry that was used longest ago leaves.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from neaptide.cache.belief import Near
from neaptide.cache.guards import Marks, difference

Vector = npt.NDArray[np.float32]
A = TypeVar("A")
NEAR = 0.6  # similarity below which nobody is asked whether two questions mean the same
FAR = 0.5  # where the next answer is taken to be when none is among those looked at
LOOKED_AT = 8  # of the nearest ones


class Entry(Generic[A]):
    """A question and its answer; the phrasings of one question share the answer, the object itself."""

    __slots__ = ("answer", "marks", "used")

    def __init__(self, marks: Marks, answer: A) -> None:
        self.marks, self.answer = marks, answer
        self.used = 0


class Match(NamedTuple, Generic[A]):
    entry: Entry[A]
    near: Near


class Shelf(Generic[A]):
    """At most `cap` entries, each 4 bytes times `size` (1.5 KB) beside its marks."""

    __slots__ = ("_cap", "_entries", "_turn", "_vectors")

    def __init__(self, cap: int, size: int = 384) -> None:
        self._cap = cap
        self._entries: list[Entry[A]] = []
        self._vectors = np.zeros((min(cap, 16), size), np.float32)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, vector: Vector, marks: Marks) -> Match[A] | None:
        """Of the nearest ones, the first that differs in no number, name, negation or direction. `vector`: length 1."""
        count = len(self._entries)
        if not count or marks.foreign:
            return None
        similar = self._vectors[:count] @ vector
        nearest = np.argpartition(-similar, min(LOOKED_AT, count) - 1)[:LOOKED_AT]
        places = sorted((int(at) for at in nearest), key=lambda at: -float(similar[at]))
        places = [at for at in places if not difference(marks, self._entries[at].marks)]
        if not places or similar[places[0]] < NEAR:
            return None
        best, similarity = self._entries[places[0]], float(similar[places[0]])
        rival = next((float(similar[at]) for at in places if self._entries[at].answer is not best.answer), FAR)
        return Match(best, Near(similarity, similarity - rival, _shared(marks.words, best.marks.words)))

    def used(self, entry: Entry[A]) -> None:
        self._turn += 1
        entry.used = self._turn

    def keep(self, vector: Vector, marks: Marks, answer: A) -> Entry[A]:
        """In the place of the one that was used longest ago where the shelf is full."""
        entry = Entry(marks, answer)
        self.used(entry)
        count = len(self._entries)
        if count >= self._cap:
            at = min(range(count), key=lambda i: self._entries[i].used)
            self._entries[at], self._vectors[at] = entry, vector
            return entry
        if count == len(self._vectors):
            larger = np.zeros((min(self._cap, 2 * count), self._vectors.shape[1]), np.float32)
            larger[:count] = self._vectors
            self._vectors = larger
        self._vectors[count] = vector
        self._entries.append(entry)
        return entry

    def drop(self, answer: A) -> None:
        """It is too old: it goes with all its phrasings."""
        stay = [at for at, entry in enumerate(self._entries) if entry.answer is not answer]
        self._vectors[: len(stay)] = self._vectors[stay]
        self._entries = [self._entries[at] for at in stay]


def _shared(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))
