"""Who runs the calls: processes of this machine, a Ray cluster of two nodes, Slurm by submitit; and what survives a kill."""

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

from supar_cli.analysis.records import Records
from supar_cli.errors import InputError, SetupError, SuparError
from supar_cli.tuning import clusters, execute
from supar_cli.tuning import search as tuning
from supar_cli.tuning.execute import Failure
from supar_cli.tuning.local import Local, visible_devices
from supar_cli.tuning.shared import _is_alive, counts

from . import studies
from .conftest import environment
from .test_tune import Heard

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
        monkeypatch.setattr(Local, "retries", 1)
        found = dict(pair.results(dies, calls))
        assert [found[n] for n in range(3)] == [0, 2, 4]
        assert found[3] == Failure("its process was killed by SIGKILL, as when memory runs out")
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
        jobs = {device: execute.workers(device=device, on_cpu=5).jobs for device in ("auto", "cuda:1", "cpu")}
        assert jobs == {"auto": 2, "cuda:1": 1, "cpu": 5}

    def test_workers_end_with_their_parent(self, tmp_path: Path) -> None:
        script = (
            "from supar_cli.tuning.local import Local; import os, signal, time; from tests.test_executors import process\n"
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
            yield index, Failure("killed") if call == (1,) else function(*call)


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


class TestTuning:
    def test_a_local_worker_killed_in_a_trial_costs_only_its_work(self, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 4, studies.SLOW, further=False), str(tmp_path / "proxy.journal")
        running = studies.start(tmp_path, "tune-proxy", "--jobs", "2")
        trial = studies.wait_for(lambda: (tmp_path / "proxy.journal").exists() and studies.midway(spec, path))
        os.kill(trial.user_attrs["process"][1], signal.SIGKILL)
        studies.check_exact(spec, path, studies.ended([running]))
        trials = studies.trials_of(spec, path)
        assert [t.number for t in trials if not counts(t)] == [trial.number], "another trial suffered"
        assert [t.params for t in trials if counts(t)].count(trial.params) == 1, "its proposal was lost"

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
        again = [t.params for t in studies.trials_of(spec, path) if counts(t)]
        assert all(trial.params in again for trial in interrupted)


def test_an_executor_or_setting_that_is_not_known_is_bad_input() -> None:
    with pytest.raises(InputError, match="--executor lokal: expected local, ray or slurm"):
        execute.workers("lokal")
    with pytest.raises(InputError, match="--executor-set gpus: the local executor has no settings"):
        execute.workers("local", settings={"gpus": 1})
    with pytest.raises(InputError, match="--executor-set adress: no setting of ray; did you mean 'address'"):
        execute.workers("ray", settings={"adress": "x"})
    with pytest.raises(InputError, match="--executor-set partion: no setting of slurm; did you mean 'partition'"):
        execute.workers("slurm", settings={"partion": "x"})
    for name, setting in (("ray", {"cpus": "many"}), ("slurm", {"time": "1:00"})):
        with pytest.raises(InputError, match="whole number"):
            execute.workers(name, settings=setting)
    for name in ("ray", "slurm"):
        with pytest.raises(InputError, match="sees its own device only"):
            execute.workers(name, device="cuda:1")


@pytest.mark.parametrize("executor", ["ray", "slurm"])
def test_a_missing_extra_is_named_at_the_start(executor: str, monkeypatch) -> None:
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match=rf"needs the extra: pip install 'supar\[{executor}\]'"):
        execute.workers(executor)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two nodes on this machine, of one core each."""
    pytest.importorskip("ray", reason="the tests of Ray need the extra `ray`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100 * 2**20}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    started.add_node(**node)
    started.wait_for_nodes()
    yield started.address
    started.shutdown()


class TestRay:
    def test_a_worker_killed_in_a_trial_costs_only_its_work_and_both_nodes_take_trials(
        self, cluster: str, tmp_path: Path
    ) -> None:
        spec, path = studies.write_spec(tmp_path, 6, studies.SLOW, further=False), str(tmp_path / "proxy.journal")
        running = studies.start(tmp_path, "tune-proxy", "--executor", "ray", RAY_ADDRESS=cluster)
        nodes: dict[int, str] = {}  # the daemon of a node that is a worker's parent, by the worker

        def killed() -> Any:
            trial = (tmp_path / "proxy.journal").exists() and studies.midway(spec, path, tuple(nodes))
            if not trial:
                return None
            worker = trial.user_attrs["process"][1]
            nodes[worker] = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]
            return trial if len(set(nodes.values())) == 2 else None

        trial = studies.wait_for(killed)
        os.kill(trial.user_attrs["process"][1], signal.SIGKILL)
        out, err = running.communicate(timeout=120)
        assert running.returncode == 0, err
        own = ("spec", "trial", "tune-", "lr", "finalist", "warning: lr fit", "wrote")
        assert not [line for line in err.splitlines() if not line.startswith(own)], "Ray chatters"
        proxy = studies.parse(studies.Proxy, studies.document.read(out, "stdout")[0])
        studies.check_exact(spec, path, [proxy])
        trials = studies.trials_of(spec, path)
        assert [t.number for t in trials if not counts(t)] == [trial.number]
        assert [t.params for t in trials if counts(t)].count(trial.params) == 1

    def test_a_dead_workers_call_is_made_again_and_errors_cross(
        self, cluster: str, tmp_path: Path, monkeypatch
    ) -> None:
        calls = [(str(tmp_path), 0, 0), (str(tmp_path), 1, 1), (str(tmp_path), 2, 9)]
        monkeypatch.setattr(clusters, "RETRIES", 1)
        with execute.workers("ray", settings={"address": cluster}) as workers:
            assert workers.jobs == 2 and not workers.here
            found = dict(workers.results(dies, calls))
            assert found[0] == 0 and found[1] == 2 and isinstance(found[2], Failure)
            with pytest.raises(InputError, match=r"train\.steps: too few"):
                list(workers.results(bad_input, [(1,)]))
            with pytest.raises(ZeroDivisionError):
                list(workers.results(bug, [(1,)]))

    def test_a_cluster_that_does_not_answer_is_said_at_once(self) -> None:
        with pytest.raises(SetupError, match=r"no cluster answers at 127\.0\.0\.1:1: Connection refused"):
            execute.workers("ray", settings={"address": "127.0.0.1:1"})


FAKE_SBATCH = """\
#!/bin/sh
# what sbatch does with a job array, on this machine and at once
cp "$1" script.sh
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
for task in $(seq 0 "${last:-0}"); do
  id=$$; [ -n "$last" ] && id=$$_$task
  SLURM_JOB_ID=$id SLURM_ARRAY_JOB_ID=$$ SLURM_ARRAY_TASK_ID=$task SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 \\
    sh script.sh > "slurm-$id.log" 2>&1 &
