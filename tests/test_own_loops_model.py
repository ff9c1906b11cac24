"""Loops of others that change the model or its gradients: told by the first step that is made; their twins pass."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import supar_cli as supar
from supar_cli.errors import SuparError

from .own_loop import VOCAB, WIDTH, Net, Training, plan_of, rows

Loop = Callable[[Training], object]


# --- gradients ---


def clip_by_torch(run: Training) -> None:
    for _ in range(2):
        run.loss().backward()
        clip_grad_norm_(run.model.parameters(), 0.1)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1


def clip_values_by_torch(run: Training) -> None:
    run.loss().backward()
    clip_grad_value_(run.model.parameters(), 1e-3)
    run.optimizer.step()
    run.steps += 1


def clip_by_prepared(run: Training) -> None:
    for _ in range(3):
        run.loss().backward()
        run.prepared.clip_grad_norm_(0.1)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1


def clip_in_the_optimizer(run: Training) -> None:
    run.optimizer = run.prepared.optimizer(clip=0.1)
    for _ in range(3):
        run.step()


def accumulate(run: Training) -> None:
    for _ in range(2):
        for _ in range(3):
            (run.loss() / 3).backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        run.steps += 1


def average_gradients(run: Training) -> None:
    """Summed over micro-batches, then divided by their number, as some loops have it."""
    for _ in range(2):
        for _ in range(3):
            run.loss().backward()
        for parameter in run.model.parameters():
            parameter.grad /= 3
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1


def add_gradient_noise(run: Training) -> None:
    for _ in range(2):
        run.loss().backward()
        for parameter in run.model.parameters():
            parameter.grad += 1e-3 * torch.randn_like(parameter)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1


def measure_the_norm(run: Training) -> None:
    """As loggers and Trainer have it: a limit of infinity, for the norm alone."""
    for _ in range(2):
        run.loss().backward()
        clip_grad_norm_(run.model.parameters(), math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.steps += 1


def scale_gradients(run: Training, unscale: bool = False) -> None:
    """As mixed precision has it; the scale is a power of two."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        scaler.scale(run.loss()).backward()
        if unscale:
            scaler.unscale_(run.optimizer)
            run.prepared.clip_grad_norm_(0.1)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        run.steps += 1


def scale_and_clip(run: Training) -> None:
    scale_gradients(run, unscale=True)


# --- values ---


def load_another_seed(run: Training) -> None:
    """The checkpoint of a run of the same model under another seed: other masks."""
    train = {**plan_of().train.model_dump(), "seed": 1}
    run.model.load_state_dict(Training(plan_of(train=train)).model.state_dict())
    run.step()


def load_a_dense_checkpoint(run: Training) -> None:
    run.model.load_state_dict(Net().state_dict())
    run.step()


def load_its_own_checkpoint(run: Training) -> None:
    run.step()
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()))
    run.step()


def reset_parameters(run: Training) -> None:
    run.model.get_submodule("up").reset_parameters()
    run.step()


def add_noise(run: Training) -> None:
    with torch.no_grad():
        run.model.get_parameter("down.weight").add_(1e-3)
    run.step()


def initialise_again(run: Training) -> None:
    """`model.apply(init_weights)` after prepare; here of a tensor without a mask."""
    nn.init.normal_(run.model.get_parameter("tokens.weight"), std=0.02)
    run.step()


def initialise_before(run: Training) -> None:
    for parameter in run.model.parameters():
        nn.init.normal_(parameter, std=0.02)
    run.prepared = supar.prepare(run.model, run.prepared.plan)
    run.optimizer = run.prepared.optimizer()
    for _ in range(2):
        run.step()


def add_noise_to_data(run: Training) -> None:
    """Through `.data`, whose writes torch does not count."""
    for _ in range(3):
        run.step()
        for parameter in run.model.parameters():
            parameter.data.add_(1e-3)


def clamp_values(run: Training) -> None:
    """As critics of Wasserstein GANs are; zeros stay zeros."""
    for _ in range(2):
        run.step()
        for parameter in run.model.parameters():
            parameter.data.clamp_(-1.0, 1.5)


# --- parameters ---


def resize_embeddings(run: Training) -> None:
    """What `resize_token_embeddings` does: another module with a new parameter."""
    larger = nn.Embedding(VOCAB + 2, WIDTH)
    with torch.no_grad():
        larger.weight[:VOCAB] = run.model.get_submodule("tokens").weight
    run.model.tokens = larger
    run.step()


def replace_a_parameter(run: Training) -> None:
    run.model.get_submodule("up").weight = nn.Parameter(run.model.get_parameter("up.weight").detach().clone())
    run.step()


