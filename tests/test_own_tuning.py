"""Tuning a user's model by the user's script: what counts, what is pruned, what ends a search, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from supar_cli.experiments import search as tuning
from supar_cli.jobs.storage import open_study
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec
from tests.conftest import Called
from tests.own_scripts import KEPT, LAYOUT, SCRIPT, is_alive, write_spec
from tests.studies import start, wait_for


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
        called = supar_here("tune-proxy", "--jobs", "1")
        assert called.status == 4 and "Traceback" not in called.err.replace("  Traceback", "")
        last = called.err.partition("error: ")[2]
        assert last.startswith("the last 3 trials failed; trial 2: the script") and what in last
        assert runs_made(here) == 3 and not Path("proxy.yaml").exists()
        write_spec(here, by=by)  # a search with another script begins anew; this one goes on
        assert supar_here("tune-proxy", "--jobs", "1").status == 4 and runs_made(here) == 6

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

    def test_finalists_differ_where_choices_are_drawn_again(
        self, here: Path, supar_here: Callable[..., Called]
    ) -> None:
        write_spec(here, trials=6, lr=[0.0005, 0.008, 0.06], finalists=2, seeds=2, lr_fit_octaves=[])
        called = supar_here("tune-proxy", "--jobs", "1")
        assert called.status == 0, called.err
        found = parse(Proxy, document.read_file("proxy.yaml")[0]).evidence["finalists"]
        assert len({one["lr"] for one in found}) == 2

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
