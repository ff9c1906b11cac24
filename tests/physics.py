"""Measures, at every hidden linear of a model trained from a plan, the sizes that the rules must keep, and their slopes.

Shape suffixes: R seeds, Z sizes of a sweep, S steps, L hidden linears in the plan's order, Q the three quantities;
B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from supar_cli.data import batches
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Data, Plan, PlanTensor
from supar_cli.planning.problems import parse
from supar_cli.planning.rules import Edition, ParameterizationName
from supar_cli.planning.spec import Proxy, Sparsity, Target
from supar_cli.planning.transfer import transfer
from supar_cli.sparse.linear import Linear
from supar_cli.training.tasks import NextToken
from supar_cli.training.trainer import Trainer

Y, GAIN, CHANGE = range(3)  # mean|Y|, mean|dL/dX| / mean|dL/dY|, mean|ΔY| where ΔY = X·ΔW at the step's own X
WORDS = ("Y", "gain", "ΔY")

CONTEXT, BATCH, BASE_WIDTH, BASE_FFN = 32, 8, 128, {"gpt2": 512, "llama": 384}
# The settings of the check. chosen: α_input as in the paper's coordinate check (11.22) to a power of two; at 1 the embedding is
# smaller than what the blocks add to it, and every slope is as flat on average but noisier.
TUNED = {"init_std": 0.08, "alpha_input": 8.0, "alpha_output": 1.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Fault:
    """In some tensors' `number` (lr or init_std) a `multiplier` (m_d or m_rho) is taken for `used`, not for their own."""

    tensors: tuple[str, ...]
    number: str
    multiplier: str
    used: float = 1.0

    def planted(self, row: PlanTensor) -> PlanTensor:
        if row.name not in self.tensors:
            return row
        ratio: float = row.because[self.multiplier] / self.used
        factor = ratio if self.number == "lr" else ratio**0.5
        return row.model_copy(update={self.number: getattr(row, self.number) * factor})


@dataclass(frozen=True)
class Experiment:
    """One run: what is transferred to, by which rules, and what is wrong in the plan on purpose."""

    name: ParameterizationName = "supar"
    family: str = "gpt2"
    optimizer: str = "adamw"
    lr: float = 2**-6
    width: int = BASE_WIDTH
    ffn_width: int | None = None
    density: float = 1.0
    distribution: str = "uniform"
    overrides: tuple[tuple[str, float], ...] = ()
    fault: Fault | None = None
    edition: Edition = 2
    steps: int = 1
    seed: int = 0

    def plan(self) -> Plan:
        """The plan, from a dense proxy of 2 layers: constant rate, no clipping, no decay."""
        model: dict[str, Any] = {"family": self.family, "width": BASE_WIDTH, "ffn_width": BASE_FFN[self.family]}
        model |= {"layers": 2, "heads": 4, "context": CONTEXT, "vocab": 256}
        if self.family == "llama":
            model |= {"kv_heads": 2, "tied": False}
        train = {"optimizer": self.optimizer, "momentum": 0.0, "steps": 10, "batch_size": BATCH, "grad_clip": 0.0}
        fields = {
            "kind": "supar.proxy/v1",
            "model": model,
            "hyperparameters": {**TUNED, "lr": self.lr},
            "train": {**train, "schedule": "constant", "warmup_fraction": 0.0, "seed": self.seed},
            "run": {"device": "cpu", "precision": "float32"},
        }
        wanted = {"density": self.density, "distribution": self.distribution, "overrides": dict(self.overrides)}
        target = Target(width=self.width, ffn_width=self.ffn_width, sparsity=Sparsity(**wanted))
        plan = transfer(parse(Proxy, Document(fields, "proxy.yaml")), target, self.name, edition=self.edition)
        if self.fault is None:
            return plan
        return plan.model_copy(update={"tensors": [self.fault.planted(row) for row in plan.tensors]})

    def hidden(self) -> list[str]:
        return [row.name for row in self.plan().tensors if row.role == "hidden"]


@cache
def tokens() -> batches.Tokens:
    return batches.load(Data(), vocab=256, context=CONTEXT)


