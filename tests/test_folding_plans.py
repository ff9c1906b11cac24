"""A plan whose multipliers are folded into its tensors' numbers trains as the plan with multipliers, clipping included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from supar_cli.planning import layout
from supar_cli.planning.folding import Numbers, describe_uses, fold, fold_factors
from supar_cli.planning.plan import Plan
from supar_cli.training.trainer import Trainer

STEPS, AGREE, APART = 8, 2e-5, 1e-3  # nats: float32 rounding of other orders of products; any forgotten fold

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"bias": True},
    "llama": {"family": "llama", "tied": False, "norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
}


def folded(plan: Plan, forgotten: str = "") -> Plan:
    """The plan with multipliers of 1, all but attention's; `forgotten` is a number into which the fold was not put."""
    decoder, rows = plan.decoder, []
    uses = describe_uses(layout.tensors(decoder), decoder.tied)
    factors = fold_factors(uses, decoder.multipliers)
    for row in plan.tensors:
        before = Numbers(row.lr, row.weight_decay, row.eps, row.init_std, row.init_constant)
        after = vars(fold(before, factors[row.name], plan.train.optimizer))
        if forgotten in after:
            after[forgotten] = getattr(row, forgotten)
        own = None if factors[row.name] == 1.0 or forgotten == "fold" else factors[row.name]
        rows.append(row.model_copy(update={**after, "fold": own}))
    multipliers = decoder.multipliers.model_copy(update={"input": 1.0, "output": 1.0, "residual": 1.0})
    return plan.model_copy(update={"tensors": rows, "model": decoder.model_copy(update={"multipliers": multipliers})})


def losses(plan: Plan) -> list[float]:
    trainer = Trainer(plan)
    return [trainer.step().loss for _ in range(STEPS)]


def largest_difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def unfolded(plan_of: Callable[..., Plan], request: pytest.FixtureRequest) -> Plan:
    """A plan in which every number matters: multipliers far from 1, decay, an epsilon of the gradients' size, clipping."""
    family, optimizer = request.param
    return plan_of(
        model=FAMILIES[family],
        hyperparameters={"alpha_input": 3.0, "alpha_output": 4.0, "weight_decay": 0.5, "eps": 1e-4, "lr": 0.02},
        parameterization={"depth_rule": "completep" if optimizer == "adamw" else "none"},
        train={"optimizer": optimizer, "grad_clip": 0.5, "schedule": "constant", "warmup_fraction": 0.0},
        target={"layers": 4, "sparsity": {"density": 0.25}},
    )


CASES = [(family, optimizer) for family in FAMILIES for optimizer in ("adamw", "sgd")]


@pytest.mark.parametrize("unfolded", CASES, indirect=True, ids=map("-".join, CASES))
def test_a_folded_plan_trains_the_same(unfolded: Plan) -> None:
    assert any(row.fold for row in folded(unfolded).tensors)
    assert largest_difference(losses(folded(unfolded)), losses(unfolded)) < AGREE


@pytest.mark.parametrize("unfolded", [("gpt2", "adamw")], indirect=True)
@pytest.mark.parametrize("forgotten", ["init_std", "init_constant", "lr", "weight_decay", "eps", "fold"])
def test_a_fold_that_was_forgotten_shows(unfolded: Plan, forgotten: str) -> None:
    assert largest_difference(losses(folded(unfolded, forgotten)), losses(unfolded)) > APART
