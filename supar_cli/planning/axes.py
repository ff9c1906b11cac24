"""The axes of a sweep: values as ranges or lists, and their places on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

from supar_cli.planning import density as shares
from supar_cli.planning import rules

SHARES = ("sparsity", "density")
LEVELS = (*SHARES, "width", "layers")
MAX_VALUES = 200  # chosen: a grid with more values is probably a typing error

GRAMMAR = "log2:-12..-4/0.5, x:-3..3/1 (the proxy's value times 2^k) or a list such as 0.001,0.002"
LISTS = {
    "sparsity": "a list of numbers 0 <= sparsity < 1 such as 0,0.75,0.9375",
    "density": "a list of numbers 0 < density <= 1 such as 1,0.25,0.0625",
    "width": "a list of whole numbers above 0 such as 256,512,1024",
    "layers": "a list of whole numbers above 0 such as 2,4,8",
}


def axis_values(name: str, given: Any, centre: float | None = 1.0) -> tuple[float, ...]:
    """The values of an axis in rising order, from a list or a text as in GRAMMAR. Raises ValueError that begins with the key."""
    try:
        return tuple(sorted(_values(name, given, centre)))
    except ValueError as error:
        raise ValueError(f"over.{name}: {given!r}: {error}; expected {LISTS.get(name, GRAMMAR)}") from None


def _values(name: str, given: Any, centre: float | None) -> list[float]:
    if isinstance(given, bool) or not isinstance(given, str | list | int | float):
        raise ValueError("not an axis")
    if isinstance(given, str) and ":" in given:
        if name in LEVELS:
            raise ValueError("a range in octaves")
        values = _octaves(given, centre)
    else:
        values = [shares.number(part) for part in parts_of(given)]
    if not 1 <= len(values) == len(set(values)) <= MAX_VALUES:
        raise ValueError(f"not 1 to {MAX_VALUES} different values")
    for value in values:
        is_valid = {"sparsity": 0 <= value < 1, "density": 0 < value <= 1}.get(name, value > 0)
        if not is_valid or (name in ("width", "layers") and value != int(value)):
            raise ValueError(f"{value:g} is not a valid {name.replace('_', ' ')}")
    return values


def parts_of(given: Any) -> list[str]:
    """The texts of an axis that is a list of values."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    return [str(part).strip() for part in parts]


def _octaves(text: str, centre: float | None) -> list[float]:
    """The values of SCALE:LOW..HIGH/STEP, or without a step in whole octaves."""
    scale, span = (part.strip() for part in text.split(":", 1))
    ends, slash, step_text = span.partition("/")
    low, high, step = (shares.number(part) for part in (*ends.partition("..")[::2], step_text if slash else "1"))
    if scale not in ("log2", "x"):
        raise ValueError(f"{scale!r} is not a scale (log2 or x)")
    if not (0 < step <= 100 and -100 <= low <= high <= 100) or (high - low) / step > MAX_VALUES:
        raise ValueError(f"not a range LOW..HIGH/STEP of at most {MAX_VALUES} values")
    if scale == "x" and centre is None:
        raise ValueError("the proxy's value, which x: multiplies, is null")
    count = int((high - low) / step + 1e-9) + 1
    return [(centre or 1.0 if scale == "x" else 1.0) * rules.power(2.0, low + i * step) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Grid:
    """Values of the tuned hyperparameter by index: 0, 1, … are those of the axis, others lie beyond or between them."""

    values: tuple[float, ...]

    def value(self, index: float) -> float:
        """The value at an index, in equal steps of its logarithm; beyond the ends in steps as the last ones there."""
        last = len(self.values) - 1
        if index == int(index) and 0 <= index <= last:
            return self.values[int(index)]
        start = min(max(int(index // 1), 0), max(last - 1, 0))
        step = self.values[start + 1] / self.values[start] if last else 2.0
        return self.values[start] * rules.power(step, index - start)

    def octaves(self, index: float) -> float:
        return log2(self.value(index))
