"""The training loop: every step obeys the plan's numbers, and what a run writes is what it did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.planning import schedule
from supar_cli.planning.plan import Plan
from supar_cli.sparse.linear import Dense
from supar_cli.training import optimizer, run_directory
from supar_cli.training.monitor import LIMIT, Monitor
from supar_cli.training.prepare import to_dense
from supar_cli.training.reporter import NullReporter
from supar_cli.training.run_directory import RunHistory
from supar_cli.training.trainer import Trainer

MakePlan = Callable[..., Plan]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: trainer.sparse_model.weight(name) for name in trainer.sparse_model.tensors}


def gradients(trainer: Trainer) -> dict[str, np.ndarray]:
    """Masked gradients of the next step in float64 and in their tensors' shapes, of the whole batch at once."""
    trainer.model.zero_grad()
    torch.autograd.backward(trainer.model(*trainer.batch(trainer.done)))
    found = {}
    for name, tensor in trainer.sparse_model.tensors.items():
        assert tensor.grad is not None
        found[name] = to_dense(tensor.grad.double(), trainer.sparse_model.masks.get(name)).numpy()
    trainer.model.zero_grad()
    return found


def trained(plan: Plan, directory: Path, *, resume: bool = False, reporter: Any = None) -> tuple[Trainer, RunHistory]:
    """The trainer of a run in a directory, and what came out."""
    trainer = Trainer(plan, reporter=reporter)
    run_directory.begin_run(directory, plan, resume=resume, force=False)
    return trainer, trainer.run(directory, resume=resume)


