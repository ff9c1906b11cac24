"""Runs that are asked to stop: by signals, by a limit of time, by another process in their directory."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supar_cli.cli.values import seconds
from supar_cli.errors import InputError, Preempted, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, checkpoint_reader, run_directory
from supar_cli.training import train as training
from supar_cli.training.reporter import NullReporter
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, environment
from tests.test_train import trained
from tests.test_train_resume import assert_same_run

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]


@pytest.fixture
def plan(plan_of: MakePlan, tmp_path: Path) -> Plan:
    """A run of a few seconds with a checkpoint at its end only, in plan.yaml."""
    train = {"steps": 600, "batch_size": 2, "eval_every": 300}
    made = plan_of(model={"layers": 1}, target={"width": 32}, train=train, run={"log_every": 50})
    (tmp_path / "plan.yaml").write_text(document.write([made.model_dump()]), "utf-8")
    return made


def hear() -> None:
    """In a child: Ctrl-C as at a terminal, though these tests may run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def steps_in(folder: Path) -> int:
    metrics = folder / "run/metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def started(folder: Path, *flags: str, steps: int = 3) -> subprocess.Popen[str]:
    """`supar train` as it does its first steps."""
    command = [sys.executable, "-m", "supar_cli", "train", "plan.yaml", "-o", "run", *flags]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear,
    )
    end, before = time.monotonic() + 60, steps_in(folder)
    while process.poll() is None and time.monotonic() < end and steps_in(folder) < before + steps:
        time.sleep(0.002)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


