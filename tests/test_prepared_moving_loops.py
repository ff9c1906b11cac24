"""A plan whose masks move in loops of others: what they see, how they resume, and what is told that would be wrong in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.own import dead_weights
from supar_cli.own.prepared import Prepared
from supar_cli.planning.plan import Plan
from supar_cli.planning.updates import Updates, resolve
from tests.own_models import METHODS, STEPS, batch, loss_of, make, moving_plan, plan_of, steps, updates

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class Run:
    """A loop of its own around a prepared model; `factor` is a schedule's."""

    def __init__(
        self, plan: Plan, factor: Callable[[int], float] = lambda step: 1 / (1 + step), **options: Any
    ) -> None:
        self.prepared = supar.prepare(make(), plan)
        self.optimizer = self.prepared.optimizer(**options)
        self.scheduler = lr_scheduler.LambdaLR(self.optimizer, factor)
        self.losses: list[float] = []

    def step(self, parts: int = 1) -> bool:
        tokens = batch(len(self.losses))
        loss = torch.zeros(())
        for part in tokens.chunk(parts):
            one = loss_of(self.prepared.model, part) / parts
            one.backward()
            loss = loss + one.detach()
            if parts > 1:
                assert not self.prepared.update()  # no step was made
        self.optimizer.step()
        changed = self.prepared.update()
        self.optimizer.zero_grad(set_to_none=len(self.losses) % 2 == 0)
        self.scheduler.step()
        self.losses.append(loss.item())
        return changed

    def train(self, steps: int, **options: Any) -> list[bool]:
        return [self.step(**options) for _ in range(steps)]


@pytest.mark.parametrize("method", METHODS)
def test_every_mask_has_what_the_plan_keeps(method: str) -> None:
    run = Run(moving_plan(method), clip=1.0)
    schedule = run.prepared.schedule
    assert schedule is not None
    for _ in range(STEPS):
        assert run.step() == schedule.is_update(run.prepared.step)
        for name, mask in run.prepared.masks.items():
            row, dead = run.prepared.rows[name], run.prepared.dead[name]
            state = run.optimizer.state[run.prepared.tensors[name]]
            assert mask.count == dead.live_here == schedule.kept(row, run.prepared.step)
            found = sum(int(dead.count_live(state[key])) for key in ("exp_avg", "exp_avg_sq"))
            assert (found > 0) == (method == "topk" and run.prepared.step < schedule.end)
        assert run.prepared.check() == {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prepared_first", [True, False])
def test_a_resumed_run_is_bit_for_bit_the_same(method: str, prepared_first: bool, tmp_path: Path) -> None:
    """Saved after a step between changes and after one that ends with a change, loaded in either order."""
    plan = moving_plan(method)
    whole = Run(plan)
    for at in (3, 4):
        whole.train(at - len(whole.losses))
        parts = [whole.prepared.model, whole.optimizer, whole.scheduler, whole.prepared]
        torch.save([part.state_dict() for part in parts], tmp_path / f"{at}.pt")
    whole.train(STEPS - 4)
    for at in (3, 4):
        again = Run(plan)
        again.losses = whole.losses[:at]
        parts = [again.prepared.model, again.optimizer, again.scheduler, again.prepared]
        pairs = list(zip(parts, torch.load(tmp_path / f"{at}.pt"), strict=True))
        for part, state in reversed(pairs) if prepared_first else pairs:
            part.load_state_dict(state)
        assert again.prepared.step == at and again.prepared.check() == {}
        again.train(STEPS - at)
        assert again.losses == whole.losses and again.prepared.masks == whole.prepared.masks
        assert all(map(torch.equal, again.prepared.tensors.values(), whole.prepared.tensors.values()))


def test_a_run_that_is_resumed_in_part_is_told(tmp_path: Path) -> None:
    run = Run(moving_plan("gmp"))
    run.train(6)
    again = Run(moving_plan("gmp"))
    again.prepared.model.load_state_dict(run.prepared.model.state_dict())
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    with pytest.raises(InputError, match="the optimizer's state is of step 6, the masks are of step 0; load both"):
        again.step()
    again.prepared.load_state_dict(run.prepared.state_dict())
    again.step()
    other = Run(moving_plan("set"))
    with pytest.raises(InputError, match="state: is of another plan"):
        other.prepared.load_state_dict(run.prepared.state_dict())
    other.prepared.model.load_state_dict(run.prepared.model.state_dict())
    with pytest.raises(InputError, match=r"expected those of a model of this plan and seed, after step 0"):
        other.step()


def test_saved_masks_are_verified_and_prepared_with(tmp_path: Path) -> None:
    run = Run(moving_plan("set"))
    run.train(5)
    run.prepared.save(tmp_path)
    run.prepared.verify(tmp_path)
    model = copy.deepcopy(run.prepared.model)
    again = supar.prepare(model, run.prepared.plan, initialise=False, state=run.prepared.state_dict())
    again.verify(tmp_path)
    assert again.step == 5 and again.masks == run.prepared.masks
    with pytest.raises(InputError, match="expected it with initialise=False"):
        supar.prepare(model, run.prepared.plan, state=run.prepared.state_dict())
    run.train(2)
    with pytest.raises(InputError, match=r"blocks\.0\.up\.weight: the saved mask is another one"):
        run.prepared.verify(tmp_path)


def test_a_loop_that_never_updates_is_told_at_its_second_step() -> None:
    made = supar.prepare(make(), moving_plan("gmp"))
    optimizer = made.optimizer()
    steps(made.model, optimizer, 1)
    with pytest.raises(InputError, match=r"write prepared\.update\(\) after each optimizer\.step\(\)"):
        steps(made.model, optimizer, 1)
    static = supar.prepare(make(), plan_of(make()))
    assert steps(static.model, static.optimizer(), 2) and not static.update() and static.step == 0


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_one_step(method: str) -> None:
    whole, parts = Run(moving_plan(method)), Run(moving_plan(method))
    whole.train(STEPS)
    parts.train(STEPS, parts=2)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5) and parts.prepared.masks == whole.prepared.masks


