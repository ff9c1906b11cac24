"""`supar_cli.model` and `supar_cli.masks`: the module that a run trained, to call, hook, compile and train on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import supar_cli
from supar_cli.errors import InputError, SetupError
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.training import tasks
from tests.conftest import TEXT_BYTES, plan_from, proxy_fields, real_text

RUNS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "model": {"family": "llama", "kv_heads": 1, "bias": True, "tied": False},
        "target": {"sparsity": {"density": 0.5, "pattern": "2:4"}},
    },
    "alibi": {
        "model": {"positions": "alibi"},
        "target": {"sparsity": {"density": 0.25, "updates": {"method": "topk"}}},
    },
    "dense": {"target": {"sparsity": {"density": 1.0}}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, which was evaluated after its last step."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_bytes(real_text(TEXT_BYTES))
    return {name: train(text, folder / name, **changes) for name, changes in RUNS.items()}


def train(source: Path, folder: Path, **changes: Any) -> Path:
    """A run of the small proxy's plan with changes."""
    fields = proxy_fields(str(source), **changes, run={"device": "cpu", "engine": "dense"})
    supar_cli.train(plan_from(fields), folder)
    return folder


def held_out_loss(model: torch.nn.Module, plan: Plan) -> float:
    """The loss that the trainer reports of a model."""
    task, count = tasks.load(plan), plan.train.eval_batches
    with torch.no_grad():
        batches = [task.held_out(index, count, plan.train.batch_size) for index in range(count)]
        return float(torch.stack([model(*batch) for batch in batches]).mean())


@pytest.mark.parametrize("name", RUNS)
def test_is_the_model_that_the_trainer_evaluated(runs: dict[str, Path], name: str) -> None:
    plan, reported = read_plan(runs[name] / "plan.yaml"), json.loads((runs[name] / "result.json").read_bytes())
    model, masks = supar_cli.model(runs[name]), supar_cli.masks(runs[name])
    assert isinstance(model, Transformer) and not model.training
    assert held_out_loss(model, plan) == pytest.approx(reported["validation_loss"], abs=1e-6)
    for row in plan.tensors:
        weight, mask = named_tensors(model)[row.name], masks.get(row.name)
        assert list(weight.shape) == row.shape and weight.dtype == torch.float32 and weight.requires_grad
        assert (mask is not None) == (row.kept < row.size)
        if mask is not None:
            assert mask.dtype == torch.bool and int(mask.sum()) == row.kept
            assert torch.equal(weight != 0, mask)
    checkpoint = max((runs[name] / "checkpoints").iterdir())
    again = supar_cli.model(str(checkpoint))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():  # the control: what the comparison of losses sees
        model.blocks[0].mlp.up.weight.copy_(model.blocks[0].mlp.up.weight.roll(1, 0))
    assert abs(held_out_loss(model, plan) - reported["validation_loss"]) > 1e-4


def test_can_be_indexed_hooked_and_ablated(runs: dict[str, Path]) -> None:
    model, index_BT = supar_cli.model(runs["gpt2"]), torch.arange(24).view(2, 12)
    weights = supar_cli.weights(runs["gpt2"])
    assert torch.equal(model.blocks[0].mlp.up.weight[3], weights["blocks.0.mlp.up"][3])
    before, seen = model(index_BT), list[torch.Tensor]()
    up = model.get_submodule("blocks.0.mlp.up")
    handle = up.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    model(index_BT)
    handle.remove()
    assert torch.equal(seen[1], torch.nn.functional.linear(seen[0], up.weight))
    with torch.no_grad():
        up.weight[3] = 0
    assert (model(index_BT) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiles_to_one_graph(runs: dict[str, Path], name: str) -> None:
    model, index_BT = supar_cli.model(runs[name]), torch.arange(24).view(2, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(index_BT), model(index_BT))


def test_can_be_trained_with_its_zeros_kept(runs: dict[str, Path]) -> None:
    plan = read_plan(runs["gpt2"] / "plan.yaml")
    losses, dead = [], []
    for holds in (True, False):  # the second is the control: without the masks dead weights come to life
        model, masks = supar_cli.model(runs["gpt2"]), supar_cli.masks(runs["gpt2"])
        optimizer, task = torch.optim.AdamW(model.parameters(), lr=1e-3), tasks.load(plan)
        losses.append(held_out_loss(model, plan))
        for step in range(8):
            optimizer.zero_grad()
            model(*task.batch(step, slice(0, 4))).backward()
            optimizer.step()
            if holds:
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_submodule(name).weight.masked_fill_(~mask, 0)
        losses.append(held_out_loss(model, plan))
        dead.append(all(not model.get_submodule(name).weight[~mask].any() for name, mask in masks.items()))
    assert losses[1] < losses[0] and dead == [True, False]


class TestRefuses:
    @pytest.mark.parametrize("function", [supar_cli.model, supar_cli.masks])
    def test_what_has_no_checkpoint_or_a_corrupt_one(
        self, runs: dict[str, Path], tmp_path: Path, function: Any
    ) -> None:
        with pytest.raises(InputError, match="expected a run directory with a checkpoint"):
            function(tmp_path)
        shutil.copytree(runs["gpt2"], tmp_path / "run")
        (file,) = (tmp_path / "run/checkpoints").rglob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(SetupError, match=r"state\.safetensors: a corrupt checkpoint: its content has changed"):
            function(tmp_path / "run")

    def test_an_unknown_device(self, runs: dict[str, Path]) -> None:
        with pytest.raises(InputError, match=r"run\.device: 'tpu' is not a valid device; expected auto, cpu, cuda"):
            supar_cli.model(runs["gpt2"], device="tpu")
