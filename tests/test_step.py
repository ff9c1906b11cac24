"""A step whose figures are read late, as on CUDA: the same run, and none changes a weight after one that is not finite.

The device that runs ahead is the CPU here, whose fused updates take the same `grad_scale` and `found_inf`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from supar_cli.errors import Preempted, UnusableResult
from supar_cli.planning.plan import Plan
from supar_cli.training.distributed import ALONE, Ranks
from supar_cli.training.mask_updates import MaskUpdates
from supar_cli.training.step import ClippedUpdate, LaunchedStep, StepResult
from supar_cli.training.trainer import Trainer

MakePlan = Callable[..., Plan]
MEASURED = ("tokens_per_s", "peak_share")  # what a record has that depends on the machine's speed


class Ahead(Trainer):
    """Launches steps before it reads what earlier ones gave. `order` is what was launched (+) and read (-)."""

    def __init__(self, plan: Plan, ranks: Ranks = ALONE) -> None:
        self.order: list[int] = []
        super().__init__(plan, ranks=ranks)

    def _build_model(self, *arguments: Any) -> None:
        super()._build_model(*arguments)
        self.update.runs_ahead = True

    def _launch(self) -> LaunchedStep:
        self.order.append(self.done + 1)
        return super()._launch()

    def _read(self, launched: LaunchedStep, diagnose: bool = False) -> StepResult:
        self.order.append(-launched.done - 1)
        return super()._read(launched, diagnose)


class Forgetful(ClippedUpdate):
    """The planted fault: a step that is not finite stops itself alone."""

    def apply(self, gradients: list[Tensor], figures: Tensor) -> None:
        self._stopped.zero_()
        super().apply(gradients, figures)


def records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def close(one: Any, other: Any) -> bool:
    """Whether two records agree but for the rounding of float32, which quotients and products have otherwise."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-4)
    return bool(one == other)


