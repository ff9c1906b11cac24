"""The block engine: products with a weight whose live values fill aligned b×b blocks, in plain torch or in Triton.

Shape suffixes: N tokens, I inputs, O outputs, B edge of a block, K live blocks, R block rows or columns of a result,
S block rows or columns of a source, V live values. Blocks are numbered by block row, then by block column.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from supar_cli.sparse.block_structure import Structure, blocks_of, structure_of, values_of
from supar_cli.sparse.linear import Engine, compute_dtype
from supar_cli.sparse.masks import Mask

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_CHUNK_NUMBERS = 2**19  # measured: as fast as 2**17 on an x86 core; 2**23 took up to a third more
DEVICE_CHUNK_NUMBERS = 2**26  # chosen: 256 MiB; few launches, and no more than one layer's activations


class Block(Engine):
    """Y = X·Wᵀ of a block-sparse weight, given as its live values in row-major order.

    `mask` is (out, in) and made of whole aligned blocks of edge `block`: 16, 32, 64 or 128.
    `kernels` is "triton", "torch", or "auto": Triton for CUDA tensors where it is installed, torch elsewhere.
    Sums are float32 (float64 for float64 inputs), and so are gradients of values. Raises ValueError for another mask
    or block, ModuleNotFoundError for "triton" where it is not installed.
    """

    def __init__(self, mask: Mask, block: int, kernels: Literal["auto", "triton", "torch"] = "auto") -> None:
        super().__init__(mask)
        self.block, self.kernels = block, kernels
        structure = structure_of(mask, block)
        for name, numbers in structure._asdict().items():
            self.register_buffer(name, numbers, persistent=False)
        self.d_out, self.d_in = mask.shape
        self.live = structure.rows.numel() * block**2
        self.has_triton = kernels == "triton" or (kernels == "auto" and _importable())
        if self.has_triton:
            import_module("supar_cli.sparse.block_kernels")  # not for the first time in a compiled forward pass

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """(…, in) and (live,) → (…, out), of autocast's dtype where it is on, else of x's.

        Raises ValueError for a wrong shape, and for float64 with Triton.
        """
        if x.shape[-1] != self.d_in or values.shape != (self.live,):
            raise ValueError(
                f"inputs {tuple(x.shape)} and values {tuple(values.shape)}; expected (…, {self.d_in}) and ({self.live},)"
            )
        x_NI = x.to(compute_dtype(x)).reshape(-1, self.d_in)
        structure = [self.get_buffer(name) for name in Structure._fields]
        if self._uses_triton(x_NI):
            from supar_cli.sparse.block_kernels import block_linear

            y_NO: Tensor = block_linear(x_NI, values, structure, self.block)
        else:
            y_NO = _Product.apply(x_NI, values, self.block, *structure)  # type: ignore[no-untyped-call]
        return y_NO.view(*x.shape[:-1], self.d_out)

    def _uses_triton(self, x: Tensor) -> bool:
        if self.kernels == "triton" and x.dtype not in TRITON_DTYPES:
            raise ValueError(f"inputs are {x.dtype}; expected at most float32, the Triton kernels' sums")
        return self.has_triton and (self.kernels == "triton" or (x.is_cuda and x.dtype in TRITON_DTYPES))


def _importable() -> bool:
    """Whether Triton is worth its import: there is a device, and nothing is missing to run it."""
    with suppress(ImportError):
        return torch.cuda.is_available() and what_triton_lacks() is None and bool(import_module("triton"))
    return False


def what_triton_lacks(device: torch.device | None = None) -> str | None:
    """What is missing to run Triton's kernels, those of torch.compile too, on a CUDA device; None: nothing is."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):  # as Triton looks for it
        return "no C compiler is found, which Triton calls"
    major, minor = torch.cuda.get_device_capability(device)
    return f"the compute capability {major}.{minor} is below 7.0, Triton's least" if major < 7 else None


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
    """Ranges of live blocks short enough that the gathered inputs of one stay small."""
    limit = CPU_CHUNK_NUMBERS if device.type == "cpu" else DEVICE_CHUNK_NUMBERS
    step = max(1, limit // max(1, numbers_per_block))
    return [slice(first, min(first + step, live_blocks)) for first in range(0, live_blocks, step)]
