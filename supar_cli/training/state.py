"""The state of a run between two steps: masks, values and moments by the plan's names. `remasked` changes the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from supar_cli.planning.plan import Plan
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.training.prepare import SparseModel

GrownMoments = Literal["zero", "mean"]  # what the second moment of a grown weight starts at


@dataclass(frozen=True, slots=True)
class State:
    """A run after `step` steps.

    The value of a masked tensor is its live weights (live,) in row-major order, or the whole tensor, zero where dead, where
    every position has moments; of another one, the tensor in its shape. `moments` is what the optimizer keeps, by torch's
    names: shaped as the value, or () if it counts steps. Values and moments may be shards.
    """

    step: int
    masks: dict[str, Mask]
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]

    @classmethod
    def capture(cls, step: int, model: SparseModel, optimizer: torch.optim.Optimizer, gather: bool = False) -> State:
        """Copy the state to host memory, so that training may go on: from a device to pinned memory, waiting for it once.

        Shards stay shards. With `gather` every rank, and all must call it, gets whole tensors, not pinned.
        """
        values = {name: _host_copy(tensor, gather) for name, tensor in model.tensors.items()}
        moments = {}
        for name, tensor in model.tensors.items():
            kept = {key: value for key, value in optimizer.state[tensor].items() if value is not None}
            moments[name] = {key: _host_copy(torch.as_tensor(value), gather) for key, value in kept.items()}
        if any(tensor.is_cuda for tensor in model.tensors.values()):
            torch.cuda.current_stream().synchronize()
        return cls(step, dict(model.masks), values, moments)

    @classmethod
    def of_model(cls, step: int, model: SparseModel, moment_names: Iterable[str]) -> State:
        """The model's own tensors, to be filled in place, and moments of zeros with the same devices and shards."""
        values = {name: tensor.detach() for name, tensor in model.tensors.items()}
        names = list(moment_names)
        moments = {
            # fused Adam keeps its counter on the device
            name: {k: torch.zeros((), device=v.device) if k == "step" else torch.zeros_like(v) for k in names}
            for name, v in values.items()
        }
        return cls(step, dict(model.masks), values, moments)

    @classmethod
    def zeros(cls, step: int, plan: Plan, masks: Mapping[str, Mask]) -> State:
        """A plan's tensors after a step under these masks, all zero and without moments."""
        schedule = MaskSchedule.of(plan)
        live = {} if schedule is not None and schedule.stores_dense(step) else masks
        shapes = {row.name: (live[row.name].count,) if row.name in live else tuple(row.shape) for row in plan.tensors}
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return cls(step, dict(masks), values, {name: {} for name in values})

    def remasked(self, masks: Mapping[str, Mask], grown: GrownMoments = "zero") -> State:
        """The same run with other masks for some tensors, with more, fewer or other live weights.

        Weights that stay alive keep their values and moments; grown ones start at 0, and their second moment, with `mean`, at
        the mean of those that stay. A tensor that was stored whole is stored by its live weights. Raises ValueError for
        a mask of another shape and for shards.
        """
        values, moments = dict(self.values), dict(self.moments)
        for name, new in masks.items():
            old, value = self.masks.get(name), self.values[name]
            if old is None or tuple(value.shape) == old.shape != (old.count,):  # every position has a value
                old = Mask.of(np.ones(tuple(value.shape), np.bool_))
            elif tuple(value.shape) != (old.count,):
                text = f"is neither ({old.count},), the live weights, nor the whole {old.shape}"
                raise ValueError(f"{name}: {tuple(value.shape)} {text}")
            values[name], moments[name] = carry(IndexMap.between(old, new), value, self.moments[name], grown)
        return State(self.step, {**self.masks, **masks}, values, moments)

    def load_moments(self, model: SparseModel, optimizer: torch.optim.Optimizer) -> None:
        """Give the moments to an optimizer of the model's tensors, on their devices and in their shards."""
        for name, tensor in model.tensors.items():
            optimizer.state[tensor] = {key: _placed(moment, tensor) for key, moment in self.moments[name].items()}


def _host_copy(tensor: Tensor, gather: bool) -> Tensor:
    whole = tensor.full_tensor() if gather and isinstance(tensor, DTensor) else tensor
    # torch copies to pinned memory where it does not wait, and keeps that for the next checkpoint
    return whole.detach().contiguous().to("cpu", non_blocking=not gather, copy=True)


SECOND_MOMENT = "exp_avg_sq"  # torch's name of Adam's


def carry(
    index: IndexMap, value: Tensor, moments: Mapping[str, Tensor], grown: GrownMoments = "zero"
) -> tuple[Tensor, dict[str, Tensor]]:
    """A tensor's values and moments under another mask: one index map moves them all, and counters stay.

    Raises ValueError for shards.
    """
    if isinstance(value, DTensor):
        raise ValueError("a shard can't move to another mask; expected whole tensors")
    found: dict[str, Tensor] = {}
    for key, moment in moments.items():
        start = 0.0
        if grown == "mean" and key == SECOND_MOMENT and len(index.old):
            start = float(moment.flatten()[torch.from_numpy(index.old).to(moment.device)].double().mean())
        found[key] = index.carry(moment.flatten(), start) if moment.shape else moment
    return index.carry(value.flatten()), found


def _placed(moment: Tensor, tensor: Tensor) -> Tensor:
    """A moment on the device and in the shards of its tensor."""
    if isinstance(moment, DTensor):
        return moment
    moment = moment.to(tensor.device)
    if isinstance(tensor, DTensor) and moment.shape:
        return distribute_tensor(moment, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return moment