def contents(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all weights and moments."""
    found = {name: tensor.detach().clone() for name, tensor in trainer.sparse_model.tensors.items()}
    for name, tensor in trainer.sparse_model.tensors.items():
        found |= {f"{key} of {name}": value.clone() for key, value in trainer.optimizer.state[tensor].items()}
    return found


def poison(trainer: Trainer, step: int, what: str) -> None:
    """Make the loss of a step NaN, or one gradient of it infinite."""
    loss_of = trainer.task.loss

    def loss(*arguments: Any) -> Tensor:
        found = loss_of(*arguments)
        return found * math.nan if trainer.done == step - 1 and torch.is_grad_enabled() else found

    if what == "loss":
        trainer.task.loss = loss  # type: ignore[method-assign]
        return
    tensor = trainer.sparse_model.tensors["blocks.1.mlp.up"]
    tensor.register_hook(lambda gradient: gradient * math.inf if trainer.done == step - 1 else gradient)


CASES: dict[str, dict[str, Any]] = {
    "AdamW that clips": {"train": {"grad_clip": 0.3}},
    "AdamW": {"train": {"grad_clip": 0.0}},
    "SGD that clips": {"train": {"optimizer": "sgd", "momentum": 0.9, "grad_clip": 0.3}},
    "masks that change": {
        "train": {"grad_clip": 0.0},
        "target": {"sparsity": {"density": 0.25, "updates": {"method": "rigl", "every_steps": 3}}},
    },
    "masks that change at every step": {
        "train": {"grad_clip": 0.0},
        "target": {"sparsity": {"density": 0.25, "updates": {"method": "topk"}}},
    },
}


class TestTheSameRun:
    @pytest.mark.parametrize("case", CASES)
    def test_records_and_weights(self, plan_of: MakePlan, tmp_path: Path, case: str) -> None:
        plan = plan_of(**CASES[case], run={"log_every": 5, "checkpoint_every": 8})
        plain, ahead = Trainer(plan), Ahead(plan)
        for name, trainer in (("plain", plain), ("ahead", ahead)):
            (tmp_path / name).mkdir()
            trainer.run(tmp_path / name)
        expected, found = records(tmp_path / "plain"), records(tmp_path / "ahead")
        assert [record["step"] for record in found] == list(range(1, 13))
        agree = close if plan.train.grad_clip else lambda one, other: one == other
        assert all(map(agree, expected, found)) and len(expected) == len(found)
        assert not agree(expected[2], found[3])
        pairs = [(ahead.order.index(step + 1), ahead.order.index(-step)) for step in range(1, 12)]
        late = [step for step, (launched, read) in enumerate(pairs, 1) if launched < read]
        # 1, 6 and 11 are logged, 6 and 12 evaluated, 8 saved; masks change after every third or every one
        assert late == {"masks that change": [4], "masks that change at every step": []}.get(case, [2, 3, 4, 9])

    def test_a_stop_writes_all_records_and_the_run_goes_on_bit_for_bit(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = plan_of(train={"grad_clip": 0.3})
        for name in ("whole", "parts"):
            (tmp_path / name).mkdir()
        Ahead(plan).run(tmp_path / "whole")
        stopped = Ahead(plan)
        with pytest.raises(Preempted, match="stopped at step 9 of 12"):
            stopped.run(tmp_path / "parts", stop=lambda: "its time" if stopped.done == 9 else None)
        assert stopped.order[-3:] == [9, -8, -9] and records(tmp_path / "parts") == records(tmp_path / "whole")[:9]
        Ahead(plan).run(tmp_path / "parts", resume=True)
        assert [r["loss"] for r in records(tmp_path / "parts")] == [r["loss"] for r in records(tmp_path / "whole")]


class TestAStepThatIsNotFinite:
    def failed(self, plan: Plan, what: str, update: type[ClippedUpdate] = ClippedUpdate, ranks: Ranks = ALONE) -> Ahead:
        """A trainer whose run has ended at step 4, after step 5 was launched."""
        trainer = Ahead(plan, ranks)
        trainer.update.__class__ = update
        poison(trainer, 4, what)
        with pytest.raises(UnusableResult, match=f"step 4: the {what} .*(is nan|not finite)"):
            trainer.run()
        assert trainer.order == [1, 2, -1, 3, -2, 4, -3, 5, -4] and trainer.done == 3
        return trainer

    def changed(self, plan: Plan, trainer: Ahead, ranks: Ranks = ALONE) -> list[str]:
        """What is not as it was after step 3."""
        expected = Ahead(plan, ranks)
        for _ in range(3):
            expected.step()
        before, after = contents(expected), contents(trainer)
        assert before.keys() == after.keys()
        return [name for name in before if not torch.equal(before[name], after[name])]

    @pytest.mark.parametrize("what", ["loss", "gradient"])
    @pytest.mark.parametrize("case", ["AdamW that clips", "SGD that clips"])
    def test_no_later_step_changes_anything(self, plan_of: MakePlan, case: str, what: str) -> None:
        plan = plan_of(**CASES[case])
        trainer = self.failed(plan, what)
        assert self.changed(plan, trainer) == []
        forgetful = self.failed(plan, what, Forgetful)
        assert len(self.changed(plan, forgetful)) > 20  # step 5 has trained all tensors

    def test_a_caller_may_go_on(self, plan_of: MakePlan) -> None:
        plan = plan_of(train={"optimizer": "sgd", "momentum": 0.9})
        for step in (1, 3):
            trainer, expected = Ahead(plan), Ahead(plan)
            poison(trainer, step, "loss")
            for _ in range(step - 1):
                assert trainer.step() == expected.step()
            with pytest.raises(UnusableResult):
                trainer.step()
            del trainer.task.loss  # type: ignore[misc]
            assert [trainer.step() for _ in range(3)] == [expected.step() for _ in range(3)]

    def test_no_mask_changes(self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Step 3, after which masks change, is not launched before it is known that step 2 was finite."""
        plan = plan_of(target={"sparsity": {"density": 0.25, "updates": {"method": "set", "every_steps": 3}}})

        def moved() -> bool:
            trainer = Ahead(plan)
            masks = dict(trainer.sparse_model.masks)
            poison(trainer, 2, "loss")
            with pytest.raises(UnusableResult, match="step 2: the loss is nan"):
                trainer.run()
            return trainer.sparse_model.masks != masks

        assert not moved()
        monkeypatch.setattr(MaskUpdates, "changes_masks", lambda *_: False)
        assert moved()


@pytest.fixture
def alone_in_a_group() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(is_distributed=True)
    dist.destroy_process_group()


class TestShards:
    """FSDP2's gradients are shards, which torch's fused AdamW divides, too; its SGD is not fused with them."""

    def test_adamw(self, plan_of: MakePlan, alone_in_a_group: Ranks) -> None:
        plan = plan_of(train={"grad_clip": 0.3}, run={"parallel": "fsdp"})
        plain, ahead = Trainer(plan, ranks=alone_in_a_group), Ahead(plan, alone_in_a_group)
        assert ahead.parallel.is_sharded and ahead.optimizer.defaults["fused"]
        assert ahead.run().losses == pytest.approx(plain.run().losses, rel=1e-4)
        failing = TestAStepThatIsNotFinite()
        assert failing.changed(plan, failing.failed(plan, "loss", ranks=alone_in_a_group), alone_in_a_group) == []

    def test_sgd_waits(self, plan_of: MakePlan, alone_in_a_group: Ranks) -> None:
        plan = plan_of(train={"optimizer": "sgd", "momentum": 0.9}, run={"parallel": "fsdp"})
        sharded, whole = Trainer(plan, ranks=alone_in_a_group), Trainer(plan)
        assert not sharded.optimizer.defaults["fused"] and whole.optimizer.defaults["fused"]
        assert sharded.step().loss == pytest.approx(whole.step().loss, rel=1e-6)
