"""Watching a run for a wrong scale: activations or gradients that vanish, explode or become non-finite."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from supar_cli.sparse.linear import Linear
from supar_cli.training.distributed import Parallel, local_shard
from supar_cli.training.prepare import SparseModel
from supar_cli.training.runtime import Runtime
from supar_cli.training.step import LaunchedStep

# measured: in 20 healthy SμPar steps the authors' model grows an MLP output 46-fold (reference run supar-s0.9375), so
# the alarm is far above that. chosen: a thousandfold.
LIMIT = 1000.0
NEGLIGIBLE = (
    1e-6  # chosen: of all gradients' norm; below lies rounding, such as that of a key's bias, which softmax ignores
)


@torch.no_grad()
def activation_sizes(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Mean |Y| of every linear's output, by the linear's name."""
    sizes: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        sizes[name] = output.detach().abs().float().mean()

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                hooks.enter_context(module.register_forward_hook(partial(record, name)))
        model(*inputs)
    found = torch.stack([*sizes.values()]).tolist() if sizes else []  # a device is waited for once
    return dict(zip(sizes, found, strict=True))


def why_not_finite(
    loss: float,
    step: LaunchedStep,
    sparse_model: SparseModel,
    inputs: tuple[Tensor, ...],
    parallel: Parallel,
    runtime: Runtime,
) -> str:
    """Which value of a step with these inputs and this loss of all ranks is not finite. Every rank calls it."""
    if not math.isfinite(loss):
        is_own = not math.isfinite(float(step.own_loss))
        return f"the loss is {loss}; {first_not_finite(sparse_model.model, inputs, parallel, runtime, is_own)}"
    by_tensor = zip(sparse_model.tensors, step.norms.tolist(), strict=True)
    name = next((name for name, value in by_tensor if not math.isfinite(value)), "the model")
    return f"the gradient of {name} is not finite"


def first_not_finite(
    model: nn.Module, inputs: tuple[Tensor, ...], parallel: Parallel, runtime: Runtime, is_own: bool
) -> str:
    """A sentence that names the first tensor that is not finite, in the first rank that has one.

    It is a weight, else the output of a linear, else the loss. `is_own` says that this rank's own loss is not finite. Every
    rank calls it and makes a forward pass for each micro-batch, as ranks may hold shards.
    """
    ranks, rows = parallel.ranks, runtime.micro_batch
    weights = [(name, local_shard(weight)) for name, weight in model.named_parameters()]
    found = [f"the weight {name.removesuffix('.weight')}" for name, weight in weights if not weight.isfinite().all()]
    for start in range(0, len(inputs[0]), rows):
        with runtime.autocast(), parallel.forward_only(with_hooks=True):
            sizes = activation_sizes(model, runtime.to_device(inputs, slice(start, start + rows)))
        found += [f"the output of {name}" for name, size in sizes.items() if not math.isfinite(size)]
    places = ranks.gather(found[0] if found else "the loss" if is_own else "")
    rank = next((rank for rank, place in enumerate(places) if place), 0)
    of = f" of rank {rank}" if ranks.size > 1 else ""
    return f"the first tensor{of} that is not finite is {places[rank] or 'the loss'}"


class Monitor:
    """Compares sizes with the first ones it saw, those of step 1 or of a resumed run's first step."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, float]] = {}
        self._warned: set[tuple[str, str]] = set()

    def warnings(self, step: int, what: str, sizes: dict[str, float]) -> list[str]:
        """Warnings about `sizes` by layer of `what` (activation, gradient) after `step` steps: one a layer and direction."""
        found = []
        least = NEGLIGIBLE * math.hypot(*sizes.values()) if what == "gradient" else 0.0
        for layer, size in sizes.items():
            name = f"{what} of {layer}"
            at, first = self._first.setdefault(name, (step, size))
            word = "exploded" if size > max(first * LIMIT, least) else "vanished" if size < first / LIMIT else ""
            if first and word and (name, word) not in self._warned:
                self._warned.add((name, word))
                found.append(f"step {step}: the {name} has {word}: {first:.3g} at step {at}, {size:.3g} now")
        return found
