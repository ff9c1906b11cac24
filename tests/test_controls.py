"""SP with sparse-aware init, the control that corrects the init alone, and the rate ratios of embeddings and of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import supar_cli
from supar_cli.errors import InputError
from supar_cli.experiments import coordinates, search
from supar_cli.experiments.check_plans import sweeps_of
from supar_cli.experiments.coordinate_bounds import CheckResult, judge
from supar_cli.experiments.sweep_views import is_subject
from supar_cli.planning.advice import warnings
from supar_cli.planning.explain import explain
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.training.trainer import Trainer

from . import own_scripts
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


# of a ratio of rates: the role that has it, its symbol, a model that can have it, and the factors that stand for it
RATIOS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "embedding_lr_ratio": ("embedding", "r", {}, ("alpha_input", "alpha_output")),
    "head_lr_ratio": ("unembedding", "κ", {"tied": False}, ("alpha_output",)),
}


def rescaled(
    plan_of: MakePlan, key: str, ratio: float, optimizer: str, forgotten: str = "", **options: Any
) -> tuple[Plan, Plan]:
    """A plan of which a role has the ratio, and one without whose numbers are scaled instead; `forgotten` is not."""
    role, _, model, factors = RATIOS[key]
    tuned = {"alpha_input": 3.0, "alpha_output": 2.0, "weight_decay": 0.5, "eps": 1e-4, "lr": 0.02}
    train = {"optimizer": optimizer, "grad_clip": 0.0, "schedule": "constant", "warmup_fraction": 0.0}
    options = {"train": train, "model": model, **options}
    with_ratio = plan_of(hyperparameters={**tuned, key: ratio}, **options)
    by = ratio if optimizer == "adamw" else sqrt(ratio)
    scaled = {name: tuned[name] * (1.0 if name == forgotten else by) for name in factors}
    without = plan_of(hyperparameters={**tuned, **scaled}, **options)
    rows = []
    for row in without.tensors:
        if row.role == role and row.site != forgotten:
            eps = row.eps * (1.0 if forgotten == "eps" else by)
            std = row.init_std if forgotten == "init_std" else (row.init_std or 0.0) / by
            row = row.model_copy(update={"init_std": std, "eps": eps})
        rows.append(row)
    return with_ratio, without.model_copy(update={"tensors": rows})


def largest_difference(plans: tuple[Plan, Plan]) -> float:
    one, other = ([trainer.step().loss for _ in range(STEPS)] for trainer in map(Trainer, plans))
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class TestRatiosOfRates:
    """Of embeddings, where the head is tied to them, and of a head that is not."""

    @pytest.mark.parametrize("key", RATIOS)
    @pytest.mark.parametrize(("ratio", "optimizer"), [(4.0, "adamw"), (0.3, "adamw"), (4.0, "sgd")])
    def test_it_is_another_scale_of_its_tensors(
        self, plan_of: MakePlan, key: str, ratio: float, optimizer: str
    ) -> None:
        """Adam: σ/r and r·ε of the role, factors times r; SGD: √r in place of r. Without clipping, with independent decay.

        That is exact in real numbers, and for powers of two bit for bit.
        """
        difference = largest_difference(rescaled(plan_of, key, ratio, optimizer))
        assert difference == 0 if ratio == 4 else difference < AGREE

    @pytest.mark.parametrize(
        ("key", "forgotten"),
        [(key, name) for key in RATIOS for name in ("eps", "init_std", *RATIOS[key][3])]
        + [("embedding_lr_ratio", "positions")],
    )
    def test_a_number_that_was_forgotten_shows(self, plan_of: MakePlan, key: str, forgotten: str) -> None:
        assert largest_difference(rescaled(plan_of, key, 4.0, "adamw", forgotten)) > APART

    @pytest.mark.parametrize("key", RATIOS)
    @pytest.mark.parametrize(
        "options",
        [
            {"parameterization": {"weight_decay_rule": "coupled"}},
            {"train": {"grad_clip": 0.05, "schedule": "constant", "warmup_fraction": 0.0}},
        ],
    )
    def test_coupled_decay_and_clipping_are_not_the_same(
        self, plan_of: MakePlan, key: str, options: dict[str, Any]
    ) -> None:
        assert largest_difference(rescaled(plan_of, key, 4.0, "adamw", **options)) > APART

    @pytest.mark.parametrize("key", RATIOS)
    @pytest.mark.parametrize("name", ["supar", "mup", "sp", "sp-si", "supar-lr-only"])
    def test_it_moves_the_rate_of_its_role_alone_at_every_size(self, plan_of: MakePlan, key: str, name: str) -> None:
        role, symbol, model, _ = RATIOS[key]
        for target in ({"width": 32, "sparsity": {"density": 1.0}}, {"width": 128, "sparsity": {"density": 1 / 16}}):
            one, four = (plan_of(name, hyperparameters={key: r}, model=model, target=target) for r in (1.0, 4.0))
            for row, other in zip(one.tensors, four.tensors, strict=True):
                if row.role == role:
                    assert (other.lr, other.weight_decay) == (4 * row.lr, row.weight_decay / 4)
                    assert other.because == {**row.because, "lr_ratio": 4.0}
                    row = row.model_copy(update={key: vars(other)[key] for key in ("lr", "weight_decay", "because")})
                assert row == other
            explained = explain(four)
            assert not any(number.is_edited for found in explained.rows for number in found.numbers)
            text = " ".join(explained.text("plan.yaml").split())
            assert f"η·{symbol} = 0.01·4 = 0.04 [D]" in text and f"λ·(1/{symbol}) = 0.1·(1/4) = 0.025" in text
            assert f"{symbol} {key} = 4" in text and "lr_ratio = 4 (own rate)" in text

    @pytest.mark.parametrize("key", RATIOS)
    def test_by_default_documents_do_not_have_it(self, plan_of: MakePlan, key: str) -> None:
        plan = plan_of()
        assert plan.hash() == plan_of(hyperparameters={key: 1.0}).hash()
        assert key not in plan.model_dump()["hyperparameters"]

    @pytest.mark.parametrize(("key", "at"), [("embedding_lr_ratio", 0), ("head_lr_ratio", -1)])
    def test_a_sweep_may_be_over_it(self, text_file: Path, key: str, at: int) -> None:
        own = {"data": {"source": str(text_file)}, "parameterizations": ["supar"]}
        tied = sweep_of(**own, over={key: "x:-1..1/1"})
        swept = tied.model_copy(update={"model": tied.model.model_copy(update=RATIOS[key][2])})
        rates = [swept.plan("supar", swept.levels[0], index, 0).tensors[at].lr for index in (0, 1, 2)]
        assert [rate / rates[1] for rate in rates] == [0.5, 1.0, 2.0]

    def test_tuned_on_short_runs_that_of_embeddings_is_warned_of(self, plan_of: MakePlan) -> None:
        train = {"steps": 1000, "eval_every": 500}
        short, long = (plan_of(hyperparameters={"embedding_lr_ratio": 4.0}, train=one) for one in ({}, train))
        said = "hyperparameters.embedding_lr_ratio: 4, tuned on 12 steps: what it gains in runs under 1,000 turns into"
        assert any(message.startswith(said) for message in warnings(short))
        assert not any("embedding_lr_ratio" in message for message in [*warnings(long), *warnings(plan_of())])


class Net(nn.Module):
    """The model of `own_scripts.LAYOUT`."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"table": (100, 64), "up": (256, 64), "head": (100, 64)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table[ids]
        return (x + (x @ self.up.T).relu().unflatten(-1, (4, 64)).sum(-2)) @ self.head.T  # type: ignore[no-any-return]


