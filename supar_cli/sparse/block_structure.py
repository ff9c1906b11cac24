"""Where the live blocks of a weight lie, and its live values from row-major order to blocks and back.

Shape suffixes: B edge of a block, K live blocks, V live values. Blocks are numbered by block row, then by block column.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.planning import patterns
from supar_cli.sparse.masks import Mask

# chosen: from the smallest tile of a tensor core up to what one program can accumulate
BLOCKS: tuple[int, ...] = get_args(patterns.Block)
# chosen: of what a program accumulates of a gradient; 512 of a block of 128 would not fit the registers
GROUP_WIDTH = 256
MOST_PADDED = 1.25  # chosen: of a gradient's products; a third less to load is worth a quarter more to multiply


class Structure(NamedTuple):
    """Where the live blocks lie: a block-CSR of the weight, one of its transpose, and the order of their values.

    A live value's place in row-major order is known by whole runs of b values: `order` gives for row i of block k,
    at k·b + i, the number of its run in row-major order, and `inverse` the way back.
    """

    order: Tensor  # (K·b,)
    inverse: Tensor  # (K·b,)
    pointers: Tensor  # (out/b + 1,) first block of each block row
    rows: Tensor  # (K,) block row of each block
    columns: Tensor  # (K,) block column of each block
    transposed_pointers: Tensor  # (in/b + 1,) first entry of each block column
    transposed_rows: Tensor  # (K,) block row of each entry, by column, then by row
    transposed_numbers: Tensor  # (K,) block number of each entry
    groups: Tensor  # (groups, width) numbers of blocks of one block row, -1 where it has no more


def structure_of(mask: Mask, block: int) -> Structure:
    """Structure of a mask (out, in) made of whole aligned blocks. Raises ValueError for any other mask or block size."""
    if block not in BLOCKS:
        raise ValueError(f"block is {block}; the block engine has {', '.join(map(str, BLOCKS))}")
    if any(size % block for size in mask.shape):
        raise ValueError(f"a mask of shape {mask.shape} is not made of {block}×{block} blocks")
    bands = (mask.alive(slice(row, row + block)) for row in range(0, mask.shape[0], block))
    alive = np.stack([_live_blocks(band, block) for band in bands])
    rows, columns = np.nonzero(alive)
    row_counts = alive.sum(axis=1)
    pointers, transposed_pointers = _pointers(row_counts), _pointers(alive.sum(axis=0))
    numbers = np.lexsort((rows, columns))
    along = np.arange(rows.size) - pointers[rows]  # the number of live blocks to the left of a block in its row
    order = (pointers[rows] * block + along)[:, None] + np.arange(block) * row_counts[rows][:, None]
    order = order.reshape(-1)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    groups = _groups(pointers, min(4, GROUP_WIDTH // block))
    found = (order, inverse, pointers, rows, columns, transposed_pointers, rows[numbers], numbers, groups)
    dtype = np.int32 if order.size < 2**31 else np.int64
    return Structure(*(torch.from_numpy(numbers_of.astype(dtype)) for numbers_of in found))


def _live_blocks(alive: NDArray[np.bool_], block: int) -> NDArray[np.bool_]:
    """Which blocks of a block row (block, in) live, (in / block,). Raises ValueError if one is only partly live."""
    live: NDArray[np.intp] = np.count_nonzero(alive.reshape(block, -1, block), axis=(0, 2))
    if np.any((live != 0) & (live != block**2)):
        raise ValueError(f"the mask has {block}×{block} blocks that are only partly live; expected whole blocks")
    return live > 0


def _pointers(counts: NDArray[np.int_]) -> NDArray[np.int_]:
    return np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])


def _groups(pointers: NDArray[np.int_], width: int) -> NDArray[np.int_]:
    """Blocks of one row each, `width` at a time, or half as many where the rows are too short for that."""
    counts = np.diff(pointers)
    lines = -(-counts // width)
    if width > 1 and width * lines.sum() > MOST_PADDED * counts.sum():
        return _groups(pointers, width // 2)
    along = np.arange(lines.sum()) - np.repeat(_pointers(lines)[:-1], lines)
    numbers = (np.repeat(pointers[:-1], lines) + along * width)[:, None] + np.arange(width)
    return np.where(numbers < np.repeat(pointers[1:], lines)[:, None], numbers, -1)


def blocks_of(values_V: Tensor, order: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Live values from row-major order to blocks (K, b, b) of a dtype."""
    return values_V.to(dtype).view(-1, block).index_select(0, order).view(-1, block, block)


def values_of(blocks_KBB: Tensor, inverse: Tensor) -> Tensor:
    """Blocks (K, b, b) back to live values in row-major order (V,)."""
    return blocks_KBB.reshape(-1, blocks_KBB.shape[-1]).index_select(0, inverse).view(-1)
