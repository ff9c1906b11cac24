"""What two processes find out together, as `torchrun --nproc-per-node 2 tests/parallel_cases.py PLAN` prints it: JSON."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from supar_cli import load
from supar_cli.errors import InputError, SuparError
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import MaskSource
from supar_cli.sparse import masks
from supar_cli.sparse.mask_files import write_masks
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint, checkpoint_reader, runtime
from supar_cli.training.distributed import Ranks, init_distributed, local_shard
from supar_cli.training.trainer import Trainer


def error_of(function: Callable[[], object]) -> list[Any]:
    """[class, text, whether all raise it] of what a call raises."""
    try:
        function()
    except SuparError as error:
        return [type(error).__name__, str(error), error.is_collective]
    return []


def planned(plan: Plan, **run: Any) -> Plan:
    return plan.model_copy(update={"run": plan.run.model_copy(update=run)})


def other_mask(plan: Plan, ranks: Ranks) -> list[Any]:
    """Rank 1 draws the mask of one tensor from another seed."""
    draw = masks.draw
    masks.draw = lambda name, wanted, density, seed: draw(
        name, wanted, density, seed + (name == "blocks.1.attn.k") * ranks.rank
    )
    try:
        return error_of(lambda: Trainer(plan, ranks=ranks))
    finally:
        masks.draw = draw


def lost_data(plan: Plan, ranks: Ranks) -> list[Any]:
    """Rank 1 does not find the data."""
    data = plan.data.model_copy(update={"source": plan.data.source + ".gone" * ranks.rank})
    return error_of(lambda: Trainer(plan.model_copy(update={"data": data}), ranks=ranks))


def lost_masks(plan: Plan, ranks: Ranks) -> list[Any]:
    """Rank 1 does not find the file of masks, while engines have to be chosen by all."""
    path, trainer = Path(f"masks-{os.getppid()}.safetensors"), Trainer(plan, ranks=ranks)
    written = ranks.on_main(write_masks, path, trainer.sparse_model.masks)
    source = MaskSource(kind="file", path=str(path) + ".gone" * ranks.rank, hash=written)
    sparsity = plan.sparsity.model_copy(update={"source": source})
    return error_of(lambda: Trainer(plan.model_copy(update={"sparsity": sparsity}), ranks=ranks))


def fails_first(ranks: Ranks) -> list[Any]:
    def fail() -> None:
        raise InputError("what rank 0 found")

    return error_of(lambda: ranks.on_main(fail))


def kinds(plan: Plan, ranks: Ranks) -> list[Any]:
    """(kind, reason) with enough memory and with too little."""
    trainer, host_bytes = Trainer(plan, ranks=ranks), runtime._host_bytes
    found = []
    for there in (2**30, 2**20):
        runtime._host_bytes = lambda there=there: there
        found.append(runtime.choose_parallelism(planned(plan, parallel="auto"), trainer.runtime, ranks))
    runtime._host_bytes = host_bytes
    return found


def exchanges(plan: Plan, ranks: Ranks, kind: str, held: bool) -> int:
    """How often gradients go round in a step of four micro-batches; with `held` taken out, after each of them."""
    trainer = Trainer(planned(plan, parallel=kind, micro_batch_size=1), ranks=ranks)
    if not held:
        gradient_sync = trainer.parallel.gradient_sync
        trainer.parallel.gradient_sync = lambda is_last: gradient_sync(True)  # type: ignore[method-assign]
    trainer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.step()
    sums = sum(
        event.count for event in profile.key_averages() if event.key == "gloo:all_reduce"
    )  # as gloo scatters too
    return sums - {"ddp": 1, "fsdp": 2}[kind]  # those of the loss and, of shards, of the norms


def shards(plan: Plan, ranks: Ranks) -> dict[str, Any]:
    """What a process holds of a model in shards, and whether its numbers are the plan's."""
    trainer = Trainer(planned(plan, parallel="fsdp", engine="dense"), ranks=ranks)
    trainer.step()
    tensors, rows = trainer.sparse_model.tensors, {row.name: row for row in plan.tensors}
    rates = all(
        group["peak_lr"] == rows[name].lr
        and group["weight_decay"] == rows[name].weight_decay
        and tensor is tensors[name]
        for group in trainer.optimizer.param_groups
        for name, tensor in zip(group["names"], group["params"], strict=True)
    )
    state = trainer.optimizer.state
    return {
        "numbers": {name: local_shard(tensor).numel() for name, tensor in tensors.items()},
        "moments": {name: local_shard(state[tensor]["exp_avg"]).numel() for name, tensor in tensors.items()},
        "sharded": all(isinstance(tensor, DTensor) for tensor in tensors.values()),
        "rates": rates,
        "dense": [
            name for name, buffer in trainer.sparse_model.model.named_buffers() if name.endswith("engine.weight")
        ],
    }


