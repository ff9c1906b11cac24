"""The parameters of a user's model under the plan's names, and the models that can't be prepared."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.nn.parameter import is_lazy

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan

# parts of a name that torch.compile and activation checkpointing insert, at any depth
_INSERTED = ("_orig_mod", "_checkpoint_wrapped_module")


# the frames of supar and of the packages beside torch are not the line that a warning is about
_NOT_THE_USERS = (f"{Path(__file__).parents[1]}/", f"{Path(torch.__file__).parents[1]}/")

NAMES_SHOWN = 3  # chosen: enough to find a group by


def warn_caller(message: str) -> None:
    """Warn at the user's line that led here, however many hooks and wrappers of others lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def shown(names: Iterable[str]) -> str:
    """The first few of some names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return ", ".join(found[:NAMES_SHOWN]) + more


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


def named_parameters(model: nn.Module, planned: Iterable[str]) -> dict[str, nn.Parameter]:
    """Every parameter by each of its names, also those of tied ones, without what wrappers such as DDP put before them."""
    found = {plain_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
    prefix = _prefix(found, planned)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def submodules(model: nn.Module, planned: Iterable[str]) -> dict[str, nn.Module]:
    """The modules by their names without wrappers; `""` is the model inside of all wrappers."""
    names = {plain_name(name) for name, _ in model.named_parameters()}
    prefix = _prefix(names, planned)
    found = {"": model}
    for name, module in model.named_modules():
        inner = f"{plain_name(name)}."
        if inner.startswith(prefix):  # of a wrapper and what it wraps, both of one name, the last one is inside
            found[inner.removeprefix(prefix).removesuffix(".").strip(".")] = module
    return found


def _prefix(names: Collection[str], planned: Iterable[str]) -> str:
    """What wrappers put before all names: `module.`, once for each of them, unless the plan's own names begin so."""
    known, prefix = set(planned), ""
    while names and all(name.startswith(f"{prefix}module.") for name in names):
        if any(name.removeprefix(prefix) in known for name in names):
            break
        prefix += "module."
    return prefix


def _site(name: str) -> str:
    """A parameter's name with `*` for the numbers of blocks."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def match(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The model's parameters by the plan's names, each tensor once; tied rows are left out.

    Raises InputError with all differences between model and plan, and for a model that can't be prepared.
    """
    refuse(model)
    named = named_parameters(model, (row.name for row in plan.tensors))
    problems, claimed = list[str](), dict[int, str]()
    for row in plan.tensors:
        tensor = named.get(row.name)
        if tensor is None:
            problems.append(f"{row.name}: in the plan only")
        elif list(tensor.shape) != row.shape:
            problems.append(f"{row.name}: the plan has the shape {row.shape}, the model {list(tensor.shape)}")
        elif row.tied_to is not None:
            if named.get(row.tied_to) is not tensor:
                problems.append(f"{row.name}: the plan ties it to {row.tied_to}; the model has two tensors")
        elif claimed.setdefault(id(tensor), row.name) != row.name:
            problems.append(f"{row.name}: the model ties it to {claimed[id(tensor)]}; the plan has two tensors")
    of_rows = {id(named[row.name]) for row in plan.tensors if row.name in named}
    unclaimed = {id(tensor): name for name, tensor in reversed(named.items()) if id(tensor) not in of_rows}
    ignored = {_site(name) for name in getattr(plan.model, "ignored", ())}  # of further blocks too: layers may differ
    names = reversed(unclaimed.values())
    problems += [f"{name}: in the model only" for name in names if _site(name) not in ignored]
    hooks = getattr(plan.model, "hooks", {})
    modules = submodules(model, (row.name for row in plan.tensors))
    problems += [f"model.hooks.{name}: the model has no such module" for name in hooks if name not in modules]
    if problems:
        what = "the plan's tensors are not the model's; expected the same names and shapes"
        raise InputError("\n  ".join([f"tensors: {what}:", *problems]))
    return {row.name: named[row.name] for row in plan.tensors if row.tied_to is None}


def refuse(model: nn.Module) -> None:
    """Raise InputError for a model that can't be prepared, naming every reason."""
    problems: list[str] = []
    sharded: set[int] = set()
    for name, module in model.named_modules():
        named = module.named_parameters()
        where = name or type(module).__name__
        if isinstance(module, FullyShardedDataParallel):
            problems.append(
                f"{where}: FSDP1 flattens parameters, so masks can't follow them; expected fully_shard (FSDP2)"
            )
        elif type(module).__module__.partition(".")[0] == "deepspeed":
            problems.append(
                f"{where}: a DeepSpeed engine moves parameters into buffers of its own; expected DDP or FSDP2"
            )
        if isinstance(module, FSDPModule):
            sharded |= {id(tensor) for _, tensor in named}
    for name, tensor in model.named_parameters():
        if reason := _reason_against(tensor, id(tensor) in sharded):
            problems.append(f"{plain_name(name)}: {reason}")
    if problems:
        raise InputError(*problems)


def _reason_against(tensor: Tensor, is_fsdp: bool) -> str | None:
    """Why a parameter can't be prepared; None if it can."""
    if is_lazy(tensor):
        return "has no shape yet; expected a model that has seen a batch, so that lazy modules know their sizes"
    if tensor.is_meta:
        return (
            "is on the meta device and has no values; call model.to_empty(device=…) and fill the model's buffers first, "
            "then prepare it"
        )
    if hasattr(tensor, "ds_id"):
        return "belongs to DeepSpeed ZeRO; expected DDP or FSDP2"
    if isinstance(tensor, DTensor):
        if not is_fsdp or sum(not placement.is_replicate() for placement in tensor.placements) > 1:
            return f"is sharded {tensor.placements} by tensor parallelism; expected FSDP2's data parallelism alone"
        return None
    is_plain = not hasattr(type(tensor), "__tensor_flatten__") and not hasattr(tensor.data, "__tensor_flatten__")
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not is_plain:
        what = f"{type(tensor.data).__name__} of {tensor.dtype}"
        return f"is {what}, quantised or complex; expected a plain tensor of float16, bfloat16, float32 or float64"
    return None


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of it, so that writing changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is sharded. Collective for shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(values: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes hold, sharded as another one; no communication."""
    if not isinstance(tensor, DTensor):
        return values.to(tensor.device)
    values = values.to(tensor.device_mesh.device_type)
    sharded = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return sharded.to_local().clone()


def total_square(tensors: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum of the squares of factor·tensor over all processes, in float32 or double precision. Collective for shards."""
    alike: dict[Any, list[tuple[float, Tensor]]] = {}
    for factor, tensor in tensors:
        spread = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        local = local_shard(tensor)
        alike.setdefault((spread, local.device, local.dtype), []).append((factor, local))
    total = torch.zeros(())
    for (spread, device, dtype), members in alike.items():
        precision = torch.promote_types(dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm([local for _, local in members], 2, precision))
        factors = torch.tensor([factor for factor, _ in members], dtype=precision, device=device)
        square = (norms * factors).square().sum()
        total = total.to(device) + (sum_shards_(square, *spread) if spread else square)
    return total


def sum_shards_(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Sum over processes, in place, what each of them found in its shard. Collective."""
    for axis, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value
