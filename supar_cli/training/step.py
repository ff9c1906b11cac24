"""The end of an optimizer step: gradients clipped, weights updated, and what the step gave, read when it is needed.

On CUDA the device decides on both, so that the host launches the next step while this one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supar_cli.training.tasks import Batch

ReadFigures = Callable[[], list[float]]


class StepResult(NamedTuple):
    """Of the whole batch: the loss before the update, the gradient's norm before clipping, and on request that by role."""

    loss: float
    grad_norm: float
    grad_norm_by_role: dict[str, float]


class LaunchedStep(NamedTuple):
    """A step that a device may still compute. `norms` (tensors,) are those of its gradients; `read` waits for its figures."""

    done: int  # steps before it
    batch: Batch
    own_loss: Tensor
    norms: Tensor
    read: ReadFigures


class ClippedUpdate:
    """Updates weights by clipped gradients, unless the loss or the gradients' norm is not finite.

    Where it `runs_ahead`, a step that is not finite stops all that follow, as the host launches them before it knows: they
    change neither weights nor moments until `allow_again` is called.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self._optimizer: Any = optimizer
        self._grad_clip = grad_clip
        device = optimizer.param_groups[0]["params"][0].device
        self.runs_ahead = device.type == "cuda" and bool(optimizer.defaults["fused"])
        self._stopped, self._one = torch.zeros((), device=device), torch.ones((), device=device)

    def apply(self, gradients: list[Tensor], figures: Tensor) -> None:
        """Update the weights, launched only where it runs ahead; `figures` are loss, votes and norm."""
        if not self.runs_ahead:
            found = figures.tolist()
            if all(map(math.isfinite, found)):
                if 0 < self._grad_clip < found[-1]:
                    torch._foreach_mul_(gradients, self._grad_clip / (found[-1] + 1e-6))
                self._optimizer.step()
            return
        # 1 from now on if a figure is not finite; figures are multiplied by one
        torch._amp_foreach_non_finite_check_and_unscale_([figures], self._stopped, self._one)
        self._optimizer.found_inf = self._stopped  # torch's names, of its GradScaler
        if self._grad_clip:  # fused updates divide gradients by it
            self._optimizer.grad_scale = ((figures[-1] + 1e-6) / self._grad_clip).clamp(min=1.0)
        self._optimizer.step()

    def allow_again(self, is_first: bool) -> None:
        """Let steps change weights again after one that was not finite, the optimizer's first or a later one."""
        self._stopped.zero_()
        if is_first:  # fused SGD has made momenta that were never written
            self._optimizer.state.clear()


def read_later(figures: Tensor) -> ReadFigures:
    """Copy figures to host memory; the function returned waits for them, but not for what is launched after this."""
    host = figures.to("cpu", non_blocking=True)  # torch pins the memory of such a copy
    if figures.device.type != "cuda":
        return host.tolist
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
