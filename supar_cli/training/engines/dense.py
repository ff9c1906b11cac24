"""The dense engine: weights stored dense and kept masked in place, gradients masked once a step.

A dead weight starts at zero and its masked gradient is zero, so momentum, update and decay are zero too and it stays zero:
no `weight * mask` in any forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """Linear map (…, in) → (…, out). `weight` is (out, in); filled by `initial`, not here."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def mask_gradients(parameters: Mapping[str, Tensor], dead: Mapping[str, Tensor]) -> None:
    """Zero each gradient at its dead weights. `dead` is True where a weight is not alive."""
    for name, where in dead.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.masked_fill_(where, 0.0)
