"""Optimizers from a plan: tensors with equal numbers share a parameter group, and each tensor is in exactly one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from supar_cli.planning import schedule
from supar_cli.planning.plan import Plan
from supar_cli.planning.schedule import MaskSchedule


def build(plan: Plan, tensors: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD, fused where torch can, with one group for each distinct (lr, weight decay, epsilon).

    Each group has its `peak_lr`, `peak_decay`, the `names` of its tensors, and the `row` of one whose density moves; all
    others have as many weights and live ones. Where a step is a CUDA graph, rates are tensors on the device, which the graph
    reads. The plan and `tensors` must name the same tensors.
    """
    moving = MaskSchedule.of(plan)
    grouped: dict[tuple[float, ...], dict[str, Any]] = {}
    for row in plan.tensors:
        numbers = {"lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps}
        new: dict[str, Any] = {
            **numbers,
            "peak_lr": row.lr,
            "peak_decay": row.weight_decay,
            "names": [],
            "params": [],
            "row": None,
        }
        own = tuple(numbers.values())
        if moving is not None and moving.moves(row):
            own, new["row"] = (*own, row.size, row.kept), row
        group = grouped.setdefault(own, new)
        group["names"].append(row.name)
        group["params"].append(tensors[row.name])
    if sorted(row.name for row in plan.tensors) != sorted(tensors):
        raise AssertionError("a tensor is in no parameter group or in two")
    groups = list(grouped.values())
    device = next(iter(tensors.values())).device
    fused, has_graph = device.type in ("cpu", "cuda"), plan.run.cuda_graph == "on"
    if has_graph:
        for group in groups:
            group["lr"] = torch.zeros((), device=device)
    if plan.train.optimizer == "adamw":
        betas = (plan.train.betas[0], plan.train.betas[1])
        return torch.optim.AdamW(groups, betas=betas, fused=fused, capturable=has_graph)
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())  # fused SGD can't update them
    return torch.optim.SGD(groups, lr=0.0, momentum=plan.train.momentum, fused=fused and not is_sharded)


def state_names(plan: Plan) -> tuple[str, ...]:
    """The names of what torch's optimizer keeps for each tensor."""
    if plan.train.optimizer == "adamw":
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if plan.train.momentum else ()


def rate_factor(plan: Plan, step: int) -> float:
    """The schedule's factor on every peak learning rate at a step (0-based)."""
    keys = ("steps", "warmup_steps", "schedule", "final_lr_fraction", "decay_steps", "decay_shape")
    return schedule.factor(step, **{key: getattr(plan.train, key) for key in keys})


def set_rates(
    optimizer: torch.optim.Optimizer, factor: float, moving: MaskSchedule | None = None, step: int = 0
) -> None:
    """Set every group's learning rate to its peak times `factor`, and rate and decay by the density after `step` steps."""
    for group in optimizer.param_groups:
        lr, row = group["peak_lr"] * factor, group["row"]
        if moving is not None and row is not None:
            lr *= moving.rate_factor(row, step)
            group["weight_decay"] = group["peak_decay"] * moving.decay_factor(row, step)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def folds(plan: Plan, tensors: Iterable[str]) -> torch.Tensor:
    """The multiplier folded into each tensor, 1 if there is none, in the order of `tensors`."""
    rows = {row.name: row for row in plan.tensors}
    return torch.tensor([rows[name].fold or 1.0 for name in tensors])
