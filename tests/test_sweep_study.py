"""What a sweep measures and concludes, on losses with known answers: optima, drift, regret, widening, resuming, verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf, isinf, log2, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli.errors import SetupError, UnusableResult
from supar_cli.experiments import statistics, sweep_views
from supar_cli.experiments.curves import Curve, find_optimum
from supar_cli.jobs import runs
from supar_cli.planning import document
from supar_cli.planning.plan import Plan

from .conftest import Called
from .test_sweep import sweep_fields, sweep_of

Supar = Callable[..., Called]

DENSITIES = [1.0, 0.25, 0.0625]
SLOPES = {"supar": -0.02, "sp": -0.8, "mup": -1.0, "supar-init-only": -0.5, "supar-lr-only": -0.4}


def synthetic(plan: Plan, slopes: dict[str, float] = SLOPES, centre: float = -6.3) -> float:
    """A parabola in octaves of the rate, its optimum at centre + slope·log2(density), and an offset for each seed."""
    best = centre + slopes[plan.parameterization.name] * log2(plan.sparsity.density)
    return 2.0 + 0.04 * (log2(plan.hyperparameters.lr) - best) ** 2 + 0.01 * plan.train.seed


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that were trained, in order: nothing is, and their losses are the synthetic ones."""
    found: list[Plan] = []

    def loss(plan: Plan, folder: Path) -> float:
        found.append(plan)
        return synthetic(plan)

    monkeypatch.setattr(runs, "validation_loss", loss)
    return found


