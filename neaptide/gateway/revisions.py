"""A lane's replicas by what a request may ask of them (inside or not, of which revision), and who gets which revision.
Pure.

    all of the lane -> those inside, where its key says so -> those of its revision -> the least loaded that has room
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from neaptide.gateway.route import Target
from neaptide.remotes import PERCENT


class Group:
    """Replicas, and the same by revision."""

    __slots__ = ("by_id", "revisions", "targets")

    def __init__(self, targets: Sequence[Target], model: str, split: bool = True) -> None:
        self.targets = targets
        self.by_id = {target.row.id: target for target in targets}
        self.revisions: dict[str, Group] = {}
        if split:
            for name in dict.fromkeys(target.row.revision_of(model) for target in targets):
                of_it = [target for target in targets if target.row.revision_of(model) == name]
                self.revisions[name] = Group(of_it, model, split=False)

    def has(self, revision: str, now: float) -> bool:
        """Whether a replica of this revision is there: not leaving, not failing to connect, and not left out for its
        errors. It may be busy."""
        found = self.revisions.get(revision)
        if found is None:
            return False
        return any(t.reachable(now) and (not t.erring or t.breaker.lets(now)) for t in found.targets)

    def any_there(self, now: float) -> str:
        """A revision of which a replica is there; "" where none is."""
        return next((name for name in self.revisions if self.has(name, now)), "")


NOBODY = Group((), "")


class Split:
    """Shares of traffic by revision, whole percents that sum to 100.

    Requests that nothing ties to others get revisions from a sequence that repeats every 100 and is even within: any
    100 of them in a row have exactly these shares. A conversation's number always falls on the same revision, and where
    shares change only those conversations move whose percent changes hands.
    """

    __slots__ = ("_places", "_sequence", "_turn", "traffic")

    def __init__(self, traffic: Mapping[str, int]) -> None:
        self.traffic = dict(traffic)
        self._places = tuple(chain.from_iterable([name] * share for name, share in traffic.items()))
        self._sequence = _even(traffic)
        self._turn = 0

    def draw(self, there: Callable[[str], bool], conversation: int | None = None) -> str:
        """The revision of a new request; the next one of the sequence where none of it is `there`. "": none is, of
        those that have a share."""
        if conversation is None:
            at, self._turn = self._turn, (self._turn + 1) % PERCENT
            first = self._sequence[at]
        else:
            at = conversation % PERCENT
            first = self._places[at]
        if there(first):
            return first
        others = (self._sequence[(at + step) % PERCENT] for step in range(PERCENT))
        return next((name for name in dict.fromkeys(others) if there(name)), "")


def _even(traffic: Mapping[str, int]) -> tuple[str, ...]:
    """100 names, each as often as its share and never more than one place from it: smooth weighted round robin, as
    nginx does it."""
    credit = dict.fromkeys(traffic, 0)
    found = []
    for _ in range(PERCENT):
        for name, share in traffic.items():
            credit[name] += share
        most = max(credit, key=credit.__getitem__)
        credit[most] -= PERCENT
        found.append(most)
    return tuple(found)
