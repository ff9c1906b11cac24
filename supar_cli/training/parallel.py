"""How the processes of a world hold a model: whole in each, gradients averaged (DDP), or every tensor in shards (FSDP2).

A masked tensor is a vector of live values to both: what is exchanged and what is sharded follows the live weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supar_cli.errors import SetupError
from supar_cli.models.transformer import Transformer
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan
from supar_cli.training.distributed import World
from supar_cli.training.runtime import Setup

Kind = Literal["alone", "ddp", "fsdp"]
USED = 0.9  # chosen: of a device's memory; the rest is the allocator's and the libraries'


def kind_of(plan: Plan, setup: Setup, world: World) -> tuple[Kind, str]:
    """How the world holds the plan's model, and why if that was decided here."""
    if not world.grouped:
        return "alone", ""
    if plan.run.parallel != "auto":
        return plan.run.parallel, ""
    cuda = setup.device.type == "cuda"
    engine = "sparse" if not cuda and plan.run.engine == "auto" else plan.run.engine
    wanted = estimate.state_bytes(plan, engine if isinstance(engine, str) else "dense", setup.precision.itemsize)
    wanted += estimate.activation_bytes(plan, setup.micro_batch, setup.precision.itemsize)
    there = int(USED * (torch.cuda.mem_get_info(setup.device)[1] if cuda else _host_bytes() // world.local_size))
    kind: Kind = "fsdp" if wanted > there else "ddp"
    words = {"ddp": "fits a device", "fsdp": "does not fit a device"}[kind]
    return kind, f"{kind}: the plan {words}: about {wanted / 2**30:.2f} GiB of {there / 2**30:.2f} GiB"


def require_host_memory(plan: Plan, setup: Setup, world: World) -> None:
    """Raise SetupError where a plan can't be built here: Linux would not say so but end the process.

    Each process builds the model on its host: masks, live values, and all else of training where the device is the CPU.
    """
    masked = sum(row.size for row in plan.tensors if row.kept < row.size)
    wanted = masked + 4 * plan.live
    if setup.device.type == "cpu":
        wanted = masked + estimate.state_bytes(plan, "sparse", 4)
        wanted += estimate.activation_bytes(plan, setup.micro_batch, setup.precision.itemsize)
    wanted *= world.local_size
    if wanted > _host_bytes():
        raise SetupError(
            f"out of memory: the plan needs about {wanted / 2**30:.1f} GiB, this machine has {_host_bytes() / 2**30:.1f}; "
            "expected a smaller model or run.micro_batch_size"
        )


def _host_bytes() -> int:
    """This machine's memory, or what a container may have of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group, or one without a limit, `max`
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return found


def local(tensor: Tensor) -> Tensor:
    """What of a tensor lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Parallel:
    """A model wrapped for its world. `model` is what a training step calls; `inner` knows nothing of other processes."""

    def __init__(self, kind: Kind, model: Transformer, setup: Setup, world: World) -> None:
        self.kind, self.world = kind, world
        self.model: nn.Module = model
        if kind == "fsdp":
            mesh = init_device_mesh(setup.device.type, (world.size,))
            for block in model.blocks:
                if setup.compiles:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif setup.compiles:
            self.model = torch.compile(model)  # type: ignore[assignment]
        self.inner = self.model
        if kind == "ddp":
            devices = [setup.device] if setup.device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it, 2.11 does not
                # buffers are an engine's own, the same everywhere and never written by a forward pass
                self.model = DistributedDataParallel(
                    self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    @property
    def sharded(self) -> bool:
        return self.kind == "fsdp"

    def exchanging(self, last: bool) -> AbstractContextManager[None]:
        """For a micro-batch's passes: gradients go round after the last of a step only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    @contextmanager
    def looking(self, hooks: bool = False) -> Iterator[None]:
        """For forward passes without a backward one, which all processes make; `hooks`: that hooks see every layer."""
        if not isinstance(self.model, FSDPModule):
            yield
            return
        with torch.compiler.set_stance("force_eager" if hooks else "default"):
            yield
        self.model.reshard()

    def norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each whole gradient, given what of each lies here."""
        norms = torch.stack(torch._foreach_norm(gradients))
        return self.world.sum(norms.square()).sqrt() if self.sharded else norms
