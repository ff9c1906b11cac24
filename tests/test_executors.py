"""Who runs the calls on this machine, and what survives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.errors import InputError, SetupError
from supar_cli.jobs import clusters
from supar_cli.jobs import workers as jobs_workers
from supar_cli.jobs.clusters import make_workers
from supar_cli.jobs.queue import _is_alive, is_counted
from supar_cli.jobs.runs import Records
from supar_cli.jobs.workers import Local, WorkerFailure, visible_devices

from . import studies
from .conftest import environment

# what workers are asked to do: functions of a module, as a worker imports them


def double(value: int, after_s: float = 0.0) -> int:
    time.sleep(after_s)
    return 2 * value


def process(value: int) -> int:
    time.sleep(0.2)
    return os.getpid()


def bad_input(value: int) -> None:
    raise InputError("train.steps: too few", "data.source: no such file")


def first_fails(folder: str, value: int) -> None:
    if value:
        (Path(folder) / "1").write_text(str(os.getpid()))
        time.sleep(60)
    while not (Path(folder) / "1").exists():
        time.sleep(0.01)
    raise InputError("the first fails")


def bug(value: int) -> None:
    raise ZeroDivisionError(f"division of {value}")


def dies(folder: str, value: int, times: int) -> int:
    """Killed as often as asked, then well."""
    before = len(list(Path(folder).glob(f"{value}-*")))
    if before < times:
        (Path(folder) / f"{value}-{before}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * value


def seen(value: int) -> tuple[str | None, int]:
    time.sleep(0.2)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads()


def record_of(value: int) -> dict[str, Any]:
    return {"state": "done", "loss": float(value)}


@pytest.fixture(scope="module")
def pair() -> Iterator[Local]:
    """Two processes for the tests that leave them whole, or nearly."""
    with Local(2) as workers:
        yield workers


class TestLocal:
    def test_results_come_as_calls_end_and_processes_are_kept(self, pair: Local) -> None:
        ids = {found for _, found in pair.results(process, [(n,) for n in range(6)])}
        assert len(ids) == 2 and os.getpid() not in ids
        assert {found for _, found in pair.results(process, [(0,), (1,)])} == ids
        assert [index for index, _ in pair.results(double, [(1, 2.0), (2,), (3,)])] == [1, 2, 0]
        assert dict(pair.results(double, [(value,) for value in range(5)])) == {n: 2 * n for n in range(5)}

    def test_errors_of_ours_cross_as_themselves_and_bugs_with_where_they_are(self, pair: Local) -> None:
        with pytest.raises(InputError, match=r"^train.steps: too few\ndata.source: no such file$") as ours:
            list(pair.results(bad_input, [(1,)]))
        assert ours.value.exit_status == 2
        with pytest.raises(ZeroDivisionError, match="division of") as bugs:
            list(pair.results(bug, [(1,)]))
        assert "in bug" in bugs.value.__notes__[0]

    def test_what_still_runs_when_a_call_fails_is_ended(self, tmp_path: Path) -> None:
        with Local(2) as workers:
            with pytest.raises(InputError):
                list(workers.results(first_fails, [(str(tmp_path), 0), (str(tmp_path), 1)]))
            other = int((tmp_path / "1").read_text())
            assert not _is_alive(other), "it went on"

    def test_one_job_is_this_process(self) -> None:
        with Local(1) as workers:
            assert dict(workers.results(process, [(1,), (2,)])) == {0: os.getpid(), 1: os.getpid()}

    def test_a_killed_workers_call_is_made_again_and_the_others_go_on(
        self, pair: Local, tmp_path: Path, monkeypatch
    ) -> None:
        calls = [(str(tmp_path), 0, 0), (str(tmp_path), 1, 1), (str(tmp_path), 2, 0), (str(tmp_path), 3, 9)]
        monkeypatch.setattr(jobs_workers, "RETRIES", 1)
        found = dict(pair.results(dies, calls))
        assert [found[n] for n in range(3)] == [0, 2, 4]
        assert found[3] == WorkerFailure("its process was killed by SIGKILL, as when memory runs out")
        assert len(list(tmp_path.glob("1-*"))) == 1 and len(list(tmp_path.glob("3-*"))) == 2

    def test_each_process_sees_a_device_and_a_share_of_the_cores_of_its_own(self) -> None:
        with Local(2, ["3", "GPU-5"]) as workers:
            found = [it for _, it in workers.results(seen, [(n,) for n in range(4)])]
        assert {device for device, _ in found} == {"3", "GPU-5"}
        assert {threads for _, threads in found} == {max(1, len(os.sched_getaffinity(0)) // 2)}

    def test_devices_are_the_ones_that_this_process_may_use(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert visible_devices("auto") == ["0", "1"] and visible_devices("cuda:1") == visible_devices("cpu") == []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5")
        assert visible_devices("cuda") == ["2", "GPU-5"]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # what CUDA says of any number of MIG devices
        for named, usable in (("MIG-1,MIG-2", ["MIG-1", "MIG-2"]), ("0,1", ["0"])):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
            assert visible_devices("auto") == usable
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-5")
        monkeypatch.setattr(clusters, "CPU_JOBS", 5)
        jobs = {device: make_workers(device=device).jobs for device in ("auto", "cuda:1", "cpu")}
        assert jobs == {"auto": 2, "cuda:1": 1, "cpu": 5}

    def test_workers_end_with_their_parent(self, tmp_path: Path) -> None:
        script = (
            "from supar_cli.jobs.workers import Local; import os, signal, time; from tests.test_executors import process\n"
            "if __name__ == '__main__':\n"
            "    found = [it for _, it in Local(2).results(process, [(1,), (2,)])]; print(*found, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        (tmp_path / "parent.py").write_text(script)
        done = subprocess.run(
            [sys.executable, str(tmp_path / "parent.py")], env=environment(), capture_output=True, timeout=60
        )
        ids = [int(word) for word in done.stdout.split()]
        assert len(ids) == 2
        studies.wait_for(lambda: not any(map(_is_alive, ids)), 10)


class Dying(Local):
    """One of its calls takes every worker down."""

    def results(self, function: Any, calls: list[Any]) -> Any:
        for index, call in enumerate(calls):
            yield index, WorkerFailure("killed") if call == (1,) else function(*call)


def test_a_run_that_takes_its_workers_down_is_recorded_as_failed(tmp_path: Path) -> None:
    calls = {f"run {value}": (value,) for value in range(4)}

    def died(value: int, why: str) -> dict[str, Any]:
        return {"state": "failed", "loss": None, "why": why, "value": value}

    records = Records(tmp_path)
    found = {record["run"]: record for _, _, record in records.complete(record_of, calls, Dying(), died)}
    assert [found[run]["state"] for run in calls] == ["done", "failed", "done", "done"]
    assert found["run 1"] == {"run": "run 1", "state": "failed", "loss": None, "why": "killed", "value": 1}
    with pytest.raises(SetupError, match="worker died each time it was started: killed"):
        list(Records(tmp_path / "other").complete(record_of, calls, Dying()))


def test_a_record_that_a_kill_has_cut_is_made_again_and_a_corrupt_one_is_named(tmp_path: Path) -> None:
    calls = {f"run {value}": (value,) for value in range(3)}
    list(Records(tmp_path).complete(record_of, calls, Local()))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [done for done, _, _ in Records(tmp_path).complete(record_of, calls, Local())] == [2, 2, 3]
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"{", b"", 1))
    with pytest.raises(SetupError, match=r"records\.jsonl:1: not a record"):
        Records(tmp_path)


class TestTuning:
    def test_a_local_worker_killed_in_a_trial_costs_only_its_work(self, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 4, studies.SLOW, further=False), str(tmp_path / "proxy.journal")
        running = studies.start(tmp_path, "tune-proxy", "--jobs", "2")
        trial = studies.wait_for(lambda: (tmp_path / "proxy.journal").exists() and studies.midway(spec, path))
        os.kill(trial.user_attrs["process"][1], signal.SIGKILL)
        studies.check_exact(spec, path, studies.ended([running]))
        trials = studies.trials_of(spec, path)
        assert [t.number for t in trials if not is_counted(t)] == [trial.number], "another trial suffered"
        assert [t.params for t in trials if is_counted(t)].count(trial.params) == 1, "its proposal was lost"

    def test_ctrl_c_gives_trials_back_and_the_same_command_goes_on(self, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 3, studies.SLOW, further=False), str(tmp_path / "proxy.journal")
        running = studies.start(tmp_path, "tune-proxy", "--jobs", "2")
        studies.wait_for(lambda: (tmp_path / "proxy.journal").exists() and studies.midway(spec, path))
        # as a terminal does it: to all processes of the group
        workers = {t.user_attrs["process"][1] for t in studies.trials_of(spec, path) if t.state.name == "RUNNING"}
        for one in (*workers, running.pid):
            os.kill(one, signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 130 and out == "" and "Traceback" not in err, err
        assert "the same command continues the study" in err
        interrupted = [t for t in studies.trials_of(spec, path) if t.state.name == "FAIL"]
        assert interrupted and not [t for t in studies.trials_of(spec, path) if t.state.name == "RUNNING"]
        studies.check_exact(spec, path, studies.ended([studies.start(tmp_path, "tune-proxy", "--jobs", "2")]))
        again = [t.params for t in studies.trials_of(spec, path) if is_counted(t)]
        assert all(trial.params in again for trial in interrupted)


def test_an_executor_or_setting_that_is_not_known_is_bad_input() -> None:
    with pytest.raises(InputError, match="--executor lokal: expected local, ray or slurm"):
        make_workers("lokal")
    with pytest.raises(InputError, match="--executor-set gpus: the local executor has no settings"):
        make_workers("local", executor_set={"gpus": 1})
    with pytest.raises(InputError, match="--executor-set adress: not a setting of ray; did you mean 'address'"):
        make_workers("ray", executor_set={"adress": "x"})
    with pytest.raises(InputError, match="--executor-set partion: not a setting of slurm; did you mean 'partition'"):
        make_workers("slurm", executor_set={"partion": "x"})
    for name, setting in (("ray", {"cpus": "many"}), ("slurm", {"time": "1:00"})):
        with pytest.raises(InputError, match="whole number"):
            make_workers(name, executor_set=setting)
    for name in ("ray", "slurm"):
        with pytest.raises(InputError, match="sees only its own GPU"):
            make_workers(name, device="cuda:1")
