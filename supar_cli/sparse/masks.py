"""Masks and random streams: drawn from (seed, name) by a counter-based generator, the same on every rank and device."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from supar_cli.planning.plan import Plan, PlanTensor


def stream(seed: int, name: str, position: int = 0) -> np.random.Philox:
    """Philox generator keyed by (seed, name), at a position of its own. Salmon et al. 2011, "Random numbers: 1, 2, 3"."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, position], dtype=np.uint64))


def draw(row: PlanTensor, seed: int, pattern: str, block: int | None = None) -> NDArray[np.bool_] | None:
    """Mask of one tensor, shape (out, in), True where the weight lives. None where every weight lives."""
    if row.kept == row.size:
        return None
    rows, columns = row.shape
    if pattern == "block":
        assert block is not None
        count = row.size // block**2
        keys = stream(seed, f"mask:{row.name}").random_raw(count)
        alive = _smallest(keys.reshape(1, -1), row.kept // block**2).reshape(rows // block, columns // block)
        return alive.repeat(block, axis=0).repeat(block, axis=1)
    keys = stream(seed, f"mask:{row.name}").random_raw(row.size)
    if pattern == "bernoulli":
        density = Fraction(row.density)
        return (keys < np.uint64(density.numerator * 2**64 // density.denominator)).reshape(rows, columns)
    if pattern == "fixed_fan_in":
        return _smallest(keys.reshape(rows, columns), row.kept // rows)
    return _smallest(keys.reshape(1, -1), row.kept).reshape(rows, columns)


def _smallest(keys: NDArray[np.uint64], count: int) -> NDArray[np.bool_]:
    """True at the `count` smallest keys of each row; equal keys go by position, so that no sort order shows."""
    limit = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    mask: NDArray[np.bool_] = keys <= limit
    for row in np.flatnonzero(mask.sum(axis=1) > count):
        ties = np.flatnonzero(keys[row] == limit[row])
        mask[row, ties[count - mask[row].sum() :]] = False
    return mask


def draw_all(plan: Plan) -> dict[str, NDArray[np.bool_]]:
    """Masks of all sparse tensors by name. Adding a layer changes no other mask."""
    sparsity = plan.sparsity
    drawn = {row.name: draw(row, plan.train.seed, sparsity.pattern, sparsity.block) for row in plan.tensors}
    return {name: mask for name, mask in drawn.items() if mask is not None}


def fingerprint(mask: NDArray[np.bool_]) -> str:
    """SHA-256 of a mask's packed bits, first 16 hex digits."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]
