"""Loops of others around a prepared model: what goes wrong in silence there is told by the first step, its twin passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import supar_cli as supar
from supar_cli.cli.help import PAGES
from supar_cli.errors import InputError, SuparError
from supar_cli.own.guard import Kept

from .own_loop import LR, WIDTH, Net, Training, plan_of, rows
from .test_readme import blocks

Loop = Callable[[Training], object]


# --- rates ---


def nanogpt(run: Training) -> None:
    for step in range(3):
        for group in run.optimizer.param_groups:
            group["lr"] = LR / (1 + step)
        run.step()


def nanogpt_by_ratio(run: Training) -> None:
    for step in range(3):
        for group in run.optimizer.param_groups:
            group["lr"] = LR / (1 + step) * group["ratio"]
        run.step()


def nanogpt_by_set_rate(run: Training) -> None:
    for step in range(3):
        run.prepared.set_rate(LR / (1 + step))
        run.step()


def cleanrl(run: Training) -> None:
    for update in range(1, 4):
        run.optimizer.param_groups[0]["lr"] = (1 - (update - 1) / 4) * LR / 2
        run.step()


def one_cycle(run: Training) -> None:
    scheduler = schedulers.OneCycleLR(run.optimizer, max_lr=LR, total_steps=10)
    scheduled(run, scheduler)


def one_cycle_by_group(run: Training) -> None:
    peaks = [group["lr"] for group in run.optimizer.param_groups]
    scheduled(run, schedulers.OneCycleLR(run.optimizer, max_lr=peaks, total_steps=10))


def cyclic(run: Training) -> None:
    scheduled(run, schedulers.CyclicLR(run.optimizer, base_lr=LR / 4, max_lr=LR, cycle_momentum=False))


def cyclic_by_group(run: Training) -> None:
    peaks = [group["lr"] for group in run.optimizer.param_groups]
    floors = [peak / 4 for peak in peaks]
    scheduled(run, schedulers.CyclicLR(run.optimizer, base_lr=floors, max_lr=peaks, cycle_momentum=False))


def cosine_to_a_floor(run: Training) -> None:
    scheduled(run, schedulers.CosineAnnealingLR(run.optimizer, T_max=5, eta_min=LR / 8))


def warm_restarts_to_a_floor(run: Training) -> None:
    scheduled(run, schedulers.CosineAnnealingWarmRestarts(run.optimizer, T_0=3, eta_min=LR / 8))


def plateau_with_a_floor(run: Training) -> None:
    scheduler = schedulers.ReduceLROnPlateau(run.optimizer, factor=0.1, patience=0, min_lr=LR / 2)
    for _ in range(4):
        run.step()
        scheduler.step(1.0)


def plateau_by_group(run: Training) -> None:
    floors = [group["lr"] / 2 for group in run.optimizer.param_groups]
    scheduler = schedulers.ReduceLROnPlateau(run.optimizer, factor=0.1, patience=0, min_lr=floors)
    for _ in range(4):
        run.step()
        scheduler.step(1.0)


def rate_finder(run: Training) -> None:
    """As torch-lr-finder has it: a small rate for all, then ever larger ones."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e-6
    scheduled(run, schedulers.ExponentialLR(run.optimizer, 2.0))


def rate_finder_by_set_rate(run: Training) -> None:
    run.prepared.set_rate(1e-6)
    scheduled(run, schedulers.ExponentialLR(run.optimizer, 2.0))


def scheduled(run: Training, scheduler: schedulers.LRScheduler, steps: int = 9) -> None:
    for _ in range(steps):
        run.step()
        scheduler.step()


RELATIVE: dict[str, Callable[[torch.optim.Optimizer], schedulers.LRScheduler]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, total_iters=4),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, 9)], [3]
    ),
}


# --- optimizers ---


def own_adamw(run: Training) -> None:
    """The line that the loop had before, left as it was."""
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=LR)
    run.step()


def own_adamw_of_groups(run: Training) -> None:
    run.optimizer = torch.optim.AdamW(run.prepared.groups())
    run.step()


def kept_rmsprop(run: Training) -> None:
    """Masks without numbers, as is said once."""
    with pytest.warns(UserWarning, match="the masks hold, its rates and decay are yours"):
        run.optimizer = run.prepared.keep(torch.optim.RMSprop(run.model.parameters(), lr=LR))
    run.step()


def other_models_adamw(run: Training) -> None:
    """A second model beside the prepared one, as critics and discriminators are."""
    other = Net()
    optimizer = torch.optim.AdamW(other.parameters())
    for _ in range(2):
        run.step()
        run.loss(other).backward()
        optimizer.step()


def state_of_a_plain_optimizer(run: Training) -> None:
    """The groups' numbers are in the state: those of another optimizer come with it."""
    other = torch.optim.AdamW([{**group, "lr": 1e-3} for group in run.prepared.groups()])
    run.optimizer.load_state_dict(other.state_dict())
    run.step()


def state_of_another_plan(run: Training) -> None:
    run.optimizer.load_state_dict(Training(plan_of(rows(fold=0.5))).optimizer.state_dict())
    run.step()


def state_with_another_decay(run: Training) -> None:
    tensors = rows()
    tensors[1]["weight_decay"] = 0.25
    run.optimizer.load_state_dict(Training(plan_of(tensors)).optimizer.state_dict())
    run.step()


