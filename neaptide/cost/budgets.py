"""Budgets: whose they are, what they hold, and the names they have from period to period. Pure.

A budget's id says whose and what it is; its name says the period too, so that a new period is another budget and
nothing has to be set back while requests run:

    id    tenant:acme:money:month          key:key_1f:tokens:day          all:money:total
    name  tenant:acme:money:2026-11        key:key_1f:tokens:2026-11-22   all:money:total

A scope may hold colons; unit, period and stamp do not. Periods begin at midnight UTC.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

import msgspec

from neaptide.errors import RequestError

Unit = Literal["money", "tokens"]
Period = Literal["day", "month", "total"]
KINDS = ("key", "project", "tenant")  # and `all`
SCOPE_BYTES = 80  # a journal's record holds every name that its request was paid from, and the record is bounded
A_SCOPE = 2  # budgets of one scope: a key is under at most four scopes
MAX_AMOUNT = 10**18  # nano-units or tokens: the sums stay in int64
_STAMP = re.compile(r"(\d{4})-(\d\d)(?:-(\d\d))?")


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """`amount` in nano-units or tokens, each period; `strict`: requests reserve all of the max_tokens they ask for."""

    scope: str  # key:ID | project:TENANT/NAME | tenant:NAME | all
    unit: Unit
    period: Period
    amount: int
    strict: bool = False

    @property
    def id(self) -> str:
        return f"{self.scope}:{self.unit}:{self.period}"

    def name(self, wall_s: float) -> str:
        """Of the period that `wall_s` is in."""
        return f"{self.scope}:{self.unit}:{_stamp(self.period, wall_s)}"


class Terms(NamedTuple):
    """Of one key: the budgets it is paid from, by their names now."""

    budgets: tuple[str, ...]
    strict: bool


NONE = Terms((), False)


def check(budget: Budget) -> None:
    """RequestError 400 for what cannot be one."""
    kind, _, name = budget.scope.partition(":")
    tenant, _, project = name.partition("/")
    whole = budget.scope == "all" or (kind in KINDS and name and (kind != "project" or (tenant and project)))
    if not whole or not budget.scope.isprintable() or len(msgspec.json.encode(budget.scope)) > SCOPE_BYTES + 2:
        raise RequestError(
            400,
            f"{budget.scope[:SCOPE_BYTES]!r} is not the scope of a budget.",
            param="scope",
            fix=f"Write key:ID, project:TENANT/NAME, tenant:NAME or all, in at most {SCOPE_BYTES} bytes.",
        )
    if budget.unit not in get_args(Unit) or budget.period not in get_args(Period):
        raise RequestError(
            400,
            f"{budget.unit} a {budget.period} is no budget.",
            param="period",
            fix="Units are money and tokens; periods are day, month and total.",
        )
    if not 0 <= budget.amount <= MAX_AMOUNT:
        raise RequestError(400, "A budget is from 0 to 10^9 of the currency, or 10^18 tokens.", param="amount")


def unit_of(name: str) -> str:
    """Of a name or an id."""
    return name.rsplit(":", 2)[1]


def renews_s(name: str) -> float | None:
    """When the period of a name ends, wall seconds; None: never, or a name that is none of ours."""
    found = _STAMP.fullmatch(name.rpartition(":")[2])
    if found is None:
        return None
    year, month, day = found.groups()
    try:
        first = datetime.datetime(int(year), int(month), int(day or 1), tzinfo=datetime.UTC)
        next_month = (first + datetime.timedelta(days=32)).replace(day=1)
        return (first + datetime.timedelta(days=1) if day else next_month).timestamp()
    except (ValueError, OverflowError):
        return None


def by_scope(budgets: Iterable[Budget], wall_s: float) -> dict[str, Terms]:
    """The names in force of each scope that has any."""
    found: dict[str, Terms] = {}
    for budget in budgets:
        names, strict = found.get(budget.scope, NONE)
        found[budget.scope] = Terms((*names, budget.name(wall_s)), strict or budget.strict)
    return found


def terms(scopes: Mapping[str, Terms], key: str, tenant: str, project: str) -> Terms:
    """Of a key; one strict budget makes it reserve all for every one."""
    mine = [
        found
        for scope in (f"key:{key}", f"project:{tenant}/{project}", f"tenant:{tenant}", "all")
        if (found := scopes.get(scope)) is not None
    ]
    if not mine:
        return NONE
    return Terms(tuple(name for found in mine for name in found.budgets), any(found.strict for found in mine))


def _stamp(period: Period, wall_s: float) -> str:
    if period == "total":
        return period
    day = datetime.datetime.fromtimestamp(wall_s, datetime.UTC).date()
    return day.isoformat() if period == "day" else day.isoformat()[:7]
