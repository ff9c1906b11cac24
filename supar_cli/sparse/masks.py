"""Masks and random streams: drawn from (seed, name) by a counter-based generator, the same on every rank and device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from supar_cli.planning.plan import Plan, PlanTensor

CHUNK_BYTES = 2**18  # chosen: packed bytes looked at at once; unpacked they and their positions take 2 to 18 MiB
ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)  # set bits of a byte


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights of a tensor live, one bit each in row-major order; `count` are live. Nobody writes to `bits`.

    Raises ValueError where `bits` are not those of `shape`: ceil(size / 8) bytes, as np.packbits makes them.
    """

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint8 or self.bits.shape != ((self.size + 7) // 8,):
            raise ValueError(
                f"{self.bits.shape} of {self.bits.dtype} are no packed bits of a mask of shape {self.shape}"
            )
        if self.size % 8 and self.bits[-1] & (0xFF >> self.size % 8):
            raise ValueError("the packed bits of a mask are not zero beyond its last weight")
        chunks = (self.bits[first : first + CHUNK_BYTES] for first in range(0, len(self.bits), CHUNK_BYTES))
        object.__setattr__(self, "count", sum(int(np.bincount(chunk, minlength=256) @ ONES) for chunk in chunks))

    @classmethod
    def of(cls, alive: NDArray[np.bool_]) -> Mask:
        """The mask of an array that is True where the weight lives."""
        return cls(alive.shape, np.packbits(alive))

    @property
    def size(self) -> int:
        """The number of weights, live and dead."""
        return prod(self.shape)

    def alive(self, rows: slice = slice(None)) -> NDArray[np.bool_]:
        """True where the weight lives: the whole array, or some rows (along the first axis) of it."""
        first, last, step = rows.indices(self.shape[0])
        width = prod(self.shape[1:])
        start, end = first * width, max(first, last) * width
        unpacked = np.unpackbits(self.bits[start // 8 : (end + 7) // 8])[start % 8 :][: end - start]
        return unpacked.view(np.bool_).reshape(-1, *self.shape[1:])[::step]

    def live(self, dtype: type[np.signedinteger] = np.int64) -> NDArray[np.signedinteger]:
        """Row-major positions of the live weights, ascending, (count,)."""
        found, filled = np.empty(self.count, dtype), 0
        for positions in self.live_chunks():
            found[filled : filled + len(positions)] = positions
            filled += len(positions)
        return found

    def live_chunks(self) -> Iterator[NDArray[np.int64]]:
        """`live`, some at a time, so that what is made of them need not be held beside them."""
        for first in range(0, len(self.bits), CHUNK_BYTES):
            unpacked = np.unpackbits(self.bits[first : first + CHUNK_BYTES]).view(np.bool_)
            yield np.flatnonzero(unpacked) + 8 * first

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the packed bits, first 16 hex digits."""
        return hashlib.sha256(self.bits.tobytes()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.bits, other.bits)

    def __hash__(self) -> int:
        return hash((self.shape, self.fingerprint))


def stream(seed: int, name: str, position: int = 0) -> np.random.Philox:
    """Philox generator keyed by (seed, name), at a position of its own. Salmon et al. 2011, "Random numbers: 1, 2, 3"."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, position], dtype=np.uint64))


def draw(row: PlanTensor, seed: int, pattern: str, block: int | None = None) -> Mask | None:
    """Mask (out, in) of one tensor. None where every weight lives."""
    return None if row.kept == row.size else Mask.of(_draw(row, seed, pattern, block))


def _draw(row: PlanTensor, seed: int, pattern: str, block: int | None) -> NDArray[np.bool_]:
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


def draw_all(plan: Plan) -> dict[str, Mask]:
    """Masks of all sparse tensors by name. Adding a layer changes no other mask."""
    sparsity = plan.sparsity
    drawn = {row.name: draw(row, plan.train.seed, sparsity.pattern, sparsity.block) for row in plan.tensors}
    return {name: mask for name, mask in drawn.items() if mask is not None}
