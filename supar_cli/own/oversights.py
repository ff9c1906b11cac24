"""What loops do around a prepared model that breaks no rule but is hardly meant: warned of once, at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from supar_cli.own.parameters import local_shard, shown, warn_caller

NORM_TOLERANCE = 1e-5  # chosen: norms of the same values on two devices agree to 1e-6
PEAK_TOLERANCE = 1.25  # chosen: peaks between two steps, and cycles that overshoot, are closer to 1


class InitialValues:
    """The values that prepare gave to tensors, by their norms, so that later initialisation does not replace them unseen."""

    @torch.no_grad()
    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        self._given = {name: (tensor, tensor._version, _norm(tensor)) for name, tensor in tensors.items()}

    def forget(self) -> None:
        """Ask no more: other values were loaded, or training has begun."""
        self._given = {}

    @torch.no_grad()
    def warn_if_replaced(self, now: Mapping[str, nn.Parameter]) -> None:
        """Warn of tensors that were written to and have another norm; then ask no more."""
        given, self._given = self._given, {}
        written = {
            name: norm
            for name, (tensor, version, norm) in given.items()
            if now.get(name) is tensor and tensor._version != version
        }
        names = [
            name for name, norm in written.items() if not math.isclose(_norm(now[name]), norm, rel_tol=NORM_TOLERANCE)
        ]
        if names:
            what = "its values were changed after prepare had given it the plan's"
            remedy = "initialise the model before prepare; to keep values of yours, name the others in initialise="
            warn_caller(f"{shown(names)}: {what}; {remedy}")


class PeakRate:
    """The largest rate of a loop, divided by the plan's: a schedule's is 1, a script's own peak is another one."""

    def __init__(self) -> None:
        self._largest = self._last = 0.0
        self._has_warned = False

    def see(self, factor: float, tuned: float) -> None:
        """Take the factor of a step; warn once, when rates fall after a peak far below the plan's, or are far above it."""
        falls, self._last, self._largest = factor < self._last * (1 - 1e-9), factor, max(self._largest, factor)
        if not self._has_warned and (self._largest > PEAK_TOLERANCE or (falls and self._largest * PEAK_TOLERANCE < 1)):
            self._has_warned = True
            what = f"the loop's largest rate is {self._largest:.3g} times the plan's, {tuned:g}: what was tuned is not trained"
            warn_caller(
                f"{what}; expected a factor whose peak is 1: prepared.set_rate(factor * plan.hyperparameters.lr)"
            )


def warn_of_untrained(tensors: Mapping[str, nn.Parameter], held: set[int], present: set[int]) -> None:
    """Warn where no tensor of an optimizer (`present`) has a gradient, and of those that have one but no optimizer (`held`)."""
    if not any(tensor.grad is not None for tensor in tensors.values() if id(tensor) in present):
        what = "the step changes nothing, as no tensor of the optimizer has a gradient"
        remedy = "if a copy of the prepared model is trained: prepared.attach(copy), or prepared.optimizer(copy)"
        warn_caller(f"optimizer: {what}; {remedy}")
    if names := [name for name, tensor in tensors.items() if tensor.grad is not None and id(tensor) not in held]:
        what = "has a gradient and is in no optimizer that prepared made or keeps"
        warn_caller(f"{shown(names)}: {what}; expected prepared.keep(optimizer) for each")


def _norm(tensor: Tensor) -> float:
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(local_shard(tensor).detach(), dtype=precision))