def own_state(run: Training) -> None:
    run.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer = run.prepared.optimizer()
    run.optimizer.load_state_dict(state)
    run.step()


def another_group(run: Training) -> None:
    """A new head beside the model, in the same optimizer."""
    run.optimizer.add_param_group({"params": nn.Linear(WIDTH, 2).parameters(), "lr": LR})
    run.step()


def one_decay_for_all(run: Training) -> None:
    for group in run.optimizer.param_groups:
        group["weight_decay"] = 0.04
    run.step()


def scheduled_decay(run: Training) -> None:
    """As self-supervised vision has it: one factor on all decays."""
    for step in range(1, 4):
        for group, planned in zip(run.optimizer.param_groups, run.prepared.groups(), strict=True):
            group["weight_decay"] = step * planned["weight_decay"]
        run.step()


def some_groups(run: Training) -> None:
    run.optimizer = run.prepared.keep(torch.optim.AdamW(run.prepared.groups()[:2]))
    run.step()


def two_optimizers(run: Training) -> None:
    groups = run.prepared.groups()
    optimizers = [run.prepared.keep(torch.optim.AdamW(part)) for part in (groups[:2], groups[2:])]
    for _ in range(2):
        run.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.steps += 1


def lbfgs(run: Training) -> None:
    run.prepared.keep(torch.optim.LBFGS(run.model.parameters()))


def closure(run: Training) -> None:
    """As Lightning has it: gradients are made inside the step."""

    def evaluate() -> float:
        run.optimizer.zero_grad()
        loss = run.loss()
        loss.backward()
        return float(loss.detach())

    for _ in range(3):
        run.optimizer.step(evaluate)
        run.steps += 1


# each loop with what its message has to say, and how many steps may be made before it is told
WRONG: dict[Loop, tuple[str, int]] = {
    nanogpt: ("set_rate", 0),
    cleanrl: ("set_rate", 0),
    one_cycle: ("max_lr", 0),
    cyclic: ("max_lr", 0),
    cosine_to_a_floor: ("eta_min", 1),
    warm_restarts_to_a_floor: ("eta_min", 1),
    plateau_with_a_floor: ("min_lr", 2),
    rate_finder: ("set_rate", 0),
    own_adamw: ("prepared.optimizer()", 0),
    own_adamw_of_groups: ("prepared.keep(optimizer)", 0),
    state_of_a_plain_optimizer: ("set_rate", 0),
    state_of_another_plan: ("load_state_dict", 0),
    state_with_another_decay: ("weight_decay", 0),
    one_decay_for_all: ("weight_decay", 0),
    some_groups: ("prepared.keep(optimizer)", 0),
    lbfgs: ("LBFGS", 0),
}
HARMLESS: list[Loop] = [
    nanogpt_by_ratio,
    nanogpt_by_set_rate,
    one_cycle_by_group,
    cyclic_by_group,
    plateau_by_group,
    rate_finder_by_set_rate,
    kept_rmsprop,
    other_models_adamw,
    own_state,
    scheduled_decay,
    two_optimizers,
    another_group,
    closure,
]


@pytest.mark.parametrize("loop", WRONG, ids=lambda loop: loop.__name__)
def test_what_breaks_a_loop_is_told(loop: Loop) -> None:
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
    start = copy.deepcopy(run.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(run)
    assert run.prepared.check() == {}
    assert run.steps >= 1 and all(not torch.equal(start[name], now) for name, now in run.model.state_dict().items())


@pytest.mark.parametrize("loop", list(WRONG)[:8], ids=lambda loop: loop.__name__)
def test_without_the_guard_wrong_rates_pass_in_silence(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: it is the guard that tells them, and their rates are wrong."""
    monkeypatch.setattr(Kept, "_before", lambda *_: None)
    run, off = Training(), list[float]()
    run.optimizer.register_step_pre_hook(lambda *_: off.append(max(run.rates()) / min(run.rates())))
    loop(run)
    assert run.steps >= 3 and max(off) > 1.5


@pytest.mark.parametrize("name", RELATIVE)
def test_schedules_that_multiply_pass(name: str) -> None:
    run = Training()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled(run, RELATIVE[name](run.optimizer), steps=12)
    assert run.rates() == pytest.approx(run.rates()[:1] * len(run.rates()), rel=1e-9)


class Router(nn.Module):
    """Two layers of experts, chosen softly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.router = nn.Embedding(50, width), nn.Linear(width, 4, bias=False)
        self.experts, self.head = nn.Parameter(torch.randn(4, width, width)), nn.Linear(width, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        mixed = torch.einsum("btd,edf,bte->btf", x, self.experts, self.router(x).softmax(-1))
        return self.head(mixed)


def test_the_manual_shows_a_question_as_it_is_asked() -> None:
    (shown,) = (block for language, block in blocks(PAGES / "own-models.md") if language == "text")
    sizes = {"base": {"width": 32}, "wider": {"width": 64}}
    with pytest.raises(InputError) as asked:
        supar.layout(Router, **sizes, example=lambda _: (torch.randint(50, (2, 8)),))
    assert " ".join(shown.split()) == f"error: {asked.value}"
    found = supar.layout(
        Router, **sizes, example=lambda _: (torch.randint(50, (2, 8)),), roles={"router.weight": "unembedding"}
    )
    (router,) = (row for row in found.tensors if row.name == "router.weight")
    assert router.said and router.role == "unembedding" and router.uses == []
