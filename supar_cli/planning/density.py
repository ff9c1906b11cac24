"""Densities and sparsities as they are written, in exact arithmetic."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from fractions import Fraction

LARGEST_EXPONENT = 400  # chosen: beyond what a double holds; the exact value of more would take memory without end
Share = float | str  # a density or a sparsity: a number, or a fraction such as "1/3", which no float holds


def literal(value: Share | int) -> Fraction:
    """The exact value of a number as written: 0.992, 99.2% or 1/128; a float counts as its shortest text. ValueError."""
    text = value.strip() if isinstance(value, str) else repr(value)
    parts = text.removesuffix("%").split("/", 1)
    try:
        numbers = [Decimal(part.strip()) for part in parts]
    except InvalidOperation:
        raise ValueError(f"{value!r} is not a number") from None
    if not all(number.is_finite() and abs(number.adjusted()) < LARGEST_EXPONENT for number in numbers):
        raise ValueError(f"{value!r} is not finite")
    if len(numbers) == 2 and not numbers[1]:
        raise ValueError(f"{value!r} divides by zero")
    return Fraction(numbers[0]) / (Fraction(numbers[1]) if len(numbers) == 2 else 1) / (100 if text[-1:] == "%" else 1)


def share(text: str) -> Share:
    """A share as documents keep it: a number or a percentage as a float, a fraction such as 1/3 as written. ValueError."""
    exact = literal(text)
    return text.strip() if "/" in text else float(exact)


def density_from(word: str, value: Share, where: str = "") -> Fraction:
    """The exact density of a `sparsity` or a `density` as written. Raises ValueError outside [0, 1) or (0, 1].

    `where` is the value's place in a document if that is not the word.
    """
    try:
        given = literal(value)
    except ValueError as error:
        raise ValueError(f"{where or word}: {error}; expected a number such as 0.992, 99.2% or 1/128") from None
    density = 1 - given if word == "sparsity" else given
    if not 0 < density <= 1:
        allowed = "0 <= sparsity < 1" if word == "sparsity" else "0 < density <= 1"
        percent = f"; did you mean {float(given / 100):g}?" if 1 < given < 100 and "/" not in str(value) else ""
        what = " leaves no weights" if density == 0 else ""
        raise ValueError(f"{where or word}: {value}{what}; expected {allowed}{percent}")
    return density


def number(text: str) -> float:
    """A number written as 0.0078125 or as 1/128. Raises ValueError."""
    return float(literal(text))
