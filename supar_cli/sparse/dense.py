"""The dense engine: the weight stored dense, zero where dead, in the precision it is computed in.

No `weight * mask` in any forward pass. A position costs its compute weight and, while it lasts, its gradient: 4 bytes in
bfloat16, 8 in float32. A live weight costs its master value, gradient, both moments and index. Where values are sharded
over processes the dense weight is not kept: it is filled for each pass, so that no process holds those of all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask


class _Product(torch.autograd.Function):
    """Y = X·Wᵀ with W as a constant; its gradient goes to the live values by gathering.

    Without a weight (None) it is filled for one pass, and what is kept for the backward one is the values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, live: Tensor, weight: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, live, values if weight is None else weight)
        ctx.is_kept, ctx.shape, ctx.dtype = weight is not None, shape, values.dtype
        return F.linear(x, _fill(values, live, shape, x.dtype) if weight is None else weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, live, weight = ctx.saved_tensors
        by_x = by_values = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ (weight if ctx.is_kept else _fill(weight, live, ctx.shape, x.dtype))
        if ctx.needs_input_grad[1]:
            dense = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
            by_values = dense.view(-1).index_select(0, live).to(ctx.dtype)
        return by_x, by_values, None, None, None


def _fill(values: Tensor, live: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    weight = torch.zeros(shape, dtype=dtype, device=values.device)
    weight.view(-1)[live] = values.to(dtype)
    return weight


class Dense(Engine):
    """`mask` is (out, in); `precision` that of the products; `keeps_weight`: hold it between passes."""

    weight: Tensor | None
    live: Tensor

    def __init__(self, mask: Mask, precision: torch.dtype, keeps_weight: bool = True) -> None:
        super().__init__(mask)
        self.shape, self.precision = mask.shape, precision
        index = mask.live(np.int32 if mask.size < 2**31 else np.int64)
        weight = torch.zeros(mask.shape, dtype=precision) if keeps_weight else None
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("live", torch.from_numpy(index), persistent=False)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        x = x.to(self.precision)
        return _Product.apply(x, values, self.live, self.weight, self.shape)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def refresh(self, values: Tensor) -> None:
        if self.weight is not None:
            self.weight.view(-1)[self.live] = values.to(self.precision)
