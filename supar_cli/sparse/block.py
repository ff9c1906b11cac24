"""The block engine: products with a weight whose live values fill aligned b×b blocks, in plain torch or in Triton.

Shape suffixes: N tokens, I inputs, O outputs, B edge of a block, K live blocks, R block rows or columns of a result,
S block rows or columns of a source, V live values. Blocks are numbered by block row, then by block column.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask

BLOCKS = (16, 32, 64, 128)  # chosen: from the smallest tile of a tensor core up to what one program can accumulate
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_CHUNK_NUMBERS = 2**19  # measured: as fast as 2**17 on an x86 core; 2**23 took up to a third more
DEVICE_CHUNK_NUMBERS = 2**26  # chosen: 256 MiB; few launches, and no more than one layer's activations


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
    along = np.arange(rows.size) - pointers[rows]  # how many live blocks stand left of a block in its row
    order = (pointers[rows] * block + along)[:, None] + np.arange(block) * row_counts[rows][:, None]
    order = order.reshape(-1)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    found = (order, inverse, pointers, rows, columns, transposed_pointers, rows[numbers], numbers)
    dtype = np.int32 if order.size < 2**31 else np.int64
    return Structure(*(torch.from_numpy(numbers_of.astype(dtype)) for numbers_of in found))


def _live_blocks(alive: NDArray[np.bool_], block: int) -> NDArray[np.bool_]:
    """Which blocks of a block row (block, in) live, (in / block,). Raises ValueError where one does in part."""
    live: NDArray[np.intp] = np.count_nonzero(alive.reshape(block, -1, block), axis=(0, 2))
    if np.any((live != 0) & (live != block**2)):
        raise ValueError(f"the mask has {block}×{block} blocks that are neither alive nor dead as a whole")
    return live > 0


def _pointers(counts: NDArray[np.int_]) -> NDArray[np.int_]:
    return np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])


def blocks_of(values_V: Tensor, order: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Live values from row-major order to blocks (K, b, b) of a dtype."""
    return values_V.to(dtype).view(-1, block).index_select(0, order).view(-1, block, block)


def values_of(blocks_KBB: Tensor, inverse: Tensor) -> Tensor:
    """Blocks (K, b, b) back to live values in row-major order (V,)."""
    return blocks_KBB.reshape(-1, blocks_KBB.shape[-1]).index_select(0, inverse).view(-1)


class Block(Engine):
    """Y = X·Wᵀ of a block-sparse weight, given as its live values in row-major order.

    `mask` is (out, in) and made of whole aligned blocks of edge `block`: 16, 32, 64 or 128.
    `kernels` is "triton", "torch", or "auto": Triton for CUDA tensors where it is installed, torch elsewhere.
    Sums are float32 (float64 for float64 inputs), and so are gradients of values. Raises ValueError for another mask
    or block, ModuleNotFoundError for "triton" where it is not installed.
    """

    def __init__(self, mask: Mask, block: int, kernels: Literal["auto", "triton", "torch"] = "auto") -> None:
        super().__init__(mask)
        if kernels not in ("auto", "triton", "torch"):
            raise ValueError(f"kernels are {kernels!r}; the block engine has 'auto', 'triton' and 'torch'")
        self.block, self.kernels = block, kernels
        structure = structure_of(mask, block)
        for name, numbers in structure._asdict().items():
            self.register_buffer(name, numbers, persistent=False)
        self.d_out, self.d_in = mask.shape
        self.live = structure.rows.numel() * block**2
        self.has_triton = kernels == "triton" or (kernels == "auto" and _importable())
        if self.has_triton:
            import_module("supar_cli.sparse.block_kernels")  # not first within a compiled forward pass

    def extra_repr(self) -> str:
        return f"{self.d_in} → {self.d_out}, block={self.block}, live={self.live}, kernels={self.kernels}"

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """(…, in) and (live,) → (…, out), of autocast's dtype where it is on, else of x's.

        Raises ValueError where a shape is another, or where Triton is asked for float64.
        """
        if x.shape[-1] != self.d_in or values.shape != (self.live,):
            raise ValueError(
                f"inputs {tuple(x.shape)} and values {tuple(values.shape)} where ({self.d_in},) and ({self.live},) belong"
            )
        x_NI = x.to(_compute_dtype(x)).reshape(-1, self.d_in)
        structure = [self.get_buffer(name) for name in Structure._fields]
        if self._uses_triton(x_NI):
            from supar_cli.sparse.block_kernels import block_linear

            y_NO: Tensor = block_linear(x_NI, values, structure, self.block)
        else:
            y_NO = _Product.apply(x_NI, values, self.block, *structure)  # type: ignore[no-untyped-call]
        return y_NO.view(*x.shape[:-1], self.d_out)

    def _uses_triton(self, x: Tensor) -> bool:
        if self.kernels == "triton" and x.dtype not in TRITON_DTYPES:
            raise ValueError(f"the Triton kernels sum in float32; inputs are {x.dtype}")
        return self.has_triton and (self.kernels == "triton" or (x.is_cuda and x.dtype in TRITON_DTYPES))


