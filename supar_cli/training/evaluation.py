"""The record of a model on a task's held-out batches, shared out over the ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from supar_cli.training.distributed import Parallel
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import Task


@torch.no_grad()
def evaluate(task: Task, parallel: Parallel, runtime: Runtime, chunk: int | None = None) -> dict[str, float]:
    """Means over the held-out batches by name, the same in all ranks; each of them passes its share of the batches.

    `chunk` is that of `Task.evaluate`. Where the task asks for it, NAME_se is the standard error of NAME's mean, over batches.
    """
    rows, ranks = runtime.micro_batch, parallel.ranks
    count = task.held_out_rows // rows
    own: dict[str, list[Tensor]] = {}
    with parallel.forward_only():
        for index in range(ranks.rank, count, ranks.size):
            batch = runtime.to_device(task.held_out(index, count, rows))
            with runtime.autocast():
                means = task.evaluate(parallel.inner, batch, chunk)
            for name, mean in means.items():
                own.setdefault(name, []).append(mean)
    record: dict[str, float] = {}
    for name, batch_means in own.items():
        means_N = torch.stack(batch_means)
        mean = ranks.sum(means_N.mean() / ranks.size)
        record[name] = float(mean)
        if task.standard_errors and count > 1:
            squares = ranks.sum((means_N - mean).square().sum())
            record[f"{name}_se"] = math.sqrt(float(squares) / (count - 1) / count)
    return record
