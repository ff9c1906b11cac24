"""The values that a user's model starts from: drawn, constant, the constructor's own scaled, or kept as they are."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import nn

from supar_cli.errors import InputError, suggestion
from supar_cli.own.dead_weights import DeadWeights
from supar_cli.own.parameters import local_shard, shard_like, total_square
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.mask_files import require_mask
from supar_cli.sparse.masks import Mask, WantedMask
from supar_cli.training.prepare import check_init, initial_values, make_masks, start_rows, to_dense, wanted_mask


def masks_of(plan: Plan, given: Mapping[str, Any] | None, step: int = 0) -> dict[str, Mask]:
    """The masks of all sparse tensors: the plan's, or those after a step, as masks or tensors whose non-zeros live.

    Raises InputError naming each tensor whose mask is missing or does not fit the plan.
    """
    wanted = wanted_masks(plan, step)
    if given is None:
        drawn = make_masks(plan)  # without those that are dense until masks move
        return {name: drawn[name] if name in drawn else _all_live(wanted[name].shape) for name in wanted}
    if not isinstance(given, Mapping):
        raise InputError(f"masks: {type(given).__name__}; expected a mask, or a tensor whose non-zeros live, by name")
    rows = {row.name: row for row in plan.tensors}
    problems = [f"masks: {name}: unknown tensor; {suggestion(name, rows)}" for name in given if name not in rows]
    problems += [
        f"masks: {name}: is missing; the plan keeps {wanted[name].kept}" for name in wanted if name not in given
    ]
    found: dict[str, Mask] = {}
    for name, mask in given.items():
        try:
            found[name] = mask if isinstance(mask, Mask) else Mask.of((torch.as_tensor(mask) != 0).cpu().numpy())
            require_mask(found[name], wanted.get(name))
        except (ValueError, TypeError, RuntimeError) as error:
            problems.append(f"masks: {name}: {error}")
    if problems:
        raise InputError(*problems)
    return {name: found[name] for name in wanted}


def wanted_masks(plan: Plan, step: int) -> dict[str, WantedMask]:
    """What the plan says of each mask after a step, by the tensor's name."""
    schedule, sparse = MaskSchedule.of(plan), [row for row in plan.tensors if row.kept < row.size]
    kept = {row.name: row.kept if schedule is None else schedule.kept(row, step) for row in sparse}
    return {row.name: wanted_mask(plan, row.model_copy(update={"kept": kept[row.name]})) for row in sparse}


def _all_live(shape: tuple[int, ...]) -> Mask:
    return Mask.of(np.ones(shape, np.bool_))


def names_to_initialise(plan: Plan, initialise: bool | Collection[str]) -> set[str]:
    """The tensors that get initial values: all, none, or those of the modules and tensors that are named."""
    names = {row.name for row in plan.tensors}
    if isinstance(initialise, bool):
        return names if initialise else set()
    if not isinstance(initialise, Collection):
        raise InputError(f"initialise: {initialise!r}; expected True, False, or names of modules or tensors")
    chosen, problems = set[str](), list[str]()
    for part in [initialise] if isinstance(initialise, str) else initialise:
        matching = {name for name in names if name == part or name.startswith(f"{part}.")}
        chosen |= matching
        if not matching:
            known = {name.rpartition(".")[0] for name in names} | names
            problems.append(f"initialise: {part}: no tensor of the plan has this name; {suggestion(part, known)}")
    if problems:
        raise InputError(*problems)
    return chosen


@torch.no_grad()
def fill(plan: Plan, tensors: Mapping[str, nn.Parameter], masks: Mapping[str, Mask], chosen: set[str]) -> None:
    """Give the chosen tensors their initial values; dead weights are those of the constructor where it is kept.

    Raises InputError for constructors' values that can't be scaled, and where a draw is not what the plan says.
    """
    problems: list[str] = []
    for row in start_rows(plan):
        if row.name in chosen:
            tensor, mask = tensors[row.name], masks.get(row.name)
            if row.init == "own" and row.init_std:
                problems += _scale(row, tensor, mask)
            else:
                _draw(plan, row, tensor, mask)
    if problems:
        raise InputError(*problems)


def _draw(plan: Plan, row: PlanTensor, tensor: nn.Parameter, mask: Mask | None) -> None:
    precise = np.float64 if tensor.dtype == torch.float64 else np.float32
    drawn = to_dense(initial_values(plan, row, mask, precise), mask)
    check_init(row, drawn.float(), plan.sparsity.pattern, mask)
    local_shard(tensor).copy_(shard_like(drawn, tensor))


def _scale(row: PlanTensor, tensor: nn.Parameter, mask: Mask | None) -> list[str]:
    """Scale the constructor's values to the plan's root mean square; problems where that is not possible."""
    if mask is not None:
        DeadWeights(mask, tensor).zero_(tensor)
    measured = sqrt(float(total_square([(1.0, tensor)])) / (row.size if mask is None else mask.count))
    if not 0 < measured < float("inf"):
        what = f"{row.name}: init: own scales what the model's constructor gave it, which has the size {measured}"
        return [f"{what}; expected numbers that are not all 0"]
    assert row.init_std is not None
    local_shard(tensor).mul_(row.init_std / measured)
    return []


@torch.no_grad()
def keep_padding(model: nn.Module, tensors: Mapping[str, nn.Parameter], chosen: set[str]) -> None:
    """Set the padding rows of embeddings to 0, as torch's constructor does: no gradient of a look-up reaches them."""
    filled = {id(tensors[name]) for name in chosen}
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.padding_idx is None:
            continue
        if id(module.weight) in filled:
            is_padding = torch.zeros(module.weight.shape)
            is_padding[module.padding_idx] = 1
            local_shard(module.weight).masked_fill_(shard_like(is_padding, module.weight) == 1, 0)


@torch.no_grad()
def require_kept(
    plan: Plan, tensors: Mapping[str, nn.Parameter], dead: Mapping[str, DeadWeights], kept: set[str], is_given: bool
) -> None:
    """Raise InputError where values that are kept live at dead weights, unless masks were given to prune dense ones by.

    Warn of kept tensors that are all 0.
    """
    problems, empty = list[str](), list[str]()
    for row in plan.tensors:
        if row.name not in kept:
            continue
        values = local_shard(tensors[row.name])
        if row.init_std and values.numel() and not values.any():
            empty.append(row.name)
        if row.name in dead and (live := int(dead[row.name].count_live(values))):
            is_sparse = int(torch.count_nonzero(values)) <= dead[row.name].live_here
            if is_sparse or not is_given:
                problems.append(live_text(row.name, live))
    if problems:
        remedy = "expected the values of a model of this plan and seed; pass masks= to prune dense values by masks"
        raise InputError(*problems, f"initialise: the values of these tensors are kept; {remedy}")
    if empty:
        text = "all their values are 0, so they pass nothing on; expected the values of a trained model"
        warnings.warn(f"{', '.join(empty)}: {text}", stacklevel=3)


def live_text(name: str, count: int) -> str:
    """What is said of a tensor with weights that live where the plan has dead ones."""
    return f"{name}: {count} weights live where the plan has dead ones"
