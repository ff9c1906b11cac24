"""What a constructor gave a parameter: its mean and spread, and whether one normal distribution is the whole truth."""

from __future__ import annotations

from torch import Tensor

from supar_cli.planning.layout_document import Own
from supar_cli.planning.rules import Role

FEWEST_VALUES = 3  # chosen: in a matrix too small for slices; no draw has so few different ones, an identity has two
FEWEST = 8  # chosen: slices, and values in each, below which their sizes say nothing
# chosen: slices of equal size have a spread of sizes near 1 of that of independent values, with a standard error of
# √(2 / slices); orthogonal rows have 1e-12, a fused matrix with parts of std 1 and 2 has hundreds
LEAST_SPREAD, ERRORS = 0.01, 10.0
MEAN_ERRORS, MEAN_SHARE = 6.0, 0.1  # chosen: a mean that is no accident, and that matters


def measure(values: Tensor) -> Own:
    """Mean and standard deviation."""
    values = values.detach().double()
    return Own(mean=float(values.mean()), std=float(values.std(correction=0)))


def keeps_own(values: Tensor, role: Role, is_table: bool) -> bool:
    """Whether the constructor's own values say more than a mean and a standard deviation do.

    Gains and biases that are not constant; weights whose rows or parts differ in size, or are equal as those of an
    orthogonal matrix; weights around another mean; small matrices of two or three values, as an identity. An empty row
    of a table (its padding) is no structure.
    """
    values = values.detach().double()
    if role in ("norm", "bias"):
        return bool((values != values.flatten()[0]).any())
    if is_table and len(values.shape) == 2:
        values = values[(values != 0).any(1)]
    if values.numel() < FEWEST or bool((values == values.flatten()[0]).all()):
        return False
    if values.numel() < FEWEST**2 and len(set(values.flatten().tolist())) <= FEWEST_VALUES:
        return True
    mean, std = values.mean(), values.std(correction=0)
    if abs(mean) > max(MEAN_ERRORS * std / values.numel() ** 0.5, MEAN_SHARE * std):
        return True
    steps = values.flatten().diff()
    if bool((steps >= 0).all()) or bool((steps <= 0).all()):
        return True
    return any(_has_odd_slices(values.movedim(axis, 0)) for axis in range(len(values.shape)))


def _has_odd_slices(values: Tensor) -> bool:
    """Whether slices differ in size by more, or by less, than those of independent values would."""
    squares = values.reshape(values.shape[0], -1).square()
    slices, size = squares.shape
    if slices < 2 or size < FEWEST:
        return False
    expected = squares.var() / size  # of a slice's mean square, if all values were independent
    spread = float(squares.mean(1).var() / expected) if expected > 0 else 0.0
    return spread > 1 + ERRORS * (2 / (slices - 1)) ** 0.5 or (slices >= FEWEST and spread < LEAST_SPREAD)
