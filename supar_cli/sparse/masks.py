"""Masks: which weights of a tensor live, packed; drawn (`draw`) or chosen by keys (`select`); values carried over.

A pattern goes along the fan-in. It sees a tensor as its matrix (fan-out, fan-in), whichever way the extents are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from math import gcd, isqrt, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.planning.patterns import Draw, group_of, require_known
from supar_cli.sparse.packed_bits import CHUNK_BYTES, count_ones, positions_of_ones, set_ones
from supar_cli.sparse.random_positions import random_count, random_positions
from supar_cli.streams import stream

CHUNK_KEYS = 2**17  # measured: keys drawn and compared at a time; 1 MiB stays in a core's cache


@dataclass(frozen=True, eq=False)
class Mask:
    """Which weights of a tensor live, one bit each in row-major order; `count` are live. `bits` is read-only.

    Raises ValueError where `bits` are not those of `shape`: ceil(size / 8) bytes, as np.packbits makes them.
    """

    shape: tuple[int, ...]
    bits: NDArray[np.uint8]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        if self.bits.dtype != np.uint8 or self.bits.shape != ((self.size + 7) // 8,):
            raise ValueError(f"{self.bits.shape} of {self.bits.dtype} are not the packed bits of shape {self.shape}")
        if self.size % 8 and self.bits[-1] & (0xFF >> self.size % 8):
            raise ValueError("the packed bits of a mask are not zero beyond its last weight")
        object.__setattr__(self, "count", count_ones(self.bits))

    @classmethod
    def of(cls, alive: NDArray[np.bool_]) -> Mask:
        """The mask of an array that is True where the weight lives."""
        return cls.of_parts(alive.shape, [alive])

    @classmethod
    def of_parts(cls, shape: Sequence[int], parts: Iterable[NDArray[np.bool_ | np.uint8]]) -> Mask:
        """The mask of an array given some rows at a time, those of `row_parts`, so that it is never held whole."""
        return cls(tuple(shape), np.concatenate([np.zeros(0, np.uint8), *map(np.packbits, parts)]))

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
        return positions_of_ones(self.bits, self.count, dtype)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the packed bits, first 16 hex digits."""
        return hashlib.sha256(self.bits.data).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self is other or (self.shape == other.shape and np.array_equal(self.bits, other.bits))

    def __hash__(self) -> int:
        return hash((self.shape, self.fingerprint))


