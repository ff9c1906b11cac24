"""Tuning a user's model by the user's script: what counts as a run's loss, what ends a run, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import inf, nan
from pathlib import Path
from typing import Any

import optuna
import pytest

from supar_cli.errors import InputError, RunFailed, UnusableResult
from supar_cli.experiments import search as tuning
from supar_cli.jobs import command
from supar_cli.jobs.storage import open_study
from supar_cli.own.report import report_loss
from supar_cli.planning import document
from supar_cli.planning.kinds import load
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec
from tests.conftest import Called
from tests.studies import start, wait_for

LAYOUT = """\
kind: supar.layout/v1
factory: mymodel:make
base: {width: 64}
wider: {width: 128}
tensors:
- {name: table, site: table, role: embedding, base: [100, 64], wider: [100, 128], fan_in_axes: [], scales: [1],
   uses: [first_sum], own: {mean: 0.0, std: 1.0}}
- {name: up, site: up, role: hidden, base: [256, 64], wider: [512, 128], fan_in_axes: [1], scales: [0, 1],
   own: {mean: 0.0, std: 0.07}}
- {name: head, site: head, role: unembedding, base: [100, 64], wider: [100, 128], fan_in_axes: [1], scales: [1],
   uses: [head], own: {mean: 0.0, std: 0.07}}
"""
SPEC = """\
kind: supar.spec/v1
model: {family: own, layout: layout.yaml}
run: {command: "COMMAND"}
hyperparameters: {lr: 0.0078125, init_std: null, alpha_input: 1.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: 30, batch_size: 4}
search: {trials: 6, finalists: 2, seeds: 2, lr: [0.001, 0.06], lr_fit_octaves: [-1.0, 1.0]}
"""
# a training script whose loss is a function of the plan: 2 + (log2 lr + 7)² / 10, a little more with another seed
SCRIPT = """\
import os, sys, time
from math import log2
import supar_cli as supar
plan = supar.load(sys.argv[1])
x = log2(plan.hyperparameters.lr) + 7
loss = 2 + 0.1 * x**2 + 0.001 * plan.train.seed
FAULT
for step in (10, 20, 30):
    print("step", step, flush=True)
    supar.report_loss(loss + 30 / step, step)
