"""SP with sparse-aware init, the control that corrects the init alone, and the rate ratio of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.experiments import coordinates
from supar_cli.experiments.check_plans import sweeps_of
from supar_cli.experiments.coordinate_bounds import CheckResult, judge
from supar_cli.experiments.sweep_views import is_subject
from supar_cli.planning.advice import warnings
from supar_cli.planning.explain import explain
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.training.trainer import Trainer

from .conftest import proxy_fields
from .test_sweep import sweep_of

MakePlan = Callable[..., Plan]
STEPS, AGREE, APART = 12, 2e-5, 1e-3  # nats: float32 rounding of other orders of products; any number forgotten


class TestSparseAwareInit:
    def test_only_the_init_of_hidden_weights_differs_from_sp(self, plan_of: MakePlan) -> None:
        target = {"width": 128, "sparsity": {"density": 0.25, "overrides": {"attn": 0.5}}}
        sp, si = (plan_of(name, target=target) for name in ("sp", "sp-si"))
        assert sp.model == si.model and sp.hash() != si.hash()
        for one, other in zip(sp.tensors, si.tensors, strict=True):
            if one.role == "hidden":
                assert other.init_std == one.init_std / sqrt(one.density)  # type: ignore[operator]
                one = one.model_copy(update={"init_std": other.init_std})
            assert one == other

    def test_when_dense_it_is_sp(self, plan_of: MakePlan) -> None:
        sp, si = (plan_of(name, target={"sparsity": {"density": 1.0}}) for name in ("sp", "sp-si"))
        assert (sp.tensors, sp.model) == (si.tensors, si.model)

    def test_explain_works_it_out(self, plan_of: MakePlan) -> None:
        explained = explain(plan_of("sp-si"))
        assert not any(number.is_edited for row in explained.rows for number in row.numbers)
        text = " ".join(explained.text("plan.yaml").split())
        assert "SP, sparse-aware init with AdamW" in text
        assert "σ/√m_ρ = 0.08/√0.25 = 0.16 [E]" in text and "lr η = 0.01 [SP]" in text

    @pytest.mark.parametrize("axis", ["density=1,0.25", "width=32,64"])
    def test_it_is_a_control_over_every_size(self, text_file: Path, axis: str) -> None:
        name, values = axis.split("=")
        swept = sweep_of(
            data={"source": str(text_file)}, over={"lr": "x:0..0/1", name: values}, parameterizations=["sp-si", "supar"]
        )
        assert [is_subject(swept, one) for one in swept.parameterizations] == [False, True]

    def test_its_sizes_start_right_and_its_updates_drift(self) -> None:
        """Width 128, densities 1 to 1/16, 2 seeds, 3 steps: medians over linears are .05, .04 and .96 (SE of one linear .01 to .07).

        A check of it fails by its updates alone, and as a control it misses as it should.
        """
        torch.set_num_threads(1)
        fields = proxy_fields("stdlib", model={"width": 64, "heads": 2, "context": 32}, target={})
        fields["hyperparameters"] |= {"lr": 2**-8, "alpha_input": 1.0, "weight_decay": 0.0}
        sweep = sweeps_of(validate(Proxy, fields, ""), "sp-si", widths=[128], seeds=2, steps=3, batch_size=8)[0]
        result = judge(sweep, {plan.hash(): coordinates.measure(plan) for plans in sweep.plans for plan in plans})
        medians = {one.quantity: one for one in result.findings if one.bound == "median"}
        assert medians["activation"].within_bound and medians["gain"].within_bound
        assert 0.7 < medians["update"].value < 1.1
        assert (result.passed, result.violations[0].quantity) == (False, "update")
        control = replace(sweep, is_control=True)
        assert CheckResult(control, result.findings).text.startswith("fails, as expected: median |slope| of update")


def rescaled(plan_of: MakePlan, ratio: float, optimizer: str, forgotten: str = "", **options: Any) -> tuple[Plan, Plan]:
    """A plan whose embeddings have the ratio, and one without whose numbers are scaled instead; `forgotten` is not."""
    tuned = {"alpha_input": 3.0, "alpha_output": 2.0, "weight_decay": 0.5, "eps": 1e-4, "lr": 0.02}
    train = {"optimizer": optimizer, "grad_clip": 0.0, "schedule": "constant", "warmup_fraction": 0.0}
    options = {"train": train, **options}
    with_ratio = plan_of(hyperparameters={**tuned, "embedding_lr_ratio": ratio}, **options)
    by = ratio if optimizer == "adamw" else sqrt(ratio)
    scaled = {name: tuned[name] * (1.0 if name == forgotten else by) for name in ("alpha_input", "alpha_output")}
    without = plan_of(hyperparameters={**tuned, **scaled}, **options)
    rows = []
    for row in without.tensors:
        if row.role == "embedding" and row.site != forgotten:
            eps = row.eps * (1.0 if forgotten == "eps" else by)
            std = row.init_std if forgotten == "init_std" else (row.init_std or 0.0) / by
            row = row.model_copy(update={"init_std": std, "eps": eps})
        rows.append(row)
    return with_ratio, without.model_copy(update={"tensors": rows})


def largest_difference(plans: tuple[Plan, Plan]) -> float:
    one, other = ([trainer.step().loss for _ in range(STEPS)] for trainer in map(Trainer, plans))
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class TestEmbeddingRatio:
    @pytest.mark.parametrize(("ratio", "optimizer"), [(4.0, "adamw"), (0.3, "adamw"), (4.0, "sgd")])
    def test_tied_it_is_another_scale_of_the_embeddings(self, plan_of: MakePlan, ratio: float, optimizer: str) -> None:
        """Adam: (σ/r, r·α_input, r·α_output) and r·ε; SGD: √r in place of r. Without clipping, with independent decay."""
        assert largest_difference(rescaled(plan_of, ratio, optimizer)) < AGREE

    @pytest.mark.parametrize("forgotten", ["eps", "init_std", "alpha_input", "alpha_output", "positions"])
    def test_a_number_that_was_forgotten_shows(self, plan_of: MakePlan, forgotten: str) -> None:
        assert largest_difference(rescaled(plan_of, 4.0, "adamw", forgotten)) > APART

    @pytest.mark.parametrize(
        "options",
        [
            {"parameterization": {"weight_decay_rule": "coupled"}},
            {"train": {"grad_clip": 0.05, "schedule": "constant", "warmup_fraction": 0.0}},
        ],
    )
    def test_coupled_decay_and_clipping_are_not_the_same(self, plan_of: MakePlan, options: dict[str, Any]) -> None:
        assert largest_difference(rescaled(plan_of, 4.0, "adamw", **options)) > APART

    @pytest.mark.parametrize("name", ["supar", "mup", "sp", "sp-si", "supar-lr-only"])
    def test_it_moves_the_rate_of_embeddings_alone_at_every_size(self, plan_of: MakePlan, name: str) -> None:
        for target in ({"width": 32, "sparsity": {"density": 1.0}}, {"width": 128, "sparsity": {"density": 1 / 16}}):
            one, four = (plan_of(name, hyperparameters={"embedding_lr_ratio": r}, target=target) for r in (1.0, 4.0))
            for row, other in zip(one.tensors, four.tensors, strict=True):
                if row.role == "embedding":
                    assert (other.lr, other.weight_decay) == (4 * row.lr, row.weight_decay / 4)
                    assert other.because == {**row.because, "lr_ratio": 4.0}
                    row = row.model_copy(update={key: vars(other)[key] for key in ("lr", "weight_decay", "because")})
                assert row == other
            explained = explain(four)
            assert not any(number.is_edited for found in explained.rows for number in found.numbers)
            text = " ".join(explained.text("plan.yaml").split())
            assert "η·r = 0.01·4 = 0.04 [D]" in text and "λ·(1/r) = 0.1·(1/4) = 0.025" in text
            assert "r embedding_lr_ratio = 4" in text and "lr_ratio = 4 (rate of embeddings)" in text

    def test_by_default_documents_do_not_have_it(self, plan_of: MakePlan) -> None:
        plan = plan_of()
        assert plan.hash() == plan_of(hyperparameters={"embedding_lr_ratio": 1.0}).hash()
        assert "embedding_lr_ratio" not in plan.model_dump()["hyperparameters"]

    def test_a_sweep_may_be_over_it(self, text_file: Path) -> None:
        swept = sweep_of(
            data={"source": str(text_file)}, over={"embedding_lr_ratio": "x:-1..1/1"}, parameterizations=["supar"]
        )
        rates = [swept.plan("supar", swept.levels[0], index, 0).tensors[0].lr for index in (0, 1, 2)]
        assert [rate / rates[1] for rate in rates] == [0.5, 1.0, 2.0]

    def test_tuned_on_short_runs_it_is_warned_of(self, plan_of: MakePlan) -> None:
        train = {"steps": 1000, "eval_every": 500}
        short, long = (plan_of(hyperparameters={"embedding_lr_ratio": 4.0}, train=one) for one in ({}, train))
        said = "hyperparameters.embedding_lr_ratio: 4, tuned on 12 steps: what it gains in runs under 1,000 turns into"
        assert any(message.startswith(said) for message in warnings(short))
        assert not any("embedding_lr_ratio" in message for message in [*warnings(long), *warnings(plan_of())])
