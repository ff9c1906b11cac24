"""What loops do around a prepared model that breaks no rule but is hardly meant: warned of once, at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from supar_cli.own.parameters import local_shard, shown, warn_caller

NORM_TOLERANCE = 1e-5  # chosen: norms of the same values on two devices agree to 1e-6


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
