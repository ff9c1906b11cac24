"""A training step as one CUDA graph: a launch instead of one for each kernel, which is what the steps of small models wait for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import Batch

# as in torch's notes on CUDA graphs: libraries allocate, kernels are compiled and tuned, and the optimizer makes its moments
WARM_UP_STEPS = 3

Results = tuple[Tensor, Tensor, Tensor]
Update = Callable[[Batch], Results]


class StepGraph:
    """Makes the steps of one model and optimizer: a few kernel by kernel, then one that is recorded, and the rest by replays of it.

    A replay works in the memory of the recorded step: parameters, moments and rates stay where they are as long as it is
    used. Where the runtime has no graph, all steps are made kernel by kernel.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._device, self._is_used, self._steps = runtime.device, runtime.has_graph, 0

    def step(self, update: Update, batch: Batch) -> Results:
        """What `update`, the same in every call, returns of a batch in host memory.

        Raises InputError for a batch of another shape than the recorded one.
        """
        if not self._is_used:
            return update(batch)
        self._steps += 1
        if self._steps <= WARM_UP_STEPS:
            return self._warm_up(update, batch)
        if self._steps == WARM_UP_STEPS + 1:
            self._record(update, batch)
        for own, given in zip(self._batch, batch, strict=True):
            if own.shape != given.shape:
                what = f"a batch is {tuple(given.shape)}, the recorded one {tuple(own.shape)}"
                raise InputError(f"run.cuda_graph: on, but {what}; expected off where batches differ")
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        own_loss, norms, figures = self._results
        return own_loss.clone(), norms.clone(), figures.clone()  # the next replay writes over them

    def _warm_up(self, update: Update, batch: Batch) -> Results:
        """Make a step on a stream beside the default one, as a recorded one is."""
        if self._steps == 1:  # the same for all of them: each stream keeps the memory of its own steps
            self._beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        current, beside = torch.cuda.current_stream(self._device), self._beside
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            results = update(batch)
        current.wait_stream(beside)
        return results

    def _record(self, update: Update, batch: Batch) -> None:
        """Record a step, which computes nothing yet."""
        self._batch = tuple(tensor.to(self._device) for tensor in batch)
        self._graph = torch.cuda.CUDAGraph()
        # not in the default mode, which would refuse that another thread pins the next batch meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = update(self._batch)