class Listening(NullReporter):
    """A reporter that keeps its warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


class TestSchedule:
    @staticmethod
    def factors(kind: str, *steps: int, final: float = 0.1) -> list[float]:
        return [
            schedule.factor(step, steps=14, warmup_steps=4, schedule=kind, final_lr_fraction=final) for step in steps
        ]

    def test_literals(self) -> None:
        for kind in ("constant", "linear", "cosine"):
            assert self.factors(kind, 0, 1, 2, 3) == [0.25, 0.5, 0.75, 1.0]
        assert self.factors("constant", 4, 9, 13) == [1.0, 1.0, 1.0]
        assert self.factors("linear", 4, 6, 9, 13) == pytest.approx([1.0, 0.82, 0.55, 0.19], rel=1e-12)
        # .1 + .9 · (1 + cos(π · t)) / 2 at t = 0, .2, .5, .9
        assert self.factors("cosine", 4, 6, 9, 13) == pytest.approx([1.0, 0.9140576475, 0.55, 0.1220245677], rel=1e-9)
        assert self.factors("linear", 13, final=0.0) == pytest.approx([0.1], rel=1e-12)

    def test_no_warm_up_and_nothing_but_warm_up(self) -> None:
        assert schedule.factor(0, steps=5, warmup_steps=0, schedule="linear", final_lr_fraction=0.0) == 1.0
        assert schedule.factor(4, steps=5, warmup_steps=5, schedule="linear", final_lr_fraction=0.0) == 1.0

    def test_the_optimizer_gets_each_tensors_peak_times_the_factor(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of(train={"steps": 10, "warmup_fraction": 0.4}))
        peak = {row.name: row.lr for row in trainer.plan.tensors}
        assert len(set(peak.values())) > 1
        for factor in (0.25, 0.5, 0.75, 1.0, 1.0, 0.85):
            trainer.step()
            for group in trainer.optimizer.param_groups:
                for name in group["names"]:
                    assert group["lr"] == pytest.approx(peak[name] * factor, rel=1e-12)


class TestGroups:
    def test_every_tensor_is_claimed_once_with_its_own_numbers(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of(model={"bias": True, "tied": False}))
        rows = {row.name: row for row in trainer.plan.tensors}
        names = [name for group in trainer.optimizer.param_groups for name in group["names"]]
        assert sorted(names) == sorted(rows)
        for group in trainer.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                assert parameter is trainer.sparse_model.tensors[name]
                assert (group["peak_lr"], group["weight_decay"], group["eps"]) == (
                    rows[name].lr,
                    rows[name].weight_decay,
                    rows[name].eps,
                )

    def test_a_tensor_too_many_or_claimed_twice_is_a_bug(self, plan_of: MakePlan) -> None:
        plan = plan_of()
        tensors = dict(Trainer(plan).sparse_model.tensors)
        with pytest.raises(AssertionError, match="in no parameter group or in two"):
            optimizer.build(plan, {**tensors, "unknown": torch.nn.Parameter(torch.zeros(2))})
        twice = plan.model_copy(update={"tensors": [*plan.tensors, plan.tensors[0].model_copy(update={"lr": 1.0})]})
        with pytest.raises((AssertionError, ValueError)):
            optimizer.build(twice, tensors)


class TestUpdate:
    """Large epsilon and decay, so that each of the plan's numbers shows in the update."""

    SECTIONS: dict[str, Any] = {  # noqa: RUF012
        "hyperparameters": {
            "lr": 0.01,
            "init_std": 0.08,
            "alpha_input": 1.5,
            "alpha_output": 2.0,
            "weight_decay": 5.0,
            "eps": 1e-3,
        },
        "train": {"steps": 8, "batch_size": 4, "betas": [0.8, 0.9], "grad_clip": 0.0, "momentum": 0.7},
    }

    def clipped(self, found: dict[str, np.ndarray], limit: float) -> dict[str, np.ndarray]:
        norm = math.sqrt(sum(float((g**2).sum()) for g in found.values()))
        return {name: g * min(1.0, limit / norm) for name, g in found.items()} if limit else found

    @pytest.mark.parametrize("limit", [0.0, 0.3])
    def test_adamw_is_numpys(self, plan_of: MakePlan, limit: float) -> None:
        sections = {**self.SECTIONS, "train": {**self.SECTIONS["train"], "grad_clip": limit}}
        trainer = Trainer(plan_of(**sections))
        first: dict[str, Any] = {}
        second: dict[str, Any] = {}
        for t in (1, 2, 3):
            before, found = weights(trainer), self.clipped(gradients(trainer), limit)
            factor = optimizer.rate_factor(trainer.plan, trainer.done)
            trainer.step()
            for row in trainer.plan.tensors:
                g, w = found[row.name], before[row.name].double().numpy()
                first[row.name] = m = 0.8 * first.get(row.name, 0.0) + 0.2 * g
                second[row.name] = v = 0.9 * second.get(row.name, 0.0) + 0.1 * g * g
                lr = row.lr * factor
                wanted = -lr * row.weight_decay * w
                wanted -= lr * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + row.eps)
                made = trainer.sparse_model.weight(row.name).double().numpy() - w
                # float32 keeps 6e-8 of a weight; the update itself is good to 1e-4 of the rate
                assert np.abs(made - wanted).max() <= 1.2e-7 * np.abs(w).max() + 1e-4 * lr, (t, row.name)

    def test_sgd_is_numpys(self, plan_of: MakePlan) -> None:
        sections = {**self.SECTIONS, "train": {**self.SECTIONS["train"], "optimizer": "sgd"}}
        trainer = Trainer(plan_of(**sections))
        momentum: dict[str, Any] = {}
        for _ in range(3):
            before, found = weights(trainer), gradients(trainer)
            factor = optimizer.rate_factor(trainer.plan, trainer.done)
            trainer.step()
            for row in trainer.plan.tensors:
                w = before[row.name].double().numpy()
                g = found[row.name] + row.weight_decay * w
                momentum[row.name] = 0.7 * momentum[row.name] + g if row.name in momentum else g
                made = trainer.sparse_model.weight(row.name).double().numpy() - w
                wanted = -row.lr * factor * momentum[row.name]
                assert np.abs(made - wanted).max() <= 1.2e-7 * np.abs(w).max() + 1e-5 * np.abs(wanted).max(), row.name

    def test_clipping_bounds_the_whole_gradient(self, plan_of: MakePlan) -> None:
        zero_decay = {**self.SECTIONS["hyperparameters"], "weight_decay": 0.0}
        train = {"optimizer": "sgd", "momentum": 0.0, "warmup_fraction": 0.0, "grad_clip": 0.01}
        trainer = Trainer(plan_of("sp", hyperparameters=zero_decay, train=train))
        before = weights(trainer)
        _, norm, _ = trainer.step()
        moved = math.sqrt(
            sum(float((w - before[name]).double().square().sum()) for name, w in weights(trainer).items())
        )
        assert norm > 1  # the norm reported is the one before clipping
        assert moved / 0.01 == pytest.approx(0.01, rel=1e-3)  # lr · clip

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    def test_dead_weights_and_their_optimizer_state_stay_exactly_zero(self, plan_of: MakePlan, optimizer: str) -> None:
        trainer = Trainer(plan_of(train={"optimizer": optimizer, "steps": 8}, hyperparameters={"weight_decay": 1.0}))
        for _ in range(8):
            trainer.step()
        assert len(trainer.sparse_model.masks) == 12
        for name, mask in trainer.sparse_model.masks.items():
            tensor = trainer.sparse_model.tensors[name]
            kept = [value for value in trainer.optimizer.state[tensor].values() if value.ndim]
            # live weights are all there is of weights, moments and gradients
            assert kept and all(value.shape == (mask.count,) for value in (tensor, *kept))
            engine = trainer.sparse_model.linear(name).engine
            assert isinstance(engine, Dense) and torch.equal(engine.weight, trainer.sparse_model.weight(name))
            assert torch.equal(engine.weight != 0, torch.from_numpy(mask.alive()))


