"""`supar compare`: transferred hyperparameters side by side, and SP's re-tuned rate, on losses with known answers and for real."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log2, sqrt
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments import statistics
from supar_cli.experiments.comparison_views import DENSE, RETUNED
from supar_cli.jobs import runs
from supar_cli.planning.plan import Plan

from .conftest import Called
from .test_sweep import sweep_of

Supar = Callable[..., Called]
RUN = ("--jobs", "1", "--device", "cpu", "--json")
SHIFT = {"sp": -1.0, "sp-si": -0.25, "mup": -0.5, "supar": 0.0}  # octaves of the optimum per octave of density
OFFSET = {"sp": -1.0, "sp-si": 0.0, "mup": 0.0, "supar": 0.0}  # and where it is when dense
SP, SP_SI, MUP, SUPAR = "SP (standard parameterization)", "SP, sparse-aware init", "μP", "SμPar"


def loss_of(plan: Plan) -> float:
    """Seeds 0 and 1 differ by 0.02; a rate costs 0.1 nats per squared octave from the optimum."""
    name = plan.parameterization.name
    octaves = log2(plan.hyperparameters.lr / 0.01) - OFFSET[name] - SHIFT[name] * log2(plan.sparsity.density)
    return 2.0 + 0.1 * octaves**2 + 0.02 * plan.train.seed


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    found: list[Plan] = []

    def loss(plan: Plan, folder: Path) -> float:
        found.append(plan)
        return loss_of(plan)

    monkeypatch.setattr(runs, "validation_loss", loss)
    return found


class TestKnownAnswers:
    def test_sparse_aware_init_is_a_line_of_its_own_and_not_re_tuned(
        self, supar_here: Supar, proxy_file: Path, trained: list[Plan]
    ) -> None:
        names = ("--parameterization", "sp,sp-si,mup,supar")
        called = supar_here("compare", "--density", "1,0.25", "--seeds", "1", *names, *RUN)
        assert called.status == 0, called.err
        dense, sparse = json.loads(called.out)["levels"]
        losses = {name: cell["loss"] for name, cell in sparse["cells"].items()}
        assert losses == pytest.approx({SP: 2.1, SP_SI: 2.025, MUP: 2.1, SUPAR: 2.0, DENSE: 2.4, RETUNED: 2.0})
        assert sparse["gains"][SP_SI] == pytest.approx(0.025 / 2.025) and dense["gains"][SP_SI] == 0
        assert sum(plan.parameterization.name == "sp-si" for plan in trained) == 2
        assert "SP, sparse-aware init" in json.loads(called.out)["tables"][0]["columns"]

    def test_losses_errors_and_gains(
        self, supar_here: Supar, proxy_file: Path, trained: list[Plan], tmp_path: Path
    ) -> None:
        called = supar_here("compare", "--density", "1,0.25", "--seeds", "2", *RUN)
        assert called.status == 0, called.err
        result = json.loads(called.out)
        dense, sparse = result["levels"]
        cells = sparse["cells"]
        assert {name: cell["loss"] for name, cell in cells.items()} == pytest.approx(
            {SP: 2.11, MUP: 2.11, SUPAR: 2.01, DENSE: 2.41, RETUNED: 2.01}
        )
        assert all(cell["standard_error"] == pytest.approx(0.01) for cell in cells.values())  # 0.02 / 2
        assert cells[RETUNED]["octaves"] == 1 and cells[RETUNED]["bracketed"]
        assert sparse["gains"] == pytest.approx(
            {SP: 0.1 / 2.11, MUP: 0.1 / 2.11, SUPAR: 0.0, DENSE: 0.4 / 2.41, RETUNED: 0.0},
            abs=1e-9,
        )
        assert dense["cells"][RETUNED] == {
            **dense["cells"][DENSE],
            "octaves": -1,
            "bracketed": True,
        }
        # SP's rates: 2^-2 … 2^1 when dense, 2^-1 … 2^2 when sparse, and nothing else is searched
        assert len(trained) == 2 * ((4 + 4) + 2 * 2)
        assert {plan.hyperparameters.lr for plan in trained if plan.parameterization.name != "sp"} == {0.01}
        folder = tmp_path / "compare" / "proxy"
        assert {path.name for path in folder.iterdir()} == {
            "question.json",
            "records.jsonl",
            "result.json",
            "compare.png",
        }
        assert json.loads((folder / "result.json").read_text("utf-8")) == result
        assert "+16.60 %" in called.err and "2.0100±.0100" in called.err
        assert max(len(line) for line in called.err.splitlines() if " %" in line and "warning" not in line) <= 80

    def test_again_repeats_nothing(self, supar_here: Supar, proxy_file: Path, trained: list[Plan]) -> None:
        first = supar_here("compare", "--seeds", "1", *RUN)
        count = len(trained)
        again = supar_here("compare", "--seeds", "1", *RUN)
        assert (again.status, again.out) == (0, first.out) and len(trained) == count > 0
        assert "one seed: no standard errors" in again.err

    def test_a_diverged_run_is_shown_and_has_no_gain(
        self, supar_here: Supar, proxy_file: Path, trained: list[Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def loss(plan: Plan, folder: Path) -> float:
            if plan.parameterization.name == "mup" and plan.sparsity.density < 1 and plan.train.seed == 1:
                raise UnusableResult("step 2: the loss is nan")
            return loss_of(plan)

        monkeypatch.setattr(runs, "validation_loss", loss)
        called = supar_here("compare", "--density", "1,0.25", "--seeds", "2", *RUN)
        sparse = json.loads(called.out)["levels"][1]
        assert sparse["cells"][MUP]["loss"] is None and sparse["cells"][MUP]["diverged"] == 1
        assert sparse["gains"][MUP] is None and "1 diverged" in called.err

    def test_over_layers_a_figure_has_their_numbers(
        self, proxy_file: Path, trained: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        study = sweep_of(over={"lr": "0.01", "layers": "4,2"}, parameterizations=["sp", "supar"], seeds=1)
        result = supar_cli.compare(study, jobs=1)
        assert [level["level"] for level in result["levels"]] == ["2", "4"] and result["verdicts"] == []
        assert result["tables"][0]["columns"] == ["layers", "SP", "SμPar", DENSE, RETUNED]
        (panel,) = result["figures"][0]["panels"]
        assert {tuple(line["x"]) for line in panel["lines"]} == {(2.0, 4.0)}

    def test_what_is_no_comparison_is_refused_in_python_too(self, text_file: Path, unchanged: Any) -> None:
        unchanged()
        for over in ({"lr": "x:-1..1/1", "density": "1,0.5"}, {"lr": "0.01"}):
            with pytest.raises(InputError, match=r"^over: can't be compared"):
                supar_cli.compare(sweep_of(over=over), text_file.parent / "out")

    def test_standard_error_is_the_textbooks(self) -> None:
        values = [2.0, 2.1, 2.4]
        mean = sum(values) / 3
        assert statistics.standard_error(values) == pytest.approx(
            sqrt(sum((v - mean) ** 2 for v in values) / 2) / sqrt(3)
        )
        assert statistics.standard_error([2.0]) is None and statistics.standard_error([2.0, float("inf")]) is None


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--sparsity", "0.5", "--density", "0.5"], "expected only one of them"),
        (["--sparsity", "0.5,1"], "--sparsity 0.5,1: '0.5,1': 1 is not a valid sparsity"),
        (["--density", "half"], "--density half: 'half': 'half' is not a number"),
        (["-s", "over.lr=x:-1..1/1"], "proxy.yaml:1: over: can't be compared"),
        (["none.yaml"], "none.yaml: no such file"),
    ],
)
def test_refusals_leave_nothing(
    supar_here: Supar, proxy_file: Path, unchanged: Any, arguments: list[str], what: str
) -> None:
    unchanged()
    called = supar_here("compare", "--device", "cpu", *arguments)
    assert (called.status, called.out) == (2, "") and what in called.err


def test_a_real_comparison_as_a_process(supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
    flags = ("--sparsity", "0,0.5", "--seeds", "1", "--steps", "4", "-s", "widen=1", "--jobs", "1", "--device", "cpu")
    called = supar("compare", *flags, "-o", "out")
    assert called.status in (0, 5), called.err  # four steps have no power
    found = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert called.out == "" and found["kind"] == "supar.compare-result/v1"
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 6 + 2 * 2 and all(2 < record["loss"] < 7 for record in records)
    dense = found["levels"][0]["cells"]
    assert dense[MUP]["loss"] == dense[SUPAR]["loss"] != dense[SP]["loss"]
