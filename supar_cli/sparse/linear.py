"""The linear layer of every model: its weight stored dense, or as live values that an engine multiplies with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Engine(nn.Module):
    """Y = X·Wᵀ of a masked weight W (out, in), given as its live values in row-major order, float32.

    An engine holds what follows from the mask, as buffers, and no parameter: optimizer state, gradients, clipping and
    checkpoints are of live values alone and do not know which engine runs.
    """

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """(…, in) and (live,) → (…, out), differentiable in both."""
        raise NotImplementedError

    def refresh(self, values: Tensor) -> None:
        """Take over values that were changed in place. Call it before the next forward pass."""


class Linear(nn.Module):
    """Linear map (…, in) → (…, out). `weight` is (out, in) or, once masked, (live,); filled by `initial`, not here."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.engine: Engine | None = None

    def mask(self, values: Tensor, engine: Engine) -> None:
        """Keep live values only, in row-major order, from now on multiplied by an engine."""
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
