"""Who runs the calls elsewhere: a Ray cluster of two nodes, Slurm by submitit; and what survives a kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supar_cli.errors import InputError, SetupError, SuparError
from supar_cli.experiments import search as tuning
from supar_cli.jobs import clusters
from supar_cli.jobs import workers as jobs_workers
from supar_cli.jobs.clusters import make_workers
from supar_cli.jobs.queue import is_counted
from supar_cli.jobs.workers import WorkerFailure

from . import studies
from .conftest import environment
from .test_executors import bad_input, bug, dies, double
from .test_tune import Heard


@pytest.mark.parametrize("executor", ["ray", "slurm"])
def test_a_missing_extra_is_named_at_the_start(executor: str, monkeypatch) -> None:
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        SetupError,
        match=rf"--executor {executor}: (ray|submitit) is not installed; expected `pip install (ray|submitit)`",
    ):
        make_workers(executor)


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
        own = ("spec", "data", "trial", "trials", "next", "tune-", "lr", "finalist", "warning: lr fit", "wrote")
        assert not [line for line in err.splitlines() if not line.startswith(own)], "Ray chatters"
        proxy = studies.parse(studies.Proxy, studies.document.read(out, "stdout")[0])
        studies.check_exact(spec, path, [proxy])
        trials = studies.trials_of(spec, path)
        assert [t.number for t in trials if not is_counted(t)] == [trial.number]
        assert [t.params for t in trials if is_counted(t)].count(trial.params) == 1

    def test_a_dead_workers_call_is_made_again_and_errors_cross(
        self, cluster: str, tmp_path: Path, monkeypatch
    ) -> None:
        calls = [(str(tmp_path), 0, 0), (str(tmp_path), 1, 1), (str(tmp_path), 2, 9)]
        monkeypatch.setattr(jobs_workers, "RETRIES", 1)
        with make_workers("ray", executor_set={"address": cluster}) as workers:
            assert workers.jobs == 2 and not workers.is_local
            found = dict(workers.results(dies, calls))
            assert found[0] == 0 and found[1] == 2 and isinstance(found[2], WorkerFailure)
            with pytest.raises(InputError, match=r"train\.steps: too few"):
                list(workers.results(bad_input, [(1,)]))
            with pytest.raises(ZeroDivisionError):
                list(workers.results(bug, [(1,)]))

    def test_a_cluster_that_does_not_answer_is_said_at_once(self) -> None:
        with pytest.raises(SetupError, match=r"no cluster answers at 127\.0\.0\.1:1: Connection refused"):
            make_workers("ray", executor_set={"address": "127.0.0.1:1"})


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
        with pytest.raises(SetupError, match="sbatch and srun not found"):
            make_workers("slurm", folder=tmp_path / "slurm")
        assert not (tmp_path / "slurm").exists()

    def test_a_round_is_a_job_array_with_what_was_asked_for(self, fake_slurm: None, tmp_path: Path) -> None:
        settings = {"partition": "gpu", "account": "me", "time": 30, "qos": "low"}
        workers = make_workers("slurm", jobs=2, executor_set=settings, device="cuda", folder=tmp_path / "proxy.slurm")
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
        workers = make_workers("slurm", executor_set=settings, device=device, folder=tmp_path / "slurm")
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
