"""From the gateways' journals into the ledger: takes what is new, ends what a dead gateway left open, clears away.

Requests that have begun and not ended are kept in the ledger (table open_begins) and not found again by reading the
journal from its first unclosed begin: one stream of an hour would hold back an hour of segments, and every start of
control would read them all.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from neaptide.clock import Clock
from neaptide.cost.ledger import Ledger, Position, Taken
from neaptide.errors import StorageError
from neaptide.journal import Gap, release_space, scan, segments, writer_alive
from neaptide.journal.reader import segment_path
from neaptide.link import TallyRow
from neaptide.types import Attempt, Begin, Usage

BATCH = 1000  # records a transaction
MAX_RECORDS = 50_000  # records a pull: the thread that asks has other work too (a second on SQLite)
DAY_S = 86400.0

log = logging.getLogger("neaptide.ledger")


class Damage(NamedTuple):
    """Bytes of a journal that are no records: a torn tail, pages lost with the power, a bad disk."""

    journal: str
    segment: int
    gap: Gap


class Pulled(NamedTuple):
    """What one pull added, and the damage it passed over; `more` says that it stopped before the end."""

    rows: int
    begins: int
    damage: tuple[Damage, ...]
    more: bool


class Batch(NamedTuple):
    taken: Taken
    records: int
    damage: list[Damage]


class Intake:
    """Pulls all journals under `root` (state/journal). One thread's."""

    def __init__(self, ledger: Ledger, root: Path, clock: Clock) -> None:
        self._ledger, self._root, self._clock = ledger, root, clock
        self._at: dict[str, Position] = {}  # as in the ledger; spares a query a journal a pull
        self._drained: dict[str, int] = {}  # journals of dead gateways, taken to the end: their last segment

    def pull(self, most: int = MAX_RECORDS) -> Pulled:
        """Takes what is new in every journal, about `most` records. StorageError leaves each journal at its last whole
        batch."""
        rows = begins = records = 0
        damage: list[Damage] = []
        try:
            for batch in itertools.chain.from_iterable(map(self._batches, self._journals())):
                rows, begins = rows + batch.taken.rows, begins + batch.taken.begins
                records, damage = records + batch.records, damage + batch.damage
                if records >= most:
                    return Pulled(rows, begins, tuple(damage), True)
        except OSError as e:
            raise StorageError(f"a journal cannot be read: {e}", fix="see to the disk", code="E544") from e
        return Pulled(rows, begins, tuple(damage), False)

    def dead(self) -> dict[str, tuple[Begin, ...]]:
        """Open begins of the journals whose writer is dead, all of what it wrote taken: ask the replicas named in them
        for a TALLY, then close_dead()."""
        self._pull_all()
        names = [name for name in self._ledger.open_journals() if self._is_over(name)]
        return {name: self._ledger.open_begins(name) for name in names}

    def close_dead(self, journal: str, tally: Mapping[str, TallyRow]) -> int:
        """Ends the open begins of a dead gateway's journal as `lost`, with the counts of the replicas that answered.

        StorageError while its gateway lives: the end records are still to come.
        """
        if writer_alive(self._root / journal):
            raise StorageError(
                f"the gateway of {journal} is alive",
                why="its requests will end by themselves; closing them as lost would drop their real rows",
                fix="stop it first",
                code="E543",
            )
        self._pull_all()
        begins = self._ledger.open_begins(journal)
        return self._ledger.close_begins(journal, [lost(b, tally.get(b.request_id)) for b in begins])

    def is_closed(self, journal: str) -> bool:
        """Its gateway is dead, all that it wrote is taken, and nothing that it began is open."""
        return self._is_over(journal) and not self._ledger.open_begins(journal)

    def remove_taken(self, retention_days: float) -> int:
        """Deletes segments that are taken and were last written longer ago; a dead journal's directory goes with its
        last one. How many segments."""
        before = self._clock.wall_s() - retention_days * DAY_S
        return sum(self._remove(name, before) for name in self._journals())

    def _journals(self) -> list[str]:
        return sorted(p.name for p in self._root.glob("*") if p.is_dir())

    def _is_over(self, journal: str) -> bool:
        """Nothing more will come from it: drained, or removed with its writer dead."""
        directory = self._root / journal
        return not writer_alive(directory) and (journal in self._drained or not segments(directory))

    def _position(self, journal: str) -> Position:
        if journal not in self._at:
            self._at[journal] = self._ledger.position(journal)
        return self._at[journal]

    def _pull_all(self) -> None:
        while self.pull().more:
            pass

    def _batches(self, journal: str) -> Iterator[Batch]:
        """Takes what is new in one journal, batch by batch; marks it drained at the end if its writer is dead."""
        directory = self._root / journal
        there = segments(directory)
        if not there or self._drained.get(journal) == there[-1]:
            return
        # In this order: a writer locks before it makes a segment, so the answer holds for those that were there, and
        # one that is dead by now has written all that is listed next.
        alive = writer_alive(directory)
        at = self._position(journal)
        numbers = [n for n in segments(directory) if n >= at.segment]
        for number in numbers:
            finished = not alive or number != numbers[-1]
            yield from self._segment(journal, number, at.offset if number == at.segment else 0, finished)
        if not alive:
            self._drained[journal] = last = (numbers or there)[-1]
            release_space(directory, segment_path(directory, last))

    def _segment(self, journal: str, number: int, offset: int, finished: bool) -> Iterator[Batch]:
        while True:
            part = scan(self._root / journal, number, offset, finished=finished, limit=BATCH)
            if part.offset == offset:
                return
            for gap in part.gaps:
                log.error("journal %s, segment %d, bytes %d to %d are no records: %s", journal, number, *gap)
            taken = self._ledger.take(journal, number, part.records, part.offset)
            self._at[journal] = Position(number, part.offset)
            yield Batch(taken, len(part.records), [Damage(journal, number, gap) for gap in part.gaps])
            offset = part.offset
            if part.done:
                return

    def _remove(self, journal: str, before_wall_s: float) -> int:
        directory = self._root / journal
        drained_to, taken_to = self._drained.get(journal, 0), self._position(journal).segment
        removed = 0
        for number in segments(directory):
            path = segment_path(directory, number)
            if (number <= drained_to or number < taken_to) and path.stat().st_mtime < before_wall_s:
                path.unlink()
                removed += 1
        over = taken_to > 0 and self._is_over(journal)  # taken_to 0: a gateway that is just starting
        if over and not segments(directory) and not self._ledger.open_begins(journal):
            for left in directory.iterdir():
                left.unlink()  # its lock, and spares that a killed gateway left
            directory.rmdir()
        return removed


def lost(begin: Begin, tally: TallyRow | None) -> Usage:
    """The row of a request whose gateway died: what was known at dispatch, and what its replica counted. It is not
    charged, so it pays nothing: what it had reserved is free again with the rest of its gateway's lease."""
    counted = tally or TallyRow(done=False)
    return Usage(
        request_id=begin.request_id,
        tenant=begin.tenant,
        project=begin.project,
        key=begin.key,
        model=begin.model,
        revision=begin.revision,
        priority=begin.priority,
        route=begin.route,
        prompt_bytes=begin.prompt_bytes,
        max_tokens=begin.max_tokens,
        prompt_tokens=counted.prompt_tokens,
        cached_tokens=counted.cached_tokens,
        output_tokens=counted.output_tokens,
        engine_s=counted.engine_s,
        started_wall_s=begin.started_wall_s,
        arrived_mono_s=begin.arrived_mono_s,
        outcome="lost",
        finish=counted.finish,
        error="gateway_died",
        attempts=(Attempt(begin.replica, counted.output_tokens),) if begin.replica else (),
    )
