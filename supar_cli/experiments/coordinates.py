"""The coordinate check: sizes of activations, backward gains and updates while a plan trains for a few steps.

Sizes must not depend on width or density [Dey et al. 2024, arXiv 2405.15743, §3.2 and Figure 5]. Measured at each step, on
that step's own batch, as means of absolute values:

    activation          Y of every hidden linear, Y = X·Wᵀ
    gain                |dL/dX| / |dL/dY| of every hidden linear: what it does to gradients that pass back through it
    update              ΔY = X·ΔWᵀ of every hidden linear, X the same before and after the step
    attention           q·k before the softmax, scaled, over the causal pairs of every attention
    logits              the model's output, except the logit of each position's own token
    Δlogits             the change of the output by the step, on the same batch
    share of Δlogits    the change of the output by the head's weight alone, and by the final norm alone, with their inputs held fixed
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, log2, nan
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from supar_cli.errors import UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import Attention
from supar_cli.planning.plan import Plan
from supar_cli.training.tasks import load_task
from supar_cli.training.trainer import Trainer

LINEAR = ("activation", "gain", "update")  # of every hidden linear
SHARE = "share of Δlogits"
# A rate is too high if, in the mean over seeds, an activation or gain grows by more than GROWTH, or a loss by LOSS_RISE.
# Updates may grow: the first, under a zero head, is the weight decay's alone.
GROWTH = 10.0
LOSS_RISE = 0.05  # chosen: of the first loss. measured: batches of 32 tokens of an untrained model differ by .025
# by quantity, by name of the tensor, attention or `logits`; None: not finite
Sizes = dict[str, dict[str, float | None]]


def measure(plan: Plan) -> Record:
    """Train a plan's steps and record its sizes: `steps` is a list of {quantity: {name: size}}, one for each step."""
    watch = _Watch(Trainer(plan, load_task(plan)))
    record: Record = {"parameterization": plan.parameterization.name, "width": plan.decoder.width}
    record |= {"density": plan.sparsity.density, "seed": plan.train.seed, "state": "done", "losses": [], "steps": []}
    try:
        for _ in range(plan.train.steps):
            loss, sizes = watch.step()
            record["losses"].append(loss)
            record["steps"].append(sizes)
    except UnusableResult as error:
        record |= {"state": "diverged", "why": str(error)}
    return record


def measured_step(trainer: Trainer) -> Callable[[], object]:
    """A step with all that is measured at it, for a dry run."""
    return _Watch(trainer).step


def log_sizes(records: list[Record], quantity: str) -> NDArray[np.float64]:
    """log2 of a quantity's sizes, by record, step and name; NaN for what is zero or not finite."""
    sizes = [[[size or nan for size in step[quantity].values()] for step in record["steps"]] for record in records]
    return np.asarray(np.log2(sizes))


def why_too_hot(base: list[Record]) -> str:
    """Why the rate of a sweep's base is too high for its slopes to reflect the rules; empty if it isn't."""
    for record in base:
        if record["state"] != "done":
            return f"a run {record['state']}: {record.get('why', '')}"
    losses_S = np.mean([record["losses"] for record in base], axis=0)
    if losses_S.max() > losses_S[0] * (1 + LOSS_RISE):
        return f"the loss rises from {losses_S[0]:.3g} to {losses_S.max():.3g}"
    for quantity in ("activation", "gain"):
        log_SN = log_sizes(base, quantity).mean(axis=0)
        first_N = log_SN[np.isfinite(log_SN).argmax(axis=0), np.arange(log_SN.shape[1])]
        growth_N = np.nan_to_num(log_SN - first_N).max(axis=0)
        name = list(base[0]["steps"][0][quantity])[growth_N.argmax()]
        if growth_N.max() > log2(GROWTH):
            return f"{quantity} of {name} grows {2.0 ** growth_N.max():.3g}-fold"
    return ""


