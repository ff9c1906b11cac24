"""`supar check`: what it measures, its verdicts on SμPar and on controls, and planted faults that it finds by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.experiments import check_plans, coordinates
from supar_cli.experiments import coordinate_check as check
from supar_cli.jobs.runs import Record
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


def verdicts(plan: Plan) -> dict[str, check.Verdict]:
    sweeps = check_plans.plan_sweeps(plan, seeds=SEEDS, steps=STEPS, batch_size=ROWS)
    by_run = {one.hash(): measured(one) for sweep in sweeps for one in sweep.runs()}
    return {f"{sweep.arm} over {sweep.axis}": check.judge(sweep, by_run) for sweep in sweeps}


def changed(plan: Plan, name: str, **numbers: float) -> Plan:
    rows = [row.model_copy(update=numbers) if row.name == name else row for row in plan.tensors]
    return plan.model_copy(update={"tensors": rows})


def test_a_plan_as_the_rules_have_it_passes(plan: Plan) -> None:
    found = verdicts(plan)
    assert set(found) == {"the plan over density", "the plan over plan", "sp over density"}
    for verdict in found.values():
        assert verdict.passed, verdict.text()  # as a control SP passes by exceeding the bounds
        assert {f.quantity for f in verdict.findings} == {*check.THROUGHOUT, "logits"}


class TestPlantedFaults:
    """Each in a plan that is right otherwise. The tensor named is the worst: a fault also moves what comes after it."""

    def worst(self, plan: Plan, axis: str = "density") -> check.Finding:
        verdict = verdicts(plan)[f"the plan over {axis}"]
        assert not verdict.passed
        return verdict.violated[0]

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

    @pytest.mark.parametrize("axis", ["density", "plan"])
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
        from supar_cli.jobs import workers as execute
        from supar_cli.training.trainer import Trainer

        small = plan.model_copy(update={"train": plan.train.model_copy(update={"steps": 1, "tokens": 128})})
        trainer = Trainer(small, execute.task_of(small))
        model, name = trainer.sparse_model.model, "blocks.0.attn.q"
        inputs_BT, _ = trainer.batch(0)
        with torch.no_grad():
            x_BTD = (model.embedding(inputs_BT) + model.positions.weight[:32]) * small.model.multipliers.input
            x_BTD = model.blocks[0].attn_norm(x_BTD)
            before = trainer.sparse_model.weight(name)
            attn = model.blocks[0].attn
            q, k = (linear(x_BTD).unflatten(-1, (16, 32)).transpose(1, 2) for linear in (attn.q, attn.k))
            scores = (q @ k.transpose(-1, -2) / 32).abs()[..., torch.ones(32, 32).tril().bool()].mean()
            logits = model(inputs_BT)
        trainer.step()
        with torch.no_grad():
            update = (x_BTD @ (trainer.sparse_model.weight(name) - before).T).abs().mean()
            moved = (model(inputs_BT) - logits).abs().mean()
        step = coordinates.measure(small)["steps"][0]
        for got, expected in (
            (step["activation"][name], (x_BTD @ before.T).abs().mean()),
            (step["update"][name], update),
            (step["attention"]["blocks.0.attn"], scores),
            (step["logits"]["logits"], logits.abs().mean()),
            (step["Δlogits"]["logits"], moved),
        ):
            assert got == pytest.approx(float(expected), rel=1e-4)


class TestJudge:
    """Slopes and bounds on sizes made up to have known ones."""

    def sweep(self, plan: Plan, control: bool = False) -> tuple[check.Sweep, list[Plan]]:
        plans = [
            [plan.model_copy(update={"train": plan.train.model_copy(update={"seed": 10 * z + r})}) for r in range(2)]
            for z in range(3)
        ]
        sweep = check.Sweep("supar", "density", [1.0, 0.25, 0.0625], lambda r: [row[r] for row in plans], control)
        return sweep.grow(2), [p for row in plans for p in row]

    def records(self, plans: list[Plan], slope: float, noise: float = 0.0) -> dict[str, Record]:
        random, found = np.random.default_rng(0), {}
        for i, one in enumerate(plans):
            octaves = -2.0 * (i // 2)

            def size(power: float, octaves: float = octaves) -> float:
                return float(2.0 ** (power * octaves + noise * random.standard_normal()))

            steps = [
                {q: {"a": size(0.0), "b": size(slope if q == "update" else 0.0)} for q in coordinates.LINEAR}
                for _ in range(4)
            ]
            found[one.hash()] = {"state": "done", "steps": steps}
        return found

    @pytest.mark.parametrize(("slope", "kept"), [(0.29, True), (0.31, False), (-0.31, False)])
    def test_the_bound_on_each_slope(self, plan: Plan, slope: float, kept: bool) -> None:
        sweep, plans = self.sweep(plan)
        verdict = check.judge(sweep, self.records(plans, slope))
        each = next(f for f in verdict.findings if (f.quantity, f.bound) == ("update", "each"))
        assert each.value == pytest.approx(slope) and each.tensor == "b" and each.kept is kept
        assert verdict.passed is (kept and abs(slope) / 2 <= check.MEDIAN)

    def test_the_interval_is_of_the_seeds(self, plan: Plan) -> None:
        sweep, plans = self.sweep(plan)
        slopes = check.judge(sweep, self.records(plans, 0.0, noise=0.1)).slopes["update"]
        spread = abs(float(np.diff(slopes.slope_RSN[:, 1, 0])[0])) / 2
        assert slopes.interval(1, 0) == pytest.approx(12.706 * spread, rel=1e-3)

    @pytest.mark.parametrize(("slope", "noise", "is_open"), [(0.31, 0.1, True), (0.31, 0.0, False), (0.0, 0.0, False)])
    def test_a_bound_within_the_interval_leaves_it_open(
        self, plan: Plan, slope: float, noise: float, is_open: bool
    ) -> None:
        sweep, plans = self.sweep(plan)
        # by gain alone, so that the median of two linears is half of it, and shrunk below its bound
        records = self.records(plans, slope, noise)
        for record in records.values():
            for step in record["steps"]:
                step["update"]["c"] = step["update"]["d"] = 1.0
        verdict = check.judge(sweep, records)
        assert verdict.open is is_open
        assert ("of 2 seeds: more would tell" in verdict.text()) is is_open

    def test_a_control_that_keeps_still_is_no_control(self, plan: Plan) -> None:
        sweep, plans = self.sweep(plan, control=True)
        assert not check.judge(sweep, self.records(plans, 0.0)).passed
        assert check.judge(sweep, self.records(plans, 1.0)).passed

    def test_a_run_that_diverged_and_a_size_that_is_no_number_fail(self, plan: Plan) -> None:
        sweep, plans = self.sweep(plan)
        records = self.records(plans, 0.0)
        records[plans[2].hash()]["steps"][2]["gain"]["b"] = None
        verdict = check.judge(sweep, records)
        assert not verdict.passed and verdict.violated[0].tensor in ("b", "")
        records[plans[2].hash()] = {"state": "diverged", "why": "step 3: the loss is nan", "steps": []}
        verdict = check.judge(sweep, records)
        assert not verdict.passed and "1 of 6 runs diverged: step 3" in verdict.text()


SMALL = ("--width", "32,64", "--density", "1,0.25", "--seeds", "2", "--steps", "3", "--jobs", "1")


class TestCommand:
    def test_it_writes_judges_and_goes_on(self, supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
        ended = supar("check", *SMALL, "--json")
        assert ended.status in (0, 5)  # so small a model bends; what matters here is what is said and kept
        result = (
            json.loads(ended.out) if ended.status == 0 else json.loads((tmp_path / "check/result.json").read_text())
        )
        assert [(v["what"], v["control"]) for v in result["verdicts"]] == [
            ("supar over density", False),
            ("supar over width", False),
            ("sp over density", True),
            ("mup over density", True),
            ("sp over width", True),
        ]
        failed = any(v["passed"] is v["control"] for v in result["verdicts"])
        assert (ended.status == 5) is failed and ("error: " in ended.err) is failed
        assert (tmp_path / "check/activation_over_density.png").stat().st_size > 10_000
        lines = (tmp_path / "check/records.jsonl").read_text().splitlines(keepends=True)
        # a killed check: the last line is cut, two runs are missing
        (tmp_path / "check/records.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
        again = supar("check", *SMALL, "--json")
        assert again.status == ended.status
        assert sorted((tmp_path / "check/records.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)

    def test_seeds_are_added_until_it_is_clear(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slope that seeds 0 and 1 have by chance: its bound is exceeded at 2 seeds, by less than its interval."""

        def sizes(plan: Plan) -> Record:
            chance = {0: 0.5, 1: 0.14}.get(plan.train.seed, 0.0) if plan.parameterization.name == "supar" else 1.0
            moved = plan.sparsity.density**chance * (plan.model.width / 64) ** chance
            others = dict.fromkeys("bcd", 1.0 if plan.parameterization.name == "supar" else moved)
            steps = [
                {quantity: {"a": 1.0 if step == 0 else moved, **others} for quantity in coordinates.LINEAR}
                for step in range(2)
            ]
            return {"state": "done", "steps": steps, "losses": [5.0]}

        monkeypatch.setattr(coordinates, "measure", sizes)
        ended = supar_here("check", *SMALL)
        assert ended.status == 0 and "of 2 seeds: more would tell; going on to 4" in ended.err
        # of its own, four seeds over density and two at the other width; SP at all three, μP over density
        count = 2 * 4 + 1 * 2 + 3 * 2 + 2 * 2
        assert len((tmp_path / "check/records.jsonl").read_text().splitlines()) == count
        ended = supar_here("check", *SMALL, "--max-seeds", "2", "-o", "fewer")
        assert ended.status == 5 and "going on" not in ended.err
        # the same folder takes more seeds, and repeats none
        ended = supar_here("check", *SMALL[:4], "--seeds", "4", *SMALL[6:], "-o", "fewer")
        assert ended.status == 0
        assert len((tmp_path / "fewer/records.jsonl").read_text().splitlines()) == count + 2  # the other width's too

    def test_sp_fails(self, supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
        ended = supar("check", *SMALL, "--parameterization", "sp", "-q")
        assert ended.status == 5 and "sp over density" in ended.err
        verdict = json.loads((tmp_path / "check/result.json").read_text())["verdicts"][0]
        assert (verdict["what"], verdict["passed"], verdict["control"]) == ("sp over density", False, False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--width", "32,x"), "--width 32,x: expected numbers"),
            (("--density", "1,2"), "--density 1,2: expected 0 < density <= 1"),
            (("--width", "32", "--density", "1"), "one of them needs at least two sizes"),
            (("--parameterization", "ntk"), "--parameterization ntk: expected one of supar"),
            (("--width", "32,50"), "target.width: 50 is not a multiple"),
            (("nothing.yaml",), "nothing.yaml: no such file"),
        ],
    )
    def test_bad_input(
        self, supar_here: Supar, proxy_file: Path, unchanged: Any, arguments: tuple[str, ...], message: str
    ) -> None:
        unchanged()
        ended = supar_here("check", *arguments)
        assert (ended.status, ended.out) == (2, "") and message in ended.err
