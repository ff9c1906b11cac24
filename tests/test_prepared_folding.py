"""Multipliers folded into a plan's numbers change no loss, faults in them do, and the clip is as if nothing were folded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supar_cli.errors import InputError
from tests.own_models import Small, batch, loss_of, make, prepared, steps

Row = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


POWERS = {"input": 4.0, "output": 0.125}
ANY = {"input": 3.3, "output": 0.17}


def folded(optimizer: str, factors: dict[str, float], tied: bool, **wrong: float) -> Callable[[Row], Row]:
    """Edits of rows that fold the factors; `wrong` multiplies a key of every folded row, for planted faults."""
    power = 2 if optimizer == "sgd" else 1
    before_head = factors["output"] / factors["input"]
    takes = {"table.weight": factors["input"], "head.weight": factors["output"]}
    if tied:
        takes |= {"last_norm.weight": before_head, "last_norm.bias": before_head}

    def change(row: Row) -> Row:
        row = {**row, **({"eps": 1e-3} if row["eps"] else {}), "weight_decay": 0.5 if row.get("init_std") else 0.0}
        if (a := takes.get(row["name"])) is None:
            return row
        row |= {"lr": row["lr"] * a**power, "weight_decay": row["weight_decay"] / a**power, "fold": a}
        row |= {"eps": row["eps"] / a} if power == 1 else {}
        row |= {key: row[key] * a for key in ("init_std", "init_constant") if key in row}
        return {**row, **{key: row[key] * by**power for key, by in wrong.items() if key in row}}

    return change


def unfolded(row: Row) -> Row:
    return {**row, **({"eps": 1e-3} if row["eps"] else {}), "weight_decay": 0.5 if row.get("init_std") else 0.0}


def run(
    model: Small, change: Callable[[Row], Row], optimizer: str, clip: str = "", limit: float = 0.3, count: int = 12
) -> list[float]:
    """Losses in double precision; `clip`: "prepared" or "torch"."""
    made = prepared(model.double(), change=change, train={"optimizer": optimizer, "momentum": 0.9})
    stepper, losses = made.optimizer(), []
    for step in range(count):
        loss = loss_of(made.model, batch(step))
        stepper.zero_grad()
        loss.backward()
        if clip == "prepared":
            made.clip_grad_norm_(limit)
        elif clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        stepper.step()
        losses.append(loss.item())
    return losses


def scaled(factors: dict[str, float], **shape: Any) -> Small:
    """The model with the multipliers in its forward pass."""
    model = make(**shape)
    model.table_scale, model.scale = factors["input"], factors["output"]
    return model


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class TestFolding:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(("factors", "allowed"), [(POWERS, 0.0), (ANY, 1e-9)])
    def test_changes_nothing(self, optimizer: str, tied: bool, factors: dict[str, float], allowed: float) -> None:
        true = run(scaled(factors, tied=tied), unfolded, optimizer)
        assert gap(true, run(make(tied=tied), folded(optimizer, factors, tied), optimizer)) <= allowed
        assert gap(true, run(make(tied=tied), unfolded, optimizer)) > 1e-2  # the multipliers matter

    @pytest.mark.parametrize(
        ("optimizer", "wrong"),
        [
            ("adamw", {"eps": 8.0}),
            ("adamw", {"weight_decay": 8.0}),
            ("adamw", {"lr": 8.0}),
            ("sgd", {"lr": 8.0**0.5}),  # a·η where a²·η is right
        ],
    )
    def test_a_planted_fault_is_seen(self, optimizer: str, wrong: dict[str, float]) -> None:
        true = run(scaled(POWERS), unfolded, optimizer)
        assert gap(true, run(make(), folded(optimizer, POWERS, False, **wrong), optimizer)) > 1e-3

    def test_a_folded_bias_of_the_head_is_seen(self) -> None:
        def change(row: Row) -> Row:
            row = folded("adamw", POWERS, False)(row)
            return {**row, "lr": row["lr"] * 0.125, "eps": row["eps"] * 8} if row["name"] == "head.bias" else row

        assert gap(run(scaled(POWERS), unfolded, "adamw"), run(make(), change, "adamw")) > 1e-3

    def test_a_folded_derived_gain_is_seen(self) -> None:
        class Derived(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)

        def with_gain(model: Small) -> Small:
            model.last_norm = Derived(32)
            return model

        def zero(change: Callable[[Row], Row]) -> Callable[[Row], Row]:
            return lambda row: change({**row, "init_constant": 0.0} if row["name"] == "last_norm.weight" else row)

        true = run(with_gain(scaled(POWERS, tied=True)), zero(unfolded), "adamw")
        assert gap(true, run(with_gain(make(tied=True)), zero(folded("adamw", POWERS, True)), "adamw")) > 1e-3

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_clip_is_that_of_the_model_with_multipliers(self, tied: bool) -> None:
        true = run(scaled(ANY, tied=tied), unfolded, "adamw", "torch")
        assert gap(true, run(make(tied=tied), folded("adamw", ANY, tied), "adamw", "prepared")) <= 1e-12
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is said of it is tested with the loops
            clipped = run(make(tied=tied), folded("adamw", ANY, tied), "adamw", "torch")
        assert gap(true, clipped) > 1e-3


class TestClipping:
    def test_returns_the_norm_and_limits_it(self) -> None:
        made = prepared()
        loss_of(made.model, batch(0)).backward()
        whole = torch.nn.utils.get_total_norm([p.grad for p in made.tensors.values()])
        assert float(made.clip_grad_norm_(whole.item() / 4)) == pytest.approx(float(whole), rel=1e-6)
        assert float(made.clip_grad_norm_(1e9)) == pytest.approx(float(whole) / 4, rel=1e-5)

    def test_leaves_dead_entries_out_and_shows_a_live_nan(self) -> None:
        made = prepared()
        loss_of(made.model, batch(0)).backward()
        weight = made.tensors["blocks.0.up.weight"]
        alive = torch.from_numpy(made.masks["blocks.0.up.weight"].alive())
        norm = made.clip_grad_norm_(1e9)
        weight.grad[~alive] = math.inf
        assert torch.equal(made.clip_grad_norm_(1e9), norm)
        weight.grad[tuple(alive.nonzero()[0])] = math.nan
        assert made.clip_grad_norm_(1e9).isnan() and made.tensors["table.weight"].grad.isnan().all()

    def test_no_limit_is_zero(self) -> None:
        one, other = prepared(), prepared()
        assert steps(one.model, one.optimizer(clip=0.0)) == steps(other.model, other.optimizer())

    @pytest.mark.parametrize("limit", [-1.0, math.nan])
    def test_a_limit_that_limits_nothing_is_refused(self, limit: float) -> None:
        with pytest.raises(InputError, match=r"clip: .*expected a number above 0"):
            prepared().clip_grad_norm_(limit)
        with pytest.raises(InputError, match=r"clip: .*expected a number above 0"):
            prepared().optimizer(clip=limit)
