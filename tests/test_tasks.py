"""Tasks: the loop, evaluations and checkpoints know none of them; next-token text is one, a classifier of arrays another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from supar_cli.errors import InputError, UnusableResult
from supar_cli.models import transformer
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.sparse.linear import Linear
from supar_cli.training import checkpoint_reader, run_directory, tasks
from supar_cli.training.distributed import Ranks
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import BatchLoader, NextToken
from supar_cli.training.trainer import Trainer
from tests.test_train_resume import Cut, assert_same_run

MakePlan = Callable[..., Plan]

FEATURES, HIDDEN, CLASSES = 16, 64, 4


class Classes:
    """Four noisy clusters of points: a batch is points (B, features), weights of the rows (B,) and their classes (B,)."""

    unit, units_per_row, flops_per_unit, hash = "points", 1, None, "sha256:clusters"
    described: ClassVar = {"points": {"seed": 2}}

    def __init__(self, rows: int, held_out_rows: int = 64) -> None:
        self.rows, self.held_out_rows = rows, held_out_rows
        self.scored_rows = held_out_rows - 5  # the rest only fills the last batch
        self.centres = np.random.default_rng(0).standard_normal((CLASSES, FEATURES)).astype(np.float32)

    def points(self, seed: tuple[int, ...], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        random = np.random.default_rng(seed)
        classes = random.integers(0, CLASSES, rows)
        points = self.centres[classes] + random.standard_normal((rows, FEATURES)).astype(np.float32)
        return torch.from_numpy(points), torch.ones(rows), torch.from_numpy(classes)

    def batch(self, step: int, rows: slice) -> tasks.Batch:
        return tuple(tensor[rows] for tensor in self.points((1, step), self.rows))

    def held_out(self, index: int, count: int, rows: int) -> tasks.Batch:
        return tuple(tensor[index * rows : (index + 1) * rows] for tensor in self.points((2,), self.held_out_rows))

    def inputs(self, batch: tasks.Batch) -> tasks.Batch:
        return batch[:1]

    def losses(self, model: nn.Module, batch: tasks.Batch) -> Tensor:
        points, weights, classes = batch
        return F.cross_entropy(model(points), classes, reduction="none") * weights

    def loss(self, model: nn.Module, batch: tasks.Batch, chunk: int | None = None) -> Tensor:
        return self.losses(model, batch).mean()

    def evaluate(self, model: nn.Module, batch: tasks.Batch, chunk: int | None = None) -> dict[str, Tensor]:
        right = model(batch[0]).argmax(1) == batch[2]
        return {"validation_loss": self.losses(model, batch), "accuracy": right.float()}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(FEATURES, HIDDEN, False), Linear(HIDDEN, HIDDEN, False)
        self.head = Linear(HIDDEN, CLASSES, False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.second(F.relu(self.first(x)))))
        return y


def classifier_plan(plan_of: MakePlan, **run: Any) -> Plan:
    """A plan of the perceptron's three tensors, the middle one sparse; what it says of a text is read by nobody."""
    plan = plan_of(train={"steps": 30, "batch_size": 16, "eval_every": 10}, run={"checkpoint_every": 10, **run})
    numbers: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-8, "because": {}, "density": 1.0}
    numbers["fan_in_axes"] = [1]
    tensors = [("first", "embedding", [HIDDEN, FEATURES]), ("second", "hidden", [HIDDEN] * 2)]
    rows = []
    for name, role, shape in [*tensors, ("head", "unembedding", [CLASSES, HIDDEN])]:
        own: dict[str, Any] = {"name": name, "role": role, "site": name, "shape": shape, "kept": math.prod(shape)}
        own |= {"fan_in": shape[1], "base_fan_in": shape[1], "init_std": shape[1] ** -0.5}
        rows.append(PlanTensor(**own, **numbers))
    rows[1] = rows[1].model_copy(update={"density": 0.25, "kept": HIDDEN * HIDDEN // 4})
    return plan.model_copy(update={"tensors": rows})


def classifier(plan: Plan) -> Trainer:
    return Trainer(plan, Classes(plan.train.batch_size), build_model=lambda _: Perceptron())


class TestClassifier:
    def test_it_learns_and_its_record_says_so(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan, directory = classifier_plan(plan_of, log_every=5), tmp_path / "run"
        run_directory.begin_run(directory, plan, resume=False, force=False)
        history = classifier(plan).run(directory)
        assert abs(history.losses[0] - math.log(CLASSES)) < 0.8 and history.losses[-1] < 0.5 * history.losses[0]
        records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        evaluated = [record for record in records if "validation_loss" in record]
        assert [record["step"] for record in evaluated] == [10, 20, 30]
        for record in evaluated:
            assert 0 <= record["accuracy"] <= 1 and record["accuracy_se"] < 0.5 and record["validation_loss_se"] > 0
        assert evaluated[-1]["accuracy"] > 0.8 > 2 / CLASSES
        assert "points_per_s" in records[0] and "tokens_per_s" not in records[0]
        result = json.loads((directory / "result.json").read_text())
        assert result["accuracy"] == evaluated[-1]["accuracy"] and result["accuracy_se"] == evaluated[-1]["accuracy_se"]
        assert result["environment"]["points"] == {"seed": 2}
        assert result["data"] == "sha256:clusters" and list(result["masks"]) == ["second"]

    def test_a_resumed_run_is_the_uninterrupted_one(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = classifier_plan(plan_of)

        def stop(done: int, loss: float) -> None:
            if done == 20:
                raise Cut

        for name in ("whole", "cut"):
            run_directory.begin_run(tmp_path / name, plan, resume=False, force=False)
        classifier(plan).run(tmp_path / "whole")
        with pytest.raises(Cut):
            classifier(plan).run(tmp_path / "cut", on_evaluation=stop)
        assert classifier(plan).run(tmp_path / "cut", resume=True).resumed_at == 20
        assert_same_run(tmp_path / "cut", tmp_path / "whole")
        weights = checkpoint_reader.weights(tmp_path / "cut/checkpoints/step-00000030")
        assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
            row.name: tuple(row.shape) for row in plan.tensors
        }
        assert int((weights["second"] != 0).sum()) == HIDDEN * HIDDEN // 4

    def test_micro_batches_add_up_to_the_whole(self, plan_of: MakePlan) -> None:
        whole, parts = (classifier(classifier_plan(plan_of, micro_batch_size=rows)) for rows in (16, 4))
        for _ in range(4):
            assert whole.step().loss == pytest.approx(parts.step().loss, rel=1e-5)
        assert whole.evaluate()["validation_loss"] == pytest.approx(parts.evaluate()["validation_loss"], rel=1e-5)

    def test_means_and_standard_errors_are_over_rows_without_those_that_fill_up(self, plan_of: MakePlan) -> None:
        trainer = classifier(classifier_plan(plan_of))
        found, task = trainer.evaluate(), trainer.task
        with torch.no_grad():
            parts = [task.evaluate(trainer.model, task.held_out(at, 4, 16)) for at in range(4)]
        for name in ("accuracy", "validation_loss"):
            values = torch.cat([part[name] for part in parts]).double().numpy()
            assert found[name] == pytest.approx(values[:59].mean()) and found[name] != pytest.approx(values.mean())
            assert found[f"{name}_se"] == pytest.approx(values[:59].std() / math.sqrt(59))
        assert found["accuracy_se"] == pytest.approx(math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 59))

    def test_a_weight_that_is_not_finite_is_named(self, plan_of: MakePlan) -> None:
        trainer = classifier(classifier_plan(plan_of))
        with torch.no_grad():
            trainer.sparse_model.tensors["second"][0] = float("nan")
        trainer.sparse_model.sync_engines()
        with pytest.raises(UnusableResult, match=r"step 1: the loss is nan; .* is the weight second$"):
            trainer.step()

    def test_evaluations_that_ranks_can_not_share_evenly_are_refused(self, plan_of: MakePlan) -> None:
        plan = classifier_plan(plan_of)
        with pytest.raises(InputError, match="Classes: 40 held-out rows are not a multiple of the batch size 16"):
            Trainer(plan, Classes(16, held_out_rows=40), build_model=lambda _: Perceptron())

    def test_a_model_that_is_not_the_plans_is_refused(self, plan_of: MakePlan) -> None:
        plan = classifier_plan(plan_of)
        with pytest.raises(InputError, match="expected the same names and shapes:\n  second: in the plan only"):
            Trainer(plan, Classes(16), build_model=lambda _: nn.ModuleDict({"first": Linear(FEATURES, HIDDEN, False)}))


class TestNextToken:
    def test_ranks_get_their_rows_of_one_batch(self, plan_of: MakePlan) -> None:
        plan = plan_of()
        task = tasks.load(plan)
        whole = task.batch(3, slice(None))
        assert [tuple(tensor.shape) for tensor in whole] == [(4, 16)] * 2
        assert torch.equal(whole[0][:, 1:], whole[1][:, :-1])
        for rank in range(2):
            ranks = Ranks(rank, 2)
            own = BatchLoader(task, Runtime.of(plan, ranks), ranks).get(3)
            assert all(torch.equal(part, tensor[2 * rank :][:2]) for part, tensor in zip(own, whole, strict=True))
        assert not torch.equal(task.batch(4, slice(None))[0], whole[0])

    def test_an_evaluation_of_more_than_is_held_out_is_refused(self, plan_of: MakePlan) -> None:
        with pytest.raises(
            InputError, match=r"train\.eval_batches: 10000 batches need 40000 held-out sequences; expected at most \d+"
        ):
            tasks.load(plan_of(train={"eval_batches": 10_000}))

    def test_it_is_a_plans_task(self, plan_of: MakePlan) -> None:
        task = Trainer(plan_of()).task
        assert isinstance(task, NextToken) and (task.unit, task.units_per_row, task.held_out_rows) == ("tokens", 16, 8)


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation made, in a forward and a backward pass."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


class TestChunks:
    """The loss of a few tokens at a time is that of all at once, and holds a few tokens' logits."""

    def losses_and_gradients(self, trainer: Trainer, chunk: int | None) -> tuple[float, dict[str, Tensor]]:
        trainer.model.zero_grad()
        loss = trainer.task.loss(trainer.model, trainer.batch(0), chunk)
        torch.autograd.backward(loss)
        gradients = {name: tensor.grad for name, tensor in trainer.sparse_model.tensors.items()}
        assert all(gradient is not None for gradient in gradients.values())
        return loss.item(), {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}

    def differences(self, trainer: Trainer, chunk: int) -> tuple[float, float]:
        """Of the loss, and of the gradients by the size of each."""
        loss, gradients = self.losses_and_gradients(trainer, None)
        other, others = self.losses_and_gradients(trainer, chunk)
        errors = [float((one - others[name]).abs().max() / one.abs().max()) for name, one in gradients.items()]
        return abs(loss - other), max(errors)

    @pytest.mark.parametrize("chunk", [1, 7, 16, 64, 1000])
    @pytest.mark.parametrize("shape", [{}, {"family": "llama", "tied": False, "bias": False}], ids=["gpt2", "llama"])
    def test_value_and_gradients_are_those_of_all_at_once(self, plan_of: MakePlan, shape: Any, chunk: int) -> None:
        by_loss, by_gradients = self.differences(Trainer(plan_of(model=shape)), chunk)
        assert by_loss <= 2e-6 and by_gradients <= 2e-5

    def test_a_mean_of_means_would_be_seen(self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of 64 tokens, 7 at a time: the last one's chunk would weigh as much as 7 others."""
        exact = transformer._loss_and_slope

        def mean_of_means(logits: Tensor, targets: Tensor) -> Any:
            return [one / len(targets) * (64 / 10) for one in exact(logits, targets)]

        monkeypatch.setattr(transformer, "_loss_and_slope", mean_of_means)
        by_loss, by_gradients = self.differences(Trainer(plan_of()), 7)
        assert by_loss > 1e-3 and by_gradients > 1e-2

    def test_no_more_logits_are_held_than_those_of_a_chunk(self, plan_of: MakePlan) -> None:
        vocab, tokens, chunk = 20_000, 64, 4
        trainer = Trainer(plan_of(model={"vocab": vocab, "width": 16, "heads": 1}, target={"width": 16}))
        found = {}
        for size in (None, chunk):
            with Largest() as largest:
                self.losses_and_gradients(trainer, size)
            found[size] = largest.numbers
        assert found[None] == tokens * vocab
        assert found[chunk] == vocab * 16 > chunk * vocab  # the head's own weight is the largest then

    def test_no_product_is_made_twice(self, plan_of: MakePlan) -> None:
        trainer, found = Trainer(plan_of(model={"vocab": 5000})), []
        for chunk in (None, 16):
            with FlopCounterMode(display=False) as counted:
                self.losses_and_gradients(trainer, chunk)
            found.append(counted.get_total_flops())
        assert found[0] == found[1] > 0

    def test_without_gradients_no_product_is_made_for_them(self) -> None:
        x, weight, targets = torch.randn(1, 64, 8), torch.randn(90, 8, requires_grad=True), torch.zeros(1, 64).long()
        for mode, products in ((torch.no_grad, 1), (torch.inference_mode, 1), (torch.enable_grad, 3)):
            with FlopCounterMode(display=False) as counted, mode():
                transformer.chunked_loss(x, weight, targets, 1.0, 16)
            assert counted.get_total_flops() == products * 2 * 64 * 90 * 8

    def test_large_logits_are_made_in_chunks_unless_the_plan_says_how_many(self, plan_of: MakePlan) -> None:
        """Of 50,000 words and 16 tokens a row: 1 GiB is 335 rows."""
        plan = plan_of(model={"vocab": 50_000})
        assert estimate.loss_chunk(plan, 335) is None and estimate.loss_chunk(plan, 336) == 2**28 // 4 // 50_000
        asked = plan.model_copy(update={"run": plan.run.model_copy(update={"loss_chunk_tokens": 10**6})})
        assert estimate.loss_chunk(asked, 336) == 10**6

    def test_runs_are_the_same_within_rounding(self, plan_of: MakePlan) -> None:
        train = {"steps": 12, "batch_size": 4, "eval_every": 6}
        whole, chunked = (
            Trainer(plan_of(train=train, run={"micro_batch_size": 2, "loss_chunk_tokens": chunk})).run()
            for chunk in (None, 5)
        )
        assert chunked.losses == pytest.approx(whole.losses, abs=1e-5) and chunked.losses != whole.losses
        assert [loss for _, loss in chunked.evaluations] == pytest.approx(
            [loss for _, loss in whole.evaluations], abs=1e-5
        )

    def test_it_is_how_a_plan_is_run_and_no_other_experiment(self, plan_of: MakePlan) -> None:
        plan, chunked = plan_of(), plan_of(run={"loss_chunk_tokens": 5})
        assert plan.hash() == chunked.hash() and chunked.run.loss_chunk_tokens == 5
        assert "loss_chunk_tokens" not in plan.model_dump()["run"]  # documents look as they did before there was one
