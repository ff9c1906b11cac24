"""Masks of a prepared model that change while it trains: chosen after a step, the same in all processes, and put in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from supar_cli.errors import InputError
from supar_cli.own.guard import STEP
from supar_cli.own.initial import masks_of, wanted_masks
from supar_cli.own.masked_model import MaskedModel
from supar_cli.own.parameters import local_shard, shard_like, shown, sum_shards_, whole
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.mask_files import read_masks
from supar_cli.sparse.masks import Mask
from supar_cli.sparse.updates import grow_largest, keep_largest, random_scores
from supar_cli.training.prepare import stream_name

MASKS = "masks.safetensors"

States = Mapping[str, Mapping[str, Any]]  # what an optimizer keeps of each tensor, by the tensor's name


@torch.no_grad()
def move(masked: MaskedModel, states: States) -> None:
    """Change the masks after a step, as the plan says; grown weights start at 0 with the plan's moments. Collective.

    Raises InputError, in all processes and before anything is changed, where the masks differ between them.
    """
    schedule, step = masked.schedule, masked.step
    assert schedule is not None
    is_falling = (
        schedule.updates.start is not None
    )  # frozen tensors are pruned too, as the plan says how many weights live
    moving = [name for name in masked.dead if is_falling or masked.tensors[name].requires_grad]
    masks = {name: _chosen(masked, schedule, name) for name in moving}
    _require_same(masks, step)
    for name, mask in masks.items():
        dead, tensor, state = masked.dead[name], masked.tensors[name], states.get(name, {})
        grown = torch.from_numpy(mask.alive() & ~dead.mask.alive())
        dead.move(mask, tensor)
        dead.zero_(tensor)
        if not schedule.stores_dense(step):
            dead.zero_moments_(state, tensor.shape)
            if tensor.grad is not None:  # of a loop that steps after this, which would give dead weights moments
                dead.zero_(tensor.grad)
        if schedule.updates.moments == "mean" and (count := int(torch.count_nonzero(grown))):
            for moment in dead.moments(state, tensor.shape):
                _fill_squares(moment, grown, mask.count - count)
    masked.masks |= masks
    masked.mark(masks)


def _chosen(masked: MaskedModel, schedule: MaskSchedule, name: str) -> Mask:
    """The mask of a tensor after this step."""
    row, step, updates = masked.rows[name], masked.step, schedule.updates
    weight, count, rule = (
        whole(masked.tensors[name]),
        schedule.dropped(row, step),
        (row.fan_in_axes, updates.min_per_neuron),
    )
    alive = torch.from_numpy(masked.masks[name].alive()).to(weight.device)
    chosen = keep_largest(
        weight, schedule.kept(row, step) - count, *rule, alive=None if updates.grow == "magnitude" else alive
    )
    if count:
        if updates.grow == "gradient":
            scores = masked.dead[name].gradient(name, step)
        else:
            scores = random_scores(row.shape, masked.plan.train.seed, stream_name(row), step).to(weight.device)
        chosen.view(-1)[grow_largest(scores, alive, count, *rule)] = True
    return Mask.of(chosen.cpu().numpy())


def _fill_squares(moment: Tensor, grown: Tensor, others: int) -> None:
    """Give grown weights the mean of the `others` that live, in a moment of squares: one that is nowhere negative.

    Without it the first step of a grown weight is too large, as the optimizer counts its steps for all weights alike.
    """
    values = local_shard(moment)
    found = torch.stack([values.double().sum(), torch.count_nonzero(values < 0).double()])
    if isinstance(moment, DTensor):
        sum_shards_(found, moment.device_mesh, moment.placements)
    total, negative = found.tolist()
    if not negative:
        values.masked_fill_(shard_like(grown, moment), total / max(1, others))


def _require_same(masks: Mapping[str, Mask], step: int) -> None:
    """Raise InputError, in all processes, where one of them has chosen other masks."""
    if not dist.is_initialized():
        return
    own = {name: mask.fingerprint for name, mask in masks.items()}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if differ := [name for name in own if any(other.get(name) != own[name] for other in found)]:
        what = f"the masks after step {step} differ between processes"
        raise InputError(
            f"{shown(differ)}: {what}; expected one model in all of them, with the same weights (DDP, FSDP2)"
        )


def masks_of_state(plan: Plan, state: Mapping[str, Any]) -> tuple[int, dict[str, Mask]]:
    """The step and the masks of a `state_dict` of a prepared model. Raises InputError for that of another plan."""
    if not isinstance(state, Mapping) or not {"plan", "step", "masks"} <= state.keys():
        raise InputError("state: expected what prepared.state_dict() returned")
    if state["plan"] != plan.hash():
        raise InputError(f"state: is of another plan, {str(state['plan'])[:19]}…; expected {plan.hash()[:19]}…")
    wanted = wanted_masks(plan, step := int(state["step"]))
    try:
        given = {
            name: Mask(wanted[name].shape, torch.as_tensor(bits).cpu().numpy().astype(np.uint8))
            for name, bits in state["masks"].items()
        }
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"state: masks: {error}; expected those of the plan's sparse tensors, packed") from None
    return step, masks_of(plan, given, step)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `Prepared.save` wrote into a folder, as `state_dict` returns it. Raises InputError or SetupError."""
    plan = read_plan(folder / "plan.yaml")
    step = int(plan.meta.get(STEP, 0))
    masks = read_masks(folder / MASKS, None, wanted_masks(plan, step))
    return {"plan": plan.hash(), "step": step, "masks": {name: mask.bits for name, mask in masks.items()}}
