"""What popular loops do to rates, groups and weights, and what a prepared model says of it by the first step that runs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.own import guard
from supar_cli.own.prepared import Prepared
from tests.own_models import make, plan_of, steps

Optimizer = torch.optim.Optimizer


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def prepared(model: nn.Module | None = None, **plan: Any) -> Prepared:
    model = make() if model is None else model
    return supar.prepare(model, plan_of(model, **plan))


def scheduled(make_scheduler: Callable[[Optimizer], Any], count: int = 4, **options: Any) -> list[list[float]]:
    """The rates of the groups at each step of a loop with a scheduler of torch's."""
    made, found = prepared(), []
    optimizer = made.optimizer(**options)
    scheduler = make_scheduler(optimizer)
    for step in range(count):
        steps(made.model, optimizer, 1, step)
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        scheduler.step()
    return found


def same(factor: float) -> Callable[[Optimizer], Any]:
    return lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)


class TestRates:
    @pytest.mark.parametrize(
        "make_scheduler",
        [
            same(0.5),
            lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
            lambda o: lr_scheduler.OneCycleLR(o, max_lr=[group["lr"] for group in o.param_groups], total_steps=9),
            lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
            lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4),  # warm-up from 0
            lambda o: lr_scheduler.ExponentialLR(o, 0.9),
            lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.StepLR(o, 2)], [2]),
        ],
    )
    def test_schedules_that_keep_proportions_pass(self, make_scheduler: Callable[[Optimizer], Any]) -> None:
        assert all(row[0] == pytest.approx(2 * row[-1]) for row in scheduled(make_scheduler))

    def test_one_rate_for_all_groups_is_told(self) -> None:
        """V1 of the reports: a scheduler with one max_lr overwrites the rates of all groups."""
        with pytest.raises(InputError, match=r"max_lr=\[g\['lr'\] for g in optimizer\.param_groups\]") as raised:
            scheduled(lambda o: lr_scheduler.OneCycleLR(o, max_lr=2**-8, total_steps=10), 1)
        assert "param_groups[2] (blocks.0.qkv.weight, " in str(raised.value)

    def test_an_absolute_floor_is_told(self) -> None:
        """V2 of the reports: one floor for groups of different rates."""
        with pytest.raises(InputError, match=r"a floor .* breaks the plan's proportions \(eta_min, min_lr\)"):
            scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=2**-9), 2)
        with pytest.raises(InputError, match="a floor"):  # by its second step in a long run too
            scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 10_000, eta_min=2**-9), 2)

    @pytest.mark.parametrize(
        ("edit", "words"),
        [
            (
                lambda o: [g.update(lr=0.003) for g in o.param_groups],
                "all groups have one rate; write prepared.set_rate",
            ),
            (lambda o: o.param_groups[0].update(lr=0.003), "only the first group was changed"),
            (lambda o: o.param_groups[-1].update(lr=math.nan), "its rate is nan"),
            (lambda o: o.param_groups[-1].update(weight_decay=0.1), "weight_decay: 0.1; the plan says 0.2"),
            (lambda o: o.param_groups[-1].update(eps=1e-8), "eps: 1e-08; the plan says 5e-09"),
            (
                lambda o: o.param_groups[1]["params"].append(o.param_groups[2]["params"].pop()),
                "several rates or decays",
            ),
            (lambda o: [g.update(lr=-g["lr"]) for g in o.param_groups], "the rates are -1 times the plan's"),
        ],
    )
    def test_a_loop_that_overwrites_numbers_is_told(self, edit: Callable[[Optimizer], Any], words: str) -> None:
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, 1)
        edit(optimizer)
        with pytest.raises(InputError, match=words):
            steps(made.model, optimizer, 1)

    def test_the_line_that_is_said_passes(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        for lr in (0.0, 0.001, 0.004):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["ratio"]
            steps(made.model, optimizer, 1)
            by_line = [group["lr"] for group in optimizer.param_groups]
            made.set_rate(lr)
            assert by_line == [group["lr"] for group in optimizer.param_groups]

    def test_rates_in_tensors_are_set_and_read(self) -> None:
        made = prepared()
        optimizer = made.optimizer(foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        made.set_rate(0.004)
        steps(made.model, optimizer, 1)
        assert float(optimizer.param_groups[-1]["lr"]) == pytest.approx(0.002)
        optimizer.param_groups[-1]["lr"].fill_(0.004)
        with pytest.raises(InputError, match="all groups have one rate"):
            steps(made.model, optimizer, 1)

    def test_no_decay_at_all_is_said_once(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        with pytest.warns(UserWarning, match="weight_decay: is 0 in all groups"):
            steps(made.model, optimizer, 1)
        steps(made.model, optimizer, 1)

    def test_the_first_group_and_the_defaults_have_the_tuned_rate(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"] == 0.01
        assert sorted(name for group in optimizer.param_groups for name in group["names"]) == sorted(made.tensors)
        reordered = prepared(change=lambda row: {**row, "lr": row["lr"] / 2 if "table" in row["name"] else row["lr"]})
        assert reordered.optimizer().param_groups[0]["lr"] == 0.01
        slower = prepared(change=lambda row: {**row, "lr": row["lr"] / 3})
        with pytest.warns(UserWarning, match=r"no group has the tuned rate 0\.01; .* sees 0\.0033"):
            slower.optimizer()

    @pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
    def test_the_plans_numbers_are_no_options(self, key: str) -> None:
        with pytest.raises(InputError, match=f"{key}: is the plan's"):
            prepared().optimizer(**{key: 0.1})


class TestOtherOptimizers:
    @pytest.mark.parametrize(
        "kind", ["RAdam", "NAdam", "RMSprop", "Adagrad", "SGD", "Adam", "Adamax", "Adadelta", "Adafactor"]
    )
    def test_the_plans_numbers_are_refused_where_they_are_wrong(self, kind: str) -> None:
        made = prepared()
        groups = made.groups()  # with decay, which Adam couples to the gradient
        with pytest.raises(InputError, match=f"{kind}: the plan's rates, decay and epsilon are those of AdamW"):
            made.keep(getattr(torch.optim, kind)(groups, lr=0.1))

    def test_exact_ones_are_kept_with_their_numbers(self) -> None:
        made = prepared(change=lambda row: {**row, "weight_decay": 0.0})
        optimizer = made.keep(torch.optim.Adam(made.groups()))
        steps(made.model, optimizer, 1)
        optimizer.param_groups[0]["lr"] = 1.0
        with pytest.raises(InputError, match="only the first group"):
            steps(made.model, optimizer, 1)

    def test_one_of_another_package_is_kept_and_said(self) -> None:
        class Theirs(torch.optim.Optimizer):
            def step(self, closure: Any = None) -> None:
                for group in self.param_groups:
                    for tensor in group["params"]:
                        tensor.data.add_(torch.ones_like(tensor), alpha=-group["lr"])

        made = prepared()
        with pytest.warns(UserWarning, match="Theirs: the plan's numbers hold for AdamW.* is not known"):
            optimizer = made.keep(Theirs(made.groups(), {}))
        steps(made.model, optimizer, 2)
        assert made.check() == {}

    def test_the_plans_groups_want_to_be_kept(self) -> None:
        made = prepared()
        with pytest.warns(
            UserWarning, match=r"AdamW: trains a prepared model, and nothing watches its numbers; .*keep"
        ):
            steps(made.model, torch.optim.AdamW(made.groups()), 2)
        assert made.check() == {}

    def test_a_foreign_parameter_may_have_a_group_of_its_own(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 0.7})
        steps(made.model, optimizer, 2)

    def test_two_optimizers_may_share_the_model(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        taken = optimizer.param_groups.pop()
        with pytest.raises(InputError, match=r"blocks\.0\.qkv\.weight.* is in no group of the optimizer"):
            steps(made.model, optimizer, 1)
        with pytest.warns(UserWarning, match="Muon: its numbers are not"):
            other = made.keep(torch.optim.Muon([p for p in taken["params"]], lr=1e-3))
        steps(made.model, optimizer, 1)
        steps(made.model, other, 1)
        assert made.check() == {}


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
