"""A model ready to train: built from a plan, filled through the raw parameters, masked, and checked against the plan."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.training import masks
from supar_cli.training.models.transformer import Transformer, named_tensors


@dataclass(slots=True)
class Prepared:
    """A model, its parameters by plan name, the masks (numpy, True where alive) and their complement on the device."""

    model: Transformer
    tensors: dict[str, nn.Parameter]
    masks: dict[str, NDArray[np.bool_]]
    dead: dict[str, Tensor]


def prepare(plan: Plan, device: torch.device) -> Prepared:
    """Build, initialise, mask and check. Raises InputError where plan and model disagree, naming the tensors."""
    model = Transformer(plan.model)
    tensors = named_tensors(model)
    _require_same_tensors(plan, tensors)
    drawn = masks.draw_all(plan)
    with torch.no_grad():
        for row in plan.tensors:
            tensors[row.name].copy_(torch.from_numpy(_values(row, plan.train.seed, drawn.get(row.name))))
    for row in plan.tensors:
        check(row, tensors[row.name], plan.sparsity.pattern, drawn.get(row.name))
    model.to(device)
    dead = {name: torch.from_numpy(~mask).to(device) for name, mask in drawn.items()}
    return Prepared(model, named_tensors(model), drawn, dead)


def _require_same_tensors(plan: Plan, tensors: dict[str, nn.Parameter]) -> None:
    planned = {row.name: tuple(row.shape) for row in plan.tensors}
    built = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(planned) != len(plan.tensors):
        names = [row.name for row in plan.tensors]
        raise InputError(f"tensors: {next(n for n in names if names.count(n) > 1)} stands twice in the plan")
    different = [
        f"  {name}: the plan has {planned[name]}, the model {built[name]}"
        for name in planned
        if name in built and planned[name] != built[name]
    ]
    different += [f"  {name}: in the plan only" for name in planned if name not in built]
    different += [f"  {name}: in the model only" for name in built if name not in planned]
    if different:
        raise InputError(
            "tensors: the plan's tensors are not the model's; expected the same names and shapes:\n"
            + "\n".join(different)
        )


def _values(row: PlanTensor, seed: int, mask: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Initial values: gains 1, otherwise normal with the plan's deviation, zero where dead."""
    if row.role == "norm":
        return np.ones(row.shape, np.float32)
    if row.init_std == 0:
        return np.zeros(row.shape, np.float32)
    normal = np.random.Generator(masks.stream(seed, f"init:{row.name}")).standard_normal(row.size, np.float32)
    values = (normal * np.float32(row.init_std)).reshape(row.shape)
    return values if mask is None else np.where(mask, values, np.float32(0))


def check(row: PlanTensor, tensor: Tensor, pattern: str, mask: NDArray[np.bool_] | None) -> None:
    """Compare a tensor's measured deviation and live count with the plan's, within 6 standard errors.

    A normal sample's deviation has the relative standard error 1/√(2n): false alarms are below 1e-8 a tensor.
    """
    alive = row.size if mask is None else int(mask.sum())
    allowed = 6 * sqrt(row.kept * (1 - row.density)) if pattern == "bernoulli" else 0
    if abs(alive - row.kept) > allowed:
        raise InputError(f"{row.name}: {alive} weights are alive, the plan keeps {row.kept}")
    if not alive:
        raise InputError(f"{row.name}: its mask has no live weight; expected a higher density or another seed")
    values = tensor.detach().double() - (1.0 if row.role == "norm" else 0.0)
    measured = sqrt(float(values.square().sum()) / alive)
    if abs(measured - row.init_std) > row.init_std * (6 / sqrt(2 * alive) + 1e-6):
        raise InputError(f"{row.name}: measured init std {measured:.6g}, the plan says {row.init_std:.6g}")
