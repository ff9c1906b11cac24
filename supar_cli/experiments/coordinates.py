"""The coordinate check: sizes of activations, backward gains and updates while a plan trains for a few steps.

Sizes must not depend on width or density [Dey et al. 2024, arXiv 2405.15743, §3.2 and Figure 5]. Measured at each step, on
that step's own batch, as means of absolute values:

    activation          Y of every hidden linear, Y = X·Wᵀ
    gain                |dL/dX| / |dL/dY| of every hidden linear: what it does to gradients that pass back through it
    update              ΔY = X·ΔWᵀ of every hidden linear, X the same before and after the step
    attention           q·k before the softmax, scaled, over the pairs of every attention that its mask lets through
    logits              the model's output; of text without the logit of each position's own token
    Δlogits             the change of the output by the step, on the same batch
    share of Δlogits    the change of the output by the head's weight alone, and by the final norm alone, with their inputs held fixed

Of a user's model `own_coordinates` measures the same, and Δattention, the change of q·k by the step on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, log2, nan
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from supar_cli.errors import UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import Attention
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Plan
from supar_cli.training.runtime import used_device
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


class Watch(Protocol):
    """Trains a model step by step, and measures each step."""

    def step(self) -> tuple[float, Sizes]:
        """Make one optimizer step; return the loss before it and the sizes. Raises UnusableResult if it diverges."""


def measure(plan: Plan) -> Record:
    """Train a plan's steps and record its sizes: `steps` is a list of {quantity: {name: size}}, one for each step."""
    return measure_with(_Watch(Trainer(plan, load_task(plan))), plan, {"width": plan.decoder.width})


def measure_with(watch: Watch, plan: Plan, about: Record) -> Record:
    """As `measure`, by a watch of the plan's model; the record says what it is `about`."""
    record: Record = {"parameterization": plan.parameterization.name, **about}
    record |= {"density": plan.sparsity.density, "seed": plan.train.seed, "state": "done", "losses": [], "steps": []}
    try:
        for _ in range(plan.train.steps):
            loss, sizes = watch.step()
            record["losses"].append(loss)
            record["steps"].append(sizes)
    except UnusableResult as error:
        record |= {"state": "diverged", "why": str(error)}
    return record | used_device()


def measured_step(plan: Plan) -> Callable[[], object]:
    """A step of a plan with all that is measured at it, for a dry run."""
    return _Watch(Trainer(plan, load_task(plan))).step


def common_names(records: list[Record], quantity: str) -> list[str]:
    """The names that every step of every record has, in their order."""
    every = [step[quantity] for record in records for step in record["steps"]]
    return [name for name in every[0] if all(name in sizes for sizes in every)]


def log_sizes(records: list[Record], quantity: str, names: list[str]) -> NDArray[np.float64]:
    """log2 of a quantity's sizes, by record, step and name; NaN for what is zero or not finite."""
    sizes = [[[step[quantity][name] or nan for name in names] for step in record["steps"]] for record in records]
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
        names = common_names(base, quantity)
        log_SN = log_sizes(base, quantity, names).mean(axis=0)
        first_N = log_SN[np.isfinite(log_SN).argmax(axis=0), np.arange(log_SN.shape[1])]
        growth_N = np.nan_to_num(log_SN - first_N).max(axis=0)
        if growth_N.max(initial=0.0) > log2(GROWTH):
            return f"{quantity} of {names[growth_N.argmax()]} grows {2.0 ** growth_N.max():.3g}-fold"
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
        with Attentions() as attentions:
            loss = self.trainer.step().loss
        with torch.no_grad():
            inputs, outputs, final_norm = self.inputs, self.outputs, self.model.get_submodule("final_norm")
            read, normed = inputs[""], outputs["final_norm"]  # of an image the head reads one position
            pool = self.model.pool if isinstance(self.model, VisionTransformer) else nn.Identity()
            factor = self.trainer.plan.decoder.multipliers.output
            logits = F.linear(pool(normed), before[self.head]) * factor
            others = torch.ones_like(logits)
            if not isinstance(self.model, VisionTransformer):
                # under a tied head the own token's logit is Θ(1) in width where others are Θ(1/√m_d)
                others.scatter_(-1, read[..., None], 0.0)
            updates = {name: F.linear(inputs[name], weight(name) - before[name]) for name in self.hidden}
            by_head = F.linear(pool(normed), weight(self.head) - before[self.head])
            by_norm = F.linear(pool(final_norm(inputs["final_norm"]) - normed), before[self.head])
            sizes = {
                "activation": {name: outputs[name].abs().mean() for name in self.hidden},
                "gain": self.gains,
                "update": {name: update.abs().mean() for name, update in updates.items()},
                "attention": {
                    name: q_k.abs().mean() for name, q_k in zip(self.attentions, attentions.scores, strict=True)
                },
                "logits": {"logits": (logits * others).abs().sum() / others.sum()},
                "Δlogits": {"logits": (self.model(read) - logits).abs().mean()},
                SHARE: {self.head: by_head.abs().mean() * factor, "final_norm": by_norm.abs().mean() * factor},
            }
        return loss, finite(sizes)


def finite(sizes: dict[str, dict[str, Tensor]]) -> Sizes:
    """The sizes as numbers, None for those that are not finite."""
    flat = [size.float() for found in sizes.values() for size in found.values()]
    values = iter(torch.stack(flat).tolist() if flat else [])  # one transfer from the device
    numbers = {quantity: dict(zip(found, values, strict=False)) for quantity, found in sizes.items()}
    return {
        quantity: {name: value if isfinite(value) else None for name, value in found.items()}
        for quantity, found in numbers.items()
    }


class Attentions(TorchFunctionMode):
    """Keeps, of each call of scaled_dot_product_attention, the scaled q·k of the pairs that it may attend to.

    `place` says where a call is made, which `places` keeps.
    """

    def __init__(self, place: Callable[[], str] = str) -> None:
        super().__init__()
        self.scores: list[Tensor] = []
        self.places: list[str] = []
        self._place = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            with torch.no_grad():
                self.scores.append(_scores(*args, **(kwargs or {})))
            self.places.append(self._place())
        return func(*args, **(kwargs or {}))


def _scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scaled q·k of a call with these arguments, of the pairs that the mask lets through."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-2, -1)).float() * factor
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if is_causal:
        allowed = allowed.tril()
    elif attn_mask is not None:  # added to the scores, a mask has -inf, or nearly so, where a pair is left out
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    return scores[allowed.expand(scores.shape)]