def moved(plan: Plan) -> dict[str, torch.Tensor]:
    """What one step of the plan's optimizer adds to each tensor of a prepared model."""
    model = Net()
    prepared = supar_cli.prepare(model, plan)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    ids = torch.arange(32)
    torch.nn.functional.cross_entropy(model(ids), ids + 1).backward()
    prepared.optimizer().step()
    return {name: tensor.detach() - before[name] for name, tensor in model.named_parameters()}


class TestHeadOfAModelOfYours:
    """The head's row has the ratio first and the folded multiplier second."""

    @staticmethod
    def own(changed: str = "", instead: str = "", optimizer: str = "adamw", **tuned: float) -> Proxy:
        layout = Path("layout.yaml")
        layout.write_text(own_scripts.LAYOUT.replace(changed, instead) if changed else own_scripts.LAYOUT)
        known = {"lr": 2**-5, "init_std": 0.125, "alpha_input": 1.0, "alpha_output": 2.0, "weight_decay": 0.5}
        fields = {"kind": "supar.proxy/v1", "model": {"family": "own", "layout": "layout.yaml"}}
        train = {"optimizer": optimizer, "steps": 30, "batch_size": 4}
        return validate(Proxy, {**fields, "hyperparameters": known | tuned, "train": train}, "proxy")

    @pytest.mark.usefixtures("here")
    @pytest.mark.parametrize(("optimizer", "by"), [("adamw", 4.0), ("sgd", 2.0)])
    def test_its_numbers_are_those_of_another_scale(self, optimizer: str, by: float) -> None:
        """With κ = 4, bit for bit those of σ/4, 4·α_output and 4·ε (SGD: 2 in place of 4): the row stands for one product."""
        plans = [
            supar_cli.transfer(self.own(optimizer=optimizer, **tuned), width=1024, density=1)
            for tuned in ({"head_lr_ratio": 4.0}, {"alpha_output": 2.0 * by}, {})
        ]
        head, other, plain = (plan.tensors[-1] for plan in plans)
        assert (head.lr, head.weight_decay) == (other.lr, other.weight_decay)
        assert (head.init_std, head.eps) == (other.init_std / by, other.eps * by)  # type: ignore[operator]
        assert (head.fold, head.because["lr_ratio"], other.fold) == (0.125, 4.0, 0.125 * by)
        assert (head.lr, head.init_std, head.eps) == (4 * plain.lr, plain.init_std, plain.eps)
        assert not any(number.is_edited for row in explain(plans[0], "head").rows for number in row.numbers)

    @pytest.mark.usefixtures("here")
    def test_a_prepared_model_trains_by_it(self) -> None:
        one, four = (
            moved(supar_cli.transfer(self.own(optimizer="sgd", weight_decay=0.0, head_lr_ratio=ratio), density="1/4"))
            for ratio in (1.0, 4.0)
        )
        for name, change in one.items():
            assert change.abs().max() > 1e-4
            assert torch.allclose(four[name], 4 * change if name == "head" else change, rtol=1e-3, atol=1e-7), name

    @pytest.mark.usefixtures("here")
    @pytest.mark.parametrize(
        ("changed", "instead", "what"),
        [
            ("uses: [head]", "uses: []", "but the layout has no head"),
            ("uses: [head]", "uses: [head], tied_to: table", "but the head head is tied and has the embeddings' rate"),
            (
                "uses: [first_sum]",
                "uses: [first_sum], tied_to: head",
                "but the head head is tied and has the embeddings' rate",
            ),
            ("uses: [first_sum]", "uses: [first_sum, head]", "but the head table is tied and has the embeddings' rate"),
        ],
    )
    def test_without_a_head_of_its_own_it_is_refused(self, changed: str, instead: str, what: str) -> None:
        with pytest.raises(InputError, match=rf"hyperparameters\.head_lr_ratio: 4, {what}.*; expected 1"):
            supar_cli.transfer(self.own(changed, instead, head_lr_ratio=4.0, alpha_output=1.0), density=1)
        assert supar_cli.transfer(self.own(changed, instead, head_lr_ratio=1.0, alpha_output=1.0), density=1)


def test_a_tied_model_of_supars_families_has_no_rate_of_its_head(plan_of: MakePlan, text_file: Path) -> None:
    what = r"head_lr_ratio: 4, but the head embedding is tied and has the embeddings' rate; expected 1"
    with pytest.raises(InputError, match=what):
        plan_of(hyperparameters={"head_lr_ratio": 4.0})
    fields = proxy_fields(str(text_file), search={"head_lr_ratio": [1.0, 4.0]})
    spec = validate(Spec, {**fields, "kind": "supar.spec/v1"}, "spec")
    with pytest.raises(InputError, match=rf"search\.head_lr_ratio: hyperparameters\.{what}; expected null"):
        search.tune(spec, text_file.parent / "proxy.journal")
    assert not (text_file.parent / "proxy.journal").exists()
