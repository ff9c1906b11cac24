"""Sweeps of arms: documents, shared runs, verdicts with power, held sizes, the calibrated exponent; losses with known optima."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.experiments import sweep_views
from supar_cli.experiments.curves import grid_plans
from supar_cli.experiments.statistics import interval_of_few, resample
from supar_cli.jobs import runs
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.sweep import MARKS, plan_all

from .planted_losses import plant, planted
from .test_sweep import sweep_fields, sweep_of
from .test_sweep_study import RUN, Supar, arms_of, result_of


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    return plant(monkeypatch)


OVER = {"lr": "log2:-7..-5/1", "density": ["1", "1/2", "1/4", "1/16"]}
ARMS: dict[str, Any] = {
    "RigL": {"updates": {"method": "rigl", "exponent": 0.8}},
    "GMP": {"updates": "gmp"},
    "GMP, final": {"updates": {"method": "gmp", "rates_follow": "end"}, "control": True, "marks": {"drift": 0.3}},
    "N of M": {"pattern": {"1/4": "1:4", "1/16": "1:16"}},
    "2 of 4": {"pattern": {"1/2": "2:4"}, "marks": {"shift": 0.5, "regret": 0.005}},
    "half": {"density_exponent": 0.5, "control": True},
    "shown": {"density_exponent": 0.5, "marks": {}},
}
SMALL = {"family": "gpt2", "width": 32, "layers": 1, "heads": 2, "context": 16, "vocab": 256}
STUDY: dict[str, Any] = {
    "model": SMALL,
    "over": OVER,
    "arms": ARMS,
    "parameterizations": [],
    "seeds": 3,
    "first_seeds": 5,
}


class TestDocuments:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"parameterizations": ["sp"]}, "parameterizations: and arms are both given"),
            ({"arms": {}}, "parameterizations: is missing, as arms are"),
            ({"arms": {"a": {"updats": "gmp"}}}, "arms.a: unknown key 'updats'; did you mean 'updates'?"),
            ({"arms": {"a": {"updates": {"method": "gmp", "drop": 0.1}}}}, "GMP has no such key"),
            ({"arms": {"1:4": {}}}, "expected names without a colon"),
            ({"arms": {"a": {"marks": {"gamma": 1.0}}}}, "marks.gamma: 1; expected numbers above 0 of drift"),
            ({"arms": {"a": {"pattern": {"1/8": "1:8"}}}}, "1/8 is no density of the sweep"),
            ({"own": {"GNP": {"lr": 0.1}}}, "own.GNP: not an arm; expected RigL, GMP"),
            ({"first_seeds": 2}, "first_seeds: 2; expected at least as many as seeds, 3"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError) as refused:
            sweep_of(**{**STUDY, **changes})
        assert what in str(refused.value).replace("arms.a.updats", "arms.a")

    def test_a_pattern_of_another_density_is_refused_before_anything_runs(self) -> None:
        with pytest.raises(InputError, match="1/4 with the pattern 1:8"):
            plan_all(sweep_of(**{**STUDY, "arms": {"a": {"pattern": {"1/4": "1:8"}}}}))

    def test_without_arms_a_document_is_as_it_was(self) -> None:
        old = sweep_of()
        assert not {"arms", "first_seeds", "robustness"} & set(old.model_dump())
        assert list(old.all_arms) == old.parameterizations
        assert old.hash() != sweep_of(robustness=True).hash()


class TestPlans:
    def test_arms_share_the_dense_runs_and_no_others(self, text_file: Path) -> None:
        study = sweep_of(**STUDY)
        dense, sparse = set(), []
        for name in study.all_arms:
            for level in study.levels_of(name):
                found = study.plan(name, level, 0, 0)
                dense.add(found.hash()) if level.density == 1 else sparse.append(found.hash())
        assert len(dense) == 1 and len(sparse) == len(set(sparse)) + 3  # `half` and `shown` are one and the same
        counts = [len(study.seeds_at(level)) for level in study.levels]
        assert counts == [5, 3, 3, 3] and len(grid_plans(study)) == 3 * (5 + 3 * len(set(sparse)))

    def test_what_an_arm_says_holds_where_weights_are_sparse(self, text_file: Path) -> None:
        arms = {
            "a": {"updates": "gmp", "weight_decay_rule": "coupled"},
            "b": {"updates": "gmp"},
            "c": {"block": 16, "pattern": "block"},
        }
        study = sweep_of(**{**STUDY, "arms": arms, "own": {"b": {"weight_decay": 0.2}}})
        first, last = study.levels[0], study.levels[2]
        a, b, c = (study.plan(name, last, 0, 0) for name in "abc")
        assert a.parameterization.weight_decay_rule == "coupled" and a.sparsity.updates is not None
        assert (c.sparsity.pattern, c.sparsity.block, c.sparsity.updates) == ("block", 16, None)
        assert (a.hyperparameters.weight_decay, b.hyperparameters.weight_decay) == (0.1, 0.2)
        dense_a, dense_b, dense_c = (study.plan(name, first, 0, 0) for name in "abc")
        assert dense_a.hash() == dense_c.hash() != dense_b.hash() and dense_a.sparsity.pattern == "exact"

    def test_at_another_width_the_decay_rule_stays(self, text_file: Path) -> None:
        arms = {"a": {"weight_decay_rule": "coupled"}, "b": {}}
        study = sweep_of(**{**STUDY, "arms": arms, "target": {"width": 64, "sparsity": {}}})
        a, b = (study.plan(name, study.levels[0], 0, 0) for name in "ab")
        assert a.hash() != b.hash()

    def test_updates_of_the_target_need_no_arms(self, text_file: Path) -> None:
        study = sweep_of(target={"sparsity": {"updates": "rigl"}}, over=OVER)
        found = {level.density: study.plan("supar", level, 0, 0).sparsity.updates for level in study.levels}
        assert found.pop(1.0) is None and all(one is not None and one.method == "rigl" for one in found.values())


class TestVerdicts:
    def test_arms_are_judged_by_their_marks(
        self, supar_here: Supar, text_file: Path, trained: list[Plan], tmp_path: Path
    ) -> None:
        (tmp_path / "arms.yaml").write_text(document.write([sweep_fields(**STUDY, name="arms")]))
        called = supar_here("sweep", "arms.yaml", *RUN)
        found = result_of(called)
        judged = {one["what"]: one["passed"] for one in found["verdicts"]}
        assert judged.pop("power") is True
        for name in ("RigL", "GMP", "N of M"):
            assert [judged.pop(f"{name}: {mark}") for mark in MARKS] == [True] * 3
        assert [judged.pop(f"2 of 4: {mark}") for mark in ("shift", "regret")] == [True] * 2
        assert judged == {"GMP, final: drift": False, **{f"half: {mark}": False for mark in MARKS}}
        arms = {arm["arm"]: arm for arm in found["arms"]}
        assert len(arms["2 of 4"]["levels"]) == 2 and len(trained) == len({plan.hash() for plan in trained})
        assert {len(point["by_seed"]) for point in arms["GMP"]["levels"][0]["losses"]} == {5}
        assert [
            line for line in called.err.splitlines() if " % " in line and len(line) > 80 and "warning" not in line
        ] == []
        # with more to measure and other marks it goes on, and nothing is made twice
        again = supar_here("sweep", "arms.yaml", *RUN, "-s", "robustness=true", "-s", "arms.RigL.marks={drift: 0.2}")
        cost = [level["cost"] for arm in result_of(again)["arms"] for level in arm["levels"]]
        assert len(trained) == len({plan.hash() for plan in trained}) and all(None not in one.values() for one in cost)
        # 0.04 nats an octave²: what half and twice a rate cost that lies `off` octaves above the optimum
        level = arms_of(found | {"arms": [arms["GMP"]]})["supar"]["levels"][0]
        off = log2(level["best_measured"] / level["optimum"])
        assert cost[4]["half"] == pytest.approx(0.04 * ((off - 1) ** 2 - off**2) / level["loss_at_first"], abs=0.003)

    @pytest.mark.parametrize(("noise", "seeds", "status"), [(0.002, 4, 0), (0.05, 4, 5), (0.05, 1, 0)])
    def test_noise_takes_the_power_and_one_seed_has_no_interval(
        self,
        noise: float,
        seeds: int,
        status: int,
        supar_here: Supar,
        text_file: Path,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: planted(plan, noise if seeds > 1 else 0.0))
        fields = sweep_fields(over=OVER, parameterizations=["supar"], seeds=seeds, refine=1, name="noisy")
        (tmp_path / "noisy.yaml").write_text(document.write([fields]))
        called = supar_here("sweep", "noisy.yaml", *RUN)
        found = result_of(called, status)
        wide = [one for one in found["verdicts"] if not one.get("has_power", True)]
        power = [one["passed"] for one in found["verdicts"] if one["what"] == "power"]
        assert bool(wide) is (status == 5) and power == [False] * (status == 5)
        assert all(one["passed"] is None and "wider than twice the mark" in one["text"] for one in wide)
        assert (found["arms"][0]["drift_ci90"] is None) is (seeds == 1)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.floats(-1, 1), st.floats(0, 1), st.floats(0.01, 0.5))
    def test_a_mark_is_missed_only_by_a_whole_interval(self, value: float, half: float, mark: float) -> None:
        passed, why = sweep_views._judge(value, [value - half, value + half], mark)
        beyond = value - half > mark or value + half < -mark
        assert (passed is False) is beyond
        assert beyond or (why == sweep_views.NO_POWER) is ((value + half) - (value - half) > 2 * mark)
        if passed:
            assert abs(value) < mark and half <= mark + 1e-9

    def test_intervals_of_few_seeds_hold_the_truth_as_often_as_they_say(self) -> None:
        """2000 studies of 4 seeds: 90 % within 2 % (three standard errors of 0.7 %); plain quantiles cover far less."""
        rng, draws = np.random.default_rng(1), resample(4)
        held = quantiles = 0
        for _ in range(2000):
            values = rng.standard_normal(4)
            means_B = values[draws].mean(1)
            low, high = interval_of_few(float(values.mean()), means_B, 4) or (0, 0)
            held += low <= 0 <= high
            quantiles += np.quantile(means_B, 0.05) <= 0 <= np.quantile(means_B, 0.95)
        assert abs(held / 2000 - 0.9) < 0.02 and quantiles / 2000 < 0.82

    def test_seeds_that_the_first_size_has_more_leave_the_others_paired(self) -> None:
        both, more = resample(4), resample(4, 2)
        assert (more[:, :4] == both).all() and set(np.unique(more[:, 4:])) == {4, 5} and resample(1, 2).size == 0


class TestHeldSizes:
    @pytest.mark.parametrize(
        ("arguments", "sizes"),
        [
            (["--over", "width=32,64", "--density", "1/4"], {(0.25, 32, 2), (0.25, 64, 2)}),
            (["--over", "layers=2,4", "--sparsity", "0.5"], {(0.5, 32, 2), (0.5, 32, 4)}),
            (["--over", "density=1,1/4", "--width", "64", "--layers", "1"], {(1.0, 64, 1), (0.25, 64, 1)}),
        ],
    )
    def test_one_size_is_swept_and_the_others_held(
        self, supar_here: Supar, proxy_file: Path, trained: list[Plan], arguments: list[str], sizes: set[Any]
    ) -> None:
        result_of(supar_here("sweep", "--over", "lr=x:0..0/1", *arguments, "-s", "widen=0", *RUN))
        model = {(plan.sparsity.density, plan.model.width, plan.model.layers) for plan in trained}  # type: ignore[union-attr]
        assert model == sizes

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["--over", "width=32,64", "--width", "64"], "--width 64: over.width says it too"),
            (["--density", "1/4"], "--density 1/4: over.density says it too"),
            (["-s", "target.sparsity.sparsity=0.5"], "-s target.sparsity.sparsity=0.5: over.density says it too"),
            (["--over", "layers=2,4", "-s", "target.layers=2"], "-s target.layers=2: over.layers says it too"),
            (["--over", "width=32,64", "--density", "1,1/4"], "--density 1,1/4: expected a single one"),
            (["--density", "1/4", "--sparsity", "0.5"], "--density: cannot be combined with --sparsity"),
        ],
    )
    def test_a_size_is_an_axis_or_held(
        self, supar_here: Supar, proxy_file: Path, arguments: list[str], what: str
    ) -> None:
        called = supar_here("sweep", "--device", "cpu", *arguments)
        assert called.status == 2 and what in called.err


def test_moving_masks_are_swept_for_real(supar_here: Supar, proxy_file: Path, tmp_path: Path) -> None:
    flags = ("--over", "lr=x:0..0/1", "--over", "density=1,1/4", "--updates", "gmp", "--parameterization", "supar")
    result_of(supar_here("sweep", *flags, *RUN, "--steps", "4", "--seeds", "1", "-s", "widen=0", "-o", "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [record["density"] for record in records] == [1.0, 0.25] and all(
        record["state"] == "done" for record in records
    )