class TestAccumulation:
    @pytest.mark.parametrize("rows", [1, 2])
    def test_small_batches_add_up_to_the_full_one(self, plan_of: MakePlan, rows: int) -> None:
        whole, parts = (Trainer(plan_of(run={"micro_batch_size": n})) for n in (4, rows))
        for _ in range(6):
            one, other = whole.step(), parts.step()
            assert other[:2] == pytest.approx(one[:2], rel=2e-5)
        assert whole.evaluate() == pytest.approx(parts.evaluate(), rel=2e-5)
        # the control: another batch differs by far more than rounding
        inputs, targets = whole.batch(7)
        assert whole.model(inputs[:1], targets[:1]).item() != pytest.approx(one[0], rel=1e-3)

    def test_what_does_not_divide_the_batch_is_refused(self, plan_of: MakePlan) -> None:
        with pytest.raises(InputError, match=r"run\.micro_batch_size: 3 does not divide the batch size 4"):
            Trainer(plan_of(run={"micro_batch_size": 3}))


class TestDevice:
    def test_an_unknown_one_is_refused_and_a_missing_one_is_a_matter_of_setup(self, plan_of: MakePlan) -> None:
        for word in ("gpu", "mps", "tpu:0"):
            with pytest.raises(InputError, match=r"run\.device"):
                Trainer(plan_of(run={"device": word}))
        with pytest.raises(SetupError, match=r"run\.device: cuda:99"):
            Trainer(plan_of(run={"device": "cuda:99"}))


class TestMonitor:
    def test_a_thousandfold_change_is_worded_once_per_direction(self) -> None:
        monitor = Monitor()
        assert monitor.warnings(1, "activation", {"a": 1.0, "b": 2.0}) == []
        assert monitor.warnings(2, "activation", {"a": 0.99 * LIMIT, "b": 2.02 / LIMIT}) == []
        found = monitor.warnings(3, "activation", {"a": 1.01 * LIMIT, "b": 1.98 / LIMIT})
        assert [message.split(":")[1].strip() for message in found] == [
            "the activation of a has exploded",
            "the activation of b has vanished",
        ]
        assert found[0].startswith("step 3: ")
        assert monitor.warnings(4, "activation", {"a": 9 * LIMIT, "b": 0.0}) == []
        assert monitor.warnings(5, "activation", {"a": 0.0}) != []

    def test_rounding_is_no_explosion(self) -> None:
        """A key's bias has no gradient under softmax: what it has is rounding, which grows with all else."""
        for now, is_told in ((6.85e-10, False), (1e-5, True)):
            monitor = Monitor()
            assert monitor.warnings(1, "gradient", {"attn.k.bias": 6.79e-13, "mlp.up": 0.5}) == []
            assert bool(monitor.warnings(2, "gradient", {"attn.k.bias": now, "mlp.up": 1.5})) == is_told

    def test_a_healthy_run_is_quiet(self, plan_of: MakePlan, tmp_path: Path) -> None:
        listening = Listening()
        trained(plan_of(train={"steps": 30}, run={"log_every": 1}), tmp_path / "run", reporter=listening)
        assert listening.warned == []

    @pytest.mark.parametrize(("factor", "word"), [(1e5, "exploded"), (1e-5, "vanished")])
    def test_a_planted_change_of_scale_is_named(self, plan_of: MakePlan, factor: float, word: str) -> None:
        listening = Listening()
        still = {"lr": 1e-12, "init_std": 0.08, "alpha_input": 1.5, "alpha_output": 2.0, "weight_decay": 0.0}
        trainer = Trainer(plan_of(hyperparameters=still), reporter=listening)
        trainer.step(diagnose=True)
        with torch.no_grad():
            trainer.sparse_model.tensors["blocks.1.mlp.up"].mul_(factor)
        trainer.sparse_model.sync_engines()
        trainer.step(diagnose=True)
        assert any(f"step 2: the activation of blocks.1.mlp.up has {word}" in message for message in listening.warned)
        assert not any("blocks.0.attn.q" in message and "activation" in message for message in listening.warned)


