"""The linear layer of every model: its weight stored dense, or as live values that an engine multiplies with.

The dense engine stores the weight dense, zero where dead, in the precision it is computed in: no `weight * mask` in any
forward pass. A position costs its compute weight and, while it lasts, its gradient: 4 bytes in bfloat16, 8 in float32. A
live weight costs its master value, gradient, both moments and index. Where values are sharded over processes the dense
weight is not kept: it is filled for each pass, so that no process holds those of all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, zip_longest
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.sparse.masks import Mask

MOST_GROUPED = 2**20  # chosen: live weights whose scatter takes about as long as three launches, some 15 µs
ALIGNED = 128  # chosen: weights, so that each matrix starts where products and compiled code want it


class Engine(nn.Module):
    """Y = X·Wᵀ of a masked weight W (out, in), given as its live values in row-major order, float32.

    An engine is made for one mask. It holds only buffers that follow from the mask, no parameter: optimizer
    state, gradients, clipping and checkpoints concern live values alone and don't depend on the engine.
    """

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    applies_gelu = False  # whether `forward` takes a form of GELU, as torch calls it, that X passes through first

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """(…, in) and (live,) → (…, out), differentiable in both."""
        raise NotImplementedError

    def refresh(self, values: Tensor) -> None:
        """Take over values that were changed in place. Call it before the next forward pass."""

    def move(self, mask: Mask) -> bool:
        """Take another mask of as many live weights, in place; False where the engine has to be made anew."""
        return False


def compute_dtype(x: Tensor) -> torch.dtype:
    """As torch casts a linear layer: autocast's dtype where it is on, except for float64."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def multiplies_in_tf32() -> bool:
    """Whether float32 products on CUDA are made by tensor cores, of factors rounded to TensorFloat32's 11 bits."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


class Linear(nn.Module):
    """Linear map (…, in) → (…, out). `weight` is (out, in) or, once masked, (live,); filled by `prepare`, not here."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.shape = (d_out, d_in)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.engine: Engine | None = None
        # called in the backward pass with the input and the gradient of the output, which make the dense gradient
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    @property
    def mask(self) -> Mask | None:
        """The mask whose live values `weight` holds, None of a dense weight."""
        return None if self.engine is None else self.engine.mask

    def remask(self, mask: Mask, values: Tensor, engine: Engine) -> None:
        """Hold `values` (live,), in row-major order, under this mask from now on, in place of any earlier one.

        `weight` is then another parameter, unless it had as many live weights before. Raises ValueError for a mask of
        another shape, for values that are not as many as it has live weights, and for an engine of another mask.
        """
        if mask.shape != self.shape:
            raise ValueError(f"mask: shape {mask.shape}; expected the weight's shape {self.shape}")
        if values.shape != (mask.count,):
            raise ValueError(f"values: shape {tuple(values.shape)}; expected ({mask.count},), one per live weight")
        if engine.mask != mask:
            raise ValueError(f"engine: made for mask {engine.mask.fingerprint}; expected {mask.fingerprint}")
        if self.weight.shape == values.shape:
            self.weight.detach().copy_(values)
        else:
            self.weight = nn.Parameter(values.clone())  # a copy, so that torch aligns its memory
        self.engine = engine
        self.refresh()

    def refresh(self) -> None:
        """Tell the engine that the weight was changed in place."""
        if self.engine is not None:
            self.engine.refresh(self.weight.detach())

    @property
    def applies_gelu(self) -> bool:
        """Whether `forward` takes a form of GELU. Not where something looks at the input: it is to see what is multiplied."""
        is_watched = self._forward_pre_hooks or self._forward_hooks or self._backward_pre_hooks or self._backward_hooks
        return self.engine is not None and self.engine.applies_gelu and self.watch is None and not is_watched

    def forward(self, x: Tensor, gelu: str | None = None) -> Tensor:
        """(…, in) → (…, out). `gelu`: the form of GELU, "none" or "tanh" as torch calls them, that X passes through first."""
        if self.engine is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = self.engine(x, self.weight) if gelu is None else self.engine(x, self.weight, gelu)
        if self.watch is not None and y.requires_grad:
            y.register_hook(partial(self.watch, x.detach()))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """Y = X·Wᵀ with W as a constant; its gradient goes to the live values by gathering.

    Without a weight (None) it is filled for one pass, and only the values are kept for the backward one.
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

    @property
    def is_small(self) -> bool:
        """Whether a launch counts beside the scatter of its live values; not where no weight is held."""
        return self.weight is not None and self.live.numel() <= MOST_GROUPED

    @torch.no_grad()
    def refresh(self, values: Tensor) -> None:
        if self.weight is not None:
            self.weight.view(-1)[self.live] = values.to(self.precision)

    @torch.no_grad()
    def move(self, mask: Mask) -> bool:
        if mask.count != self.mask.count:
            return False
        if self.weight is not None:
            self.weight.zero_()
        self.live.copy_(torch.from_numpy(mask.live(np.int32 if mask.size < 2**31 else np.int64)))
        self.mask = mask
        return True


class DenseGroup:
    """Layers under the dense engine whose weights are parts of one buffer, so that one scatter takes over all their values.

    It costs a second index of its layers, 4 bytes a live weight, and 14 more while it refreshes.
    """

    def __init__(self, layers: list[Linear]) -> None:
        self.layers = {layer: engine for layer in layers if isinstance(engine := layer.engine, Dense)}
        weights = [engine.weight for engine in self.layers.values() if engine.weight is not None]
        self._masks: list[Mask] = []
        self._firsts = [0, *accumulate(-(-weight.numel() // ALIGNED) * ALIGNED for weight in weights)]
        self._weights = weights[0].new_zeros(self._firsts.pop())
        for engine, weight, first in zip(self.layers.values(), weights, self._firsts, strict=True):
            engine.weight = self._weights[first : first + weight.numel()].view(weight.shape).copy_(weight)

    @classmethod
    def of(cls, layers: list[Linear]) -> DenseGroup | None:
        """The group of the small ones of these layers; None if there are not two."""
        small = [layer for layer in layers if isinstance(layer.engine, Dense) and layer.engine.is_small]
        return cls(small) if len(small) > 1 else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the layers' values, as `Linear.refresh` of each."""
        masks = [engine.mask for engine in self.layers.values()]
        if any(new is not old for new, old in zip_longest(masks, self._masks)):
            kind = torch.int32 if len(self._weights) < 2**31 else torch.int64
            live = (
                engine.live.to(kind) + first for engine, first in zip(self.layers.values(), self._firsts, strict=True)
            )
            self._live, self._masks = torch.cat(list(live)), masks
        values = torch.cat([layer.weight.detach() for layer in self.layers])
        self._weights[self._live] = values.to(self._weights.dtype)