def row_step(shape: Sequence[int]) -> int:
    """The number of rows (first axis) that hold about CHUNK_KEYS weights and fill whole packed bytes."""
    width = max(1, prod(shape[1:]))
    unit = 8 // gcd(width, 8)
    return max(unit, CHUNK_KEYS // width // unit * unit)


def row_parts(shape: Sequence[int]) -> Iterator[slice]:
    """All rows, `row_step` at a time."""
    step = row_step(shape)
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


class RandomKeys:
    """Keys of 64 random bits for a matrix (rows, columns), drawn anew at each pass over them and never held whole."""

    def __init__(self, seed: int, name: str, shape: tuple[int, int]) -> None:
        self.shape, self.size, self._seed, self._name = shape, prod(shape), seed, name

    def chunks(self, length: int) -> Iterator[NDArray[np.uint64]]:
        """The keys in row-major order, `length` at a time."""
        source = stream(self._seed, self._name)
        for first in range(0, self.size, length):
            yield source.random_raw(min(length, self.size - first))


Keys = NDArray[Any] | RandomKeys


def select(
    pattern: str,
    keys: Keys,
    kept: int,
    *,
    block: int | None = None,
    density: float | None = None,
    even_rows: bool = False,
) -> Mask:
    """The mask (fan-out, fan-in) of the `kept` weights whose keys are smallest under a pattern; equal keys go by position.

    Random keys draw a mask, −|w| prunes by magnitude, −|gradient| says what to grow. `keys` are one a weight, (fan-out,
    fan-in), or for blocks one a block, (fan-out / block, fan-in / block); with `even_rows` the rows of blocks have as many,
    or one more where the next smallest key is smallest. Under `bernoulli` with a `density` each weight
    lives for itself, where its key of 64 random bits is below density · 2⁶⁴; without one it is `exact`. Raises ValueError
    where `kept` does not fit the pattern, and for a key that is not a number.
    """
    if not isinstance(keys, RandomKeys) and np.isnan(keys).any():
        raise ValueError("a key is not a number")
    rows, columns = keys.shape
    if pattern == "block":
        assert block is not None
        if kept % block**2:
            raise ValueError(f"{kept} live weights; expected a multiple of {block}×{block}")
        return _expand((_select_even if even_rows else partial(select, "exact"))(keys, kept // block**2), block)
    if pattern == "bernoulli" and density is not None:
        limit = np.uint64(int(Fraction(density) * 2**64))
        return _by_rows(keys, lambda chunk: chunk < limit)
    group = (kept // rows, columns) if pattern == "fixed_fan_in" else group_of(pattern)
    _require_fit(pattern, keys.shape, kept, group)
    if group is not None:
        live, length = group
        return _by_rows(keys, lambda chunk: _smallest(chunk.reshape(-1, length), live).reshape(chunk.shape))
    require_known(pattern)
    if isinstance(keys, RandomKeys):
        return _smallest_random(keys, kept)
    return Mask.of(_smallest(keys.reshape(1, -1), kept).reshape(keys.shape))


def _require_fit(pattern: str, shape: tuple[int, int], kept: int, group: tuple[int, int] | None) -> None:
    """Raise ValueError unless a matrix has so many weights, and each of its rows whole groups of so many live ones."""
    size, columns = prod(shape), shape[1]
    if not 0 <= kept <= size:
        raise ValueError(f"{kept} live weights; expected 0 to {size}")
    if group is not None and (kept * group[1] != size * group[0] or columns % group[1]):
        raise ValueError(f"{kept} of {shape[0]}×{columns} weights are not {pattern} along the rows")


def _select_even(keys: Keys, kept: int) -> Mask:
    """The mask of `kept` smallest keys, as many in each row; what is left over goes to rows whose next key is smallest.

    Of random keys that is a random choice of rows.
    """
    rows, columns = keys.shape
    if not 0 <= kept <= rows * columns:
        raise ValueError(f"{kept} live blocks; expected 0 to {rows * columns}")
    if isinstance(keys, RandomKeys):
        keys = np.concatenate([*keys.chunks(CHUNK_KEYS)]).reshape(keys.shape)
    each, left = divmod(kept, rows)
    alive = _smallest(keys, each)
    if left:
        more = _smallest(keys, each + 1)
        chosen = _smallest(keys[more & ~alive].reshape(1, -1), left)[0]
        alive[chosen] = more[chosen]
    return Mask.of(alive)


def _expand(blocks: Mask, edge: int) -> Mask:
    """The mask of weights from the mask of blocks."""
    rows, columns = blocks.shape
    alive = np.where(blocks.alive(), np.uint8(0xFF), np.uint8(0)).repeat(edge // 8, axis=1).repeat(edge, axis=0)
    return Mask((rows * edge, columns * edge), alive.reshape(-1))


def _by_rows(keys: Keys, alive_of: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> Mask:
    """The mask that `alive_of` gives for some rows of keys at a time."""
    columns, step = keys.shape[1], row_step(keys.shape)
    if isinstance(keys, RandomKeys):
        keys_of_rows: Iterable[NDArray[Any]] = keys.chunks(step * columns)
    else:
        keys_of_rows = (keys[part] for part in row_parts(keys.shape))
    return Mask.of_parts(keys.shape, (alive_of(part.reshape(-1, columns)) for part in keys_of_rows))


def _smallest(keys: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """True at the `count` smallest keys of each row; equal keys go by position, so that no sort order shows."""
    if count in (0, keys.shape[1]):
        return np.full(keys.shape, count > 0)
    limit = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    mask: NDArray[np.bool_] = keys <= limit
    tied = np.flatnonzero(np.count_nonzero(mask, axis=1) > count)
    if len(keys) == 1 and len(tied):  # one row may be a whole matrix, too large for a running count at every key
        ties = np.flatnonzero(keys == limit)
        mask[0, ties[count - np.count_nonzero(mask) :]] = False
    elif len(tied):  # all rows at once: pruned weights, all 0, tie in every one
        at_limit, below = keys[tied] == limit[tied], keys[tied] < limit[tied]
        spare = count - np.count_nonzero(below, axis=1, keepdims=True)
        mask[tied] = below | (at_limit & (np.cumsum(at_limit, axis=1) <= spare))
    return mask


def _smallest_random(keys: RandomKeys, count: int, deviations: int = 8) -> Mask:
    """`_smallest` over the whole matrix, in one pass and in memory for the packed bits and a few keys.

    How many of `size` random keys are below a bound is known within a few standard deviations: what is below the lower of
    two bounds lives, and only the keys between them are kept to choose from. If the bounds fail, it is
    repeated with wider ones, finally with those of all keys.
    """
    size = keys.size
    spread = deviations * (isqrt(count * (size - count) // size) + 1) + 16  # 8 deviations fail once in 10^15
    low, high = (min(max(0, (count + by) * 2**64 // size), 2**64) for by in (-spread, spread))
    first, below = 0, 0
    bits: list[NDArray[np.uint8]] = []
    positions: list[NDArray[np.int64]] = []
    between: list[NDArray[np.uint64]] = []
    for chunk in keys.chunks(CHUNK_KEYS):
        alive = chunk < np.uint64(low)
        found = np.flatnonzero((chunk <= np.uint64(high - 1)) ^ alive)
        bits.append(np.packbits(alive))
        positions.append(found + first)
        between.append(chunk[found])
        below += int(np.count_nonzero(alive))
        first += len(chunk)
    candidates, wanted = np.concatenate(positions), count - below
    if not 0 <= wanted <= len(candidates):
        return _smallest_random(keys, count, 64 * deviations)
    chosen = candidates[np.argsort(np.concatenate(between), kind="stable")[:wanted]]
    packed = np.concatenate(bits)
    set_ones(packed, chosen)
    return Mask(keys.shape, packed)


def matrix_axes(shape: Sequence[int], fan_in_axes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The order of a tensor's axes in its matrix, fan-out before fan-in, and the matrix's shape (fan-out, fan-in)."""
    fan_out_axes = [axis for axis in range(len(shape)) if axis not in fan_in_axes]
    extents = prod(shape[axis] for axis in fan_out_axes), prod(shape[axis] for axis in fan_in_axes)
    return (*fan_out_axes, *fan_in_axes), extents


def to_matrix(array: NDArray[Any], fan_in_axes: Sequence[int]) -> NDArray[Any]:
    """A tensor's array as its matrix (fan-out, fan-in)."""
    order, shape = matrix_axes(array.shape, fan_in_axes)
    return array.transpose(order).reshape(shape)


def from_matrix(mask: Mask, shape: Sequence[int], fan_in_axes: Sequence[int]) -> Mask:
    """The mask of a tensor as it is stored, given that of its matrix (fan-out, fan-in)."""
    order, _ = matrix_axes(shape, fan_in_axes)
    if order == tuple(range(len(shape))):
        return mask if mask.shape == tuple(shape) else Mask(tuple(shape), mask.bits)
    alive = mask.alive().reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
    return Mask.of_parts(shape, (alive[part] for part in row_parts(shape)))


@dataclass(frozen=True)
class WantedMask:
    """What a plan says of a tensor's mask: shape as stored, live weights, and along which axes it has which pattern.

    `even_rows`: rows of blocks differ by at most one block. `draw`: whether every position has a key, or positions are drawn.
    """

    shape: tuple[int, ...]
    kept: int
    fan_in_axes: tuple[int, ...]
    pattern: str = "exact"
    block: int | None = None
    even_rows: bool = False
    draw: Draw = "positions"


def draw(name: str, wanted: WantedMask, density: float, seed: int) -> Mask:
    """A tensor's random mask, a function of (seed, name) and its matrix alone; one of lower density lives within it.

    Raises InputError, naming the tensor, where the number of live weights does not fit the pattern.
    """
    _, (rows, columns) = matrix_axes(wanted.shape, wanted.fan_in_axes)
    edge = wanted.block or 1
    try:
        if rows % edge or columns % edge:
            what = f"{edge}×{edge} blocks don't divide the shape {rows}×{columns}"
            raise ValueError(f"{what}; expected an edge that does")
        if wanted.draw == "live":
            mask = _draw_live(f"mask:{name}", (rows, columns), wanted, density, seed)
        else:
            keys = RandomKeys(seed, f"mask:{name}", (rows // edge, columns // edge))
            choose = partial(select, wanted.pattern, keys, wanted.kept, density=density)
            mask = choose(block=wanted.block, even_rows=wanted.even_rows)
    except ValueError as error:
        raise InputError(f"{name}: kept: {error}") from None
    return from_matrix(mask, wanted.shape, wanted.fan_in_axes)


def _draw_live(name: str, shape: tuple[int, int], wanted: WantedMask, density: float, seed: int) -> Mask:
    """The mask of a matrix of which only what lives is drawn: random positions of it, or of each of its rows."""
    rows, length = shape if wanted.pattern == "fixed_fan_in" else (1, prod(shape))
    kept = random_count(seed, name, length, Fraction(density)) if wanted.pattern == "bernoulli" else wanted.kept
    _require_fit(wanted.pattern, shape, kept, (kept // rows, length) if rows > 1 else None)
    return Mask(shape, random_positions(seed, name, rows, length, kept // rows))


@dataclass(frozen=True)
class IndexMap:
    """The positions of the weights that live under both of two masks, among the live ones of each: `old` and `new`, in row-major order.

    For the values of a tensor and for every one of its moments alike; `count` is how many live under the new mask.
    """

    old: NDArray[np.int64]
    new: NDArray[np.int64]
    count: int

    @classmethod
    def between(cls, old: Mask, new: Mask) -> IndexMap:
        """The map from one mask to another of the same shape. Raises ValueError for another shape."""
        if old.shape != new.shape:
            raise ValueError(f"a mask of shape {old.shape} can't become one of shape {new.shape}")
        by_old, by_new, passed_old, passed_new = [], [], 0, 0
        for first in range(0, len(old.bits), CHUNK_BYTES):  # a dense mask's positions would take 8 bytes a weight
            part = slice(first, first + CHUNK_BYTES)
            before, after = (np.unpackbits(mask.bits[part]).view(np.bool_) for mask in (old, new))
            both = before & after
            by_old.append(passed_old + np.flatnonzero(both[before]))
            by_new.append(passed_new + np.flatnonzero(both[after]))
            passed_old += int(np.count_nonzero(before))
            passed_new += int(np.count_nonzero(after))
        return cls(np.concatenate(by_old), np.concatenate(by_new), new.count)

    def carry(self, values: Tensor, grown: float = 0.0) -> Tensor:
        """Live values under the new mask: those of survivors as they were, `grown` where a weight came to life."""
        moved = torch.full((self.count,), grown, dtype=values.dtype, device=values.device)
        old, new = (torch.from_numpy(index).to(values.device) for index in (self.old, self.new))
        moved[new] = values[old]
        return moved
