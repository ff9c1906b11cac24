"""Processes and their launcher: signals at any moment, limits of time, restarts, and what a start again may take over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supar_cli.errors import InputError, PeerLost
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, checkpoint_reader, run_directory, runtime
from supar_cli.training.distributed import Ranks, StopRequest
from supar_cli.training.launch import elastic
from supar_cli.training.launch import environment as launch
from supar_cli.training.launch.environment import StopSignals
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, environment
from tests.test_train import trained
from tests.test_train_parallel import long, member, plan, started, torchrun
from tests.test_train_preempted import ended, hear

__all__ = ["long", "plan"]  # fixtures

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]


@pytest.fixture
def of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment of one of two processes that torchrun has started."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


def begun(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], int]:
    """`supar train --nproc 2`, and its rank 1 as soon as that is there: long before it knows what it is to do."""
    command = [sys.executable, "-m", "supar_cli", "train", "-o", "run", "-q", "--nproc", "2", *flags]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), preexec_fn=hear, **pipes)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            return process, member(process.pid, 1)
        except AssertionError:
            time.sleep(0.01)
    raise AssertionError(process.communicate(timeout=1))


class TestSignals:
    def test_one_that_comes_before_a_process_is_ready_is_heeded(self, long: Plan, tmp_path: Path) -> None:
        process, _ = begun(tmp_path)
        process.send_signal(signal.SIGTERM)
        code, out, err = ended(process)
        assert (code, out) == (75, "") and "stopped at step 0 of 400 by SIGTERM" in err

    def test_one_that_all_processes_get_is_one_request(self, long: Plan, tmp_path: Path) -> None:
        """As Slurm sends it: to the launcher, which hands it on, and to each process."""
        process = started(tmp_path, "--nproc", "2")
        for number in (member(process.pid, 0), member(process.pid, 1), process.pid):
            os.kill(number, signal.SIGTERM)
        code, _, err = ended(process)
        assert code == 75 and "by SIGTERM; `supar train run` continues from step-" in err, err

    def test_a_repeat_is_a_second_request_only_later_and_alone_at_once(
        self, of_torchrun: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "ONE_REQUEST_S", 0.5)
        with StopSignals() as asked:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            assert asked.reason() == "SIGINT"
            time.sleep(0.6)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
        monkeypatch.delenv("RANK")
        with StopSignals() as asked, pytest.raises(KeyboardInterrupt):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

    @pytest.mark.parametrize("seed", range(20))
    def test_what_schedulers_send_before_they_kill(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        """In any order, and repeated: each of them is a request, and none but a later SIGTERM ends the process.

        Before, SIGUSR2, SIGHUP and SIGXCPU did, and a SIGTERM that came twice.
        """

        def end(number: int, frame: object) -> None:
            raise KeyboardInterrupt(number)

        clock = [0.0]
        monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        before = {number: signal.signal(number, end) for number in launch.SIGNALS}
        draw, sent = random.Random(seed), list[signal.Signals]()
        try:
            with StopSignals() as asked:
                for number in draw.choices(launch.ANNOUNCING, k=draw.randint(0, 5)):
                    sent += [number] * draw.randint(1, 2)
                sent += [signal.SIGTERM] * 2 + draw.choices(launch.ANNOUNCING, k=draw.randint(0, 2))
                first = None
                for number in sent:
                    clock[0] += draw.uniform(0.0, 0.9) if first == number == signal.SIGTERM else draw.uniform(0.0, 90.0)
                    os.kill(os.getpid(), number)
                    first = number if number == signal.SIGTERM else first or number
                    assert asked.reason() == first.name
                clock[0] += 1.0
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGTERM)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def test_one_that_is_ignored_stays_so(self) -> None:
        """As `nohup` ignores SIGHUP."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as asked:
                os.kill(os.getpid(), signal.SIGHUP)
                assert asked.reason() is None
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_second_ctrl_c_waits_for_no_checkpoint_and_none_appears(self, long: Plan, tmp_path: Path) -> None:
        code = (
            "import sys, time\n"
            "from supar_cli.training import checkpoint\n"
            "save = checkpoint.save_tensors\n"
            "def slow(*arguments):\n"
            "    print('writes', flush=True)\n"
            "    time.sleep(20)\n"
            "    save(*arguments)\n"
            "checkpoint.save_tensors = slow\n"
            "from supar_cli.cli.app import main\n"
            "sys.argv = ['supar', 'train', '-o', 'run', '-q', '--checkpoint-every', '5']\n"
            "main()\n"
        )
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), preexec_fn=hear, **pipes)
        assert process.stdout is not None and process.stdout.readline() == "writes\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        status, _, err = ended(process)
        assert status == 130 and time.monotonic() - asked < 10 and err.endswith("interrupted\n"), err
        assert json.loads((tmp_path / "run/ended.json").read_text())["state"] == "preempted"
        assert checkpoint_reader.available(tmp_path / "run/checkpoints") == [] and "Traceback" not in err

    def test_a_checkpoint_that_is_given_up_gets_no_name(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        hashed = checkpoint.file_hash
        monkeypatch.setattr(checkpoint, "file_hash", lambda path: (time.sleep(0.5), hashed(path))[1])
        monkeypatch.setattr(run_directory.Metrics, "sync", lambda _: None)  # else the closed file would be in its way
        made = plan_of(train={"eval_every": 6}, run={"checkpoint_every": 5})
        with run_directory.open_run(tmp_path / "run", made, resume=True, force=False), pytest.raises(KeyboardInterrupt):
            Trainer(made).run(tmp_path / "run", on_evaluation=interrupted)
        folder, end = tmp_path / "run/checkpoints", time.monotonic() + 10
        assert list(folder.iterdir()) != []  # it is being written
        while list(folder.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        assert list(folder.iterdir()) == []


class TestRequest:
    """What ranks agree on between two steps: reasons are exchanged only where a step's votes say that there is one."""

    class Two:
        """Ranks of which the other one has a reason of its own."""

        is_distributed = True

        def __init__(self) -> None:
            self.other: str | None = None
            self.exchanges = 0

        def gather(self, value: str | None) -> list[str | None]:
            self.exchanges += 1
            return [value, self.other]

    def test_alone_it_is_the_process_own_reason(self) -> None:
        reasons = iter([None, "SIGTERM"])
        request = StopRequest(Ranks(), lambda: next(reasons))
        assert [request.vote(), request.reason(), request.reason()] == [0.0, None, "SIGTERM"]

    def test_before_the_first_step_all_are_asked(self) -> None:
        ranks = self.Two()
        ranks.other = "SIGUSR1"
        assert StopRequest(ranks).reason() == "SIGUSR1"

    def test_after_it_only_where_one_has_voted(self) -> None:
        ranks, own = self.Two(), list[str]()
        request = StopRequest(ranks, lambda: own[0] if own else None)
        assert request.reason() is None and ranks.exchanges == 1
        request.votes = request.vote()
        assert request.reason() is None and ranks.exchanges == 1
        ranks.other = "SIGTERM"
        request.votes = request.vote() + 1.0
        assert request.reason() == "SIGTERM" and ranks.exchanges == 2
        own.append("the limit of 3 s")
        assert request.vote() == 1.0
        request.votes = 1.0
        assert request.reason() == "the limit of 3 s"


class TestLimitOfTime:
    def test_it_counts_from_the_launchers_start(self, of_torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
        since = launch.launcher_age_s()
        assert since > 0.1
        assert (
            StopSignals(since + 60).reason() is None
            and StopSignals(since / 2).reason() == f"the limit of {since / 2:g} s"
        )
        monkeypatch.delenv("RANK")
        assert StopSignals(since / 2).reason() is None


class TestRestarts:
    def test_force_that_had_not_begun_is_still_meant(self, long: Plan, tmp_path: Path) -> None:
        """A complete run lies there; what is killed had not yet removed it."""
        trained(long, tmp_path / "run")
        process, second = begun(tmp_path, "--force", "--max-restarts", "1")
        os.kill(second, signal.SIGKILL)
        code, _, err = ended(process)
        assert code == 0 and "starting again" in err and "is already complete" not in err, err
        assert json.loads((tmp_path / "run/result.json").read_text())["environment"]["processes"] == 2

    def test_under_torchrun_nothing_starts_anew(self, plan: Plan, tmp_path: Path, of_torchrun: None) -> None:
        for flags in ({"resume": False, "force": True}, {"resume": False, "force": False}):
            with (
                pytest.raises(InputError, match="under torchrun, whose restarts would do so too"),
                run_directory.open_run(tmp_path / "run", plan, **flags),
            ):
                pass
        assert not (tmp_path / "run").exists()

    def test_only_its_own_launchers_preempted_run_is_left_alone(
        self, plan: Plan, tmp_path: Path, of_torchrun: None
    ) -> None:
        ends = {"state": "preempted", "text": "stopped at step 8 of 20 by SIGTERM"}
        for launcher, found in (("elsewhere 17 1.5", ""), (launch.launcher_id(), ends["text"]), (None, "")):
            (tmp_path / "ended.json").write_text(json.dumps({**ends, "launcher": launcher}))
            assert run_directory.preemption_reason(tmp_path) == found

    def test_a_run_preempted_before_goes_on_under_torchrun(self, plan: Plan, supar_here: Supar, tmp_path: Path) -> None:
        assert supar_here("train", "-o", "run", "-q", "--max-time", "0.001s").status == 75
        (done,) = torchrun(tmp_path, "-o", "run", "-q", "--json")
        assert done.status == 0 and '"kind": "supar.result/v1"' in done.out, done.err

    def test_a_peer_that_is_gone_is_no_reason_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lives, said = iter([{0: 1, 1: PeerLost.exit_status}, {}]), list[str]()
        monkeypatch.setattr(elastic, "_run", lambda *_: next(lives))
        assert elastic.launch([], 2, 1, tmp_path, said.append) == 0
        assert said == ["a process failed; starting again from the last checkpoint, 1 of at most 1 times"]
        lives = iter([{0: 2, 1: PeerLost.exit_status}])
        assert elastic.launch([], 2, 1, tmp_path, said.append) == 2

    def test_of_the_processes_that_are_left_the_first_says_that_one_is_gone(
        self, of_torchrun: None, supar_here: Supar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cut_off(*_: Any) -> None:
            with Ranks(is_distributed=True).translate_peer_errors():
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

        monkeypatch.setattr("supar_cli.cli.transfer.parse", cut_off)
        gone = "error: another process of this run is gone; the same command continues from the last checkpoint\n"
        for rank, said in (("0", gone), ("1", "")):
            monkeypatch.setenv("RANK", rank)
            called = supar_here("transfer", "--from-paper", "--sparsity", "0.9", "-o", "-", "-q")
            assert (called.status, called.out, called.err) == (1, "", said)


def test_a_checkpoint_in_shards_that_cannot_be_written_is_told_once(long: Plan, tmp_path: Path) -> None:
    """No file may become larger than 40 KiB: a full disk, to those that write shards."""
    train = f"{sys.executable} -m supar_cli train -o run -q --nproc 2 --parallel fsdp --checkpoint-every 20"
    command = ["bash", "-c", f"ulimit -f 40; exec {train}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 3 and len(said) == 1, done.stderr
    assert "run/checkpoints: the checkpoint can't be written: File too large" in said[0]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_no_model_outlives_its_group(plan: Plan, tmp_path: Path) -> None:
    """The last to hold a group, DDP's reducer would wait, with the interpreter locked, for threads that want it: for ever."""
    code = (
        "import gc, sys, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "from supar_cli import load, train\n"
        "destroy = dist.destroy_process_group\n"
        "def looked(group) -> None:\n"
        "    print(built, sum(isinstance(one, DistributedDataParallel) for one in gc.get_objects()))\n"
        "    destroy(group)\n"
        "built, init = 0, DistributedDataParallel.__init__\n"
        "def counted(*arguments, **named):\n"
        "    global built\n"
        "    built += 1\n"
        "    init(*arguments, **named)\n"
        "DistributedDataParallel.__init__ = counted\n"
        "dist.destroy_process_group = looked\n"
        "gc.disable()\n"
        "train(load('plan.yaml'), 'run')\n"
    )
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split("\n") == ["1 0", "1 0", ""], done


class TestLock:
    def test_who_only_looks_is_in_nobodys_way(self, plan: Plan, tmp_path: Path) -> None:
        with run_directory.open_run(tmp_path / "run", plan, resume=True, force=False):
            assert run_directory.is_open(tmp_path / "run")
        code = (
            "import fcntl, sys, time\n"
            "file = open(sys.argv[1])\n"
            "fcntl.flock(file, fcntl.LOCK_SH)\n"
            "print('looks', flush=True)\n"
            "time.sleep(0.3)\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "run/lock")]
        looker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert looker.stdout is not None and looker.stdout.readline() == "looks\n"
        with run_directory.open_run(tmp_path / "run", plan, resume=True, force=False):
            pass
        looker.communicate()


def test_a_cuda_device_has_a_number(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch selects devices by number only: `cuda` alone would end each run of one process."""
    chosen = list[torch.device]()
    fakes = {"is_available": True, "device_count": 2, "is_initialized": True, "current_device": 1}
    fakes["get_device_capability"] = (8, 0)
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bool(chosen))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    plan = plan_of(run={"device": "auto"})
    assert runtime.device_of(plan.run.device, Ranks()) == torch.device("cuda", 1)
    assert runtime.device_of(plan.run.device, Ranks(1, 2, 0, 2, is_distributed=True)) == torch.device("cuda", 0)
    assert runtime.Runtime.of(plan).precision is torch.bfloat16  # asked of the device that was selected
    assert chosen == [torch.device("cuda", 1)]
