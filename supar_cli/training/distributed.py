"""The ranks that train one plan: collective calls, and how they hold the model (DDP or FSDP2).

`supar train --nproc N` or torchrun starts them. They communicate over torch.distributed: NCCL for tensors on CUDA, gloo for
the rest. A masked tensor is a vector of live values to DDP and FSDP2, so its traffic and its shards shrink with its density.
"""

from __future__ import annotations

import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from supar_cli.errors import PeerLost, SetupError, SuparError
from supar_cli.files import write_file
from supar_cli.sparse.linear import Linear
from supar_cli.training.launch.environment import LAUNCH_DIR, SIGNAL_FILE, is_rank_process

T = TypeVar("T")
P = ParamSpec("P")
Parallelism = Literal["alone", "ddp", "fsdp"]
StopReason = Callable[[], str | None]  # says why to stop now; None to go on

# chosen: for how long a rank waits for another in one call. One may read a terabyte of data that the others need not read,
# compile for minutes, or write a checkpoint to a slow disk, for all of which torch's half an hour may be too short
PEER_TIMEOUT = timedelta(hours=1)
APART = "_supar_gathered_apart"  # a name that no model has


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process is `rank` of `size`, and `local_rank` of `local_size` on this machine.

    Its calls are collective: every rank makes them. `group` is their torch.distributed group, None the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    is_distributed: bool = False
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and messages for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if not self.is_distributed:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def run_on_all(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in every rank. A SuparError in one rank is raised in all, with the number of that rank."""
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
        """Call a function in rank 0 only; return its result, or raise its SuparError, in every rank."""
        result = self.run_on_all(function, *args, **kwargs) if self.is_main else self.run_on_all(lambda: None)
        return self.gather(result)[0]  # type: ignore[return-value]

    def require_equal(self, values: dict[str, str]) -> None:
        """Raise SetupError unless every rank has these values: the ranks would train different runs."""
        found = self.gather(values)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    what = "is not that of rank 0; expected the same everywhere"
                    raise collective_error(SetupError, f"rank {rank}: {name} {what}")

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @contextmanager
    def translate_peer_errors(self) -> Iterator[None]:
        """Turn an error of torch into PeerLost if its cause is that another process is gone, or hangs.

        A collective of NCCL that takes too long raises nothing: torch's watchdog says so and ends this process by SIGABRT.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's errors have no type of their own
            is_gloo = any(word in str(error) for word in ("gloo", "Gloo", "by peer"))
            if not self.is_distributed or not (is_gloo or isinstance(error, dist.DistError)):
                raise
            is_late = "timed out" in str(error).lower()
            what = (
                f"hangs or is gone: it has not answered for {PEER_TIMEOUT.total_seconds() / 60:g} minutes"
                if is_late
                else "is gone"
            )
            remedy = "the same command continues from the last checkpoint"
            raise PeerLost(f"another process of this run {what}; {remedy}") from None

    def new_group(self, is_default_backend: bool = False) -> Ranks:
        """The same ranks with a group of their own, for calls from another thread or pass. Every rank calls it."""
        backend = None if is_default_backend else "gloo"
        return replace(self, group=_new_group(backend) if self.is_distributed else None)


ALONE = Ranks()


def collective_error(kind: type[SuparError], text: str) -> SuparError:
    """An error that every rank raises and rank 0 reports."""
    error = kind(text)
    error.is_collective = True
    return error


@contextmanager
def init_distributed() -> Iterator[Ranks]:
    """Join the ranks of this run; at the end, wait for all of them unless one has failed, and leave the group.

    A model that is trained inside has to be released inside. Raises PeerLost if another process is gone, or hangs.
    """
    if not is_rank_process():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if folder := os.environ.get(LAUNCH_DIR):
        write_file(Path(folder, str(rank)), str(os.getpid()))
        if (signal_file := Path(folder, SIGNAL_FILE)).is_file():  # the launcher got it before it knew this process
            os.kill(os.getpid(), int(signal_file.read_text("utf-8")))
    ranks = Ranks(rank, size, *local, is_distributed=True)
    with ranks.translate_peer_errors():
        is_ours = not dist.is_initialized()
        if is_ours:
            has_both = torch.cuda.is_available() and dist.is_nccl_available()
            store, *_ = next(rendezvous("env://", rank, size))
            # torchrun keeps one store for all its restarts, in which gloo would find the addresses of the previous one
            prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}"
            backend = "cpu:gloo,cuda:nccl" if has_both else "gloo"
            store = PrefixStore(prefix, store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PEER_TIMEOUT)
        else:  # a script's own group, which may be for tensors on CUDA only
            ranks = replace(ranks, group=_new_group("gloo"))
        with _leaving(ranks.group or dist.group.WORLD):
            yield ranks


@contextmanager
def _leaving(group: Any) -> Iterator[None]:
    """At the end, wait for all ranks unless this one has failed alone, and leave the group; the default one with all others."""
    try:
        try:
            yield
        except SuparError as error:
            if error.is_collective:
                dist.barrier(group)
            raise
        dist.barrier(group)  # wait for all: a launcher ends the others when the first one ends
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:  # the frames that errors came through hold the model
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        group.abort()  # else NCCL would wait for what its peers were to do
        raise
    finally:
        gc.collect()  # release DDP's models first: one that outlives the group deadlocks when it is freed
        dist.destroy_process_group(group)


