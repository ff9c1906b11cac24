"""`supar check`: what it measures, its verdicts on SμPar and on controls, and planted faults that it finds by tensor."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.experiments import check_plans, coordinates
from supar_cli.experiments import coordinate_bounds as check
from supar_cli.experiments.statistics import half_widths
from supar_cli.files import Record
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import Multipliers
from tests.conftest import Called, plan_from, proxy_fields

Supar = Callable[..., Called]

# A proxy of width 128 and its target: 4 times as wide, 16 times as sparse, so 32 weights a neuron
SHAPE = {"family": "gpt2", "width": 128, "layers": 2, "heads": 4, "context": 32, "vocab": 256}
TUNED = {"lr": 2**-6, "init_std": 0.08, "alpha_input": 8.0, "alpha_output": 1.0, "weight_decay": 0.0}
TARGET = {"width": 512, "sparsity": {"density": 1 / 16, "overrides": {"blocks.1.mlp.up": 0.25}}}
STEPS, SEEDS, ROWS = 3, 2, 8

_measured: dict[str, Record] = {}


def measured(plan: Plan) -> Record:
    """Once for each plan: the references are the same for all faults."""
    if plan.hash() not in _measured:
        torch.set_num_threads(1)
        _measured[plan.hash()] = coordinates.measure(plan)
    return _measured[plan.hash()]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    fields = proxy_fields("stdlib", model=SHAPE, hyperparameters=TUNED)
    fields["target"] = TARGET
    return plan_from(fields)


def judge_plan(plan: Plan, seeds: int = SEEDS, rows: int = ROWS) -> dict[str, check.CheckResult]:
    sweeps = check_plans.sweeps_of(plan, seeds=seeds, steps=STEPS, batch_size=rows)
    by_run = {one.hash(): measured(one) for sweep in sweeps for plans in sweep.plans for one in plans}
    return {sweep.label: check.judge(sweep, by_run) for sweep in sweeps}


def changed(plan: Plan, name: str, **numbers: float) -> Plan:
    rows = [row.model_copy(update=numbers) if row.name == name else row for row in plan.tensors]
    return plan.model_copy(update={"tensors": rows})


def test_a_plan_as_the_rules_have_it_passes(plan: Plan) -> None:
    found = judge_plan(plan)
    assert set(found) == {"the plan over density", "the plan over scale", "sp over density"}
    for one in found.values():
        assert one.passed is not one.sweep.is_control, one.text
        quantities = {*coordinates.LINEAR, "attention", "logits", "Δlogits", coordinates.SHARE}
        assert {f.quantity for f in one.findings} == quantities


class TestPlantedFaults:
    """Each in a plan that is right otherwise. The tensor named is the worst: a fault also moves what comes after it."""

    def worst(self, plan: Plan, axis: str = "density") -> check.Finding:
        found = judge_plan(plan)[f"the plan over {axis}"]
        assert not found.passed
        return found.violations[0]

    def test_a_rate_not_divided_by_its_density(self, plan: Plan) -> None:
        name = "blocks.1.attn.o"
        row = next(row for row in plan.tensors if row.name == name)
        found = self.worst(changed(plan, name, lr=row.lr * row.because["m_rho"]))
        assert (found.quantity, found.tensor) == ("update", name)
        assert found.value == pytest.approx(1.0, abs=0.3)

    def test_an_init_from_the_nominal_density(self, plan: Plan) -> None:
        name = "blocks.1.mlp.up"  # its own density is 1/4
        row = next(row for row in plan.tensors if row.name == name)
        assert row.because["m_rho"] == 0.25
        found = self.worst(changed(plan, name, init_std=row.init_std * sqrt(0.25 / plan.sparsity.density)))
        assert found.quantity in ("activation", "gain") and (found.bound, found.tensor) == ("step 1", name)
        assert found.value == pytest.approx(-0.25, abs=0.05)  # twice the size, over four octaves

    def test_attention_by_the_root_of_the_head_width(self, plan: Plan) -> None:
        found = self.worst(self.with_factor(plan, attention=1 / sqrt(plan.model.head_width)))
        assert found.quantity == "attention" and found.tensor in ("blocks.0.attn", "blocks.1.attn")

    @pytest.mark.parametrize("axis", ["density", "scale"])
    def test_no_output_multiplier(self, plan: Plan, axis: str) -> None:
        found = self.worst(self.with_factor(plan, output=1.0), axis)
        assert (found.quantity, found.bound, found.tensor) == ("logits", "step 1", "logits")

    def with_factor(self, plan: Plan, **factors: float) -> Plan:
        multipliers = Multipliers(**{**plan.model.multipliers.model_dump(), **factors})
        return plan.model_copy(update={"model": plan.model.model_copy(update={"multipliers": multipliers})})


class TestMeasure:
    @pytest.mark.parametrize(
        ("family", "positions"), [("gpt2", "learned"), ("llama", "rope"), ("llama", "alibi")], ids=str
    )
    def test_every_family_shows_every_quantity(self, family: str, positions: str) -> None:
        model = {
            "family": family,
            "width": 32,
            "layers": 2,
            "heads": 4,
            "positions": positions,
            "context": 16,
            "vocab": 256,
        }
        if family == "llama":
            model |= {"kv_heads": 2, "ffn_width": 96}
        fields = proxy_fields("stdlib", model=model)
        one = plan_from({**fields, "train": {**fields["train"], "steps": 2}})
        record = coordinates.measure(one)
        hidden = {row.name for row in one.tensors if row.role == "hidden"}
        assert record["state"] == "done" and len(record["steps"]) == len(record["losses"]) == 2
        for step in record["steps"]:
            assert all(set(step[quantity]) == hidden for quantity in coordinates.LINEAR)
            assert set(step["attention"]) == {"blocks.0.attn", "blocks.1.attn"}
            assert all(value > 0 for sizes in step.values() for value in sizes.values())

    def test_sizes_are_those_of_the_numbers_themselves(self, plan: Plan) -> None:
        from supar_cli.training.tasks import load_task
        from supar_cli.training.trainer import Trainer

        small = plan.model_copy(update={"train": plan.train.model_copy(update={"steps": 1, "tokens": 128})})
        trainer = Trainer(small, load_task(small))
        model, name = trainer.sparse_model.model, "blocks.0.attn.q"
        inputs_BT, _ = trainer.batch(0)
        with torch.no_grad():
            x_BTD = (model.embedding(inputs_BT) + model.positions.weight[:32]) * small.model.multipliers.input
            x_BTD = model.blocks[0].attn_norm(x_BTD)
            before = trainer.sparse_model.weight(name)
            attn = model.blocks[0].attn
            q, k = (linear(x_BTD).unflatten(-1, (16, 32)).transpose(1, 2) for linear in (attn.q, attn.k))
            scores = (q @ k.transpose(-1, -2) / 32).abs()[..., torch.ones(32, 32).tril().bool()].mean()
            entered: list[torch.Tensor] = []
            hook = model.final_norm.register_forward_hook(lambda _, inputs, output: entered.extend((*inputs, output)))
            logits = model(inputs_BT)
            hook.remove()
            head = trainer.sparse_model.weight("embedding")
            others = logits.abs().sum() - logits.gather(-1, inputs_BT[..., None]).abs().sum()
        trainer.step()
        with torch.no_grad():
            by_head = entered[1] @ (trainer.sparse_model.weight("embedding") - head).T / 4
            by_norm = (model.final_norm(entered[0]) - entered[1]) @ head.T / 4
            update = (x_BTD @ (trainer.sparse_model.weight(name) - before).T).abs().mean()
            moved = (model(inputs_BT) - logits).abs().mean()
        step = coordinates.measure(small)["steps"][0]
        for got, expected in (
            (step["activation"][name], (x_BTD @ before.T).abs().mean()),
            (step["update"][name], update),
            (step["attention"]["blocks.0.attn"], scores),
            (step["logits"]["logits"], others / (logits.numel() - inputs_BT.numel())),
            (step["Δlogits"]["logits"], moved),
            (step[coordinates.SHARE]["embedding"], by_head.abs().mean()),
            (step[coordinates.SHARE]["final_norm"], by_norm.abs().mean()),
        ):
            assert got == pytest.approx(float(expected), rel=1e-4)


class TestJudge:
    """Slopes and bounds on sizes made up to have known ones."""

    def sweep(self, plan: Plan, control: bool = False) -> tuple[check_plans.SlopeSweep, list[Plan]]:
        plans = [
            [plan.model_copy(update={"train": plan.train.model_copy(update={"seed": 10 * z + r})}) for r in range(2)]
            for z in range(3)
        ]
        makers = {4.0**-z: plans[z].__getitem__ for z in range(3)}
        writers = check_plans.writers_of(plan)
        sweep = check_plans.SlopeSweep("supar", "density", makers, control, writers=writers)
        return sweep.grow(2), [p for row in plans for p in row]

    def records(
        self, plans: list[Plan], slope: float, noise: float = 0.0, at: tuple[str, str] = ("update", "b")
    ) -> dict[str, Record]:
        random, found = np.random.default_rng(0), {}
        for i, one in enumerate(plans):
            octaves = -2.0 * (i // 2)

            def size(power: float, octaves: float = octaves) -> float:
                return float(2.0 ** (power * octaves + noise * random.standard_normal()))

            steps = [
                {q: {"a": size(0.0), at[1]: size(slope if q == at[0] else 0.0)} for q in coordinates.LINEAR}
                for _ in range(4)
            ]
            found[one.hash()] = {"state": "done", "steps": steps}
        return found

    @pytest.mark.parametrize(("slope", "kept"), [(0.29, True), (0.31, False), (-0.31, False)])
    def test_the_bound_on_each_slope(self, plan: Plan, slope: float, kept: bool) -> None:
        sweep, plans = self.sweep(plan)
        result = check.judge(sweep, self.records(plans, slope))
        each = next(f for f in result.findings if (f.quantity, f.bound) == ("update", "each"))
        assert each.value == pytest.approx(slope) and each.tensor == "b" and each.within_bound is kept
        assert result.passed is (kept and abs(slope) / 2 <= check.MEDIAN)

    @pytest.mark.parametrize(
        ("tensor", "slope", "kept"),
        [
            ("blocks.0.attn.q", 0.025, True),
            ("blocks.0.attn.q", 0.035, False),
            ("blocks.0.mlp.down", 0.045, True),
            ("blocks.0.attn.o", -0.055, False),
        ],
    )
    def test_what_writes_the_residual_stream_has_a_bound_of_its_own(
        self, plan: Plan, tensor: str, slope: float, kept: bool
    ) -> None:
        sweep, plans = self.sweep(plan)
        result = check.judge(sweep, self.records(plans, slope, at=("activation", tensor)))
        assert result.passed is kept
        finding = next(f for f in result.findings if f.tensor == tensor and f.bound == "step 1")
        assert finding.limit == (0.03 if tensor.endswith("q") else 0.05)

    def test_the_interval_is_of_the_seeds(self) -> None:
        found_SN = half_widths(np.array([[[0.0, 0.25]], [[0.0, 0.5]]]))
        assert found_SN[0, 0] == 0.0
        assert found_SN[0, 1] == pytest.approx(12.706 * 0.125, rel=1e-3)
        assert half_widths(np.zeros((1, 1, 1)))[0, 0] == float("inf")

    @pytest.mark.parametrize(
        ("slope", "noise", "inconclusive"), [(0.31, 0.1, True), (0.31, 0.0, False), (0.0, 0.0, False)]
    )
    def test_a_bound_within_the_interval_is_inconclusive(
        self, plan: Plan, slope: float, noise: float, inconclusive: bool
    ) -> None:
        sweep, plans = self.sweep(plan)
        # by gain alone, so that the median of two linears is half of it, and shrunk below its bound
        records = self.records(plans, slope, noise)
        for record in records.values():
            for step in record["steps"]:
                step["update"]["c"] = step["update"]["d"] = 1.0
        result = check.judge(sweep, records)
        assert result.inconclusive is inconclusive
        assert ("of 2 seeds: more seeds may decide" in result.text) is inconclusive

    def test_a_control_that_keeps_still_is_no_control(self, plan: Plan) -> None:
        sweep, plans = self.sweep(plan, control=True)
        assert check.judge(sweep, self.records(plans, 0.0)).passed
        assert check.judge(sweep, self.records(plans, 1.0)).passed is False

    def test_a_run_that_diverged_and_a_size_that_is_no_number_fail(self, plan: Plan) -> None:
        sweep, plans = self.sweep(plan)
        records = self.records(plans, 0.0)
        records[plans[2].hash()]["steps"][2]["gain"]["b"] = None
        result = check.judge(sweep, records)
        assert result.passed is False and result.violations[0].tensor in ("b", "")
        records[plans[2].hash()] = {"state": "diverged", "why": "step 3: the loss is nan", "steps": []}
        result = check.judge(sweep, records)
        assert result.passed is False and "1 of 6 runs diverged: step 3" in result.text


def test_a_plan_and_its_references_are_lowered_alike(plan: Plan) -> None:
    kwargs: dict[str, Any] = {"seeds": 1, "steps": 2, "batch_size": 1}
    for sweep, lower in zip(
        check_plans.sweeps_of(plan, **kwargs), check_plans.sweeps_of(plan, lr_factor=0.25, **kwargs), strict=True
    ):
        for one, other in zip(sweep.plans[0], lower.plans[0], strict=True):
            assert [row.lr / 4 for row in one.tensors] == [row.lr for row in other.tensors]
            assert [row.init_std for row in one.tensors] == [row.init_std for row in other.tensors]
