"""Runs of a user's model by the user's script: what counts as a loss, what ends a run, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from math import inf, nan
from pathlib import Path
from typing import Any

import optuna
import pytest

from supar_cli.errors import InputError, RunFailed, UnusableResult
from supar_cli.jobs import command
from supar_cli.own.report import report_loss
from supar_cli.planning.kinds import load
from tests.own_scripts import CHILDREN, REPORT, STUBBORN, is_alive, plan_with
from tests.studies import wait_for


class TestRun:
    """A plan run by a command, without a search."""

    def test_the_last_loss_decides_and_those_with_a_step_are_passed_on(self, here: Path) -> None:
        by = """for i in 1 2 3; do echo "{\\"loss\\": 1$i, \\"step\\": $i}" >> $SUPAR_RESULT; done; """ + REPORT
        heard: list[tuple[int, float]] = []
        history = command.run_command(plan_with(by), here / "trials", lambda *one: heard.append(one))
        assert heard == [(1, 11.0), (2, 12.0), (3, 13.0)]
        assert history.evaluations[-1][1] == 1.5

    def test_of_many_reports_only_some_are_passed_on_and_the_same_ones_in_each_run(self, here: Path) -> None:
        by = """seq 1 5000 | sed 's/.*/{"loss": &, "step": &}/' > $SUPAR_RESULT"""
        heard: list[list[int]] = [[], []]
        for steps in heard:
            history = command.run_command(
                plan_with(by), here / "trials", lambda step, _, steps=steps: steps.append(step)
            )  # type: ignore[misc]
        assert len(history.evaluations) == 5000 and heard[0] == heard[1]
        assert heard[0][:99] == [*range(1, 100)] and 200 < len(heard[0]) < 400

    def test_the_command_gets_the_plan_as_a_file_of_any_path(self, here: Path) -> None:
        folder = here / "a 'b' $c"
        plan = plan_with(f"cp {{plan}} copy.yaml && {REPORT}")
        command.run_command(plan, folder)
        assert load("copy.yaml") == plan
        assert [path.name for path in folder.iterdir()] == [plan.hash()[7:15]]

    def test_each_run_has_its_own_folder(self, here: Path) -> None:
        plan = plan_with(f"test ! -e $SUPAR_RESULT && {REPORT}")
        for _ in range(2):
            command.run_command(plan, here / "trials")
        assert len(list((here / "trials").iterdir())) == 2

    @pytest.mark.parametrize(
        ("by", "what"),
        [
            (f"{REPORT}; echo no; exit 3", "the script failed: its process ended with status 3"),
            (f"{REPORT}; kill -SEGV $$", "the script failed: its process was killed by SIGSEGV"),
            (f"{REPORT}; sh -c 'kill -KILL $$'", "killed by SIGKILL, as when memory runs out"),
            ("echo trained", "the script ended without reporting a loss; expected supar_cli.report_loss"),
            ("echo '{}' > $SUPAR_RESULT", r"result.jsonl:1: not a record; expected a JSON object with `loss`"),
            ("""echo '{"loss": "low"}' > $SUPAR_RESULT""", "result.jsonl:1: loss is 'low'; expected a number"),
            (
                """echo '{"loss": 1, "step": 2}\n{"loss": 1, "step": 2}' > $SUPAR_RESULT""",
                "jsonl:2: step is 2; expected",
            ),
            ("sleep 60", "has reported no loss for 0.4 s and was ended"),
            ("mkfifo $SUPAR_RESULT; sleep 60", "result.jsonl: is no longer a plain file"),
            ("mkdir $SUPAR_RESULT; sleep 60", "result.jsonl: is no longer a plain file"),
        ],
    )
    def test_a_script_that_fails_is_named(self, here: Path, by: str, what: str) -> None:
        with pytest.raises(RunFailed, match=what):
            command.run_command(plan_with(by, timeout_s=0.4), here / "trials")

    def test_a_script_that_goes_on_reporting_may_take_longer(self, here: Path) -> None:
        by = """for i in 1 2 3 4; do sleep .2; echo "{\\"loss\\": 1, \\"step\\": $i}" >> $SUPAR_RESULT; done"""
        command.run_command(plan_with(by, timeout_s=0.4), here / "trials")

    def test_the_last_ten_lines_are_shown(self, here: Path) -> None:
        with pytest.raises(RunFailed) as error:
            command.run_command(plan_with("seq 1 30; printf 'a\\rb\\n' >&2; exit 1"), here / "trials")
        first, *lines = str(error.value).splitlines()
        assert first.endswith("output.txt:")
        assert lines == [f"  {number}" for number in range(23, 31)] + ["  a", "  b"]

    def test_a_last_line_without_its_end_counts(self, here: Path) -> None:
        by = """printf '{"loss": 2.5, "step": 1}\\n{"loss": 1.5}' > $SUPAR_RESULT"""
        assert command.run_command(plan_with(by), here / "trials").evaluations[-1][1] == 1.5

    @pytest.mark.parametrize("loss", ["NaN", "Infinity", "-Infinity", "null", "1" + 400 * "0"])
    @pytest.mark.parametrize("then", ["true", "exit 1", "sleep 60"])
    def test_a_loss_that_is_not_finite_is_divergence(self, here: Path, loss: str, then: str) -> None:
        by = f"""echo '{{"loss": {loss}, "step": 7}}' > $SUPAR_RESULT; {then}"""
        with pytest.raises(UnusableResult, match="not finite at step 7"):
            command.run_command(plan_with(by), here / "trials")


class TestNothingIsLeft:
    def run(self, here: Path, by: str) -> list[int]:
        """Prune a run after its first report; return the numbers of its children."""

        def prune(step: int, loss: float) -> None:
            wait_for((here / "second").exists)
            raise optuna.TrialPruned

        report = """echo '{"loss": 1, "step": 1}' > $SUPAR_RESULT; sleep 60"""
        with pytest.raises(optuna.TrialPruned):
            command.run_command(plan_with(f"{by}{CHILDREN}{report}"), here / "trials", prune)
        return [int(wait_for(lambda name=name: (here / name).read_text())) for name in ("first", "second")]

    def test_a_pruned_script_is_ended_with_its_children(self, here: Path) -> None:
        started = time.monotonic()
        assert not any(map(is_alive, self.run(here, "")))
        assert time.monotonic() - started < 30

    def test_so_is_one_that_ignores_sigterm(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "GRACE_S", 0.3)
        assert not any(map(is_alive, self.run(here, STUBBORN)))

    def test_without_the_end_they_would_live(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ended: list[Any] = []
        end = command._end
        monkeypatch.setattr(command, "_end", lambda *run: ended.append(run))
        try:
            assert all(map(is_alive, self.run(here, "")))
        finally:
            end(*ended[0])

    def test_what_a_script_leaves_running_is_ended_too(self, here: Path) -> None:
        command.run_command(plan_with(f"{CHILDREN} sleep .2; {REPORT}"), here / "trials")
        assert not is_alive(int((here / "first").read_text())) and not is_alive(int((here / "second").read_text()))


class TestReport:
    @pytest.fixture
    def result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "result.jsonl"))
        return tmp_path / "result.jsonl"

    def test_what_is_reported_is_what_is_read(self, result: Path) -> None:
        import numpy as np
        import torch

        for step, loss in enumerate([2, 2.5, np.float32(0.5), torch.tensor(1.5), torch.tensor([[3.0]])]):
            report_loss(loss, step)
        report_loss(torch.tensor(1.0, requires_grad=True), np.int64(9))
        report_loss(4.5)
        reports = command._Reports(result)
        taken = [(0, 2.0), (1, 2.5), (2, 0.5), (3, 1.5), (4, 3.0), (9, 1.0), (None, 4.5)]
        assert reports.take(False) == taken and reports.take(False) == []

    @pytest.mark.parametrize("loss", [nan, inf, -inf])
    def test_one_that_is_not_finite_is_valid_json(self, result: Path, loss: float) -> None:
        report_loss(loss)
        assert json.loads(result.read_text()) == {"loss": None}
        with pytest.raises(UnusableResult):
            command._Reports(result).take(False)

    def test_what_is_no_loss_is_refused_in_a_study_or_not(self, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        for _ in range(2):
            for wrong, what in (
                (torch.ones(2), r"Tensor of shape \[2\]"),
                ("low", "'low'"),
                (True, "True"),
                (None, "None"),
            ):
                with pytest.raises(InputError, match=f"report_loss: loss: {what}; expected a number"):
                    report_loss(wrong)
            for step in (-1, 1.5, "3", True):
                with pytest.raises(InputError, match="report_loss: step"):
                    report_loss(1.0, step)  # type: ignore[arg-type]
            monkeypatch.delenv("SUPAR_RESULT", raising=False)
        assert not result.exists()

    def test_outside_of_a_study_nothing_happens(self, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
        report_loss(1.0, 1)
        assert capfd.readouterr() == ("", "") and [path.name for path in here.iterdir()] == ["layout.yaml"]

    def test_only_the_first_rank_reports(self, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        report_loss(1.0)
        assert not result.exists()
        monkeypatch.setenv("RANK", "0")
        report_loss(1.0)
        assert result.exists()

    def test_the_rank_of_torch_comes_before_the_environments(
        self, result: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch.distributed as dist

        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        report_loss(1.0)
        assert not result.exists()


def test_a_reported_loss_needs_no_torch() -> None:
    code = "import sys; from supar_cli import report_loss; report_loss(1.0); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