class _Watch:
    """Runs a trainer's steps. Hooks record the inputs and outputs of the model's parts in the last step, and their sizes."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.model = trainer, trainer.sparse_model.model
        self.hidden = [row.name for row in trainer.plan.tensors if row.role == "hidden"]
        by_site = {row.site: row.name for row in trainer.plan.tensors}
        self.head = by_site.get("unembedding") or by_site["embedding"]
        self.attentions = [name for name, module in self.model.named_modules() if isinstance(module, Attention)]
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}
        for name in (*self.hidden, "final_norm", ""):  # "": the model itself
            self.model.get_submodule(name).register_forward_hook(partial(self._keep, name))
        for name in self.hidden:
            self.model.get_submodule(name).register_full_backward_hook(partial(self._keep_gain, name))

    def _keep(self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.inputs[name], self.outputs[name] = inputs[0].detach(), output.detach()

    def _keep_gain(self, name: str, _module: nn.Module, by_input: Any, by_output: Any) -> None:
        # a module's own hook sees its own share of dL/dX: q, k and v read one input, whose gradient is the sum of theirs
        self.gains[name] = by_input[0].abs().mean() / by_output[0].abs().mean()

    def step(self) -> tuple[float, Sizes]:
        """Make one optimizer step; return the loss before it and the sizes."""
        weight = self.trainer.sparse_model.weight
        before = {name: weight(name) for name in (*self.hidden, self.head)}
        with _Attentions() as attentions:
            loss = self.trainer.step().loss
        with torch.no_grad():
            inputs, outputs, final_norm = self.inputs, self.outputs, self.model.get_submodule("final_norm")
            tokens_BT, logits_BTV, normed_BTD = inputs[""], outputs[""], outputs["final_norm"]
            # under a tied head the own token's logit is Θ(1) in width where others are Θ(1/√m_d)
            others_BTV = torch.ones_like(logits_BTV).scatter_(-1, tokens_BT[..., None], 0.0)
            updates = {name: F.linear(inputs[name], weight(name) - before[name]) for name in self.hidden}
            by_head = F.linear(normed_BTD, weight(self.head) - before[self.head])
            by_norm = F.linear(final_norm(inputs["final_norm"]) - normed_BTD, before[self.head])
            factor = self.trainer.plan.decoder.multipliers.output
            sizes = {
                "activation": {name: outputs[name].abs().mean() for name in self.hidden},
                "gain": self.gains,
                "update": {name: update.abs().mean() for name, update in updates.items()},
                "attention": dict(zip(self.attentions, attentions.sizes, strict=True)),
                "logits": {"logits": (logits_BTV * others_BTV).abs().sum() / others_BTV.sum()},
                "Δlogits": {"logits": (self.model(tokens_BT) - logits_BTV).abs().mean()},
                SHARE: {self.head: by_head.abs().mean() * factor, "final_norm": by_norm.abs().mean() * factor},
            }
        return loss, {quantity: _finite(found) for quantity, found in sizes.items()}


def _finite(sizes: dict[str, Tensor]) -> dict[str, float | None]:
    values = torch.stack([size.float() for size in sizes.values()]).tolist()  # one transfer from the device
    return {name: value if isfinite(value) else None for name, value in zip(sizes, values, strict=True)}


class _Attentions(TorchFunctionMode):
    """Keeps, of each call of scaled_dot_product_attention, mean |scaled q·k| over the pairs that it may attend to."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.sizes.append(_mean_score(args[0].detach(), args[1].detach(), kwargs["scale"]))
        return func(*args, **(kwargs or {}))


def _mean_score(q_BHTE: Tensor, k_BKTE: Tensor, scale: float) -> Tensor:
    k_BHTE = k_BKTE.repeat_interleave(q_BHTE.shape[1] // k_BKTE.shape[1], dim=1)
    scores_BHTT = (q_BHTE @ k_BHTE.transpose(-2, -1)).float().abs() * scale
    return scores_BHTT[..., torch.ones(scores_BHTT.shape[-2:], device=q_BHTE.device).tril().bool()].mean()
