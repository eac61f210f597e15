"""Budgets and leases in the ledger: what is set, what is lent to whom, what was spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from neaptide.cost import schema
from neaptide.cost.budgets import Budget, Period, Unit, renews_s
from neaptide.cost.database import Database
from neaptide.cost.rate import MAX_CHARGE_NANOS
from neaptide.cost.rows import text
from neaptide.types import Usage

NOBODY = ""  # the gateway of what dead ones have spent


class Lease(NamedTuple):
    """A row of the table leases."""

    budget: str  # its name
    gateway: str
    granted: int = 0
    returned: int = 0
    spent: int = 0


class Leases:
    """Over the ledger's database; every method is one transaction and raises StorageError when the database fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def budgets(self) -> tuple[Budget, ...]:
        """All that are set, by scope."""
        table = schema.budgets
        query = sa.select(table).order_by(table.c.scope, table.c.unit, table.c.period)
        with self._database.read() as connection:
            rows = connection.execute(query).mappings().all()
        return tuple(
            Budget(
                scope=row["scope"],
                unit=cast(Unit, row["unit"]),
                period=cast(Period, row["period"]),
                amount=row["amount"],
                strict=row["strict"],
            )
            for row in rows
        )

    def set(self, budget: Budget, now_s: float) -> None:
        """A new one, or another amount; what was spent of it stays."""
        row = {
            "scope": budget.scope,
            "unit": budget.unit,
            "period": budget.period,
            "amount": budget.amount,
            "strict": budget.strict,
            "created_s": now_s,
        }
        with self._database.write() as connection:
            self._database.merge(connection, schema.budgets, [row], put=("amount", "strict"))

    def remove(self, budget: Budget) -> None:
        """It is not set any more; what was spent of it stays, should it be set again."""
        table = schema.budgets.c
        where = (table.scope == budget.scope, table.unit == budget.unit, table.period == budget.period)
        with self._database.write() as connection:
            connection.execute(schema.budgets.delete().where(*where))

    def of(self, names: Sequence[str]) -> tuple[Lease, ...]:
        """All leases of these budgets."""
        table = schema.leases
        columns = (table.c[name] for name in Lease._fields)
        query = sa.select(*columns).where(self._database.among(table.c.budget, names))
        with self._database.read() as connection:
            return tuple(Lease(*row) for row in connection.execute(query))

    def lend(self, leases: Iterable[Lease]) -> None:
        """What is granted and returned by now, before any gateway hears of it; what is spent is not theirs to say."""
        rows = [_row(lease) for lease in leases]
        with self._database.write() as connection:
            self._database.merge(connection, schema.leases, rows, put=("granted", "returned"))

    def gateways(self) -> tuple[str, ...]:
        """All that have leases, dead ones too."""
        column = schema.leases.c.gateway
        with self._database.read() as connection:
            return tuple(connection.scalars(sa.select(column).where(column != NOBODY).distinct().order_by(column)))

    def over(self, gateway: str) -> None:
        """It is dead and all that it wrote is taken: of its leases stays what it has spent."""
        table = schema.leases
        with self._database.write() as connection:
            columns = (table.c.budget, table.c.spent)
            left = connection.execute(sa.select(*columns).where(table.c.gateway == gateway)).all()
            rows = [_row(Lease(budget, NOBODY, spent=spent)) for budget, spent in left]
            self._database.merge(connection, table, rows, add=("spent",))
            connection.execute(table.delete().where(table.c.gateway == gateway))

    def forget(self, before_wall_s: float) -> None:
        """Deletes what was spent in periods that ended before."""
        renews = schema.leases.c.renews_s
        with self._database.write() as connection:
            connection.execute(schema.leases.delete().where(renews > 0, renews < before_wall_s))


def spend(database: Database, connection: sa.Connection, gateway: str, usages: Iterable[Usage]) -> Mapping[str, int]:
    """Counts what these rows of a gateway say they paid as spent, in the transaction that adds them; how much, by
    budget."""
    paid: dict[str, int] = {}
    for usage in usages:
        for budget, _, cost in usage.paid:
            paid[text(budget)] = paid.get(text(budget), 0) + max(0, min(cost, MAX_CHARGE_NANOS))
    rows = [_row(Lease(budget, gateway, spent=amount)) for budget, amount in sorted(paid.items())]
    database.merge(connection, schema.leases, rows, add=("spent",))
    return paid


def _row(lease: Lease) -> dict[str, Any]:
    return {**lease._asdict(), "renews_s": renews_s(lease.budget) or 0.0}
