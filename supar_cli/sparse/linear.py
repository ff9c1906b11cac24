"""The linear layer of every model: its weight stored dense, or as live values that an engine multiplies with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.sparse.masks import Mask


class Engine(nn.Module):
    """Y = X·Wᵀ of a masked weight W (out, in), given as its live values in row-major order, float32.

    An engine is made for one mask. It holds what follows from that, as buffers, and no parameter: optimizer state,
    gradients, clipping and checkpoints are of live values alone and do not know which engine runs.
    """

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """(…, in) and (live,) → (…, out), differentiable in both."""
        raise NotImplementedError

    def refresh(self, values: Tensor) -> None:
        """Take over values that were changed in place. Call it before the next forward pass."""


class Linear(nn.Module):
    """Linear map (…, in) → (…, out). `weight` is (out, in) or, once masked, (live,); filled by `prepare`, not here."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.shape = (d_out, d_in)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.engine: Engine | None = None

    @property
    def mask(self) -> Mask | None:
        """The mask whose live values `weight` holds, None of a dense weight."""
        return None if self.engine is None else self.engine.mask

    def remask(self, mask: Mask, values: Tensor, engine: Engine) -> None:
        """Hold `values` (live,), in row-major order, under a mask from now on: its first, or another than before.

        `weight` is then another parameter, of another length. Raises ValueError for a mask of another shape, for values
        that are not as many as it has live weights, and for an engine that was made for another mask.
        """
        if mask.shape != self.shape:
            raise ValueError(f"a mask of shape {mask.shape} on a weight of shape {self.shape}")
        if values.shape != (mask.count,):
            raise ValueError(f"values of shape {tuple(values.shape)} under a mask of {mask.count} live weights")
        if engine.mask != mask:
            raise ValueError(f"an engine of mask {engine.mask.fingerprint} under mask {mask.fingerprint}")
        self.weight, self.engine = nn.Parameter(values.clone()), engine  # in memory as torch aligns it
        self.refresh()

    def refresh(self) -> None:
        """Tell the engine that the weight was changed in place."""
        if self.engine is not None:
            self.engine.refresh(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.engine is None:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = self.engine(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)