def test_rigl_grows_by_all_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: the last part alone is another gradient."""
    monkeypatch.setattr(dead_weights.DeadWeights, "collect", lambda dead, g: setattr(dead, "_gradient", g.clone()))
    whole, parts = Run(moving_plan()), Run(moving_plan())
    whole.train(STEPS)
    parts.train(STEPS, parts=2)
    assert parts.prepared.masks != whole.prepared.masks


def test_schedulers_and_loops_see_planned_rates() -> None:
    """GMP starts dense: rates are lower by the density then, inside of each step alone."""
    run, inside = Run(moving_plan("gmp"), factor=lambda step: 0.5), []
    run.optimizer.register_step_pre_hook(
        lambda o, *_: inside.append([(g["lr"], g["weight_decay"]) for g in o.param_groups])
    )
    for step in range(STEPS):
        run.step()
        for group in run.optimizer.param_groups:
            row = run.prepared.rows[group["names"][0]]
            assert (group["lr"], group["weight_decay"]) == (0.5 * row.lr, row.weight_decay)
        density = run.prepared.schedule.kept(run.prepared.rows["blocks.0.up.weight"], step) / 4096  # type: ignore[union-attr]
        assert inside[-1][-1] == pytest.approx((0.0025 * 0.25 / density, 0.2 * density / 0.25))
        assert inside[-1][0] == (0.005, 0.1)  # of what stays dense


def test_a_closure_is_one_step() -> None:
    plain, closed = Run(moving_plan()), Run(moving_plan())
    plain.train(STEPS)
    for step in range(STEPS):

        def closure(step: int = step) -> torch.Tensor:
            closed.optimizer.zero_grad()
            loss = loss_of(closed.prepared.model, batch(step))
            loss.backward()
            return loss

        closed.losses.append(closed.optimizer.step(closure).item())  # type: ignore[attr-defined]
        closed.prepared.update()
        closed.scheduler.step()
    assert closed.losses == plain.losses and closed.prepared.masks == plain.prepared.masks


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_scaler_skips_is_none(fused: bool) -> None:
    run = Run(moving_plan(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    steps_made = 0
    for step in range(STEPS):
        loss = loss_of(run.prepared.model, batch(step))
        scaler.scale(loss).backward()
        if step == 1:
            run.prepared.tensors["head.bias"].grad[0] = torch.inf  # type: ignore[index]
        scaler.step(run.optimizer)
        scaler.update()
        run.prepared.update()
        run.optimizer.zero_grad(set_to_none=False)
        steps_made += step != 1
        assert run.prepared.step == steps_made
    assert run.prepared.check() == {}


def test_gradients_that_overflowed_are_not_grown_by() -> None:
    made = supar.prepare(make(), moving_plan())
    name = "blocks.0.up.weight"
    dead, gradient = made.dead[name], torch.ones(128, 32)
    for value, found in ((torch.inf, torch.finfo().max), (2.0, 2.0), (3.0, 5.0), (torch.nan, 0.0)):
        gradient[0, 0] = value
        dead.collect(gradient)
        assert float(dead.gradient(name, 2)[0, 0]) == pytest.approx(found)


def test_the_sparse_engine_makes_dense_gradients_where_rigl_needs_them() -> None:
    losses = []
    for engine in (None, "sparse"):
        made = supar.prepare(make(), moving_plan(), engine=engine)
        optimizer, found = made.optimizer(), []
        for step in range(STEPS):
            found += steps(made.model, optimizer, 1, step)
            made.update()
        losses.append(found)
        assert made.check() == {}
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_no_squares_to_fill(momentum: float) -> None:
    train = {"optimizer": "sgd", "momentum": momentum}
    run = Run(moving_plan("set", train=train))
    run.train(STEPS)
    for name, tensor in run.prepared.tensors.items():
        moment = run.optimizer.state[tensor].get("momentum_buffer")
        if moment is not None and name in run.prepared.dead:
            assert not run.prepared.dead[name].count_live(moment)


def test_frozen_tensors_keep_their_masks() -> None:
    model = make()
    made = supar.prepare(model, moving_plan("set"))
    model.blocks[0].requires_grad_(False)
    made.attach(model)
    first, optimizer = dict(made.masks), made.optimizer()
    for step in range(4):
        steps(model, optimizer, 1, step)
        made.update()
    moved = {name.split(".")[1] for name, mask in made.masks.items() if mask != first[name]}
    assert moved == {"1"}


def test_frozen_tensors_are_pruned_as_the_plan_says() -> None:
    (model := make()).blocks[0].requires_grad_(False)
    for method in ("gmp", "topk"):
        made = supar.prepare(model, moving_plan(method))
        optimizer = made.optimizer()
        for step in range(STEPS):
            steps(model, optimizer, 1, step)
            made.update()
        assert all(mask.count == made.rows[name].kept for name, mask in made.masks.items()) and made.check() == {}
        made.load_state_dict(made.state_dict())


@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_a_loop_that_updates_before_its_step_leaves_no_dead_moments(method: str) -> None:
    made = supar.prepare(make(), moving_plan(method))
    optimizer = made.optimizer()
    for step in range(STEPS):
        loss_of(made.model, batch(step)).backward()
        made.update()
        optimizer.step()
        optimizer.zero_grad()
        moments = [(dead, optimizer.state[made.tensors[name]]["exp_avg"]) for name, dead in made.dead.items()]
        assert not any(int(dead.count_live(moment)) for dead, moment in moments)


def test_a_step_is_counted_of_an_optimizer_kept_anew_and_not_if_it_is_taken_back() -> None:
    run = Run(moving_plan("gmp"))
    run.train(4)
    saved = [(part, copy.deepcopy(part.state_dict())) for part in (run.prepared.model, run.optimizer, run.prepared)]
    steps(run.prepared.model, run.optimizer, 1, 4)
    run.prepared.keep(run.optimizer)
    assert not run.prepared.update() and run.prepared.step == 5  # no change is due
    steps(run.prepared.model, run.optimizer, 1, 5)
    for part, state in saved:
        part.load_state_dict(state)
    assert not run.prepared.update() and run.prepared.step == 4


# --- Trainer, Lightning ---


def test_the_callback_updates_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    theirs = pytest.importorskip("tests.test_own_trainer")
    plan = theirs.llama_plan()
    resolved = resolve(Updates(**updates("rigl", every_steps=1)), 1.0, 6).model_dump()
    plan = theirs.llama_plan(
        sparsity={**plan.sparsity.model_dump(), "updates": resolved}, train={**plan.train.model_dump(), "steps": 6}
    )
    checkpoint, runs, made = str(tmp_path / "one/checkpoint-3"), list[Any](), list[Prepared]()
    for name in ("one", "one", "other"):
        runs.append(theirs.trainer(tmp_path / name, plan))
        (callback,) = [one for one in runs[-1].callback_handler.callbacks if isinstance(one, supar.Callback)]
        made.append(callback.prepared)
        if name == "other":
            with pytest.raises(InputError, match=r"call prepared\.load\(checkpoint\) before"):
                runs[-1].train(checkpoint)
            callback.prepared.load(checkpoint)
        runs[-1].train(None if len(runs) == 1 else checkpoint)
    assert [one.step for one in made] == [6] * 3 and made[0].masks != supar.prepare(theirs.llama(), plan).masks
    for run, prepared in zip(runs[1:], made[1:], strict=True):
        assert theirs.losses(run)[-3:] == theirs.losses(runs[0])[-3:] and prepared.masks == made[0].masks
        assert theirs.same_tensors(run.model, runs[0].model)


def test_lightning_updates_after_each_batch(lightning: Any, tmp_path: Path) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.prepared = supar.prepare(make(), moving_plan())
            self.model = self.prepared.model

        def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
            return loss_of(self.model, tokens)

        def on_train_batch_end(self, *_: Any) -> None:
            self.prepared.update()

        def configure_optimizers(self) -> Any:
            return self.prepared.optimizer(self.model)

    module, plain = Module(), Run(moving_plan(), factor=lambda step: 1.0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {"default_root_dir": str(tmp_path), "accelerator": "cpu", "max_epochs": 1, **quiet}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None)
        lightning.Trainer(**options).fit(module, data)
    plain.train(STEPS)
    assert module.prepared.step == STEPS and module.prepared.masks == plain.prepared.masks
