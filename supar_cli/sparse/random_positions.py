"""Random positions in every row of a matrix: as many as wanted, every set of them equally likely, the fewer among the more.

A row's positions have a random order, and the first ones of it are taken. Its beginning is drawn position by position, so that
time follows what is taken; the rest has random keys, drawn a bit of all keys at a time. All of it in whole numbers, the same
on every machine.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from supar_cli.sparse.packed_bits import are_ones, count_ones, positions_of_ones, set_ones
from supar_cli.streams import stream

# The first two decide which masks are drawn.
DRAWN_SHARE = 64  # measured: to draw a 64th of a row's positions takes as long as the keys of all, on Zen 4
WHOLE_KEYS = 2**10  # measured: positions left of all rows where keys of 64 bits are faster than single bits, on Zen 4
CHUNK_DRAWS = 2**18  # measured: positions drawn and sorted at a time; fewer reach too many pages of a wide mask


def random_positions(seed: int, name: str, rows: int, columns: int, each: int) -> NDArray[np.uint8]:
    """A matrix of packed bits, `each` of the `columns` ones in every row."""
    bits = np.zeros((rows, -(-columns // 64) * 8), np.uint8)  # rows of whole words
    drawn = min(each, columns // DRAWN_SHARE)
    _draw(stream(seed, name, 1), bits, columns, drawn)
    if each > drawn:
        _choose(stream(seed, name, 2), bits, columns, each - drawn)
    if rows == 1 or columns % 8 == 0:
        return np.ascontiguousarray(bits[:, : (columns + 7) // 8]).reshape(-1)  # of one byte a row reshape makes a view
    step = 8 * max(1, CHUNK_DRAWS // columns)  # rows that end with a byte
    parts = (np.unpackbits(bits[first : first + step], axis=1, count=columns) for first in range(0, rows, step))
    return np.concatenate([np.packbits(part) for part in parts])


def _draw(source: np.random.Philox, bits: NDArray[np.uint8], columns: int, each: int) -> None:
    """Set the first `each` different positions that every row draws. Its i-th draw is the stream's number rows · i + row."""
    rows, length = len(bits), 8 * bits.shape[1]
    starts, missing = np.arange(0, rows * length, length, dtype=np.uint64), np.full(rows, each)
    below = np.uint64(2 ** (columns - 1).bit_length() - 1)
    while missing.any():
        # no row draws more than it lacks: then what it keeps does not depend on how many are drawn at a time
        draws = max(1, min(int(missing[missing > 0].min()), CHUNK_DRAWS // rows))
        columns_DR = source.random_raw(draws * rows).reshape(draws, rows) & below
        positions = (columns_DR + starts)[(columns_DR < columns) & (missing > 0)]
        positions = positions.astype(np.min_scalar_type(rows * length))
        positions.sort()
        positions = positions[np.diff(positions, prepend=~positions[:1]) != 0]
        positions = positions[~are_ones(bits.reshape(-1), positions)]
        set_ones(bits.reshape(-1), positions)
        missing -= np.bincount(positions // length, minlength=rows)


def _choose(source: np.random.Philox, bits: NDArray[np.uint8], columns: int, each: int) -> None:
    """Set `each` more of every row's positions, those with the smallest keys; equal keys go by position.

    Keys of which one bit decides are not drawn further: in each row a bit halves the positions that are `left` to choose from.
    """
    rows, length = len(bits), 8 * bits.shape[1]
    inside = np.zeros(length // 8, np.uint8)
    inside[: columns // 8] = 0xFF
    inside[columns // 8 :][: columns % 8 > 0] = 0xFF ^ (0xFF >> columns % 8)
    alive, left = bits.view(np.uint64), (~bits & inside).view(np.uint64)
    missing = np.full((rows, 1), each)
    for _ in range((rows * columns // WHOLE_KEYS).bit_length()):
        zeros = source.random_raw(left.size).astype("<u8", copy=False).view(np.uint64).reshape(left.shape)
        zeros &= left  # those whose next bit is 0: which word of the two says so does not matter
        count = np.bitwise_count(zeros).sum(axis=1, keepdims=True, dtype=np.int64)
        are_taken = count <= missing
        whole = np.where(are_taken, ~np.uint64(0), np.uint64(0))
        alive |= zeros & whole
        left &= whole  # what follows the zeros where they are taken, else the zeros themselves
        left ^= zeros
        missing -= count * are_taken
    few = left.reshape(-1).view(np.uint8)
    positions = positions_of_ones(few, count_ones(few))
    row = positions // length
    rank = np.arange(len(positions)) - np.searchsorted(row, np.arange(rows))[row]
    keys = source.random_raw(rows * (int(rank.max(initial=-1)) + 1))[rows * rank + row]  # of other rows independent
    order = np.lexsort((keys, row))
    set_ones(bits.reshape(-1), positions[order[rank < missing[row, 0]]])


def random_count(seed: int, name: str, size: int, density: Fraction) -> int:
    """A binomial number: how many of `size` random keys are below the density; the higher the density, the more.

    Of the keys that a bit does not decide, the next one is drawn.
    """
    source, below = stream(seed, name, 3), 0
    while size and density:
        density *= 2
        zeros = size - _count_random_ones(source, size)
        if density >= 1:
            density, below, size = density - 1, below + zeros, size - zeros
        else:
            size = zeros
    return below


def _count_random_ones(source: np.random.Philox, size: int) -> int:
    """The number of ones among `size` random bits."""
    ones = 0
    for first in range(0, size, 64 * CHUNK_DRAWS):
        bits = min(64 * CHUNK_DRAWS, size - first)
        words = source.random_raw(-(-bits // 64))
        words[-1] >>= np.uint64(-bits % 64)
        ones += int(np.bitwise_count(words).sum(dtype=np.int64))
    return ones
