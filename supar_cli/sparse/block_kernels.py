"""The block engine's Triton kernels: tokens times live blocks, forward or transposed, and the gradient of live blocks.

Shape suffixes as in `block`; P programs' parts of a gradient. Everything is row-major. Imports Triton, so import late.

A sum's order depends on shapes alone: no atomics, and tuning picks neither a reduction tile nor a split.
Annotations are not strings here, since torch reads the operators' schemas from them.
"""

from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found]
import triton.language as tl  # type: ignore[import-untyped,import-not-found]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from supar_cli.sparse.block_structure import Structure, blocks_of, values_of
from supar_cli.sparse.linear import multiplies_in_tf32

GRADIENT_PROGRAMS = 512  # chosen: about four for each multiprocessor of a large GPU
SPLIT_TOKENS = 1024  # chosen: fewer tokens for a program cost less than a second pass over the partial sums


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x,
    blocks,
    y,
    pointers,
    sources,
    numbers,
    n_tokens,
    x_width,
    n_targets,
    BUCKET: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TF32: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of tokens times the live blocks of one target, (TOKENS, BLOCK), by steps of STEP inputs.

    Forward, a target is a block row, its sources are block columns and a block is read transposed; TRANSPOSED is the
    reverse, and blocks are found through `numbers`. BUCKET only makes tuning separate for few and many tokens.
    TF32 is of float32 products. WIDEN is for the interpreter, which holds bfloat16 as integers and multiplies those.
    """
    tile = tl.program_id(0) // n_targets
    target = tl.program_id(0) % n_targets
    token = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    present = token[:, None] < n_tokens
    inner = tl.arange(0, STEP)
    outer = tl.arange(0, BLOCK)
    parts: tl.constexpr = BLOCK // STEP
    first = tl.load(pointers + target)
    last = tl.load(pointers + target + 1)
    total = tl.zeros((TOKENS, BLOCK), dtype=tl.float32)
    for at in range(first * parts, last * parts):
        entry = at // parts
        along = (at % parts) * STEP + inner
        source = tl.load(sources + entry)
        x_tile = tl.load(x + token[:, None] * x_width + (source * BLOCK + along)[None, :], mask=present, other=0.0)
        if TRANSPOSED:
            number = tl.load(numbers + entry).to(tl.int64)
            weight = tl.load(blocks + number * (BLOCK * BLOCK) + along[:, None] * BLOCK + outer[None, :])
        else:
            number = entry.to(tl.int64)
            weight = tl.load(blocks + number * (BLOCK * BLOCK) + outer[None, :] * BLOCK + along[:, None])
        if WIDEN:
            x_tile, weight = x_tile.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x_tile, weight, total, input_precision="tf32" if TF32 else "ieee")
    place = y + token[:, None] * (n_targets * BLOCK) + (target * BLOCK + outer)[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=present)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient(  # type: ignore[no-untyped-def]
    dy,
    x,
    partial,
    groups,
    rows,
    columns,
    n_tokens,
    dy_width,
    x_width,
    n_groups,
    n_blocks,
    span_tokens,
    BUCKET: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TF32: tl.constexpr,
    WIDEN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """dyᵀ·x at one group of live blocks of a row, (BLOCK, GROUP·BLOCK), over one span of the tokens.

    dy is loaded once for all of them. BUCKET, TF32 and WIDEN as in `_product`.
    """
    group = groups + (tl.program_id(0) % n_groups) * GROUP
    span = tl.program_id(0) // n_groups
    begin = span * span_tokens
    end = tl.minimum(begin + span_tokens, n_tokens)
    inner = tl.arange(0, TOKENS)
    outer = tl.arange(0, BLOCK)
    wide = tl.arange(0, GROUP * BLOCK)
    number = tl.load(group + wide // BLOCK)
    live = number >= 0
    dy_column = tl.load(rows + tl.load(group)) * BLOCK + outer
    x_column = tl.load(columns + number, mask=live, other=0) * BLOCK + wide % BLOCK
    total = tl.zeros((BLOCK, GROUP * BLOCK), dtype=tl.float32)
    for first in range(begin, end, TOKENS):
        token = (first + inner).to(tl.int64)
        present = token < end
        dy_tile = tl.load(dy + token[None, :] * dy_width + dy_column[:, None], mask=present[None, :], other=0.0)
        x_present = present[:, None] & live[None, :]
        x_tile = tl.load(x + token[:, None] * x_width + x_column[None, :], mask=x_present, other=0.0)
        if WIDEN:
            dy_tile, x_tile = dy_tile.to(tl.float32), x_tile.to(tl.float32)
        total = tl.dot(dy_tile, x_tile, total, input_precision="tf32" if TF32 else "ieee")
    place = (span * n_blocks + number).to(tl.int64) * (BLOCK * BLOCK) + wide % BLOCK
    tl.store(partial + outer[:, None] * BLOCK + place[None, :], total, mask=live[None, :])


INTERPRETED = not isinstance(_product, triton.JITFunction)  # TRITON_INTERPRET was set before the import
UNTUNED = {"TOKENS": 32} if INTERPRETED else {}  # chosen: the interpreter runs a tile as numpy would: any size will do

# chosen: tiles from few tokens up to what fills the registers, and 4 warps at least, for Hopper's matrix instructions.
# A source's number is loaded one stage ahead, so that 2, 3 and 5 stages hold 2, 2 and 3 tiles; 4 is the same as 3.
PRODUCT_CONFIGS = [
    triton.Config({"TOKENS": tokens}, num_warps=warps, num_stages=stages)
    for tokens, warps, stages in ((32, 4, 5), (64, 4, 2), (64, 4, 5), (128, 4, 3), (128, 8, 5))
]
# 8 warps: a thread of 4 can't hold its share of 128×256 sums
GRADIENT_CONFIGS = [triton.Config({}, num_warps=8, num_stages=stages) for stages in (2, 3, 4)]
_KEY = ["BUCKET", "BLOCK", "TF32"]  # Triton adds the dtypes of the tensors
tuned_product: Any = (
    _product if INTERPRETED else triton.autotune(configs=PRODUCT_CONFIGS, key=[*_KEY, "TRANSPOSED"])(_product)
)
tuned_gradient: Any = (
    _gradient if INTERPRETED else triton.autotune(configs=GRADIENT_CONFIGS, key=[*_KEY, "GROUP"])(_gradient)
)


# Inputs of one step of a product, tokens of one of a gradient. Not tuned: the step is part of the sum's order.
# chosen: without tensor cores, short steps compile fast, and the gradient's fit the registers of an A100
STEP, FLOAT32_STEP, FLOAT32_GRADIENT_STEP = 64, 32, 16


def splits_of(tokens: int, groups: int) -> int:
    """The number of spans in which a gradient's tokens are summed: more for few groups and many tokens, so that all units work."""
    splits = 1
    while splits < 32 and groups * splits < GRADIENT_PROGRAMS and tokens > 2 * splits * SPLIT_TOKENS:
        splits *= 2
    return splits