@pytest.fixture
def document_file(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "study.yaml"
    fields = sweep_fields(
        over={"lr": "log2:-7..-5/1", "density": DENSITIES}, parameterizations=["sp", "supar"], name="study"
    )
    path.write_text(document.write([fields]))
    return path


RUN = ("--jobs", "1", "--device", "cpu", "--json")


def result_of(called: Called, status: int = 0) -> dict[str, Any]:
    assert called.status == status, called.err
    return dict(json.loads(called.out))


def arms_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {arm["parameterization"]: arm for arm in result["arms"]}


class TestKnownAnswers:
    def test_optima_drift_and_regret_of_parabolas(
        self, supar_here: Supar, document_file: Path, trained: list[Plan], tmp_path: Path
    ) -> None:
        called = supar_here("sweep", "study.yaml", *RUN)
        result = result_of(called)
        arms = arms_of(result)
        for name, arm in arms.items():
            assert arm["drift"] == pytest.approx(SLOPES[name], abs=1e-6)
            assert arm["drift_ci95"] == pytest.approx([SLOPES[name]] * 2, abs=1e-6)  # seeds differ by an offset only
            assert arm["shift_octaves"] == pytest.approx(4 * abs(SLOPES[name]), abs=1e-6)
            for level in arm["levels"]:
                wanted = 2 ** (-6.3 + SLOPES[name] * log2(level["density"]))
                assert level["optimum"] == pytest.approx(wanted, rel=1e-6) and level["bracketed"]
        # SP's dense best on the grid is 2^-6, 0.3 octaves off; at density 1/16 the optimum is at -3.1, -3 on the grid
        sparse = arms["sp"]["levels"][-1]
        assert sparse["best_measured"] == 2.0**-3
        assert sparse["regret_nats"] == pytest.approx(0.04 * (2.9**2 - 0.1**2))
        assert sparse["regret"] == pytest.approx(sparse["regret_nats"] / sparse["loss_at_best"])
        assert max(level["regret"] for level in arms["supar"]["levels"]) == 0
        passed = {one["what"]: (one["passed"], one["control"]) for one in result["verdicts"]}
        for mark in ("drift", "shift", "regret"):
            assert passed[f"SμPar: {mark}"] == (True, False)
            assert passed[f"SP: {mark}"] == (False, True)
        assert max(len(line) for line in called.err.splitlines() if " %" in line and "warning" not in line) <= 80
        folder = tmp_path / "sweeps" / "study"
        assert json.loads((folder / "result.json").read_text("utf-8")) == result
        assert result["kind"] == "supar.sweep-result/v1" and result["parents"]["sweep"].startswith("sha256:")
        assert {path.name for path in folder.iterdir()} == {
            "question.json",
            "records.jsonl",
            "result.json",
            "loss.png",
            "optimum.png",
        }

    def test_widening_goes_as_far_as_the_optimum_asks_and_no_farther(
        self, supar_here: Supar, document_file: Path, trained: list[Plan]
    ) -> None:
        arms = arms_of(result_of(supar_here("sweep", "study.yaml", *RUN)))
        tried = {
            (name, level["density"]): [round(log2(point["lr"])) for point in level["losses"]]
            for name, arm in arms.items()
            for level in arm["levels"]
        }
        assert tried["supar", 1.0] == tried["supar", 0.0625] == [-7, -6, -5]
        assert tried["sp", 0.0625] == [-7, -6, -5, -4, -3, -2]
        assert len(trained) == 2 * sum(map(len, tried.values()))

    def test_refining_adds_half_steps_around_the_best(
        self, supar_here: Supar, document_file: Path, trained: list[Plan]
    ) -> None:
        arms = arms_of(result_of(supar_here("sweep", "study.yaml", *RUN, "-s", "refine=1")))
        dense = [log2(point["lr"]) for point in arms["supar"]["levels"][0]["losses"]]
        assert dense == pytest.approx([-7, -6.5, -6, -5.5, -5])

    def test_beyond_the_limit_is_unknown_and_no_pass(
        self, supar_here: Supar, document_file: Path, trained: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        far = {**SLOPES, "supar": -1.0}
        monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: synthetic(plan, far))
        called = supar_here("sweep", "study.yaml", *RUN, "-s", "widen=1")
        result = result_of(called)  # not known, so not violated
        own = [one for one in result["verdicts"] if one["what"].startswith("SμPar")]
        assert [one["passed"] for one in own] == [None] * 3 and all("unknown" in one["text"] for one in own)
        assert "lie at an end of their axis" in called.err and "at the edge" in called.err

    def test_a_drifting_supar_ends_with_5_after_all_is_written(
        self,
        supar_here: Supar,
        document_file: Path,
        trained: list[Plan],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        drifting = {**SLOPES, "supar": -0.2}
        monkeypatch.setattr(runs, "validation_loss", lambda plan, folder: synthetic(plan, drifting))
        called = supar_here("sweep", "study.yaml", *RUN)
        result = result_of(called, 5)
        assert [one["passed"] for one in result["verdicts"] if one["what"] == "SμPar: drift"] == [False]
        assert "error: SμPar: drift: see the verdicts above" in called.err and called.err.count("γ = -0.200") == 1
        assert (tmp_path / "sweeps" / "study" / "result.json").exists()

    def test_one_seed_gives_no_interval_and_says_so(
        self, supar_here: Supar, document_file: Path, trained: list[Plan]
    ) -> None:
        called = supar_here("sweep", "study.yaml", *RUN, "--seeds", "1")
        arm = arms_of(result_of(called))["supar"]
        assert arm["drift"] == pytest.approx(-0.02, abs=1e-6) and arm["drift_ci95"] is None
        assert "one seed: no interval" in called.err


class TestRecords:
    def test_the_same_command_again_repeats_no_finished_run(
        self, supar_here: Supar, document_file: Path, trained: list[Plan]
    ) -> None:
        first = result_of(supar_here("sweep", "study.yaml", *RUN))
        count = len(trained)
        assert count > 0
        again = result_of(supar_here("sweep", "study.yaml", *RUN))
        assert len(trained) == count and again["arms"] == first["arms"]
        assert result_of(supar_here("sweep", "study.yaml", *RUN, "--force"))["arms"] == first["arms"]
        assert len(trained) == 2 * count

    def test_interrupted_work_goes_on_where_it_was(
        self, supar_here: Supar, document_file: Path, trained: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = runs.validation_loss

        def stopping(plan: Plan, folder: Path) -> float:
            if len(trained) == 7:
                raise KeyboardInterrupt
            return done(plan, folder)

        monkeypatch.setattr(runs, "validation_loss", stopping)
        called = supar_here("sweep", "study.yaml", *RUN)
        assert called.status == 130 and "the same command continues" in called.err and called.out == ""
        monkeypatch.setattr(runs, "validation_loss", done)
        result_of(supar_here("sweep", "study.yaml", *RUN))
        hashes = [plan.hash() for plan in trained]
        assert len(hashes) == len(set(hashes)) > 7

    def test_another_question_is_refused(self, supar_here: Supar, document_file: Path, trained: list[Plan]) -> None:
        result_of(supar_here("sweep", "study.yaml", *RUN))
        called = supar_here("sweep", "study.yaml", *RUN, "--steps", "20")
        assert called.status == 2 and "another measurement" in called.err

    def test_more_seeds_go_on_with_what_is_there(
        self, supar_here: Supar, document_file: Path, trained: list[Plan], tmp_path: Path
    ) -> None:
        result_of(supar_here("sweep", "study.yaml", *RUN))
        result_of(supar_here("sweep", "study.yaml", *RUN, "--seeds", "4"))
        hashes = [plan.hash() for plan in trained]
        assert len(hashes) == len(set(hashes))
        assert json.loads((tmp_path / "sweeps/study/question.json").read_text())["seeds"] == 4

    def test_diverged_and_failed_runs_are_recorded_shown_and_judged(
        self,
        supar_here: Supar,
        document_file: Path,
        trained: list[Plan],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        fails = True

        def loss(plan: Plan, folder: Path) -> float:
            if plan.hyperparameters.lr > 2.0**-5.5:
                raise UnusableResult("step 3: the loss is nan")
            if fails and plan.parameterization.name == "sp" and plan.sparsity.density == 1 and plan.train.seed == 1:
                raise RuntimeError("CUDA out of memory\nand more")
            return synthetic(plan)

        monkeypatch.setattr(runs, "validation_loss", loss)
        called = supar_here("sweep", "study.yaml", *RUN)
        result = result_of(called)
        lines = (tmp_path / "sweeps" / "study" / "records.jsonl").read_text().splitlines()
        states = [json.loads(line)["state"] for line in lines]
        assert {"done", "diverged", "failed"} == set(states)
        supar = arms_of(result)["supar"]
        assert [level["diverged"] for level in supar["levels"]] == [
            2,
            2,
            2,
        ] and "supar: of 18 runs 6 diverged" in called.err
        assert all(level["bracketed"] and level["best_measured"] == 2.0**-6 for level in supar["levels"])
        dense = arms_of(result)["sp"]["levels"][0]
        assert dense["failed"] == 2 and not dense["bracketed"]
        assert "failed: sp, seed 1: RuntimeError: CUDA out of memory" in called.err
        # what failed, and only that, is tried again
        fails = False
        again = result_of(supar_here("sweep", "study.yaml", *RUN), status=5)  # SP's optimum is cut off by divergence
        assert [level["failed"] for level in arms_of(again)["sp"]["levels"]] == [0, 0, 0]

    def test_a_missing_device_ends_the_study_instead_of_being_a_failed_run(
        self, supar_here: Supar, document_file: Path, trained: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loss(plan: Plan, folder: Path) -> float:
            raise SetupError("no device")

        monkeypatch.setattr(runs, "validation_loss", loss)
        assert supar_here("sweep", "study.yaml", *RUN).status == 3


def curve_of(losses: dict[float, list[float]]) -> Curve:
    """A curve over octaves -2, -1, 0, 1 of losses by seed."""
    sweep = sweep_of(over={"lr": "log2:-2..1/1", "density": [1.0, 0.25]}, seeds=len(next(iter(losses.values()))))
    by_seed = {place: dict(enumerate(values)) for place, values in losses.items()}
    return Curve("supar", sweep.levels[0], sweep.grid("supar"), by_seed)


class TestOptimum:
    DRAWS = np.random.default_rng(0).integers(3, size=(2000, 3))

    def test_the_interval_covers_seeds_that_disagree(self) -> None:
        """Three seeds with optima at -1.2, -1.0 and -0.8: their mean is -1, and means of resamples span that range."""
        losses = {float(p): [(p - 2 - best) ** 2 for best in (-1.2, -1.0, -0.8)] for p in range(4)}
        found = find_optimum(curve_of(losses), self.DRAWS)
        assert found.octaves == pytest.approx(-1.0) and not found.why
        low, high = statistics.interval(found.resampled) or (0, 0)
        assert -1.2001 < low < -1.1 and -0.9 < high < -0.7999
        same = {float(p): [(p - 2 + 1.0) ** 2] * 3 for p in range(4)}
        again = find_optimum(curve_of(same), self.DRAWS)
        assert statistics.interval(again.resampled) == pytest.approx((-1, -1))

    def test_far_losses_don_t_bend_the_parabola(self) -> None:
        losses = {float(p): [0.1 * (p - 2 + 1.2) ** 2] * 3 for p in range(3)}
        near = find_optimum(curve_of(losses), self.DRAWS).octaves
        assert near == pytest.approx(-1.2)
        assert find_optimum(curve_of({**losses, 3.0: [50.0] * 3}), self.DRAWS).octaves == near

    def test_where_the_next_rate_diverges_the_best_measured_stands(self) -> None:
        curve = curve_of({0.0: [2.2] * 3, 1.0: [2.1] * 3, 2.0: [2.0] * 3, 3.0: [2.0, inf, 2.0]})
        found = find_optimum(curve, self.DRAWS)
        assert curve.bracketed and found.why and found.octaves == 0.0 and curve.count_runs(isinf) == 1

    @pytest.mark.parametrize(
        ("losses", "bracketed"),
        [
            ([3, 2, 3, 4], True),
            ([2, 3, 4, 5], False),
            ([5, 4, 3, 2], False),
            ([inf, 2, inf, inf], True),
            ([nan, 2, 3, 4], False),  # what a failed run would have had isn't known
            ([inf, inf, inf, inf], False),
        ],
    )
    def test_bracketed_means_worse_on_both_sides(self, losses: list[float], bracketed: bool) -> None:
        assert curve_of({float(p): [loss] for p, loss in enumerate(losses)}).bracketed is bracketed

    def test_slope_of_a_line_and_of_noise(self) -> None:
        x = np.array([0.0, -2.0, -4.0])
        assert statistics.slope(x, np.array([[1.0, 0], [2.0, 0], [3.0, 0]])) == pytest.approx([-0.5, 0])


class TestPromises:
    @pytest.mark.parametrize(
        ("over", "held"),
        [
            ({"lr": "0.1", "density": "1,0.5"}, {"supar"}),
            ({"lr": "0.1", "width": "32,64"}, {"supar", "mup", "supar-init-only"}),
            ({"lr": "0.1", "layers": "2,4"}, set()),
        ],
    )
    def test_who_is_a_control(self, over: dict[str, str], held: set[str]) -> None:
        sweep = sweep_of(over=over)
        names = ("sp", "mup", "supar", "supar-init-only")
        assert {name for name in names if sweep_views.is_subject(sweep, name)} == held


def test_a_real_sweep_as_a_process(supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
    flags = ("--over", "lr=x:-1..1/2", "--over", "density=1,0.5", "--parameterization", "supar", "--seeds", "1")
    called = supar("sweep", *flags, "--jobs", "2", "--steps", "4", "-s", "widen=0", "-o", "out", "--device", "cpu")
    assert called.status in (0, 5), called.err
    found = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert called.out == "" and found["kind"] == "supar.sweep-result/v1"
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 4 and all(2 < record["loss"] < 7 for record in records)
    assert {record["lr"] for record in records} == {0.005, 0.02}
    assert "left" in called.err or "4/4" in called.err
    assert max(len(line) for line in called.err.splitlines() if line.startswith(" ")) <= 80
