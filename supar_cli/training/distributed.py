"""The processes that train one plan: their ranks, what they agree on, and how they hold the model between them.

They are started by `supar train --nproc N` or by torchrun, and meet over torch.distributed: NCCL for tensors on CUDA,
gloo for all else. To DDP and FSDP2 a masked tensor is a vector of live values: what is exchanged and sharded follows the
live weights.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supar_cli.errors import PeerLost, SetupError, SuparError
from supar_cli.files import write_file
from supar_cli.training.launch.environment import LAUNCH_DIR, SIGNAL_FILE, is_rank_process

T = TypeVar("T")
P = ParamSpec("P")
Parallelism = Literal["alone", "ddp", "fsdp"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine; one alone unless `init_distributed` is used.

    `group` is the torch.distributed group that its calls go through; None is the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    is_distributed: bool = False
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value by rank."""
        if not self.is_distributed:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def run_on_all(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in every process. Where it raises a SuparError in one, raise it in all, the rank named."""
        if not self.is_distributed:
            return function(*args, **kwargs)
        error, result = None, None
        try:
            result = function(*args, **kwargs)
        except SuparError as raised:
            error = type(raised), str(raised)
        failed = [(rank, *raised) for rank, raised in enumerate(self.gather(error)) if raised is not None]
        if failed:
            rank, kind, text = failed[0]
            is_everyone = len(failed) == self.size
            raise collective_error(kind, text if rank == 0 or is_everyone else f"rank {rank}: {text}")
        return result  # type: ignore[return-value]

    def on_main(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the main process only; return its result, or raise its SuparError, in all."""
        box: list[Any] = [self.run_on_all(function, *args, **kwargs) if self.is_main else self.run_on_all(lambda: None)]
        if self.is_distributed:
            dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]  # type: ignore[no-any-return]

    def require_equal(self, values: dict[str, str]) -> None:
        """Raise SetupError where another rank has other values of these: the run would be none of theirs."""
        found = self.gather(values)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    what = "is not that of rank 0; expected the same everywhere"
                    raise collective_error(SetupError, f"rank {rank}: {name} {what}")

    def sum(self, tensor: Tensor) -> Tensor:
        """A tensor's sum over all processes, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @contextmanager
    def translate_peer_errors(self) -> Iterator[None]:
        """Raise PeerLost where what is inside fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            is_told = any(word in str(error) for word in ("gloo", "Gloo", "by peer"))  # gloo says so in words only
            if not self.is_distributed or not (is_told or isinstance(error, dist.DistError)):
                raise
            what = "another process of this run is gone; the same command goes on from the last checkpoint"
            raise PeerLost(what) from None

    def new_group(self) -> Ranks:
        """The same processes by a group of their own, which another thread may use meanwhile. All have to ask for it."""
        return replace(self, group=dist.new_group(backend="gloo") if self.is_distributed else None)


ALONE = Ranks()


def collective_error(kind: type[SuparError], text: str) -> SuparError:
    """An error that every process of a run raises, and that the main one reports."""
    error = kind(text)
    error.is_collective = True
    return error


@contextmanager
def init_distributed() -> Iterator[Ranks]:
    """The ranks of this run, left by all at once unless one of them fails. Raises PeerLost when one is gone.

    A model that is trained inside has to be released inside.
    """
    if not is_rank_process():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if folder := os.environ.get(LAUNCH_DIR):
        write_file(Path(folder, str(rank)), str(os.getpid()))
        if (signal_file := Path(folder, SIGNAL_FILE)).is_file():  # sent before the launcher knew of this process
            os.kill(os.getpid(), int(signal_file.read_text("utf-8")))
    ranks = Ranks(rank, size, *local, is_distributed=True)
    with ranks.translate_peer_errors():
        is_ours = not dist.is_initialized()
        if is_ours:
            has_both = torch.cuda.is_available() and dist.is_nccl_available()
            store, *_ = next(rendezvous("env://", rank, size))
            # torchrun keeps one store for all its restarts, in which gloo would find the addresses of the life before
            life = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}"
            backend = "cpu:gloo,cuda:nccl" if has_both else "gloo"
            dist.init_process_group(backend, store=PrefixStore(life, store), rank=rank, world_size=size)
        else:  # a script's own, which may know tensors on CUDA only
            ranks = replace(ranks, group=dist.new_group(backend="gloo"))
        try:
            yield ranks
        except SuparError as error:
            if error.is_collective:
                dist.barrier(ranks.group)
            raise
        dist.barrier(ranks.group)  # no one ends before the others are done: launchers end what is left
        if is_ours:
            gc.collect()  # DDP's models first: the last one to hold a group waits for threads that wait for the interpreter
            dist.destroy_process_group()


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Parallel:
    """A model as its processes hold it: whole in each, gradients averaged (DDP), or every tensor in shards (FSDP2).

    `model` is what a training step calls; `inner` is without DDP, for passes that exchange nothing. FSDP2 gathers the
    tensors of one of the model's `blocks`, if it has any, at a time.
    """

    def __init__(self, kind: Parallelism, model: nn.Module, device: torch.device, compiles: bool, ranks: Ranks) -> None:
        self.kind, self.device, self.ranks, self.is_sharded = kind, device, ranks, kind == "fsdp"
        self.model = model
        if kind == "fsdp":
            mesh = init_device_mesh(device.type, (ranks.size,))
            for block in getattr(model, "blocks", ()):
                if compiles:
                    block.compile()
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif compiles:
            self.model = torch.compile(model)  # type: ignore[assignment]
        self.inner = self.model
        if kind == "ddp":
            devices = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it, 2.11 does not
                # buffers are an engine's own, the same everywhere and never written by a forward pass
                self.model = DistributedDataParallel(
                    self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """For a micro-batch's passes: gradients are exchanged after the last of a step only."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def forward_only(self, with_hooks: bool = False) -> Iterator[None]:
        """For forward passes without a backward one, which all processes make; `with_hooks`: hooks have to see each layer."""
        if not isinstance(self.model, FSDPModule):
            yield
            return
        with torch.compiler.set_stance("force_eager" if with_hooks else "default"):
            yield
        self.model.reshard()

    def norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each whole gradient, given this rank's shards."""
        norms = torch.stack(torch._foreach_norm(gradients))
        return self.ranks.sum(norms.square()).sqrt() if self.is_sharded else norms
