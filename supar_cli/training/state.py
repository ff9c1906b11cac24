"""What a run is between two steps: masks, values and moments by the plan's names, and the same run under other masks."""

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

    `values` are a tensor's live weights (live,), in row-major order, where it has a mask, else the tensor in its shape.
    `moments` are what the optimizer keeps of it, by torch's names: (live,) as the values, in the mask's shape where they are
    of every position, or () where they count steps. Tensors that ranks hold in shards may be shards here too.
    """

    step: int
    masks: dict[str, Mask]
    values: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]

    @classmethod
    def capture(cls, step: int, model: SparseModel, optimizer: torch.optim.Optimizer, gather: bool = False) -> State:
        """A copy in host memory: training goes on in the originals.

        Shards stay shards, unless `gather`: then each rank, all of which call it, gets the whole tensors.
        """
        values = {name: _host_copy(tensor, gather) for name, tensor in model.tensors.items()}
        moments = {}
        for name, tensor in model.tensors.items():
            kept = {key: value for key, value in optimizer.state[tensor].items() if value is not None}
            moments[name] = {key: _host_copy(torch.as_tensor(value), gather) for key, value in kept.items()}
        return cls(step, dict(model.masks), values, moments)

    @classmethod
    def of_model(cls, step: int, model: SparseModel, moment_names: Iterable[str]) -> State:
        """The model's own tensors, to be filled in place, and zeros for moments, on their devices and in their shards."""
        values = {name: tensor.detach() for name, tensor in model.tensors.items()}
        names = list(moment_names)
        moments = {
            # a counter is on the device where fused Adam keeps it
            name: {k: torch.zeros((), device=v.device) if k == "step" else torch.zeros_like(v) for k in names}
            for name, v in values.items()
        }
        return cls(step, dict(model.masks), values, moments)

    @classmethod
    def zeros(cls, plan: Plan, masks: Mapping[str, Mask]) -> State:
        """A plan's tensors under these masks, all zero, without moments: what a model is built from before it is filled."""
        shapes = {row.name: (masks[row.name].count,) if row.name in masks else tuple(row.shape) for row in plan.tensors}
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return cls(0, dict(masks), values, {name: {} for name in values})

    def remasked(self, masks: Mapping[str, Mask]) -> State:
        """The same run under other masks of some tensors, with more, fewer or other live weights.

        Weights alive before and after keep their values and moments; grown ones start with 0. One index map moves a
        tensor's values and each of its moments; counters stay, and so do moments of every position. Raises ValueError for
        a mask of another shape and for shards.
        """
        values, moments = dict(self.values), dict(self.moments)
        for name, new in masks.items():
            old = self.masks.get(name)
            index = IndexMap.between(old or Mask.of(np.ones(tuple(self.values[name].shape), np.bool_)), new)
            values[name] = _carried(self.values[name], old, index)
            moments[name] = {key: _carried(moment, old, index) for key, moment in self.moments[name].items()}
        return State(self.step, {**self.masks, **masks}, values, moments)

    def load_moments(self, model: SparseModel, optimizer: torch.optim.Optimizer) -> None:
        """Hand the moments to an optimizer of the model's tensors, each to where its tensor is."""
        for name, tensor in model.tensors.items():
            optimizer.state[tensor] = {key: _placed(moment, tensor) for key, moment in self.moments[name].items()}


def _host_copy(tensor: Tensor, gather: bool) -> Tensor:
    whole = tensor.full_tensor() if gather and isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True).contiguous()


def _carried(tensor: Tensor, old: Mask | None, index: IndexMap) -> Tensor:
    """A tensor's values or one of its moments under another mask than `old`; None: it had none."""
    if isinstance(tensor, DTensor):
        raise ValueError("a shard can't be moved to another mask; expected whole tensors")
    if not tensor.shape:
        return tensor
    if old is None:
        return index.carry(tensor.flatten())
    if tuple(tensor.shape) == (old.count,):
        return index.carry(tensor)
    if tuple(tensor.shape) == old.shape:
        return tensor
    raise ValueError(f"{tuple(tensor.shape)} is neither of the {old.count} live weights nor of all of {old.shape}")


def _placed(moment: Tensor, tensor: Tensor) -> Tensor:
    """A moment on its tensor's device, in the same shards."""
    if isinstance(moment, DTensor):
        return moment
    moment = moment.to(tensor.device)
    if isinstance(tensor, DTensor) and moment.shape:
        return distribute_tensor(moment, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return moment
