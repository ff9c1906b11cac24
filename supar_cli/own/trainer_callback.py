"""Hugging Face's Trainer under a plan: a callback that refuses another optimizer, and a mixin whose Trainer makes the plan's."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from supar_cli.errors import InputError, SetupError
from supar_cli.own.guard import kept
from supar_cli.own.initial import live_text
from supar_cli.own.parameters import match
from supar_cli.own.prepared import Prepared

try:
    from transformers import TrainerCallback
except ImportError:
    raise SetupError("supar.Callback: needs transformers: pip install transformers accelerate") from None

_PASS_OPTIMIZER = "optimizers=(prepared.optimizer(), None)"


class Callback(TrainerCallback):  # type: ignore[misc]
    """Hold a Trainer to a plan: `callbacks=[supar.Callback(prepared)]`.

    Training starts only with an optimizer of `prepared` and without Trainer's own clipping, which knows nothing of folded
    multipliers; arguments that the plan overrules are warned of. Each checkpoint gets the plan. Raises InputError.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        model, optimizer = trainer["model"], unwrap(trainer["optimizer"])
        problems = [*_sharding_problems(args), *_clipping_problems(args, self.prepared)]
        if optimizer not in kept or kept[optimizer][0].masked is not self.prepared:
            what = f"Trainer's optimizer ({type(optimizer).__name__}) was not made by prepared"
            problems.append(f"{what}; expected {_PASS_OPTIMIZER}, or class MyTrainer(supar.TrainerMixin, Trainer)")
        if problems:
            raise InputError(*problems)
        for message in _ignored(args, self.prepared):
            warnings.warn(message, stacklevel=2)
        _require_prepared(self.prepared, model)
        self.prepared.attach(model)
        folder = _checkpoint_folder(args, state)
        if state.global_step and (folder / "plan.yaml").exists():
            self.prepared.load(folder)
            self.prepared.verify(folder)
        elif state.global_step and self.prepared.schedule is not None and not self.prepared.step:
            what = f"{folder}: is not there, and only it has the masks of step {state.global_step}"
            raise InputError(f"{what}; call prepared.load(checkpoint) before trainer.train(checkpoint)")
        _require_dead(self.prepared)

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        self.prepared.update()

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        _require_dead(self.prepared)
        if state.is_world_process_zero:
            self.prepared.save(_checkpoint_folder(args, state))


class TrainerMixin:
    """A Trainer that makes the plan's optimizer itself, as sharding (FSDP2) needs: `class MyTrainer(supar.TrainerMixin, Trainer)`.

    `MyTrainer(..., prepared=prepared, clip=1.0)`; keywords in `optimizer_options` go to the optimizer. Adds the callback.
    Raises InputError where the model is not the prepared one.
    """

    optimizer: torch.optim.Optimizer | None
    model: torch.nn.Module

    def __init__(
        self,
        *args: Any,
        prepared: Prepared,
        clip: float | None = None,
        optimizer_options: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        self.prepared, self.clip, self.optimizer_options = prepared, clip, optimizer_options or {}
        super().__init__(*args, **trainer)
        self.add_callback(Callback(prepared))  # type: ignore[attr-defined]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """What Trainer calls before it shards or wraps the model."""
        if self.optimizer is None:
            whole = self.model if model is None else model
            _require_prepared(self.prepared, whole)
            self.optimizer = self.prepared.optimizer(whole, clip=self.clip, **self.optimizer_options)
        return self.optimizer


def unwrap(optimizer: Any) -> Any:
    """The optimizer that accelerate's or Lightning's wrapper holds."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _checkpoint_folder(args: Any, state: Any) -> Path:
    """Where Trainer writes the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _require_prepared(prepared: Prepared, model: torch.nn.Module) -> None:
    """Raise InputError for a model that is not the prepared one, or its shards."""
    now = match(model, prepared.plan)
    if any(now[name] is not held and not isinstance(now[name], DTensor) for name, held in prepared.tensors.items()):
        what = "model: is not the one that was prepared, so it has not the plan's initial values and masks"
        raise InputError(f"{what}; expected model=prepared.model, and no model_init")


def _require_dead(prepared: Prepared) -> None:
    """Raise InputError, by tensor, if weights live where the plan has dead ones."""
    if found := prepared.check():
        what = "weights: expected those of a model of this plan and seed"
        raise InputError(*(live_text(name, count) for name, count in found.items()), what)


def _sharding_problems(args: Any) -> list[str]:
    """What keeps tensors in other places than the model; FSDP1 is refused where the model is attached."""
    return ["deepspeed: its optimizer holds copies of the tensors; expected DDP or FSDP2"] if args.deepspeed else []


def _clipping_problems(args: Any, prepared: Prepared) -> list[str]:
    if not args.max_grad_norm or all((row.fold or 1.0) == 1.0 for row in prepared.plan.tensors):
        return []
    what = (
        f"max_grad_norm: {args.max_grad_norm}; Trainer's clipping knows nothing of the multipliers folded into tensors"
    )
    return [f"{what}; expected max_grad_norm=0 and prepared.optimizer(clip={args.max_grad_norm})"]


def _ignored(args: Any, prepared: Prepared) -> list[str]:
    """Arguments that were given, differ from the plan and have no effect, a sentence each."""
    tuned, train = prepared.plan.hyperparameters, prepared.plan.train
    planned = {"learning_rate": tuned.lr, "weight_decay": tuned.weight_decay, "optim": None}
    if train.optimizer == "adamw":
        planned |= {"adam_beta1": train.betas[0], "adam_beta2": train.betas[1], "adam_epsilon": tuned.eps}
    defaults = {field.name: field.default for field in fields(args)}
    return [
        f"supar: {name}={getattr(args, name)} of TrainingArguments has no effect: {_overruling(value)}; leave it out"
        for name, value in planned.items()
        if getattr(args, name) not in (defaults[name], value)
    ]


def _overruling(value: float | None) -> str:
    return "the optimizer is prepared's" if value is None else f"the plan has {value:g}, scaled for each tensor"
