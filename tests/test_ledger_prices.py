"""Money is integers: prices as they were written, charges rounded once, shares that sum to the whole."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neaptide.config import Price
from neaptide.cost.meter import allocate, charge
from neaptide.cost.prices import NO_PRICES, PriceBook, PriceList, Rate, rates
from neaptide.cost.rate import CHARGED, MAX_CHARGE_NANOS
from neaptide.errors import ConfigError
from neaptide.types import Usage

TOKENS = st.integers(0, 10**7)
NANOS = st.integers(0, 10**12)


@pytest.mark.parametrize(
    ("written", "nanos"), [(0.1, 100_000_000), (0.002, 2_000_000), (15, 15_000_000_000), (1e-9, 1), (0.14, 140_000_000)]
)
def test_a_price_is_what_was_written_not_the_float_next_to_it(written: float, nanos: int) -> None:
    assert rates({"m": Price(prompt=written)})["m"] == Rate(nanos, nanos, 0)


def test_cached_tokens_cost_what_prompt_tokens_do_unless_said_otherwise() -> None:
    assert rates({"m": Price(prompt=1, output=2)})["m"].cached_nanos == 10**9
    assert rates({"m": Price(prompt=1, cached=0, output=2)})["m"].cached_nanos == 0


@pytest.mark.parametrize("value", [-1.0, 1e-10, 0.1234567891, float("nan"), float("inf"), 1e7])
def test_what_is_no_price_is_refused_by_name(value: float) -> None:
    with pytest.raises(ConfigError, match=r"prices\.m\.output"):
        rates({"m": Price(output=value)})


@given(st.decimals(0, 10**6, places=9))
def test_every_decimal_that_fits_is_exact(value: Decimal) -> None:
    if float(value) and Decimal(repr(float(value))) == value:
        assert rates({"m": Price(prompt=float(value))})["m"].prompt_nanos == int(value * 10**9)


@given(TOKENS, TOKENS, TOKENS, NANOS, NANOS, NANOS)
def test_a_charge_is_the_exact_sum_rounded_once(prompt: int, cached: int, output: int, p: int, c: int, o: int) -> None:
    usage = Usage(request_id="r", model="m", prompt_tokens=prompt, cached_tokens=cached, output_tokens=output)
    charged = charge(usage, PriceList(1, 0.0, "CNY", {"m": Rate(p, c, o)}))
    within = min(cached, prompt)
    exact = Fraction((prompt - within) * p + within * c + output * o, 10**6)
    assert charged is not None
    assert charged.amount_nanos == min(round(exact), MAX_CHARGE_NANOS)  # Fraction rounds half to even
    assert charged.basis == "list"


@given(TOKENS, NANOS, st.integers(0, 1000))
def test_an_answer_told_again_costs_its_share_of_the_list_price(output: int, nanos: int, millis: int) -> None:
    usage = Usage(request_id="r", model="m", output_tokens=output, cache="hit", price_millis=millis)
    charged = charge(usage, PriceList(1, 0.0, "CNY", {"m": Rate(0, 0, nanos)}))
    assert charged is not None
    assert charged.amount_nanos == min(round(Fraction(output * nanos * millis, 10**9)), MAX_CHARGE_NANOS)


def test_what_failed_is_not_charged_and_what_has_no_price_neither() -> None:
    prices = PriceList(1, 0.0, "CNY", {"m": Rate(10**9, 10**9, 10**9)})
    for outcome in ("ok", "refused", "error", "aborted", "timeout", "lost"):
        usage = Usage(request_id="r", model="m", output_tokens=10, outcome=outcome)
        assert (charge(usage, prices) is not None) == (outcome in CHARGED)
    assert charge(Usage(request_id="r", model="other"), prices) is None


@given(st.integers(0, 10**18), st.lists(st.integers(0, 10**12), min_size=1, max_size=40).filter(any))
def test_shares_sum_exactly_and_none_is_a_unit_off(amount: int, weights: list[int]) -> None:
    shares = allocate(amount, weights)
    total = sum(weights)
    assert sum(shares) == amount
    assert all(abs(Fraction(amount * w, total) - s) < 1 for w, s in zip(weights, shares))
    assert all(s == 0 for w, s in zip(weights, shares) if w == 0)


def test_equal_weights_give_the_remainder_to_the_first() -> None:
    assert allocate(5, [1, 1, 1]) == [2, 2, 1]
    assert allocate(0, [3, 4]) == [0, 0]


@pytest.mark.parametrize(("amount", "weights"), [(-1, [1]), (1, []), (1, [0, 0]), (1, [2, -1])])
def test_what_cannot_be_shared_is_refused(amount: int, weights: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        allocate(amount, weights)


def test_the_price_list_in_force_is_the_newest_that_had_begun() -> None:
    lists = [PriceList(v, since, "CNY", {}) for v, since in ((1, 0.0), (2, 100.0), (3, 200.0))]
    book = PriceBook(lists)
    assert [book.at(s).version for s in (-5.0, 0.0, 99.9, 100.0, 1e12)] == [0, 1, 1, 2, 3]
    assert book.latest.version == 3
    assert PriceBook(()).at(5.0) is NO_PRICES