def _new_group(backend: str | None) -> Any:
    return dist.new_group(backend=backend, timeout=PEER_TIMEOUT)


class StopRequest:
    """Decides between two steps whether all ranks stop, even if only one was asked to.

    `own_reason()` is this rank's reason. The ranks exchange reasons only after a step whose votes say that there is one:
    each adds its `vote` to the step's loss, which is summed over them in any case, and sets `votes` to the sum.
    """

    def __init__(self, ranks: Ranks, own_reason: StopReason = lambda: None) -> None:
        self._ranks, self._own_reason = ranks, own_reason
        self.votes = 1.0  # there are no votes before the first step: exchange reasons

    def vote(self) -> float:
        """1 if this rank was asked to stop, else 0."""
        return float(self._ranks.is_distributed and self._own_reason() is not None)

    def reason(self) -> str | None:
        """Why to stop now, the same in every rank; None to go on."""
        if not self._ranks.is_distributed:
            return self._own_reason()
        if not self.votes:
            return None
        self.votes = 0.0
        return next((reason for reason in self._ranks.gather(self._own_reason()) if reason), None)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compile_parts(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Compile each block of a model by itself, in place, so that equal ones share a graph, and its `compiled_methods`.

    Once a block's backward pass is done, its gradients can be sent while those of others are computed.
    """
    _allow_for_blocks(len(blocks))
    for part in blocks or [model]:
        part.compile()
    for name in getattr(model, "compiled_methods", ()):
        setattr(model, name, torch.compile(getattr(model, name)))


def _allow_for_blocks(count: int) -> None:
    """Set torch.compile, in this process, for models of `count` blocks."""
    config, shapes = torch._dynamo.config, torch.fx.experimental._config
    # masks drawn weight by weight have another number of live weights in each block: one graph for all of them
    config.force_parameter_static_shapes = False
    shapes.use_duck_shape = False  # two of a block's tensors may happen to have as many live weights, and others' not
    # blocks that are unlike each other have two graphs each, with gradients and without; beyond the limit they run eagerly
    config.recompile_limit = max(config.recompile_limit, 8 + 2 * count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 + 2 * count)
    config.optimize_ddp = False  # it would cut the graph of a block where a bucket of DDP ends


def _besides_linears(blocks: list[nn.Module]) -> list[nn.Module]:
    """The modules of blocks that have parameters and are no linear layers, such as norms; none that hold other modules."""
    others = [one for block in blocks for one in block.modules() if not isinstance(one, Linear)]
    return [one for one in others if not list(one.children()) and list(one.parameters())]


class Parallel:
    """A model as the ranks hold it: whole in each with averaged gradients (DDP), or every tensor in shards (FSDP2).

    A training step calls `model`; `inner` is the model without DDP, for passes without communication. A model's `blocks`
    are compiled one by one, and FSDP2 gathers one of them at a time: what its linear layers multiply with in `precision`, all
    else, and gradients, in float32.
    """

    def __init__(
        self,
        kind: Parallelism,
        model: nn.Module,
        device: torch.device,
        compiles: bool,
        ranks: Ranks,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.kind, self.device, self.ranks, self.is_sharded = kind, device, ranks, kind == "fsdp"
        self.compiles = compiles
        self.model = self.inner = model
        blocks = list(getattr(model, "blocks", ()))
        if compiles:
            compile_parts(model, blocks)
        if kind == "fsdp":
            mesh = init_device_mesh(device.type, (ranks.size,))
            policy = MixedPrecisionPolicy(precision, torch.float32, cast_forward_inputs=False)
            # what computes in float32 all the same is gathered so, with the rest of the model
            apart = [] if precision == torch.float32 else _besides_linears(blocks)
            ignored = {tensor for one in apart for tensor in one.parameters()}
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
            model.add_module(APART, nn.ModuleList(apart))  # where FSDP2 finds them: it looks into no block again
            fully_shard(model, mesh=mesh)
            delattr(model, APART)
        elif kind == "ddp":
            devices = [device] if device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames an option, 2.11 lacks the new name
                # an engine's buffers are equal on all ranks, and no forward pass writes to them
                self.model = DistributedDataParallel(
                    model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        """For the passes of a micro-batch: only the last one of a step exchanges gradients."""
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        return nullcontext()

    @contextmanager
    def forward_only(self, with_hooks: bool = False) -> Iterator[None]:
        """For forward passes without backward ones, which every rank makes; `with_hooks` if hooks have to see each layer."""
        is_eager = with_hooks and self.compiles
        with torch.compiler.set_stance("force_eager") if is_eager else nullcontext():
            yield
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def norms(self, gradients: list[Tensor]) -> Tensor:
        """The norm of each whole gradient, from this rank's shards."""
        norms = torch.stack(torch._foreach_norm(gradients))
        return self.ranks.sum(norms.square()).sqrt() if self.is_sharded else norms
