"""`supar runs` and `supar show`: what they say of runs that ended in every way, and of folders that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.reporting import runs
from supar_cli.training import run_directory
from supar_cli.training.trainer import Trainer
from tests.conftest import Called
from tests.test_train import trained
from tests.test_train_resume import cut_at

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]


@pytest.fixture
def ways(plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> Path:
    """A folder with a run that finished, was stopped, failed, was killed, and one that can't be read."""
    plan, folder = plan_of(train={"eval_every": 3}), tmp_path / "runs"
    trained(plan, folder / "whole")
    cut_at(plan, folder / "killed", 6)
    (folder / "killed/lock").touch()
    (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
    assert supar_here("train", "-o", "runs/stopped", "-q", "--max-time", "0.0001s").status == 75
    huge = plan_of(hyperparameters={"lr": 1e30})
    (tmp_path / "huge.yaml").write_text(document.write([huge.model_dump()]), "utf-8")
    assert supar_here("train", "huge.yaml", "-o", "runs/group/failed", "-q").status == 4
    shutil.copytree(folder / "whole", folder / "broken")
    (folder / "broken/result.json").write_text("{")
    (folder / "no run").mkdir()
    return folder


class TestRuns:
    def test_each_has_its_state(self, ways: Path, supar_here: Supar) -> None:
        ended = supar_here("runs", "--json")
        assert ended.status == 0 and "Traceback" not in ended.err
        found = {Path(one["run"]).name: one for one in json.loads(ended.out)}
        states = {name: one["state"] for name, one in found.items()}
        assert states == {
            "whole": "finished",
            "killed": "killed",
            "stopped": "preempted",
            "failed": "failed",
            "broken": "unreadable",
        }
        assert (found["whole"]["step"], found["whole"]["steps"]) == (12, 12)
        result = json.loads((ways / "whole/result.json").read_text())
        assert found["whole"]["validation_loss"] == result["validation_loss"]
        assert found["killed"]["step"] == 6 and found["killed"]["loss"] > 0
        assert found["stopped"]["text"].startswith("stopped at step 0 of 12 by the limit")
        assert found["failed"]["text"].startswith("step 2: the loss is")
        assert "result.json: is corrupt" in found["broken"]["text"]
        for name, state in states.items():
            assert any(name in line and state in line for line in ended.err.splitlines())

    def test_one_that_runs(self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> None:
        plan, seen = plan_of(), list[Any]()

        def look(done: int, loss: float) -> None:
            seen.extend(json.loads(supar_here("runs", ".", "-q", "--json").out))

        with run_directory.open_run(tmp_path / "run", plan, resume=True, force=False):
            Trainer(plan).run(tmp_path / "run", on_evaluation=look)
        assert [(one["state"], one["step"], one["steps"]) for one in seen] == [("running", 6, 12), ("running", 12, 12)]

    def test_none(self, supar_here: Supar, tmp_path: Path) -> None:
        ended = supar_here("runs")
        assert (ended.status, ended.err) == (2, "error: runs: no such folder; `supar train` writes runs/NAME\n")
        (tmp_path / "runs").mkdir()
        assert supar_here("runs").err == "warning: runs: no run directory found\n"


class TestShow:
    def test_a_finished_run(self, ways: Path, supar_here: Supar) -> None:
        ended = supar_here("show", "runs/whole")
        assert ended.status == 0 and "runs/whole: finished, step 12 of 12, loss " in ended.err
        for part in ("m_ρ", "precision: float32", "engine: dense 12", "training loss\n", "validation loss ", " at 12"):
            assert part in ended.err
        assert "engines:" in ended.out and all(len(line) <= 110 for line in ended.err.splitlines())

    @pytest.mark.parametrize(
        ("name", "status"), [("stopped", 0), ("killed", 0), ("broken", 3), ("no run", 2), ("x", 2)]
    )
    def test_others(self, ways: Path, supar_here: Supar, name: str, status: int) -> None:
        ended = supar_here("show", f"runs/{name}", "--json")
        assert ended.status == status and "Traceback" not in ended.err
        assert bool(ended.out) == (status == 0) and ("error: " in ended.err) == (status != 0)


class TestCurve:
    def test_it_falls_from_the_upper_left_to_the_lower_right(self) -> None:
        records = [{"step": step, "loss": 10.0 - step} for step in range(1, 9)]
        lines = runs.curve(records, "loss", 20, 4)
        assert [len(line) for line in lines] == [20] * 5
        drawn = [line.partition("┤")[2] for line in lines[:-1]]
        filled = [[at for at, cell in enumerate(row) if cell != chr(0x2800)] for row in drawn]
        assert filled[0][0] == 0 and filled[-1][-1] == len(drawn[0]) - 1
        assert all(above[-1] < below[0] + 1 for above, below in pairwise(filled))
        assert lines[0].startswith("9 ┤") and lines[3].startswith("2 ┤") and lines[4].endswith("step 8")

    def test_one_point_gaps_and_nothing(self) -> None:
        assert len(runs.curve([{"step": 1, "loss": 2.0}], "loss", 20, 4)) == 5
        assert runs.curve([{"step": 1, "loss": float("nan")}], "loss", 20, 4) == []
        assert runs.curve([], "loss", 20, 4) == []