class Watch:
    """Hooks on hidden linears that keep a step's input, mean|Y| and backward gain."""

    def __init__(self, model: nn.Module, hidden: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.output: dict[str, float] = {}
        self.gain: dict[str, float] = {}
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        for name in hidden:
            linears[name].register_forward_hook(self._forward(name))
            linears[name].register_full_backward_hook(self._backward(name))

    def _forward(self, name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.inputs[name] = inputs[0].detach()
            self.output[name] = float(output.detach().abs().mean())

        return keep

    def _backward(self, name: str) -> Callable[..., None]:
        # a module's own hook sees its own share of dL/dX: q, k and v read one input, whose gradient is the sum of theirs
        def keep(_module: nn.Module, by_input: tuple[Tensor], by_output: tuple[Tensor]) -> None:
            self.gain[name] = float(by_input[0].abs().mean() / by_output[0].abs().mean())

        return keep


@cache
def logs_SLQ(wanted: Experiment) -> NDArray[np.float64]:
    """log2 of the three quantities at every step and hidden linear, of the trainer's own steps."""
    hidden, trainer = wanted.hidden(), Trainer(wanted.plan(), NextToken(wanted.plan(), tokens()))
    watch, weight = Watch(trainer.model, hidden), trainer.sparse_model.weight
    found = []
    for _ in range(wanted.steps):
        before = {name: weight(name) for name in hidden}
        trainer.step()
        with torch.no_grad():  # dead weights are zero before and after, so ΔW is masked as it is
            change = {n: float(F.linear(watch.inputs[n], weight(n) - before[n]).abs().mean()) for n in hidden}
        found.append([[watch.output[n], watch.gain[n], change[n]] for n in hidden])
    return np.log2(np.array(found))


def logit_change(plan: Plan) -> float:
    """mean |change of the logits| of the first batch by its own update."""
    trainer = Trainer(plan, NextToken(plan, tokens()))
    inputs_BT, _ = trainer.batch(0)
    with torch.no_grad():
        before_BTV = trainer.model(inputs_BT)
        with torch.enable_grad():
            trainer.step()
        return float((trainer.model(inputs_BT) - before_BTV).abs().mean())


@dataclass(frozen=True)
class Slopes:
    """Least-squares slopes of log2(quantity) against log2(size), one for each seed: their mean is the slope of the mean logs."""

    linears: list[str]
    slope_RSLQ: NDArray[np.float64]

    @property
    def slope_SLQ(self) -> NDArray[np.float64]:
        return self.slope_RSLQ.mean(axis=0)

    @property
    def error_SLQ(self) -> NDArray[np.float64]:
        """Standard error of the slopes over seeds."""
        return self.slope_RSLQ.std(axis=0, ddof=1) / len(self.slope_RSLQ) ** 0.5

    def averaged(self) -> Slopes:
        """The same of the logs averaged over the steps, as a single step."""
        return replace(self, slope_RSLQ=self.slope_RSLQ.mean(axis=1, keepdims=True))

    def median(self, *quantities: int, first_steps: int | None = None) -> NDArray[np.float64]:
        """Median |slope| over the linears, (S, Q)."""
        return np.median(np.abs(self.slope_SLQ[:first_steps, :, list(quantities)]), axis=1)

    def steep(self, bound: float, *quantities: int, first_steps: int | None = None) -> dict[str, str]:
        """Linears with an |slope| above the bound, in the plan's order, each with its worst slope in words."""
        found = {}
        for linear, name in enumerate(self.linears):
            slope_SQ = self.slope_SLQ[:first_steps, linear, list(quantities)]
            step, at = np.unravel_index(np.abs(slope_SQ).argmax(), slope_SQ.shape)
            if not abs(slope_SQ[step, at]) <= bound:  # NaN is steep
                found[name] = f"{WORDS[quantities[at]]} {slope_SQ[step, at]:+.3f} at step {step + 1}"
        return found


def fit(logs: NDArray[np.float64], sizes: Iterable[float]) -> NDArray[np.float64]:
    """Least-squares slope of each column of `logs` (Z, …) against log2 of the sizes."""
    axis_Z = np.log2(list(sizes))
    axis_Z -= axis_Z.mean()
    return np.tensordot(axis_Z / (axis_Z @ axis_Z), logs, axes=1)


def slopes(runs: Mapping[float, Experiment], seeds: Iterable[int]) -> Slopes:
    """Slopes over a sweep: experiments by their size on the axis."""
    slope_RSLQ = [fit(np.stack([logs_SLQ(replace(run, seed=seed)) for run in runs.values()]), runs) for seed in seeds]
    return Slopes(next(iter(runs.values())).hidden(), np.stack(slope_RSLQ))
