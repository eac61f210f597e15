"""What a model's tokens cost, in versions: a changed price is a new version, and what was charged stays as it was.

A price is a decimal per 10^6 tokens, kept as an integer of nano-units (1e-9 of the currency), so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

from neaptide.config import Price
from neaptide.errors import ConfigError
from neaptide.types import Rate

NANOS = 10**9
MAX_NANOS = 10**15  # a million of the currency per 10^6 tokens

__all__ = ["NO_PRICES", "PriceBook", "PriceList", "Rate", "nanos", "rates"]


class PriceList(NamedTuple):
    """One version: in force for requests that start from `since_s` (wall clock) on. Models not named cost nothing."""

    version: int
    since_s: float
    currency: str
    rates: dict[str, Rate]


NO_PRICES = PriceList(0, 0.0, "", {})


class PriceBook:
    """All versions. Which one applies depends on a request's row alone, so reading a journal again charges the
    same."""

    def __init__(self, lists: Sequence[PriceList]) -> None:
        self._newest_first = sorted(lists, key=lambda p: p.version, reverse=True)

    @property
    def latest(self) -> PriceList:
        return self._newest_first[0] if self._newest_first else NO_PRICES

    def of(self, version: int, wall_s: float) -> PriceList:
        """The list of that version; the one in force at that time where the version is 0, or not known."""
        if version:
            for prices in self._newest_first:
                if prices.version == version:
                    return prices
        return self.at(wall_s)

    def at(self, wall_s: float) -> PriceList:
        """The list in force at that time; NO_PRICES before the first."""
        for prices in self._newest_first:
            if prices.since_s <= wall_s:
                return prices
        return NO_PRICES


def rates(prices: Mapping[str, Price]) -> dict[str, Rate]:
    """The config's prices as exact integers. ConfigError for what is negative, too fine or too large."""
    return {model: _rate(model, price) for model, price in prices.items()}


def _rate(model: str, price: Price) -> Rate:
    cached = price.prompt if price.cached is None else price.cached
    return Rate(
        _nanos(price.prompt, f"prices.{model}.prompt"),
        _nanos(cached, f"prices.{model}.cached"),
        _nanos(price.output, f"prices.{model}.output"),
    )


def nanos(value: float | str) -> int | None:
    """Exactly, in nano-units; None for what is negative, finer than that, or no number. `repr` of a float is the
    decimal that was written in the file; the float itself is only near it."""
    try:
        exact = Decimal(value if isinstance(value, str) else repr(value)) * NANOS
    except InvalidOperation:
        return None
    return int(exact) if exact.is_finite() and exact >= 0 and exact == exact.to_integral_value() else None


def _nanos(value: float | str, key: str) -> int:
    exact = nanos(value)
    if exact is None or exact > MAX_NANOS:
        raise ConfigError(
            f"{key}: {value} is not a price",
            why="per 10^6 tokens, from 0 to 10^6, with at most nine decimals",
            fix=f"write it as {key}: 0.5",
            code="E109",
        )
    return exact
