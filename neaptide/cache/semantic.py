"""Which kept answer a question could be served with: the nearest one that no guard tells apart. Pure.

    find(vector, marks)  ->  Match: the entry, how similar, how likely wrong; None: nothing near enough to ask about
    judged(match, right)     what a judge found: the entry's belief and the pool's learn it
    keep(...)                a new question with its answer, where no entry was right for it

One Shelf holds what may answer each other: the same tenant, model, system prompt, sampling and earlier turns. Bounded:
the entry that was used longest ago leaves.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from neaptide.cache.belief import Belief, wrong
from neaptide.cache.guards import Marks, difference

Vector = npt.NDArray[np.float32]
A = TypeVar("A")
NEAR = 0.7  # below it nobody is asked whether two questions mean the same
LOOKED_AT = 4  # of the nearest ones


class Entry(Generic[A]):
    """A question and its answer."""

    __slots__ = ("answer", "belief", "marks", "used")

    def __init__(self, marks: Marks, answer: A) -> None:
        self.marks, self.answer = marks, answer
        self.belief = Belief()
        self.used = 0


class Match(NamedTuple, Generic[A]):
    entry: Entry[A]
    similarity: float
    wrong: float  # how likely its answer is wrong here, 0 to 1


class Shelf(Generic[A]):
    """`pool`: what all shelves of the deployment have shown. At most `cap` entries of 1.5 KB and a belief of 2.7 KB."""

    __slots__ = ("_cap", "_entries", "_turn", "_vectors", "pool")

    def __init__(self, pool: Belief, cap: int, size: int = 384) -> None:
        self.pool = pool
        self._cap = cap
        self._entries: list[Entry[A]] = []
        self._vectors = np.zeros((min(cap, 16), size), np.float32)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, vector: Vector, marks: Marks) -> Match[A] | None:
        """Of the nearest ones, the first that differs in no number, name, negation or direction."""
        count = len(self._entries)
        if not count or marks.foreign:
            return None
        similar = self._vectors[:count] @ vector
        near = np.argpartition(-similar, min(LOOKED_AT, count) - 1)[:LOOKED_AT]
        for at in sorted(near, key=lambda i: -float(similar[i])):
            similarity = float(similar[at])
            if similarity < NEAR:
                return None
            entry = self._entries[at]
            if not difference(marks, entry.marks):
                return Match(entry, similarity, wrong(entry.belief, self.pool, similarity))
        return None

    def used(self, entry: Entry[A]) -> None:
        self._turn += 1
        entry.used = self._turn

    def judged(self, match: Match[A], right: bool) -> None:
        match.entry.belief.saw(match.similarity, right)
        self.pool.saw(match.similarity, right)

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

    def drop(self, entry: Entry[A]) -> None:
        """Its answer is too old."""
        at = self._entries.index(entry)
        last = self._entries.pop()
        if at < len(self._entries):
            self._entries[at], self._vectors[at] = last, self._vectors[len(self._entries)]