done
echo "Submitted batch job $$"
"""
FAKE_SRUN = """\
#!/bin/sh
while [ "${1#--}" != "$1" ]; do case $1 in --unbuffered) shift;; *) shift 2;; esac; done
exec "$@"
"""


class TestSlurm:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("submitit", reason="the tests of Slurm need the extra `slurm`")

    @pytest.fixture
    def fake_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Commands of Slurm's names, which run a job array on this machine."""
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in {"sbatch": FAKE_SBATCH, "srun": FAKE_SRUN, "sacct": "#!/bin/sh\n", "scancel": ""}.items():
            (folder / name).write_text(text or "#!/bin/sh\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        monkeypatch.chdir(tmp_path)

    def test_without_slurm_it_is_said_at_once(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(clusters.shutil, "which", lambda _: None)
        with pytest.raises(SetupError, match="no sbatch and srun here"):
            execute.workers("slurm", folder=tmp_path / "slurm")
        assert not (tmp_path / "slurm").exists()

    def test_a_round_is_a_job_array_with_what_was_asked_for(self, fake_slurm: None, tmp_path: Path) -> None:
        settings = {"partition": "gpu", "account": "me", "time": 30, "qos": "low"}
        workers = execute.workers("slurm", jobs=2, settings=settings, device="cuda", folder=tmp_path / "proxy.slurm")
        found = dict(workers.results(double, [(value,) for value in range(3)]))
        assert found == {0: 0, 1: 2, 2: 4}
        lines = set((tmp_path / "script.sh").read_text().splitlines())
        assert lines >= {
            "#SBATCH --array=0-2%2",
            "#SBATCH --partition=gpu",
            "#SBATCH --account=me",
            "#SBATCH --time=30",
            "#SBATCH --qos=low",
            "#SBATCH --gpus-per-node=1",
            "#SBATCH --job-name=supar",
        }
        assert (tmp_path / "proxy.slurm").stat().st_mode & 0o077 == 0, "others could read the study's password"

    @pytest.mark.parametrize(
        ("device", "settings", "asked"),
        [
            ("cpu", {}, None),
            ("cuda", {}, "#SBATCH --gpus-per-node=1"),
            ("cuda", {"gres": "gpu:h100:1"}, "#SBATCH --gres=gpu:h100:1"),
        ],
    )
    def test_a_gpu_is_asked_for_where_the_device_is_cuda(
        self, device: str, settings: dict[str, Any], asked: str | None, fake_slurm: None, tmp_path: Path
    ) -> None:
        workers = execute.workers("slurm", settings=settings, device=device, folder=tmp_path / "slurm")
        assert isinstance(workers, clusters.Slurm)
        text = workers._executor._executor._make_submission_file_text("true", "1")
        assert [line for line in text.splitlines() if line.startswith("#SBATCH --g")] == ([asked] if asked else [])
        assert "#SBATCH --time=60" in text

    def test_errors_cross_and_a_killed_jobs_call_is_made_again(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        workers = clusters.Slurm(2, {}, "cpu", tmp_path / "slurm", cluster="local")
        monkeypatch.setattr("submitit.LocalJob._results_timeout_s", 0)
        with workers:
            assert dict(workers.results(dies, [(str(tmp_path), 1, 1), (str(tmp_path), 2, 0)])) == {0: 2, 1: 4}
            with pytest.raises(SuparError, match=r"train\.steps: too few"):
                list(workers.results(bad_input, [(1,)]))

    def test_a_search_by_submitits_local_executor(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
        spec = studies.write_spec(tmp_path, 3, studies.FAST, further=False)
        workers = clusters.Slurm(2, {}, "cpu", tmp_path / "slurm", cluster="local")
        proxy = tuning.search(spec, "proxy.journal", workers=workers, reporter=Heard())
        studies.check_exact(spec, "proxy.journal", [proxy])
        assert len({trial.user_attrs["process"][1] for trial in studies.trials_of(spec, "proxy.journal")}) == 3

    def test_a_search_and_a_sweep_run_as_jobs(self, fake_slurm: None, tmp_path: Path) -> None:
        spec, path = studies.write_spec(tmp_path, 2, studies.FAST, further=False), str(tmp_path / "proxy.journal")
        flags = ("--executor", "slurm", "--jobs", "2")
        studies.check_exact(spec, path, studies.ended([studies.start(tmp_path, "tune-proxy", *flags)]))
        sweep = ("sweep", "--over", "lr=x:0..1/1", "--over", "density=1", "--parameterization", "supar")
        done = studies.start(
            tmp_path, *sweep, "--seeds", "1", "-s", "widen=0", "-s", "refine=0", "-o", "out", *flags, "--json"
        )
        _, err = done.communicate(timeout=120)
        assert done.returncode in (0, 5) and "Traceback" not in err, err
        assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) >= 2
        assert list((tmp_path / "out" / "slurm").glob("*_result.pkl"))
