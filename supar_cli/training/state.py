"""The state of a run between two steps: masks, values and moments by the plan's names. `remasked` changes the masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import IndexMap, Mask
from supar_cli.training.prepare import SparseModel


@dataclass(frozen=True, slots=True)
class State:
    """A run after `step` steps.

    The value of a masked tensor is its live weights (live,) in row-major order; of another one, the tensor in its shape.
    `moments` is what the optimizer keeps, by torch's names: shaped as the value, in the mask's shape if it covers every
    position, or () if it counts steps. Values and moments may be shards.
    """

    step: int
    masks: dict[str, Mask]
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]

    @classmethod
    def capture(cls, step: int, model: SparseModel, optimizer: torch.optim.Optimizer, gather: bool = False) -> State:
        """Copy the state to host memory, so that training may go on.

        Shards stay shards. With `gather` every rank, and all must call it, gets whole tensors.
        """
        values = {name: _host_copy(tensor, gather) for name, tensor in model.tensors.items()}
        moments = {}
        for name, tensor in model.tensors.items():
            kept = {key: value for key, value in optimizer.state[tensor].items() if value is not None}
            moments[name] = {key: _host_copy(torch.as_tensor(value), gather) for key, value in kept.items()}
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
    def zeros(cls, plan: Plan, masks: Mapping[str, Mask]) -> State:
        """A plan's tensors under these masks, all zero and without moments."""
        shapes = {row.name: (masks[row.name].count,) if row.name in masks else tuple(row.shape) for row in plan.tensors}
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return cls(0, dict(masks), values, {name: {} for name in values})

    def remasked(self, masks: Mapping[str, Mask]) -> State:
        """The same run with other masks for some tensors, with more, fewer or other live weights.

        Weights that stay alive keep their values and moments; grown ones start at 0. One index map moves a tensor's values
        and each of its moments; counters and moments of every position stay. Raises ValueError for a mask of another shape
        and for shards.
        """
        values, moments = dict(self.values), dict(self.moments)
        for name, new in masks.items():
            old = self.masks.get(name)
            index = IndexMap.between(old or Mask.of(np.ones(tuple(self.values[name].shape), np.bool_)), new)
            values[name] = _carried(self.values[name], old, index)
            moments[name] = {key: _carried(moment, old, index) for key, moment in self.moments[name].items()}
        return State(self.step, {**self.masks, **masks}, values, moments)

    def load_moments(self, model: SparseModel, optimizer: torch.optim.Optimizer) -> None:
        """Give the moments to an optimizer of the model's tensors, on their devices and in their shards."""
        for name, tensor in model.tensors.items():
            optimizer.state[tensor] = {key: _placed(moment, tensor) for key, moment in self.moments[name].items()}


def _host_copy(tensor: Tensor, gather: bool) -> Tensor:
    whole = tensor.full_tensor() if gather and isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


def _carried(tensor: Tensor, old: Mask | None, index: IndexMap) -> Tensor:
    """Move a tensor's values or one of its moments from the mask `old`, None if it had no mask, to the new one."""
    if isinstance(tensor, DTensor):
        raise ValueError("a shard can't move to another mask; expected whole tensors")
    if not tensor.shape:
        return tensor
    if old is None:
        return index.carry(tensor.flatten())
    if tuple(tensor.shape) == (old.count,):
        return index.carry(tensor)
    if tuple(tensor.shape) == old.shape:
        return tensor
    raise ValueError(f"{tuple(tensor.shape)} is neither ({old.count},), the live weights, nor the whole {old.shape}")


def _placed(moment: Tensor, tensor: Tensor) -> Tensor:
    """A moment on the device and in the shards of its tensor."""
    if isinstance(moment, DTensor):
        return moment
    moment = moment.to(tensor.device)
    if isinstance(tensor, DTensor) and moment.shape:
        return distribute_tensor(moment, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return moment