def _bucket(tokens: int) -> int:
    return 0 if tokens <= 512 else 1 if tokens <= 8192 else 2


def _launch_product(x_NI: Tensor, values_V: Tensor, structure: Structure, block: int, transposed: bool) -> Tensor:
    """x times the live blocks, of x's dtype; zero in the result where a whole block row (column) is dead."""
    blocks_KBB = blocks_of(values_V, structure.order, block, x_NI.dtype)
    pointers = structure.transposed_pointers if transposed else structure.pointers
    sources = structure.transposed_rows if transposed else structure.columns
    tokens, targets = x_NI.shape[0], pointers.numel() - 1
    if tokens == 0 or targets == 0:
        return x_NI.new_zeros(tokens, targets * block)
    x_NI = x_NI.contiguous()
    y_NO = torch.empty(tokens, targets * block, dtype=x_NI.dtype, device=x_NI.device)
    kernel = tuned_product if INTERPRETED else wrap_triton(tuned_product)
    tensors = (x_NI, blocks_KBB, y_NO, pointers, sources, structure.transposed_numbers)
    sizes = (tokens, x_NI.shape[1], targets)
    step = FLOAT32_STEP if x_NI.dtype == torch.float32 else STEP
    constants = {"BUCKET": _bucket(tokens), "BLOCK": block, "STEP": min(block, step), "TF32": multiplies_in_tf32()}

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(tokens, meta["TOKENS"]) * targets,)

    kernel[grid](*tensors, *sizes, **constants, TRANSPOSED=transposed, WIDEN=INTERPRETED, **UNTUNED)
    return y_NO