class TestNotFinite:
    def test_a_huge_rate_ends_the_run_with_step_and_tensor(self, plan_of: MakePlan, tmp_path: Path) -> None:
        huge = {"lr": 1e30, "init_std": 0.08, "alpha_input": 1.5, "alpha_output": 2.0, "weight_decay": 0.1}
        with pytest.raises(
            UnusableResult, match=r"^step 2: the loss is (nan|inf); the first tensor .* is (the .*)$"
        ) as caught:
            trained(plan_of(hyperparameters=huge), tmp_path / "run")
        assert caught.value.exit_status == 4
        assert not (tmp_path / "run" / "result.json").exists()

    def test_the_tensor_named_is_the_first(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of())
        before = weights(trainer)
        with torch.no_grad():
            trainer.sparse_model.tensors["blocks.1.attn.v"][0] = float("nan")
        trainer.sparse_model.sync_engines()
        with pytest.raises(UnusableResult, match=r"step 1: the loss is nan; .* is the weight blocks\.1\.attn\.v$"):
            trainer.step()
        unchanged = {name for name, w in weights(trainer).items() if torch.equal(w, before[name])}
        assert unchanged == set(before) - {"blocks.1.attn.v"}  # no weight was updated

    def test_an_overflow_inside_is_named_by_its_linear(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of())
        with torch.no_grad():
            trainer.sparse_model.tensors["blocks.0.mlp.down"].mul_(3e38)
        trainer.sparse_model.sync_engines()
        with pytest.raises(UnusableResult, match=r"the output of blocks\.(0\.mlp\.down|1\.attn\.q)$"):
            trainer.step()

    def test_a_gradient_is_named_when_the_loss_is_finite(self, plan_of: MakePlan) -> None:
        trainer = Trainer(plan_of())
        trainer.sparse_model.tensors["final_norm"].register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(UnusableResult, match=r"step 1: the gradient of final_norm is not finite"):
            trainer.step()


class TestRun:
    def test_files_say_what_was_done(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = plan_of(run={"log_every": 5, "checkpoint_every": 5})
        directory = tmp_path / "run"
        _, history = trained(plan, directory)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        assert [line["loss"] for line in lines] == history.losses
        assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
        assert [line["step"] for line in lines if "grad_norm" in line] == [1, 6, 11, 12]
        assert set(lines[0]["grad_norm_by_role"]) == {"embedding", "hidden", "norm"}
        by_role = math.sqrt(sum(value**2 for value in lines[0]["grad_norm_by_role"].values()))
        assert by_role == pytest.approx(lines[0]["grad_norm"], rel=1e-5)
        result = json.loads((directory / "result.json").read_text())
        assert result["plan"] == plan.hash() and result["data"] == plan.data.hash and result["steps"] == 12
        assert (result["train_loss"], result["validation_loss"]) == (history.losses[-1], history.evaluations[-1][1])
        assert result["live_parameters"] == plan.live < result["parameters"] == plan.parameters
        assert len(result["masks"]) == 12 and result["environment"]["precision"] == "float32"
        assert history.losses[-1] < history.losses[0] - 0.5  # it learns: from ln 256 = 5.55 down
        assert abs(history.losses[0] - math.log(256)) < 1.0  # its deviation over seeds is 0.25, measured over 20

    def test_the_result_is_written_last(self, plan_of: MakePlan, tmp_path: Path, monkeypatch: Any) -> None:
        written: list[str] = []

        def noting(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
            return lambda path, target: (written.append(target.name), move(path, target))[1]

        for name in ("replace", "rename"):  # of files and of checkpoints, as they get their names
            monkeypatch.setattr(Path, name, noting(getattr(Path, name)))
        trained(plan_of(run={"checkpoint_every": 6}), tmp_path / "run")
        checkpoint = ["plan.yaml", "manifest.json"]  # of its own files, in its folder that has no name yet
        checkpoints = [*checkpoint, "step-00000006", *checkpoint, "step-00000012"]
        assert written == ["plan.yaml", "metrics.jsonl", *checkpoints, "result.json"]

    def test_only_the_newest_two_checkpoints_stay(self, plan_of: MakePlan, tmp_path: Path) -> None:
        trained(plan_of(run={"checkpoint_every": 3}), tmp_path / "run")
        assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000009", "step-00000012"]

    def test_evaluation_is_deterministic_and_changes_nothing(self, plan_of: MakePlan) -> None:
        trainer, alone = Trainer(plan_of()), Trainer(plan_of())
        trainer.step()
        alone.step()
        assert trainer.evaluate() == trainer.evaluate()
        assert trainer.step()[0] == alone.step()[0]

    def test_a_seed_is_another_run_and_the_same_seed_the_same(self, plan_of: MakePlan) -> None:
        def losses(seed: int) -> list[float]:
            return Trainer(plan_of(train={"steps": 3, "batch_size": 4, "seed": seed})).run().losses

        assert losses(1) == losses(1) != losses(2)