def replace_and_attach(run: Training) -> None:
    replace = nn.Parameter(run.model.get_parameter("up.weight").detach().clone())
    run.model.get_submodule("up").weight = replace
    run.optimizer = run.prepared.optimizer(run.model)
    run.step()


def weight_norm(run: Training) -> None:
    parametrizations.weight_norm(run.model.get_submodule("up"))
    run.step()


def prune_by_torch(run: Training) -> None:
    prune.l1_unstructured(run.model.get_submodule("down"), "weight", 0.5)
    run.step()


def unfreeze(run: Training) -> None:
    """Gradual unfreezing: a tensor that was frozen when the optimizer was made."""
    run.model.get_parameter("up.weight").requires_grad_(False)
    run.optimizer = run.prepared.optimizer()
    run.step()
    run.model.get_parameter("up.weight").requires_grad_(True)
    run.step()


def unfreeze_and_make_anew(run: Training) -> None:
    run.model.get_parameter("up.weight").requires_grad_(False)
    run.optimizer = run.prepared.optimizer()
    run.step()
    run.model.get_parameter("up.weight").requires_grad_(True)
    run.optimizer = run.prepared.optimizer()
    run.step()


def freeze(run: Training) -> None:
    run.step()
    run.model.get_submodule("tokens").requires_grad_(False)
    run.step()


# --- copies ---


def train_a_copy(run: Training) -> None:
    """A copy is trained and the optimizer is that of the original."""
    run.model = copy.deepcopy(run.model)
    run.step()


def train_a_copy_that_is_attached(run: Training) -> None:
    run.model = copy.deepcopy(run.model)
    run.optimizer = run.prepared.optimizer(run.model)
    for _ in range(2):
        run.step()


def average(run: Training) -> None:
    """An exponential moving average, evaluated and copied back."""
    averaged = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        run.step()
        averaged.update_parameters(run.model)
    run.model.load_state_dict(averaged.module.state_dict())
    run.step()


WRONG: dict[Loop, tuple[str, int]] = {
    clip_by_torch: ("prepared.clip_grad_norm_(", 0),
    clip_values_by_torch: ("prepared.clip_grad_norm_(", 0),
    load_another_seed: ("up.weight", 0),
    load_a_dense_checkpoint: ("up.weight", 0),
    reset_parameters: ("up.weight", 0),
    add_noise: ("down.weight", 0),
    add_noise_to_data: ("down.weight", 1),
    initialise_again: ("tokens.weight", 0),
    resize_embeddings: ("tokens.weight", 0),
    replace_a_parameter: ("up.weight", 0),
    weight_norm: ("up.weight", 0),
    prune_by_torch: ("down.weight", 0),
    unfreeze: ("up.weight", 1),
    train_a_copy: ("attach", 0),
}
HARMLESS: list[Loop] = [
    clip_by_prepared,
    clip_in_the_optimizer,
    accumulate,
    average_gradients,
    add_gradient_noise,
    measure_the_norm,
    scale_gradients,
    scale_and_clip,
    load_its_own_checkpoint,
    clamp_values,
    initialise_before,
    replace_and_attach,
    unfreeze_and_make_anew,
    freeze,
    train_a_copy_that_is_attached,
    average,
]


@pytest.mark.parametrize("loop", WRONG, ids=lambda loop: loop.__name__)
def test_what_changes_the_model_is_told(loop: Loop) -> None:
    line, steps = WRONG[loop]
    run = Training()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((SuparError, UserWarning)) as told:
            loop(run)
    assert line in str(told.value) and run.steps <= steps


@pytest.mark.parametrize("loop", HARMLESS, ids=lambda loop: loop.__name__)
def test_its_twin_passes(loop: Loop) -> None:
    run = Training()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(run)
    assert run.prepared.check() == {}
    assert run.steps >= 2 or loop in (replace_and_attach,)


def test_torchs_clipping_is_right_where_nothing_is_folded() -> None:
    run = Training(plan_of(rows(fold=1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_by_torch(run)


def test_an_inf_at_a_dead_weight_skips_no_step() -> None:
    """GradScaler skips a step where a gradient is not finite: at a dead weight it means nothing, at a live one it counts."""
    for alive, moved in ((False, True), (True, False)):
        run = Training()
        weight = run.model.get_parameter("up.weight")
        start = weight.detach().clone()
        at = (start != 0) == alive
        weight.register_hook(lambda grad, at=at: grad.masked_fill(at, torch.inf))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(run.loss()).backward()
        scaler.step(run.optimizer)
        scaler.update()
        assert (not torch.equal(start, weight)) == moved and bool((weight[start == 0] == 0).all())
