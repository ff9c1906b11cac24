"""What popular loops do to rates, groups and weights, and what a prepared model says of it by the first step that runs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from supar_cli.errors import InputError
from tests.own_models import batch, loss_of, prepared, steps

Optimizer = torch.optim.Optimizer

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


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

    @pytest.mark.parametrize(
        ("factors", "told"),
        [
            ([0.0, 0.5, 1.0, 0.5, 0.1], None),
            ([0.5, 0.9, 0.85], None),  # a peak between two steps
            ([1e-3, 2e-3, 4e-3, 8e-3], None),  # a warm-up, so far
            ([0.1, 0.1, 0.1], None),
            ([0.01, 0.03, 0.02, 0.01], 2),
            ([0.03, 0.02], 1),
            ([0.5, 1.0, 1.5], 2),
            ([3.0], 0),
        ],
    )
    def test_a_peak_of_the_scripts_own_is_told_once(self, factors: list[float], told: int | None) -> None:
        made, found = prepared(), []
        optimizer = made.optimizer()
        for step, factor in enumerate(factors):
            made.set_rate(0.01 * factor)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                steps(made.model, optimizer, 1, step)
            found += [step for one in said if "the loop's largest rate is" in str(one.message)]
        assert found == ([] if told is None else [told])

    def test_a_resumed_runs_peak_is_not_known(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, 1)
        again = made.optimizer()
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for factor in (0.5, 0.4):
            made.set_rate(0.01 * factor)
            steps(made.model, again, 1)

    @pytest.mark.parametrize(("factors", "told"), [((1.0, 0.5), True), ((0.5, 0.5), False), ((1.0, 1.0), False)])
    def test_two_optimizers_have_one_factor(self, factors: tuple[float, float], told: bool) -> None:
        made = prepared()
        groups = made.groups()
        both = [made.keep(torch.optim.AdamW(part)) for part in (groups[:1], groups[1:])]
        for optimizer, factor in zip(both, factors, strict=True):
            for group in optimizer.param_groups:
                group["lr"] *= factor
        loss_of(made.model, batch(0)).backward()
        both[0].step()
        if told:
            with pytest.raises(
                InputError, match=r"rates are 0\.5 times the plan's, where the model's other optimizer has 1"
            ):
                both[1].step()
        else:
            both[1].step()

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

    def test_a_bare_one_of_a_dense_plan_is_told_of_its_numbers(self) -> None:
        made = prepared(density=1.0)
        with pytest.warns(UserWarning, match="SGD: trains a prepared model, by numbers that are not the plan's"):
            steps(made.model, torch.optim.SGD(made.model.parameters(), lr=0.1), 2)

    def test_keeping_the_plans_own_leaves_its_clip(self) -> None:
        losses = []
        for keeps in (False, True):
            made = prepared(train={"optimizer": "sgd"})
            optimizer = made.optimizer(clip=0.01)
            losses.append(steps(made.model, made.keep(optimizer) if keeps else optimizer))
        free = prepared(train={"optimizer": "sgd"})
        assert losses[0] == losses[1] != steps(free.model, free.optimizer())

    def test_the_plans_groups_want_to_be_kept(self) -> None:
        made = prepared()
        with pytest.warns(
            UserWarning, match=r"AdamW: trains a prepared model, and nothing watches its numbers; .*keep"
        ):
            steps(made.model, torch.optim.AdamW(made.groups()), 2)
        assert made.check() == {}

    def test_an_optimizer_that_was_copied_with_its_model_is_named(self) -> None:
        made = prepared()
        model, optimizer = copy.deepcopy((made.model, made.optimizer()))
        with pytest.warns(UserWarning, match=r"no mask holds there; .* prepared\.optimizer\(copy\)"):
            steps(model, optimizer, 1)

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
