"""Training on a CUDA device: bfloat16 and compiled, with the masks of every other device."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.planning.plan import Plan
from supar_cli.sparse.linear import Dense
from supar_cli.training import run_directory
from supar_cli.training.trainer import Trainer
from tests.test_train import trained

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use"),
]

MakePlan = Callable[..., Plan]
STEPS = 24


BLOCKS = {"sparsity": {"density": 0.25, "pattern": "block", "block": 32}}


def on(device: str, plan_of: MakePlan, target: dict[str, Any] | None = None, **run: Any) -> Plan:
    train = {"steps": STEPS, "batch_size": 4, "eval_every": 8}
    return plan_of(train=train, target=target or {}, run={"device": device, "checkpoint_every": 8, **run})


def test_bf16_and_compiled_training_learns_like_the_cpu(plan_of: MakePlan, tmp_path: Path) -> None:
    trainer, history = trained(on("cuda", plan_of), tmp_path / "cuda")
    assert trainer.runtime.precision == torch.bfloat16 and trainer.runtime.compiles
    assert trainer.sparse_model.model.get_submodule("blocks.0")._compiled_call_impl is not None
    reference = Trainer(on("cpu", plan_of)).run()
    assert abs(history.losses[0] - math.log(256)) < 0.3
    assert history.losses[-1] < history.losses[0] - 0.5
    # the same weights, masks and batches: bfloat16 keeps 8 bits, 2^-9 = .002 of a loss of 5.5 is .01
    assert history.losses[0] == pytest.approx(reference.losses[0], abs=0.03)
    assert history.evaluations[-1][1] == pytest.approx(reference.evaluations[-1][1], abs=0.15)


@pytest.mark.parametrize(("engine", "target"), [("dense", {}), ("block", BLOCKS)], ids=["dense", "block"])
def test_float32_uncompiled_follows_the_cpu_closely(engine: str, target: dict[str, Any], plan_of: MakePlan) -> None:
    run = {"precision": "float32", "compile": "off", "engine": engine}
    made, reference = (Trainer(on(device, plan_of, target, **run)).run().losses for device in ("cuda", "cpu"))
    assert made[:4] == pytest.approx(reference[:4], abs=5e-3)  # TF32 is off by default; rounding grows with the steps


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_steps_as_one_graph_are_the_same_steps(compiled: str, plan_of: MakePlan) -> None:
    made, graphed = (
        Trainer(on("cuda", plan_of, precision="float32", compile=compiled, cuda_graph=graph)).run()
        for graph in ("off", "on")
    )
    assert graphed.losses == pytest.approx(
        made.losses, abs=5e-3
    )  # rates are float32 there; sums may be in another order
    assert [loss for _, loss in graphed.evaluations] == pytest.approx([loss for _, loss in made.evaluations], abs=5e-3)


def test_masks_are_the_cpus_and_dead_weights_stay_exactly_zero(plan_of: MakePlan, tmp_path: Path) -> None:
    trainer, _ = trained(on("cuda", plan_of), tmp_path / "cuda")
    reference = Trainer(on("cpu", plan_of)).sparse_model.masks
    assert trainer.sparse_model.masks.keys() == reference.keys() and len(reference) == 12
    for name, mask in reference.items():
        assert trainer.sparse_model.masks[name] == mask
        engine = trainer.sparse_model.linear(name).engine
        assert isinstance(engine, Dense)
        tensor = engine.weight
        alive = torch.from_numpy(mask.alive()).to(tensor.device)
        values = trainer.sparse_model.tensors[name]
        state = [value for value in trainer.optimizer.state[values].values() if value.ndim]
        assert state and all(value.shape == (mask.count,) for value in (values, *state))
        assert torch.equal(tensor != 0, alive) and torch.equal(tensor[alive], values.detach().to(tensor.dtype))


class _Cut(Exception):
    pass


def test_a_resumed_run_is_close_to_the_uninterrupted_one(plan_of: MakePlan, tmp_path: Path) -> None:
    plan = on("cuda", plan_of)
    _, whole = trained(plan, tmp_path / "whole")
    run_directory.begin_run(tmp_path / "cut", plan, resume=False, force=False)

    def stop(step: int, loss: float) -> None:
        if step == 16:
            raise _Cut

    with pytest.raises(_Cut):
        Trainer(plan).run(tmp_path / "cut", on_evaluation=stop)
    _, resumed = trained(plan, tmp_path / "cut", resume=True)
    assert resumed.resumed_at == 16 and len(resumed.losses) == STEPS
    # kernels may add in another order, so not bit for bit; a lost optimizer state moves the next losses by far more
    assert resumed.losses[16:] == pytest.approx(whole.losses[16:], abs=0.02)
    assert resumed.evaluations[-1][1] == pytest.approx(whole.evaluations[-1][1], abs=0.02)


def test_a_cpu_checkpoint_is_continued_on_cuda(plan_of: MakePlan, tmp_path: Path) -> None:
    # the device is not part of the experiment, so neither is it of the plan's hash
    run_directory.begin_run(tmp_path / "run", on("cpu", plan_of), resume=False, force=False)

    def stop(step: int, loss: float) -> None:
        if step == 8:
            raise _Cut

    with pytest.raises(_Cut):
        Trainer(on("cpu", plan_of)).run(tmp_path / "run", on_evaluation=stop)
    _, history = trained(on("cuda", plan_of), tmp_path / "run", resume=True)
    assert history.resumed_at == 8 and len(history.losses) == STEPS
    assert history.losses[8] < history.losses[0]
