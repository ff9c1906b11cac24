"""Parameters, weights and states of optimizers that change under a prepared model are noticed by the next step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.own import guard
from tests.own_models import make, plan_of, prepared, steps

Optimizer = torch.optim.Optimizer

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class TestReplacedParameters:
    @pytest.mark.parametrize(
        "replace",
        [
            lambda m: setattr(m.table, "weight", nn.Parameter(m.table.weight.detach().clone())),
            lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
            lambda m: setattr(m.blocks, "1", copy.deepcopy(m.blocks[1])),
        ],
    )
    def test_are_noticed_at_the_next_step(self, replace: Callable[[Any], Any]) -> None:
        made = prepared()
        optimizer = made.optimizer(clip=1.0)
        steps(made.model, optimizer, 1)
        replace(made.model)
        with pytest.raises(
            InputError, match=r"the model has other parameters than .* call prepared\.optimizer\(model\)"
        ):
            steps(made.model, optimizer, 1)
        steps(made.model, made.optimizer(), 2)
        assert made.check() == {}
        with pytest.raises(InputError, match=r"the optimizer's parameter is not the prepared model's"):
            steps(made.model, optimizer, 1)

    def test_one_of_another_shape_in_the_same_place_is_noticed(self) -> None:
        """As Hugging Face resizes embeddings: fused kernels of torch would write beyond the moments."""
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, 1)
        made.model.table.weight.data = torch.zeros(60, 32)
        with pytest.raises(InputError, match=r"^table\.weight: the model has other parameters"):
            steps(made.model, optimizer, 1)
        with pytest.raises(InputError, match=r"table\.weight: the plan has the shape \[48, 32\], the model \[60, 32\]"):
            made.optimizer()

    def test_a_new_part_of_the_model_is_noticed_before_the_first_step(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        made.model.adapter = nn.Linear(2, 2)
        with pytest.raises(InputError, match=r"adapter\.weight: in the model only"):
            steps(made.model, optimizer, 1)

    def test_frozen_parameters_are_in_no_group(self) -> None:
        model = make()
        model.table.weight.requires_grad_(False)
        before = model.table.weight.clone()
        made = prepared(model)
        optimizer = made.optimizer()
        steps(model, optimizer, 2)
        assert torch.equal(before, model.table.weight)
        assert "table.weight" not in [name for group in optimizer.param_groups for name in group["names"]]
        model.table.weight.requires_grad_(True)
        with pytest.raises(InputError, match=r"table\.weight: requires_grad and is in no group"):
            steps(model, optimizer, 1)

    def test_an_optimizer_of_another_model_is_refused(self) -> None:
        with pytest.raises(InputError, match="none of the optimizer's parameters is the prepared model's"):
            prepared().keep(torch.optim.AdamW(make().parameters()))


def test_an_optimizer_of_earlier_masks_is_refused() -> None:
    made = prepared()
    optimizer = made.optimizer()
    again = supar.prepare(made.model, plan_of(make(), train={"seed": 1}))
    with pytest.raises(InputError, match=r"blocks\.0\.qkv\.weight.* was prepared again, with other masks"):
        steps(made.model, optimizer, 1)
    steps(made.model, again.optimizer(), 1)


class TestLiveWeights:
    def test_a_load_of_other_masks_is_an_error_before_any_pass(self) -> None:
        made = prepared()
        other = prepared(train={"seed": 1})
        kept = copy.deepcopy(other.model.state_dict())
        with pytest.raises(InputError, match=r"blocks\.0\.up\.weight: \d+ weights live where the plan has dead ones"):
            made.model.load_state_dict(kept)
        assert made.model.blocks[0].up.weight.equal(kept["blocks.0.up.weight"])  # said, and not set to 0
        with pytest.raises(InputError, match="weights live where the plan has dead ones"):
            steps(made.model, made.optimizer(), 1)

    @pytest.mark.parametrize("at", [0, 2])
    def test_weights_written_in_place_are_seen_before_the_next_step(self, at: int) -> None:
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, at)
        made.model.blocks[0].up.reset_parameters()
        with pytest.raises(InputError, match=r"blocks\.0\.up\.weight: 3072 weights live"):
            steps(made.model, optimizer, 1)

    def test_what_torch_does_not_see_being_written_is_found_every_so_often(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "CHECK_EVERY", 2)
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, 2)
        made.model.blocks[0].up.weight.data.normal_()
        with pytest.raises(InputError, match=r"blocks\.0\.up\.weight: 3072 weights live"):
            steps(made.model, optimizer, 1)

    def test_a_live_weight_that_becomes_zero_stays_live(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        weight = made.tensors["blocks.0.up.weight"]
        alive = torch.from_numpy(made.masks["blocks.0.up.weight"].alive())
        steps(made.model, optimizer, 1)
        with torch.no_grad():
            weight.zero_()
        steps(made.model, optimizer, 1)
        assert int(weight.count_nonzero()) > 0.9 * int(alive.sum()) and made.check() == {}

    def test_a_copy_that_is_loaded_is_not_taken_for_the_model(self) -> None:
        made = prepared()
        copy.deepcopy(made.model).load_state_dict(make().state_dict())
        steps(made.model, made.optimizer(), 1)


class TestOptimizerStates:
    def test_a_state_of_another_plan_is_named(self) -> None:
        made = prepared()
        other = prepared(change=lambda row: {**row, "lr": 0.003 if row["name"] == "head.bias" else row["lr"]})
        with pytest.raises(InputError, match=r"load_state_dict: group \d of the state holds"):
            made.optimizer().load_state_dict(other.optimizer().state_dict())

    def test_rates_of_another_plan_are_told_at_the_first_step(self) -> None:
        made = prepared()
        other = prepared(change=lambda row: {**row, "lr": row["lr"] * (0.5 if row["role"] == "hidden" else 1.0)})
        optimizer = made.optimizer()
        optimizer.load_state_dict(other.optimizer().state_dict())
        assert optimizer.param_groups[-1]["ratio"] == 0.5  # this plan's
        with pytest.raises(InputError, match="after load_state_dict: a state of this plan"):
            steps(made.model, optimizer, 1)

    def test_moments_of_other_masks_are_set_to_zero(self) -> None:
        made, other = prepared(), prepared(train={"seed": 1})
        theirs = other.optimizer()
        steps(other.model, theirs, 2)
        optimizer = made.optimizer()
        optimizer.load_state_dict(theirs.state_dict())
        for name, mask in made.masks.items():
            state = optimizer.state[made.tensors[name]]
            moments: list[Tensor] = [state["exp_avg"], state["exp_avg_sq"]]
            assert all(int(moment[~torch.from_numpy(mask.alive())].count_nonzero()) == 0 for moment in moments)
            assert all(int(moment.count_nonzero()) > 0 for moment in moments)


def test_preparing_and_keeping_twice_hooks_once() -> None:
    made = prepared()
    again = supar.prepare(made.model, made.plan)
    optimizer = again.optimizer()
    again.keep(optimizer)
    for tensor in again.tensors.values():
        assert len(tensor._post_accumulate_grad_hooks or ()) == (
            id(tensor) in {id(made.tensors[n]) for n in made.masks}
        )
    assert len(optimizer._optimizer_step_post_hooks) == len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(made.model._load_state_dict_post_hooks) == 1
    steps(made.model, optimizer, 2)
