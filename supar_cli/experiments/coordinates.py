"""The coordinate check: sizes of activations, backward gains and updates while a plan trains for a few steps.

Sizes must not depend on width or density [Dey et al. 2024, arXiv 2405.15743, §3.2 and Figure 5]. Measured at each step, on
that step's own batch, as means of absolute values:

    activation          Y of every hidden linear, Y = X·Wᵀ
    gain                |dL/dX| / |dL/dY| of every hidden linear: what it does to gradients that pass back through it
    update              ΔY = X·ΔWᵀ of every hidden linear, X the same before and after the step
    attention           q·k before the softmax, scaled, over the causal pairs of every attention
    logits, Δlogits     the model's output, and its change by the step on the same batch
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from supar_cli.errors import UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import Attention
from supar_cli.planning.plan import Plan
from supar_cli.training.tasks import load_task
from supar_cli.training.trainer import Trainer

LINEAR = ("activation", "gain", "update")  # of every hidden linear
Sizes = dict[str, dict[str, float | None]]  # by quantity, by name of the linear, attention or `logits`; None: no number


class _Attentions(TorchFunctionMode):
    """Sees the calls of scaled_dot_product_attention and keeps mean |scaled q·k| over the pairs each may attend to."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names, self.sizes, self._call = names, dict[str, Tensor](), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.sizes[self._names[self._call % len(self._names)]] = _pairs(args[0], args[1], kwargs["scale"])
            self._call += 1
        return func(*args, **kwargs)


@torch.no_grad()
def _pairs(q_BHTE: Tensor, k_BKTE: Tensor, scale: float) -> Tensor:
    k_BHTE = k_BKTE.repeat_interleave(q_BHTE.shape[1] // k_BKTE.shape[1], dim=1)
    scores_BHTT = (q_BHTE.detach() @ k_BHTE.detach().transpose(-2, -1)).float().abs() * scale
    causal_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=scores_BHTT.device).tril()
    return scores_BHTT[..., causal_TT].mean()


class _Watch:
    """Hooks on a model that keep, of its last step, each hidden linear's input and the sizes it showed."""

    def __init__(self, model: nn.Module, hidden: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.sizes: dict[str, dict[str, Tensor]] = {"activation": {}, "gain": {}}
        self.logits = torch.empty(0)
        modules = dict(model.named_modules())
        self.attentions = [name for name, module in modules.items() if isinstance(module, Attention)]
        for name in hidden:
            modules[name].register_forward_hook(self._forward(name))
            modules[name].register_full_backward_hook(self._backward(name))
        model.register_forward_hook(self._output)

    def _forward(self, name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                self.inputs[name] = inputs[0].detach()
                self.sizes["activation"][name] = output.detach().abs().mean()

        return keep

    def _backward(self, name: str) -> Callable[..., None]:
        # a module's own hook sees its own share of dL/dX: q, k and v read one input, whose gradient is the sum of theirs
        def keep(_module: nn.Module, by_input: tuple[Tensor, ...], by_output: tuple[Tensor, ...]) -> None:
            self.sizes["gain"][name] = by_input[0].abs().mean() / by_output[0].abs().mean()

        return keep

    def _output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.logits = output.detach()


def measure(plan: Plan) -> Record:
    """Train a plan's steps and record its sizes: `steps` is a list of {quantity: {name: size}}, one for each step."""
    trainer = Trainer(plan, load_task(plan))
    hidden = [row.name for row in plan.tensors if row.role == "hidden"]
    watch = _Watch(trainer.sparse_model.model, hidden)
    steps: list[Sizes] = []
    losses: list[float] = []
    try:
        while trainer.done < plan.train.steps:
            loss, sizes = _step(trainer, watch, hidden)
            losses.append(loss)
            steps.append(sizes)
    except UnusableResult as error:
        return {**_at(plan), "state": "diverged", "why": str(error), "losses": losses, "steps": steps}
    return {**_at(plan), "state": "done", "losses": losses, "steps": steps}


def _at(plan: Plan) -> Record:
    return {
        "parameterization": plan.parameterization.name,
        "width": plan.decoder.width,
        "density": plan.sparsity.density,
        "seed": plan.train.seed,
    }


def _step(trainer: Trainer, watch: _Watch, hidden: list[str]) -> tuple[float, Sizes]:
    sparse_model = trainer.sparse_model
    before = {name: sparse_model.weight(name) for name in hidden}
    (inputs_BT,) = trainer.task.inputs(trainer.batch(trainer.done))
    with _Attentions(watch.attentions) as attention:
        loss = trainer.step().loss
    logits_BTV = watch.logits
    sizes = {quantity: dict(found) for quantity, found in watch.sizes.items()}
    with torch.no_grad():
        sizes["update"] = {
            name: F.linear(watch.inputs[name], sparse_model.weight(name) - before[name]).abs().mean() for name in hidden
        }
        change_BTV = trainer.sparse_model.model(inputs_BT.to(trainer.runtime.device)) - logits_BTV
    sizes["attention"] = attention.sizes
    sizes["logits"], sizes["Δlogits"] = {"logits": logits_BTV.abs().mean()}, {"logits": change_BTV.abs().mean()}
    names = [(quantity, name) for quantity, found in sizes.items() for name in found]
    values = torch.stack([sizes[quantity][name].float() for quantity, name in names]).tolist()
    read: Sizes = {}
    for (quantity, name), value in zip(names, values, strict=True):
        read.setdefault(quantity, {})[name] = value if isfinite(value) else None
    return loss, read