class TestSignals:
    def test_a_run_stopped_by_each_ends_as_the_uninterrupted_one(self, plan: Plan, tmp_path: Path) -> None:
        trained(plan, tmp_path / "whole")
        newest = 0
        for number, status in ((signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)):
            process = started(tmp_path)
            process.send_signal(number)
            if status == 75:  # a cluster may signal the process and its group
                time.sleep(0.05)
                process.send_signal(number)
            code, out, err = ended(process)
            assert (code, out) == (status, ""), err
            (*_, folder) = sorted((tmp_path / "run/checkpoints").iterdir())
            step = int(folder.name.removeprefix("step-"))
            assert newest < step < 600 and step == steps_in(tmp_path)
            assert (
                f"stopped at step {step} of 600 by {number.name}; `supar train run` continues from {folder.name}" in err
            )
            assert json.loads((tmp_path / "run/ended.json").read_text())["state"] == "preempted"
            assert "Traceback" not in err and not (tmp_path / "run/result.json").exists()
            newest = step
        code, _, err = ended(started(tmp_path))
        assert code == 0 and f"run: continues after step {newest}" in err
        assert not (tmp_path / "run/ended.json").exists()
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
    def test_the_second_stops_at_once(self, plan: Plan, tmp_path: Path, number: signal.Signals, status: int) -> None:
        """The first is granted between two steps; a step that never ends shows what the second does."""
        code = (
            "import time, sys\n"
            "from supar_cli.training.launch import environment\n"
            "from supar_cli.training.trainer import Trainer\n"
            "environment.ONE_REQUEST_S = 0.2\n"
            "step = Trainer.step\n"
            "def slow(self, diagnose=False):\n"
            "    found = step(self, diagnose)\n"
            "    if self.done > 3:\n"
            "        print('slow', flush=True)\n"
            "        time.sleep(60)\n"
            "    return found\n"
            "Trainer.step = slow\n"
            "from supar_cli.cli.app import main\n"
            "sys.argv = ['supar', 'train', '-o', 'run', '-q']\n"
            "main()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )
        assert process.stdout is not None and process.stdout.readline() == "slow\n"
        process.send_signal(number)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert process.returncode == status and "Traceback" not in err
        assert not list((tmp_path / "run").glob("checkpoints/step-*"))

    def test_one_that_is_interrupted_early_is_not_called_killed(
        self, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A second Ctrl-C may come while a run is being continued: before its checkpoint is read, or its first file written."""
        run = tmp_path / "run"
        messages: list[str] = []
        reporter = NullReporter()
        monkeypatch.setattr(reporter, "warn", messages.append)

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        def continued() -> None:
            with pytest.raises(KeyboardInterrupt):
                training.run(Trainer(plan, reporter=reporter), run)

        trainer = Trainer(plan)
        with pytest.raises(Preempted):
            training.run(trainer, run, stop=lambda: "SIGINT" if trainer.done == 4 else None)
        for module, name, text in (
            (run_directory, "write_file", "stopped at step 4 of 600 by SIGINT"),  # as the last time: nothing was begun
            (checkpoint_reader, "load", "interrupted"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, interrupt)
                continued()
            assert json.loads((run / "ended.json").read_text()) == {"state": "preempted", "text": text}
            assert messages[-1] == f"interrupted; `supar train {run}` continues from step-00000004"

    def test_a_background_job_goes_on_at_ctrl_c(self, plan: Plan, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "supar_cli", "train", "-o", "run", "-q"]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        while process.poll() is None and steps_in(tmp_path) < 3:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0

    def test_a_signal_before_the_first_step_leaves_no_checkpoint(self, plan: Plan, tmp_path: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "supar_cli", "train", "-o", "run", "--max-time", "0.001s"],
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=hear,
        )
        code, _, err = ended(process)
        assert code == 75 and "stopped at step 0 of 600 by the limit of 0.001 s" in err and "no checkpoint" in err


class TestMaxTime:
    def test_a_run_in_pieces_ends_as_the_whole(self, plan: Plan, supar_here: Supar, tmp_path: Path) -> None:
        trained(plan, tmp_path / "whole")
        statuses = []
        for _ in range(60):
            statuses.append(supar_here("train", "-o", "run", "-q", "--max-time", "0.3s").status)
            if statuses[-1] != 75:
                break
        assert len(statuses) > 2 and statuses[-1] == 0 and set(statuses[:-1]) == {75}
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    @pytest.mark.parametrize(
        ("text", "found"), [("90s", 90), ("1.5h", 5400), ("2m", 120), ("1:30", 90), ("02:00:05", 7205)]
    )
    def test_times(self, text: str, found: float) -> None:
        assert seconds("--max-time", text) == found

    @pytest.mark.parametrize("text", ["", "90", "s", "0s", "-1s", "nans", "infh", "1:2:3:4", "1:-2", "2 days"])
    def test_what_is_no_time(self, text: str) -> None:
        with pytest.raises(InputError, match=r"--max-time .*: expected a time such as 90s"):
            seconds("--max-time", text)


class TestDirectory:
    def test_two_processes_do_not_share_one(self, plan: Plan, supar_here: Supar, tmp_path: Path) -> None:
        process = started(tmp_path)
        process.send_signal(signal.SIGSTOP)  # else it may have ended meanwhile
        try:
            assert run_directory.is_open(tmp_path / "run")
            for flags in ((), ("--force",)):
                other = supar_here("train", "-o", "run", *flags)
                assert other.status == 2 and "run: another process is training there" in other.err
        finally:
            process.kill()
            process.communicate()
        assert not run_directory.is_open(tmp_path / "run") and not run_directory.is_open(tmp_path)
        assert supar_here("train", "-o", "run", "-q").status == 0

    def test_checkpoints_that_stay(self, plan: Plan, supar_here: Supar, tmp_path: Path) -> None:
        flags = ("--steps", "12", "--checkpoint-every", "2", "--keep", "4", "-q")
        assert supar_here("train", "-o", "run", *flags).status == 0
        assert len(list((tmp_path / "run/checkpoints").iterdir())) == 4

    def test_what_changes_in_how_it_runs_is_said(self, plan: Plan, supar_here: Supar, tmp_path: Path) -> None:
        assert supar_here("train", "-o", "run", "-q", "--max-time", "0.2s").status == 75
        other = supar_here("train", "-o", "run", "-q", "--precision", "bfloat16")
        assert (
            other.status == 0 and "run: continues with a changed setting: run.precision: auto → bfloat16\n" in other.err
        )

    def test_data_that_moved_are_the_same_experiment(
        self, plan: Plan, supar_here: Supar, text_file: Path, tmp_path: Path
    ) -> None:
        assert supar_here("train", "-o", "run", "-q", "--max-time", "0.2s").status == 75
        (tmp_path / "moved").mkdir()
        text_file.rename(tmp_path / "moved/text.txt")
        other = supar_here("train", "-o", "run", "-q", "--data", "moved/text.txt")
        assert (other.status, other.err) == (0, "")
        (tmp_path / "moved/text.txt").write_bytes(b"other" * 5000)
        other = supar_here("train", "-o", "run", "-q", "--data", "moved/text.txt")
        assert other.status == 2 and "text.txt is not the data" in other.err

    def test_a_failure_is_noted(self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> None:
        huge: Any = plan_of(hyperparameters={"lr": 1e30})
        (tmp_path / "plan.yaml").write_text(document.write([huge.model_dump()]), "utf-8")
        assert supar_here("train", "-o", "run", "-q").status == 4
        found = json.loads((tmp_path / "run/ended.json").read_text())
        assert found["state"] == "failed" and found["text"].startswith("step 2: the loss is")


class TestWriting:
    """Checkpoints are written beside the training."""

    def test_training_goes_on_and_the_copy_is_of_its_step(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(run={"checkpoint_every": 4, "keep": 5})
        trained(plan_of(run={"checkpoint_every": 4, "keep": 5}), tmp_path / "whole")
        write, trainer, during = checkpoint.Writer._write, Trainer(plan), list[tuple[int, int]]()

        def slow(*arguments: Any) -> None:
            step, end = arguments[2].step, time.monotonic() + 20
            while trainer.done < min(step + 2, 12) and time.monotonic() < end:
                time.sleep(0.001)
            during.append((step, trainer.done))
            write(*arguments)

        monkeypatch.setattr(checkpoint.Writer, "_write", slow)
        with run_directory.open_run(tmp_path / "run", plan, resume=True, force=False):
            trainer.run(tmp_path / "run")
        assert [step for step, _ in during] == [4, 8, 12] and all(done >= min(step + 2, 12) for step, done in during)
        for step in (4, 8, 12):
            here, there = (tmp_path / name / f"checkpoints/step-{step:08d}/manifest.json" for name in ("run", "whole"))
            assert json.loads(here.read_text()) == json.loads(there.read_text())

    def test_a_write_that_fails_ends_the_run_by_its_name(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_tensors", full)
        trainer = Trainer(plan_of(run={"checkpoint_every": 4}))
        with pytest.raises(SetupError, match="checkpoints: the checkpoint can't be written: No space left on device"):
            trainer.run(tmp_path)
        assert trainer.done == 8  # where the next one was due


class TestDisk:
    """A disk that fills up under a run: a small tmpfs where one may be mounted, else a limit on the size of a file."""

    def test_full_and_then_not(self, plan: Plan, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        try:
            flags = ("-q", "--checkpoint-every", "20", "--keep", "30")
            command = [sys.executable, "-m", "supar_cli", "train", "plan.yaml", "-o", "disk/run", *flags]
            done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (3, ""), done.stderr
            assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
            assert "can't be written" in done.stderr and len(done.stderr.splitlines()) == 1
            kept = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
            assert len(kept) >= 2 and all(name.startswith("step-") for name in kept)
            larger = ["mount", "-o", "remount,size=200m", str(disk)]
            assert subprocess.run(larger, capture_output=True).returncode == 0
            done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0 and done.stderr == "", done.stderr
            trained(plan, tmp_path / "whole")
            assert_same_run(disk / "run", tmp_path / "whole")
        finally:
            subprocess.run(["umount", str(disk)], capture_output=True, check=True)

    @pytest.mark.parametrize("limit", [0, 1000, 30_000, 100_000])
    def test_files_that_may_not_grow(self, plan: Plan, tmp_path: Path, limit: int) -> None:
        """The plan, the metrics or a checkpoint fails, by the limit; without it the run goes on and ends as the whole."""

        def small() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        flags = ("-o", "run", "-q", "--checkpoint-every", "40")
        command = [sys.executable, "-m", "supar_cli", "train", "plan.yaml", *flags]
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(command, cwd=tmp_path, env=environment(), preexec_fn=small, **streams)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        assert "can't be written: " in done.stderr and "Traceback" not in done.stderr
        again = subprocess.run(command, cwd=tmp_path, env=environment(), **streams)
        assert again.returncode == 0, again.stderr
        trained(plan, tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")