@triton_op("supar::block_linear", mutates_args=())
def block_linear(x: Tensor, values: Tensor, structure: list[Tensor], block: int) -> Tensor:
    """y (N, out) of x's dtype, from x (N, in) and live values (V,) in row-major order. Differentiable in both."""
    return _launch_product(x, values, Structure(*structure), block, transposed=False)


@triton_op("supar::block_linear_grad_input", mutates_args=())
def block_linear_grad_input(dy: Tensor, values: Tensor, structure: list[Tensor], block: int) -> Tensor:
    """dx (N, in) of dy's dtype, from dy (N, out) and live values (V,)."""
    return _launch_product(dy, values, Structure(*structure), block, transposed=True)


@triton_op("supar::block_linear_grad_values", mutates_args=())
def block_linear_grad_values(dy: Tensor, x: Tensor, structure: list[Tensor], block: int) -> Tensor:
    """Gradient of the live values (V,) in row-major order, float32, from dy (N, out) and x (N, in)."""
    found = Structure(*structure)
    tokens, live_blocks = x.shape[0], found.rows.numel()
    if tokens == 0 or live_blocks == 0:
        return x.new_zeros(live_blocks * block**2, dtype=torch.float32)
    dy, x = dy.contiguous(), x.contiguous()
    groups, width = found.groups.shape
    splits = splits_of(tokens, groups)
    partial_PBB = torch.empty(splits * live_blocks, block, block, dtype=torch.float32, device=x.device)
    kernel = tuned_gradient if INTERPRETED else wrap_triton(tuned_gradient)
    tensors = (dy, x, partial_PBB, found.groups, found.rows, found.columns)
    sizes = (tokens, dy.shape[1], x.shape[1], groups, live_blocks, (tokens + splits - 1) // splits)
    # a width that differs from layer to layer may be symbolic where this is compiled
    constants = {"BUCKET": _bucket(tokens), "BLOCK": block, "GROUP": int(width), "TF32": multiplies_in_tf32()}
    float32_step = FLOAT32_STEP if multiplies_in_tf32() else FLOAT32_GRADIENT_STEP
    constants["TOKENS"] = float32_step if x.dtype == torch.float32 else STEP
    kernel[(splits * groups,)](*tensors, *sizes, **constants, WIDEN=INTERPRETED)
    blocks_KBB = partial_PBB if splits == 1 else partial_PBB.view(splits, live_blocks, block, block).sum(dim=0)
    return values_of(blocks_KBB, found.inverse)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, list[Tensor], int], output: Tensor) -> None:
    x, values, structure, ctx.block = inputs
    ctx.save_for_backward(x, values, *structure)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, list[None], None]:
    x, values, *structure = ctx.saved_tensors
    dx = block_linear_grad_input(dy, values, structure, ctx.block) if ctx.needs_input_grad[0] else None
    dvalues = block_linear_grad_values(dy, x, structure, ctx.block) if ctx.needs_input_grad[1] else None
    return dx, None if dvalues is None else dvalues.to(values.dtype), [None] * len(structure), None


block_linear.register_autograd(_backward, setup_context=_save)
