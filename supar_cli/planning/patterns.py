"""Patterns of masks: how many weights of a tensor each leaves alive at a density, and the density that then holds.

A pattern goes along the fan-in: it sees a tensor as a matrix (fan-out, fan-in), however its extents are stored.

To add one: its word in `Pattern`, its count in `live_count`, and whether rows are equal (`has_equal_rows`), here; which weights
live in `sparse.masks.select`, and how `draw` makes its keys, or its positions if it is in `DRAWN_LIVE`; the conditions on a mask
from a file in `sparse.mask_files`; `check_init`'s tolerance in `training.prepare`; its warnings in `advice`; the flags' help in
`cli.option_table`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal, get_args

from supar_cli.errors import InputError
from supar_cli.planning.schema import Section, Text

LARGEST_GROUP = 64  # chosen: hardware supports 2:4; measurements go up to 1:16 and 4:8

# N live of every M
GroupPattern = Annotated[
    str, Text(r"^[1-9][0-9]?:[1-9][0-9]?$", "N:M such as '2:4' (quoted: YAML 1.1 reads 2:4 as 124)")
]
Pattern = Literal["exact", "fixed_fan_in", "bernoulli", "block"] | GroupPattern
Block = Literal[16, 32, 64, 128]  # edges of blocks, as the block engine has them
# even: rows of blocks differ by at most one block; random: all blocks are drawn alike
BlockRows = Literal["random", "even"]
# positions: every position has its random number; live: only what lives is drawn, in a time that follows it
Draw = Literal["positions", "live"]
# patterns whose masks can be; groups and blocks are many times fewer
DRAWN_LIVE = ("exact", "fixed_fan_in", "bernoulli")


class PatternKeys(Section):
    """The keys `pattern` and `block` of a section. `block`, the edge of a block, is written with that pattern only."""

    def check(self) -> None:
        """Raise ValueError where the two contradict each other, or N:M has no such N."""
        pattern, block = vars(self)["pattern"], vars(self)["block"]
        if pattern == "block" and block is None:
            edges = ", ".join(map(str, get_args(Block)))
            raise ValueError(f"block: is missing; expected one of {edges} with the pattern block")
        if pattern != "block" and block is not None:
            raise ValueError(f"block: can't be combined with the pattern {pattern}; expected the pattern block")
        group = group_of(pattern)
        if group is not None and not group[0] < group[1] <= LARGEST_GROUP:
            raise ValueError(f"pattern: {pattern}; expected N:M with N < M <= {LARGEST_GROUP}")


@dataclass(frozen=True)
class LiveCount:
    """A tensor's own density, as it enters the rules, and its number of live weights."""

    density: float
    count: int


def group_of(pattern: str) -> tuple[int, int] | None:
    """(N, M) of a pattern N:M, None of any other."""
    live, colon, size = pattern.partition(":")
    return (int(live), int(size)) if colon else None


def density_of(pattern: str) -> Fraction | None:
    """The density that the pattern itself states, N/M; None where it allows any density."""
    group = group_of(pattern)
    return None if group is None else Fraction(*group)


def has_equal_rows(pattern: str) -> bool:
    """Whether every neuron has the same number of live weights, so that none has no input."""
    return pattern == "fixed_fan_in" or group_of(pattern) is not None


def describe(pattern: str, block: int | None) -> str:
    """The pattern in words."""
    return pattern if block is None else f"blocks of {block}"


def live_count(name: str, size: int, fan_in: int, density: Fraction, pattern: str, block: int | None) -> LiveCount:
    """How many of a tensor's `size` weights live, and their density, with whole weights per row or whole blocks.

    Raises InputError, naming the tensor, where its matrix (size / fan_in, fan_in) does not divide into the pattern's blocks or
    groups, where no block would live, and for a density that is not N:M's own.
    """
    rows, group = size // fan_in, group_of(pattern)
    if pattern == "block" and density < 1:
        assert block is not None
        if rows % block or fan_in % block:
            shape = f"the shape {rows}×{fan_in}"
            raise InputError(f"{name}: {block}×{block} blocks don't divide {shape}; expected an edge that does")
        count = size // block**2
        live = _round(density * count)
        if not live:
            what = f"density {float(density):g} keeps none of its {count} blocks"
            raise InputError(f"{name}: {what}; expected a smaller block or more width")
        return LiveCount(live / count, live * block**2)
    if group is not None and density < 1:
        live, length = group
        if fan_in % length:
            raise InputError(f"{name}: the fan-in {fan_in} is not a multiple of {length}; expected whole groups")
        if float(density) != live / length:  # a document's float may only be the nearest to N/M
            what = f"density {float(density):g} with the pattern {pattern}"
            raise InputError(f"{name}: {what}; expected {live}/{length}, or 1 for a dense tensor")
        return LiveCount(live / length, size // length * live)
    if pattern == "fixed_fan_in":
        # every row keeps the same whole number, so the density that holds is that number's share, not the nominal one
        per_row = _round(density * fan_in)
        return LiveCount(per_row / fan_in, per_row * rows)
    require_known(pattern)
    return LiveCount(float(density), _round(density * size))


def require_known(pattern: str) -> None:
    """Raise AssertionError for a pattern that the caller has no case for: it would be taken for `exact`."""
    if group_of(pattern) is None and pattern not in ("exact", "bernoulli", "fixed_fan_in", "block"):
        raise AssertionError(f"no case for the pattern {pattern}")


def _round(value: Fraction) -> int:
    """Nearest whole number, halves up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)