supar.report_loss(loss)
"""
REPORT = """echo '{"loss": 1.5}' >> $SUPAR_RESULT"""
KEPT = f"{sys.executable} train.py {{plan}}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a layout in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout.yaml").write_text(LAYOUT)
    return tmp_path


def write_spec(here: Path, by: str = KEPT, fault: str = "", **search: Any) -> Spec:
    """supar.yaml and train.py in a folder; `fault` are lines of the script."""
    (here / "train.py").write_text(SCRIPT.replace("FAULT", fault))
    spec = parse(Spec, document.read(SPEC.replace("COMMAND", by), "supar.yaml")[0])
    spec = spec.model_copy(update={"search": spec.search.model_copy(update=search)})
    (here / "supar.yaml").write_text(document.write([spec.model_dump()]))
    return spec.model_copy(update={"model": spec.model.with_hash()})  # type: ignore[union-attr]


def plan_with(by: str, **run: Any) -> Plan:
    """The plan of a trial whose command is `by`; `: {plan}` before it does nothing."""
    text = SPEC.replace("COMMAND", "COMMAND: {plan}").replace("COMMAND", "x")
    spec = parse(Spec, document.read(text, "supar.yaml")[0])
    asked = spec.run.model_copy(update={"command": by if "{plan}" in by else f": {{plan}}; {by}", **run})
    return tuning._plan(spec.model_copy(update={"run": asked}), {}, 0)


def is_alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


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


STUBBORN = "trap '' TERM; "  # a script that SIGTERM does not end
# a child in the background, and one in a session of its own, as torchrun's workers are; their numbers go to a file
CHILDREN = "sleep 60 & echo $! > first; setsid sh -c 'echo $$ > second; exec sleep 60' & "


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


def trials_of(spec: Spec, storage: str = "proxy.journal") -> list[optuna.trial.FrozenTrial]:
    return open_study(storage, tuning.study_name(spec)).get_trials()


def runs_made(here: Path, folder: str = "proxy.trials") -> int:
    return len(list((here / folder).iterdir()))


class TestSearch:
    def test_the_best_rate_is_found_and_the_same_command_continues(
        self, here: Path, supar_here: Callable[..., Called]
    ) -> None:
        spec = write_spec(here)
        called = supar_here("tune-proxy")
        assert called.status == 0, called.err
        proxy = parse(Proxy, document.read_file("proxy.yaml")[0])
        assert abs(proxy.hyperparameters.lr - 2**-7) < 1e-4 and proxy.hyperparameters.init_std is None
        assert proxy.model == spec.model  # the layout's path, as seen from proxy.yaml, and its hash
        assert proxy.evidence["command"] == KEPT and list(proxy.evidence["script"]) == [sys.executable, "train.py"]
        made = runs_made(here)
        assert made == 6 + 2 + 4
        assert "proxy.trials/" in called.err and "changes no loss" not in called.err

        again = supar_here("tune-proxy", "--trials", "7")
        assert again.status == 0 and runs_made(here) == made + 1, again.err
        (here / "train.py").write_text(SCRIPT.replace("FAULT", "# changed"))
        changed = supar_here("tune-proxy", "--trials", "7")
        assert changed.status == 0 and "train.py: changed since the study began" in changed.err
        assert tuning.study_name(write_spec(here, by=KEPT + " --fast")) != tuning.study_name(spec)

    def test_a_spec_is_not_needed(self, here: Path, supar_here: Callable[..., Called]) -> None:
        write_spec(here)
        (here / "supar.yaml").unlink()
        few = ("--trials", "2", "--seeds", "1", "-s", "search.lr_fit_octaves=[]", "-o", "out/proxy.yaml")
        called = supar_here("tune-proxy", "--layout", "layout.yaml", "--command", KEPT, *few)
        assert called.status == 0, called.err
        proxy = parse(Proxy, document.read_file("out/proxy.yaml")[0])
        assert proxy.model.layout == "../layout.yaml"  # type: ignore[union-attr]
        assert set(proxy.evidence["ranges"]) == {"lr", "alpha_input", "alpha_output"}
        assert "next: supar transfer out/proxy.yaml --width " in called.err
        plan = supar_here("transfer", "out/proxy.yaml", "--width", "256", "--sparsity", "0.75", "-o", "-")
        assert plan.status == 0 and "fold: 0.25" in plan.out, plan.err

    def test_the_template_searches_what_the_model_can_take(self, here: Path, supar_here: Callable[..., Called]) -> None:
        (here / "layout.yaml").write_text(LAYOUT.replace("uses: [first_sum]", "uses: []"))
        write_spec(here)
        refused = supar_here("tune-proxy", "-s", "search.alpha_input=[0.5, 1.0]", "--trials", "1")
        assert (
            refused.status == 2 and "search.alpha_input: hyperparameters.alpha_input: no tensor can take" in refused.err
        )
        (here / "supar.yaml").unlink()
        told = supar_here("tune-proxy", "--layout", "layout.yaml", "--command", KEPT, "--dry-run")
        assert told.status == 0 and "not searched: hyperparameters.alpha_input: no tensor can take" in told.err

    def test_divergence_counts_and_a_failed_trial_does_not(self, here: Path, supar_here: Callable[..., Called]) -> None:
        fault = "assert x < 1.5, 'too hot'\nif x < -0.3: loss = float('nan')"
        spec = write_spec(here, fault=fault, seeds=1, lr_fit_octaves=[0.5, 2.5])
        called = supar_here("tune-proxy")
        assert called.status == 0, called.err
        states = [tuning.state_of(trial) for trial in trials_of(spec)]
        assert len(states) - states.count("failed") == 6 and {"failed", "diverged", "complete"} <= {*states}
        assert "AssertionError: too hot" in called.err
        assert called.err.count("is made again: the script failed") == called.err.count("counts as diverged") == 1

    @pytest.mark.parametrize(
        ("by", "what"),
        [
            ("python3 -c 'raise KeyError(7)' {plan}", "KeyError: 7"),
            (": {plan}", "ended without reporting a loss"),
            ("pyhton train.py {plan}", "pyhton: not found"),
        ],
    )
    def test_a_script_that_always_fails_ends_the_search(
        self, here: Path, supar_here: Callable[..., Called], by: str, what: str
    ) -> None:
        write_spec(here, by=by)
        called = supar_here("tune-proxy")
        assert called.status == 4 and "Traceback" not in called.err.replace("  Traceback", "")
        last = called.err.partition("error: ")[2]
        assert last.startswith("the last 3 trials failed; trial 2: the script") and what in last
        assert runs_made(here) == 3 and not Path("proxy.yaml").exists()
        write_spec(here, by=by)  # a search with another script begins anew; this one goes on
        assert supar_here("tune-proxy").status == 4 and runs_made(here) == 6

    def test_bad_trials_are_pruned_by_their_reports(self, here: Path, supar_here: Callable[..., Called]) -> None:
        fault = "if x < -2.2: supar.report_loss(99, 10); open('slow', 'w').write(str(os.getpid())); time.sleep(60)"
        spec = write_spec(here, fault=fault, trials=10, lr=[0.0005, 0.06], finalists=1, seeds=1, lr_fit_octaves=[])
        called = supar_here("tune-proxy")
        assert called.status == 0, called.err
        assert "pruned" in [tuning.state_of(trial) for trial in trials_of(spec)]
        assert not is_alive(int((here / "slow").read_text()))

    @pytest.mark.parametrize(
        ("fault", "status", "what"),
        [
            ("loss = 2.0", 4, "all 3 trials have the loss 2.0, whatever their values; expected a script that trains"),
            ("loss = 2 + 0.1 * x**2", 0, "warning: another seed changes no loss"),
        ],
    )
    def test_a_script_that_does_not_use_its_plan_is_told(
        self, here: Path, supar_here: Callable[..., Called], fault: str, status: int, what: str
    ) -> None:
        write_spec(here, fault=fault, trials=3, finalists=1, lr_fit_octaves=[])
        called = supar_here("tune-proxy")
        assert called.status == status and what in called.err

    def test_a_dry_run_says_how_many_runs_and_whose_time(self, here: Path, supar_here: Callable[..., Called]) -> None:
        write_spec(here)
        called = supar_here("tune-proxy", "--dry-run")
        assert called.status == 0
        assert "at most 6 trials, at most 2 finalist runs, at most 4 lr fit runs; 12 in all, each by: " in called.err
        assert called.err.endswith("time: that of the script\n") and not Path("proxy.trials").exists()

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["-s", "run.command=null"], "run.command: is missing; expected what trains a plan, such as --command"),
            (["--command", "python train.py"], "--command python train.py: 'python train.py'; expected {plan}"),
            (["--timeout", "soon"], "--timeout soon: expected a time such as 90s"),
            (["--width", "64"], "--width: a model of your own has the sizes of its layout"),
            (["--layout", "other.yaml"], "other.yaml: can't be read"),
        ],
    )
    def test_bad_input_runs_nothing(
        self, here: Path, supar_here: Callable[..., Called], arguments: list[str], what: str
    ) -> None:
        write_spec(here)
        called = supar_here("tune-proxy", *arguments)
        assert called.status == 2 and what in called.err
        assert not Path("proxy.journal").exists()

    def test_a_command_is_for_models_of_the_user(self, here: Path, supar_here: Callable[..., Called]) -> None:
        called = supar_here("tune-proxy", "--command", KEPT)
        assert called.status == 2 and "{plan}: is for a model of your own; expected none" in called.err


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for one in started:
        one.kill()
        one.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_scripts_of_all_jobs_and_the_study_continues(
    here: Path, processes: list[subprocess.Popen[str]], number: int, supar_here: Callable[..., Called]
) -> None:
    jobs = 2 if number == signal.SIGINT else 1
    fault = "open(f'at-{os.getpid()}', 'w').close()\nif not os.path.exists('go'): time.sleep(60)"
    spec = write_spec(here, fault=fault, trials=3, finalists=1, seeds=1, lr_fit_octaves=[])
    processes.append(start(here, "tune-proxy", "--jobs", str(jobs)))
    scripts = wait_for(lambda: len(found := list(here.glob("at-*"))) == jobs and found)
    processes[0].send_signal(number)
    _, err = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 130 and "the same command continues" in err, err
    assert not any(is_alive(int(path.name[3:])) for path in scripts)
    assert not [trial for trial in trials_of(spec) if trial.state == optuna.trial.TrialState.RUNNING]
    if jobs == 2:
        (here / "go").touch()
        assert supar_here("tune-proxy").status == 0
        assert sum(map(tuning.is_counted, trials_of(spec))) == 3


def test_a_reported_loss_needs_no_torch() -> None:
    code = "import sys; from supar_cli import report_loss; report_loss(1.0); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