def _importable() -> bool:
    """Whether Triton is worth its import: it is installed and there is a device to run it."""
    if not torch.cuda.is_available():
        return False
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def _compute_dtype(x: Tensor) -> torch.dtype:
    """As torch casts a linear layer: autocast's dtype where it is on, except for float64."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Product(torch.autograd.Function):
    """The plain torch version: gather, multiply all blocks at once, add up. Every step is float32 or float64."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, values_V: Tensor, block: int, *tensors: Tensor) -> Tensor:
        structure = Structure(*tensors)
        ctx.save_for_backward(x_NI, values_V, *tensors)
        ctx.block = block
        blocks_KBB = blocks_of(values_V, structure.order, block, x_NI.dtype)
        targets = structure.pointers.numel() - 1
        return _multiply(x_NI, blocks_KBB.mT, structure.columns, structure.rows, targets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, values_V, *tensors = ctx.saved_tensors
        structure, block, dy_NO = Structure(*tensors), ctx.block, gradients[0]
        dx_NI = dvalues_V = None
        if ctx.needs_input_grad[0]:
            blocks_KBB = blocks_of(values_V, structure.order, block, x_NI.dtype)
            targets = structure.transposed_pointers.numel() - 1
            dx_NI = _multiply(dy_NO, blocks_KBB, structure.rows, structure.columns, targets)
        if ctx.needs_input_grad[1]:
            dblocks_KBB = _outer(dy_NO, x_NI, structure.rows, structure.columns, block)
            dvalues_V = values_of(dblocks_KBB, structure.inverse).to(values_V.dtype)
        return dx_NI, dvalues_V, None, *(None for _ in tensors)


def _multiply(x_NI: Tensor, blocks_KBB: Tensor, sources: Tensor, targets: Tensor, target_count: int) -> Tensor:
    """Sum of x[source]·block into each block's target: (N, S·b) → (N, R·b) of x's dtype."""
    tokens, block = x_NI.shape[0], blocks_KBB.shape[-1]
    wide = _wide(x_NI.dtype)
    x_SNB = _by_block(x_NI, block)
    y_RNB = torch.zeros(target_count, tokens, block, dtype=wide, device=x_NI.device)
    with torch.autocast(x_NI.device.type, enabled=False):
        for chunk in _chunks(blocks_KBB.shape[0], tokens * block, x_NI.device):
            source_KNB = x_SNB.index_select(0, sources[chunk]).to(wide)
            y_RNB.index_add_(0, targets[chunk], torch.bmm(source_KNB, blocks_KBB[chunk].to(wide)))
    return y_RNB.transpose(0, 1).to(x_NI.dtype).reshape(tokens, target_count * block)


def _outer(dy_NO: Tensor, x_NI: Tensor, rows: Tensor, columns: Tensor, block: int) -> Tensor:
    """Gradient of the live blocks, dyᵀ·x at each: (N, out), (N, in) → (K, b, b), float32 or float64."""
    tokens, live_blocks, wide = x_NI.shape[0], rows.numel(), _wide(x_NI.dtype)
    dy_SNB, x_SNB = _by_block(dy_NO, block), _by_block(x_NI, block)
    dblocks_KBB = torch.empty(live_blocks, block, block, dtype=wide, device=x_NI.device)
    with torch.autocast(x_NI.device.type, enabled=False):
        for chunk in _chunks(live_blocks, 2 * tokens * block, x_NI.device):
            dy_KNB = dy_SNB.index_select(0, rows[chunk]).to(wide)
            dblocks_KBB[chunk] = torch.bmm(dy_KNB.mT, x_SNB.index_select(0, columns[chunk]).to(wide))
    return dblocks_KBB


def _by_block(x_NI: Tensor, block: int) -> Tensor:
    """(N, S·b) → (S, N, b), each block of inputs in one piece."""
    return x_NI.reshape(x_NI.shape[0], x_NI.shape[1] // block, block).transpose(0, 1).contiguous()


def _chunks(live_blocks: int, numbers_per_block: int, device: torch.device) -> list[slice]:
    """Runs of live blocks so short that what is gathered for one stays small."""
    limit = CPU_CHUNK_NUMBERS if device.type == "cpu" else DEVICE_CHUNK_NUMBERS
    step = max(1, limit // max(1, numbers_per_block))
    return [slice(first, min(first + step, live_blocks)) for first in range(0, live_blocks, step)]
