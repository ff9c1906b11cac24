"""The processes that train one plan together: who they are, what they agree on, and how an error of one ends them all.

They are started by `supar train --nproc N` or by torchrun, and meet over torch.distributed: NCCL for tensors on CUDA,
gloo for all else.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from supar_cli.errors import PeerGone, SuparError
from supar_cli.files import write_file
from supar_cli.training.launch.environment import HEARD, LAUNCH, is_member

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine; alone unless `joined` says otherwise.

    `group` is the torch.distributed group that its calls go through; None is the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    grouped: bool = False
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value by rank."""
        if not self.grouped:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process. Where it raises a SuparError in one, raises it in all, the rank named."""
        error, result = None, None
        try:
            result = function()
        except SuparError as raised:
            if not self.grouped:
                raise
            error = raised
        found = self.gather(None if error is None else (type(error), str(error)))
        failed = {rank: said for rank, said in enumerate(found) if said is not None}
        if failed:
            rank, (kind, text) = next(iter(failed.items()))
            everyone = len(failed) == self.size
            raise shared(kind, text if rank == 0 or everyone else f"rank {rank}: {text}") from None
        return result  # type: ignore[return-value]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process only and give its result, or its SuparError, to all."""
        result = self.together(lambda: function() if self.is_first else None)
        if not self.grouped:
            return result  # type: ignore[return-value]
        box = [result]
        dist.broadcast_object_list(box, src=0, group=self.group, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's sum over all processes, in place."""
        if self.grouped:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Raises PeerGone where what is inside fails because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            # gloo says so in words only
            gone = isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "Gloo", "by peer"))
            if not self.grouped or not gone:
                raise
            raise PeerGone(
                "another process of this run is gone; the same command goes on from the last checkpoint"
            ) from None

    def beside(self) -> World:
        """The same processes by a group of their own, which another thread may use meanwhile. All have to ask for it."""
        group = dist.new_group(backend="gloo") if self.grouped else None
        return World(self.rank, self.size, self.local_rank, self.local_size, self.grouped, group)


def shared(kind: type[SuparError], text: str) -> SuparError:
    """An error that every process of a run raises, of which the first speaks."""
    error = kind(text)
    error.shared = True
    return error


@contextmanager
def joined() -> Iterator[World]:
    """The world of this process, left by all at once unless one of them fails. Raises PeerGone when one is gone.

    What was trained in it has to be given up inside.
    """
    if not is_member():
        yield World()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if folder := os.environ.get(LAUNCH):
        write_file(Path(folder, str(rank)), str(os.getpid()))
        if (heard := Path(folder, HEARD)).is_file():  # before the launcher knew of this process
            os.kill(os.getpid(), int(heard.read_text("utf-8")))
    world = World(rank, size, *local, grouped=True)
    with world.complete():
        begun = not dist.is_initialized()
        if begun:
            both = torch.cuda.is_available() and dist.is_nccl_available()
            store, *_ = next(rendezvous("env://", rank, size))
            # torchrun keeps one store for all its restarts, in which gloo would find the addresses of the life before
            life = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}"
            backend = "cpu:gloo,cuda:nccl" if both else "gloo"
            dist.init_process_group(backend, store=PrefixStore(life, store), rank=rank, world_size=size)
        else:  # a script's own, which may know tensors on CUDA only
            world = replace(world, group=dist.new_group(backend="gloo"))
        try:
            yield world
        except SuparError as error:
            if error.shared:
                dist.barrier(world.group)
            raise
        dist.barrier(world.group)  # no one ends before the others are done: launchers end what is left
        if begun:
            gc.collect()  # DDP's models first: the last one to hold a group waits for threads that wait for the interpreter
            dist.destroy_process_group()
