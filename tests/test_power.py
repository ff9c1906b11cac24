"""Powers that are the same on every machine: against exact fractions, against integers of 300 bits, and as bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256
from math import exp, frexp, inf, log, nan, nextafter, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.planning.axes import Grid, axis_values
from supar_cli.planning.rules import power

from .test_rules_mutants import SOURCE, compiled

BITS = 300  # of the fixed-point numbers below
ONE = 1 << BITS
bases = st.floats(2.0**-40, 2.0**40)


def inverse_tanh_series(ratio: Fraction) -> int:
    """atanh of a ratio from 0 to 1/3, by its power series, in fixed point."""
    total, odd = 0, 1
    term, square = int(ratio * ONE), int(ratio * ratio * ONE)
    while term:
        total, odd, term = total + term // odd, odd + 2, term * square >> BITS
    return total


LOG_2 = 2 * inverse_tanh_series(Fraction(1, 3))


def by_series(base: float, exponent: float) -> float:
    """base^exponent by the power series of the logarithm and of the exponential; it shares nothing with `decimal`."""
    part, octaves = frexp(base)  # part is ½ or more, and below 1
    logarithm = octaves * LOG_2 - 2 * inverse_tanh_series((1 - Fraction(part)) / (1 + Fraction(part)))
    whole, rest = divmod(int(Fraction(exponent) * logarithm), LOG_2)
    total, term, k = 0, ONE, 0
    while term:
        total, k = total + term, k + 1
        term = (term * rest >> BITS) // k
    return float(Fraction(total, ONE) * Fraction(2) ** whole)


def is_nearest(found: float, base: float, exponent: Fraction) -> bool:
    """Whether no double is nearer to base^exponent, by exact fractions: both sides are raised to the exponent's denominator."""
    below, above = ((Fraction(found) + Fraction(nextafter(found, end))) / 2 for end in (0.0, inf))
    exact = Fraction(base) ** exponent.numerator
    return below**exponent.denominator <= exact <= above**exponent.denominator


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bases, st.integers(-20, 20), st.sampled_from([1, 2, 4, 8]))
def test_no_double_is_nearer(base: float, numerator: int, denominator: int) -> None:
    assert is_nearest(power(base, numerator / denominator), base, Fraction(numerator, denominator))


def test_the_comparison_sees_powers_off_by_one_in_the_last_digit() -> None:
    assert not is_nearest(nextafter(power(3.0, 0.125), inf), 3.0, Fraction(1, 8))
    halves = [(x / 7, k / 8) for x in range(1, 50) for k in range(-20, 20)]
    assert not all(is_nearest(exp(k * log(x)), x, Fraction(k)) for x, k in halves)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bases, st.floats(-20.0, 20.0))
def test_at_any_exponent_too(base: float, exponent: float) -> None:
    assert power(base, exponent) == by_series(base, exponent)


@settings(deadline=None, derandomize=True)
@given(bases)
def test_what_ieee_754_rounds_correctly_is_met_bit_for_bit(x: float) -> None:
    assert [power(x, k) for k in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [1 / x, 1.0, sqrt(x), x, x * x]


def test_powers_of_two_are_exact() -> None:
    assert all(power(2.0, k) == float(Fraction(2) ** k) for k in range(-1074, 1024))
    assert [power(4.0, 1.5), power(2.0**-6, 0.5), power(0.0625, -0.25), power(8.0, 1 / 3)] == [8.0, 0.125, 2.0, 2.0]


@settings(deadline=None, derandomize=True)
@given(bases, bases, st.floats(0.01, 20.0))
def test_it_rises_with_the_base_and_is_undone_by_the_inverse(one: float, other: float, exponent: float) -> None:
    low, high = sorted((one, other))
    assert power(low, exponent) <= power(high, exponent)
    assert power(high, -exponent) <= power(low, -exponent)
    # both exponents and the value between are rounded: the relative errors are 2^-53 each, times log(base) or 1/exponent
    allowed = 2.0**-52 * (2 + abs(log(one)) + 1 / exponent)
    assert power(power(one, exponent), 1 / exponent) == pytest.approx(one, rel=allowed)


@pytest.mark.parametrize("base", [0.0, -1.0, inf, nan])
def test_a_base_without_powers_is_refused(base: float) -> None:
    with pytest.raises(ValueError, match=r"expected a finite base above 0 and a finite exponent"):
        power(base, 0.5)


def test_what_no_double_holds_is_refused_or_zero() -> None:
    for exponent in (1024.0, 2000.0, 1024.5, 1e300):
        with pytest.raises(OverflowError, match=r"2\.0 to the power of .* is beyond the largest double"):
            power(2.0, exponent)
    assert [power(2.0, exponent) for exponent in (-1080.0, -2000.0, -1080.5, -1e300)] == [0.0] * 4
    for exponent in (inf, nan):
        with pytest.raises(ValueError):
            power(2.0, exponent)


FAULTS = [
    ("prec=50", "prec=16"),
    ("return sqrt(base)", "return base"),
    ("Fraction(base) ** int(exponent)", "Fraction(base) ** abs(int(exponent))"),
    ("float(exact) if exact", "float(exact * Fraction(1.0000000000000002)) if exact"),
    ("float(_DECIMAL.power(Decimal(base), Decimal(exponent)))", "float(_DECIMAL.exp(Decimal(log(base) * exponent)))"),
]


def is_right(function: Callable[[float, float], float]) -> bool:
    tried = [(x / 7, k) for x in range(1, 200) for k in range(-20, 21)]
    return all(is_nearest(function(x, k / 8), x, Fraction(k, 8)) for x, k in tried)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[1])
def test_a_planted_fault_is_found(fault: tuple[str, str]) -> None:
    assert SOURCE.count(fault[0]) == 1 and is_right(power)
    planted = compiled(SOURCE.replace(*fault))
    vars(planted)["log"] = log
    assert not is_right(planted.power)


def digest(values: list[float]) -> str:
    return sha256(struct.pack(f"<{len(values)}d", *values)).hexdigest()[:16]


def test_grids_have_the_bytes_they_always_had() -> None:
    """A study's folder knows its runs by their numbers: other bytes would make every run again. measured: glibc 2.36's `pow`
    gives the same for all of these."""
    eighths = [axis_values("lr", f"log2:{low}..{low + 20}/0.125") for low in (-30, -10, 10)]
    assert digest([value for values in eighths for value in values]) == "fda7a8fd87a0e211"
    grids = [Grid(axis_values("lr", f"x:-3..3/{step}", 0.0111583)) for step in ("0.5", "1", "0.25")]
    grids += [Grid((1e-4, 3e-4, 1e-3, 3e-3, 1e-2)), Grid((0.02,))]
    assert digest([grid.value(place / 4) for grid in grids for place in range(-24, 60)]) == "92cb7c5cc60b6901"
