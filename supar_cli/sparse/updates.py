"""Which weights of a tensor live on, and which grow, when its mask changes: what SET, RigL, GMP and top-k have in common.

Everything is a function of its arguments, on the device of its tensors, and equal keys go by position. So ranks with equal
weights select equal masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from supar_cli.sparse.masks import matrix_axes
from supar_cli.streams import stream


def keep_largest(
    weight: Tensor, kept: int, fan_in_axes: Sequence[int], min_per_neuron: int = 0, alive: Tensor | None = None
) -> Tensor:
    """True at the `kept` weights of largest magnitude, of those `alive` (by default all): a tensor of the weight's shape.

    Of every neuron (row of the matrix fan-out × fan-in) at least the `min_per_neuron` largest are kept, or as many as
    live. Raises ValueError where fewer than `kept` live, where the floors need more, and for a weight that is not a number.
    """
    keys = weight.detach().abs().float()
    if torch.isnan(keys).any():
        raise ValueError("a weight is not a number")
    if alive is not None:
        keys = keys.masked_fill(~alive, -1.0)  # below every magnitude
    if min_per_neuron:
        floor = _largest_of_neurons(keys, min_per_neuron, fan_in_axes) & (keys >= 0)
        if (least := int(floor.sum())) > kept:
            raise ValueError(f"{kept} live weights; {min_per_neuron} for each neuron need {least}")
        keys = keys.masked_fill(floor, torch.inf)
    found = _largest_of_rows(keys.reshape(1, -1), kept).reshape(weight.shape)
    if alive is not None and bool((found & ~alive).any()):
        raise ValueError(f"{kept} live weights; only {int(alive.sum())} live")
    return found


def grow_largest(
    scores: Tensor, alive: Tensor, count: int, fan_in_axes: Sequence[int], min_per_neuron: int = 0
) -> Tensor:
    """Row-major positions (count,) of the dead weights of largest score, such as the size of their gradient.

    Those that a neuron with less than `min_per_neuron` live weights lacks go first.
    """
    keys = scores.detach().abs().float().masked_fill(alive, -1.0)
    if min_per_neuron:
        floor = _largest_of_neurons(keys.masked_fill(alive, torch.inf), min_per_neuron, fan_in_axes)
        keys = keys.masked_fill(floor & ~alive, torch.inf)
    return _largest_of_rows(keys.reshape(1, -1), count).flatten().nonzero().flatten()


def random_scores(shape: Sequence[int], seed: int, name: str, step: int) -> Tensor:
    """Scores from 0 to 1 of 24 random bits each, a function of (seed, name, step)."""
    bits = stream(seed, f"grow:{name}:{step}").random_raw(prod(shape)) >> np.uint64(40)
    return torch.from_numpy((bits / 2**24).astype(np.float32).reshape(shape))


def _largest_of_neurons(keys: Tensor, count: int, fan_in_axes: Sequence[int]) -> Tensor:
    """True at the `count` largest keys of each neuron, a row of the matrix (fan-out, fan-in)."""
    order, extents = matrix_axes(keys.shape, fan_in_axes)
    found = _largest_of_rows(keys.permute(order).reshape(extents), count)
    return found.reshape([keys.shape[axis] for axis in order]).permute(torch.argsort(torch.tensor(order)).tolist())


def _largest_of_rows(keys_RC: Tensor, count: int) -> Tensor:
    """True at the `count` largest keys of each row (R, C); equal keys go by position."""
    columns = keys_RC.shape[1]
    if not 0 < count < columns:
        return torch.full_like(keys_RC, count > 0, dtype=torch.bool)
    limit_R1 = torch.kthvalue(keys_RC, columns - count + 1, dim=1, keepdim=True).values
    found_RC = keys_RC >= limit_R1
    if bool((found_RC.sum(1) > count).any()):
        at_limit_RC = keys_RC == limit_R1
        spare_R1 = count - (keys_RC > limit_R1).sum(1, keepdim=True)
        found_RC = (keys_RC > limit_R1) | (at_limit_RC & (at_limit_RC.cumsum(1) <= spare_R1))
    return found_RC
