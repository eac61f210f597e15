"""Which replica a request goes to: the gateway's own choice, and others' to compare it with."""

from __future__ import annotations

import random
from typing import Literal, Protocol

from neaptide.gateway.affinity import Familiar
from neaptide.gateway.route import Target, choose
from neaptide.simulate.engine import Book

RouteName = Literal["least-loaded", "round-robin", "two-choices", "prefix"]


class Pool:
    """The replicas that take requests."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.by_id: dict[str, Target] = {}

    def add(self, target: Target) -> None:
        self.targets.append(target)
        self.by_id[target.row.id] = target

    def remove(self, target: Target) -> None:
        self.targets.remove(target)
        del self.by_id[target.row.id]


class Router(Protocol):
    def pick(self, pool: Pool, id: int, now_s: float) -> Target | None:
        """None: the request must wait. Whoever is picked gets it."""


class LeastLoaded:
    """What the gateway does."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, pool: Pool, id: int, now_s: float) -> Target | None:
        target = choose(pool.targets, now_s, self._turn)
        self._turn += target is not None
        return target


class RoundRobin:
    def __init__(self) -> None:
        self.turn = 0  # the place of the next one

    def pick(self, pool: Pool, id: int, now_s: float) -> Target | None:
        targets = pool.targets
        for _ in targets:
            target = targets[self.turn % len(targets)]
            self.turn += 1
            if target.can_take(now_s):
                return target
        return None


class TwoChoices:
    """The less loaded of two at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"two choices {seed}")

    def pick(self, pool: Pool, id: int, now_s: float) -> Target | None:
        targets = pool.targets
        if len(targets) < 3:
            return choose(targets, now_s)
        return choose(self._random.sample(targets, 2), now_s) or choose(targets, now_s)


class PrefixAffinity:
    """To the replica that has seen most of its prompt lately, unless that one is much more loaded."""

    def __init__(self, book: Book, block_tokens: int) -> None:
        self._book, self._block_tokens = book, block_tokens
        self._familiar = Familiar()
        self._turn = 0

    def pick(self, pool: Pool, id: int, now_s: float) -> Target | None:
        least = choose(pool.targets, now_s, self._turn)
        if least is None:
            return None
        self._turn += 1
        blocks = self._book.shareable(id, self._block_tokens)
        return self._familiar.choose(blocks, pool.by_id, least, now_s)


def router(name: RouteName, book: Book, block_tokens: int, seed: int) -> Router:
    if name == "round-robin":
        return RoundRobin()
    if name == "two-choices":
        return TwoChoices(seed)
    return PrefixAffinity(book, block_tokens) if name == "prefix" else LeastLoaded()