class Exchanged(TorchDispatchMode):
    """Bytes of the collectives called, by name, device and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.nbytes)
            self.bytes[f"{func._opname} {largest.device} {largest.dtype}"] += largest.nbytes
        return func(*args, **(kwargs or {}))


def exchanged(plan: Plan, ranks: Ranks, kind: str, precision: str) -> dict[str, Any]:
    """The bytes of a step, the dtypes that a rank keeps, and losses of steps of two micro-batches."""
    run = {"parallel": kind, "precision": precision, "engine": "dense", "micro_batch_size": 2}
    trainer = Trainer(planned(plan, **run), ranks=ranks)
    losses = [trainer.step().loss for _ in range(3)]
    with Exchanged() as found:
        losses.append(trainer.step().loss)
    kept = {tensor.dtype for tensor in trainer.sparse_model.tensors.values()}
    return {"bytes": dict(found.bytes), "kept": sorted(map(str, kept)), "losses": losses}


class Moving(Trainer):
    """A trainer whose masks may be others than those its plan draws."""

    moves_masks = True


def other_masks(plan: Plan) -> dict[str, Mask]:
    """Masks of a plan's sparse tensors: at other weights, more of them in one tensor and fewer in the next."""
    rows = [row for row in plan.tensors if row.kept < row.size]
    shares = [row.density * (1.5 if at % 2 else 0.5) for at, row in enumerate(rows)]
    random = [np.random.default_rng(at).random(row.shape) for at, row in enumerate(rows)]
    return {row.name: Mask.of(found < share) for row, found, share in zip(rows, random, shares, strict=True)}


def saved(trainer: Trainer, folder: Path) -> Path:
    """The checkpoint of a trainer's present state, by all ranks."""
    writer = checkpoint.Writer(folder, trainer.plan, trainer.task.hash, trainer.parallel)
    writer.save(trainer.done, trainer.capture)
    writer.wait()
    return trainer.ranks.on_main(checkpoint_reader.available, folder)[-1]


def remasked(plan: Plan, ranks: Ranks, kind: str, other: str) -> dict[str, list[float]]:
    """Losses of a run under other masks from step 4 on, and of one of another kind that goes on from its checkpoint."""
    trainer = Moving(planned(plan, parallel=kind), ranks=ranks)
    found = {"live": [trainer.step().loss for _ in range(4)]}
    trainer.remask(other_masks(plan))
    path = saved(trainer, Path(f"remasked-{kind}").resolve())
    found["live"] += [trainer.step().loss for _ in range(6)]
    restored = Moving(planned(plan, parallel=other), ranks=ranks)
    restored.restore(path)
    found["restored"] = [restored.step().loss for _ in range(6)]
    found["held"] = [local_shard(tensor).numel() for tensor in trainer.sparse_model.tensors.values()]
    return found


def remasked_apart(plan: Plan, ranks: Ranks) -> list[Any]:
    """Rank 1 moves one tensor to another mask than rank 0."""
    trainer, masks = Trainer(planned(plan, parallel="ddp"), ranks=ranks), other_masks(plan)
    masks["blocks.1.mlp.up"] = Mask.of(np.roll(masks["blocks.1.mlp.up"].alive(), ranks.rank, axis=1))
    return error_of(lambda: trainer.remask(masks))


def sgd(plan: Plan, ranks: Ranks) -> list[float]:
    """Losses of SGD in shards."""
    train = plan.train.model_copy(update={"optimizer": "sgd", "momentum": 0.9})
    trainer = Trainer(planned(plan.model_copy(update={"train": train}), parallel="fsdp"), ranks=ranks)
    return [trainer.step().loss for _ in range(4)]


def chunked(plan: Plan, ranks: Ranks, kind: str) -> list[float]:
    """Losses of steps, and of an evaluation, whose losses are made of 24 tokens at a time."""
    trainer = Trainer(planned(plan, parallel=kind, micro_batch_size=2, loss_chunk_tokens=24), ranks=ranks)
    return [*(trainer.step().loss for _ in range(4)), trainer.evaluate()["validation_loss"]]


def main() -> None:
    plan = load(Path(sys.argv[1]))
    assert isinstance(plan, Plan)
    with init_distributed() as ranks:
        found = {
            "other_mask": other_mask(plan, ranks),
            "lost_data": lost_data(plan, ranks),
            "lost_masks": lost_masks(plan, ranks),
            "fails_first": fails_first(ranks),
            "kinds": kinds(plan, ranks),
            "exchanges": {
                f"{kind} {'held' if held else 'not held'}": exchanges(plan, ranks, kind, held)
                for kind in ("ddp", "fsdp")
                for held in (True, False)
            },
            "shards": shards(plan, ranks),
            "exchanged": {
                f"{kind} {precision}": exchanged(plan, ranks, kind, precision)
                for kind in ("ddp", "fsdp")
                for precision in ("float32", "bfloat16")
            },
            "remasked": {
                kind: remasked(plan, ranks, kind, other) for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"))
            },
            "remasked_apart": remasked_apart(plan, ranks),
            "sgd": sgd(plan, ranks),
            "chunked": {kind: chunked(plan, ranks, kind) for kind in ("ddp", "fsdp")},
        }
        everyone = ranks.gather(found)
        if ranks.is_main:
            sys.stdout.write(json.dumps(everyone))


if __name__ == "__main__":
    main()
