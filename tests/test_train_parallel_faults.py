"""Several processes of which one is killed, hangs, fails alone, meets a NaN, or is asked for what can't be."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import distributed
from tests.conftest import CHECKOUT, TEXT_BYTES, environment, plan_from, proxy_fields, real_text
from tests.leaving_cases import LINGER_S
from tests.test_train import trained
from tests.test_train_parallel import Supar, assert_close, long, member, plan, started, wait_for_steps
from tests.test_train_preempted import ended
from tests.test_train_resume import losses

__all__ = ["long", "plan"]  # fixtures


class TestKilled:
    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_a_rank_killed_mid_step_restarts_from_the_last_checkpoint(
        self, long: Plan, tmp_path: Path, parallel: str
    ) -> None:
        trained(long, tmp_path / "whole")
        flags = ("--nproc", "2", "--parallel", parallel, "--max-restarts", "1", "--checkpoint-every", "20")
        (tmp_path / "run").mkdir()
        (tmp_path / "run/other").write_text("in the way")  # so that --force is needed, and may not start again
        process = started(tmp_path, *flags, "--force", steps=50)
        os.kill(member(process.pid, 1), signal.SIGKILL)
        code, _, err = ended(process)
        assert code == 0, err
        assert (
            "warning: killed: rank 1 by SIGKILL; starting again from the last checkpoint, 1 of at most 1 times" in err
        )
        assert "Traceback" not in err
        assert json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] >= 20
        assert_close(tmp_path / "run", tmp_path / "whole", agree=1e-3)

    def test_torchruns_own_restarts(self, long: Plan, tmp_path: Path) -> None:
        """Which keep one store: addresses of the life before must not be found in it."""
        trained(long, tmp_path / "whole")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "--max-restarts=3",
        ]
        flags = ["-m", "supar_cli", "train", "-o", "run", "-q", "--checkpoint-every", "20"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environ = environment(OMP_NUM_THREADS="1")
        agent = subprocess.Popen([*command, *flags], cwd=tmp_path, env=environ, **pipes)
        for steps in (60, 150):
            wait_for_steps(tmp_path / "run", steps, agent)
            os.kill(member(agent.pid, steps % 4 // 2), signal.SIGKILL)
        out, err = agent.communicate(timeout=300)
        assert (agent.returncode, out) == (0, ""), err
        assert (
            json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] >= 120
        )  # which is on disk before 140 is written
        assert_close(tmp_path / "run", tmp_path / "whole", agree=1e-3)

    def test_without_restarts_the_same_command_goes_on(self, long: Plan, supar: Supar, tmp_path: Path) -> None:
        process = started(tmp_path, "--nproc", "2", "--checkpoint-every", "10", steps=30)
        os.kill(member(process.pid, 0), signal.SIGKILL)
        code, out, err = ended(process)
        assert (code, out) == (3, "") and "Traceback" not in err
        assert err.splitlines()[-1] == (
            "error: killed: rank 0 by SIGKILL; the same command continues from the last checkpoint"
        )
        done = supar("train", "-o", "run", "-q", "--nproc", "2", "--steps", "400")
        assert done.status == 0 and json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] >= 10


class TestRefused:
    def test_a_second_request_ends_processes_that_wait_for_one_that_hangs(self, long: Plan, tmp_path: Path) -> None:
        process = started(tmp_path, "--nproc", "2", "--parallel", "ddp")
        ranks = [member(process.pid, rank) for rank in range(2)]
        os.kill(ranks[1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None  # the other waits for it, and hears nothing
        process.send_signal(signal.SIGINT)
        code, _, err = ended(process)
        assert code == 130 and "Traceback" not in err and "killed" not in err
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    def test_restarts_without_a_launcher(self, plan: Plan, supar_here: Supar) -> None:
        done = supar_here("train", "-o", "run", "--max-restarts", "2")
        assert (done.status, done.err) == (
            2,
            "error: --max-restarts: needs --nproc; expected torchrun's own --max-restarts under torchrun\n",
        )

    def test_bad_input_is_said_once_and_nothing_starts(self, plan: Plan, supar: Supar, tmp_path: Path) -> None:
        done = supar("train", "none.yaml", "--nproc", "2")
        assert done.status == 2 and done.err.splitlines() == [
            "error: none.yaml: no such file; expected a plan, which `supar transfer` writes"
        ]
        done = supar("train", "-o", "run", "-q", "--nproc", "3")
        assert done.status == 2 and len(done.err.splitlines()) == 1
        assert "train.batch_size: 8 sequences can't be shared evenly by 3 processes" in done.err
        assert not (tmp_path / "run").exists()

    def test_nan_in_one_rank_ends_all_and_names_it(self, plan: Plan, tmp_path: Path) -> None:
        """A weight of rank 1 turns into NaN after step 3: no weight changes any more, anywhere."""
        code = (
            "import os, sys, torch\n"
            "from supar_cli.training.trainer import Trainer\n"
            "step = Trainer.step\n"
            "def poisoned(self, diagnose=False):\n"
            "    if self.done == 3 and os.environ['RANK'] == '1':\n"
            "        tensor = self.sparse_model.tensors['blocks.1.mlp.up'].detach()\n"
            "        getattr(tensor, '_local_tensor', tensor)[0] = float('nan')\n"
            "        self.sparse_model.sync_engines()\n"
            "    return step(self, diagnose)\n"
            "Trainer.step = poisoned\n"
            "from supar_cli.cli.app import main\n"
            "sys.argv = ['supar', 'train', '-o', 'run', '-q', '--parallel', sys.argv[1]]\n"
            "main()\n"
        )
        (tmp_path / "poisoned.py").write_text(code)
        for parallel in ("ddp", "fsdp"):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            done = subprocess.run(
                [*command, "poisoned.py", parallel],
                cwd=tmp_path,
                env=environment(OMP_NUM_THREADS="1"),
                capture_output=True,
                text=True,
                timeout=120,
            )
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(said) == 1, done.stderr
            assert re.search(r"step 4: the loss is nan; the first tensor of rank \d that is not finite is ", said[0])
            if parallel == "ddp":
                assert said[0].endswith("of rank 1 that is not finite is the weight blocks.1.mlp.up")
            assert done.stdout == "" and len(losses(tmp_path / "run")) == 3
            subprocess.run(["rm", "-r", str(tmp_path / "run")], check=True)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks meets at the end of a run, by case."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
    fields = {"train": {"steps": 6, "batch_size": 2, "eval_every": 6}, "model": {"layers": 1}, "target": {"width": 64}}
    plan = plan_from(proxy_fields(str(folder / "text.txt"), **fields, run={"parallel": "ddp"}))
    (folder / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
    alone = [f"alone {how}" for how in ("bug", "refusal", "interrupt", "bug with frames held", "bug not left")]
    cases = ["success", "together", *alone, "hung", "hung patient", "own"]
    command = [sys.executable, str(CHECKOUT / "tests/leaving_cases.py"), "plan.yaml", *cases]
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


GONE = ["PeerLost", "another process of this run is gone; the same command continues from the last checkpoint"]


class TestEnds:
    """The processes outlive their runs: nothing but a group that is left tells the others."""

    @pytest.mark.parametrize(
        ("case", "raised"),
        [
            ("success", [None, None]),
            ("together", [["InputError", "told by all"]] * 2),
            ("alone bug", [GONE, ["ValueError", "of rank 1"]]),
            ("alone refusal", [GONE, ["InputError", "of rank 1"]]),
            ("alone interrupt", [GONE, ["KeyboardInterrupt", "of rank 1"]]),
        ],
    )
    def test_every_way_out_leaves_the_group(
        self, ends: dict[str, list[dict[str, Any]]], case: str, raised: list[Any]
    ) -> None:
        assert [one.get("raised") for one in ends[case]] == raised
        assert all(one["is_left"] and one["models"] == [0] for one in ends[case])
        assert max(one["seconds"] for one in ends[case]) < LINGER_S

    def test_controls(self, ends: dict[str, list[dict[str, Any]]]) -> None:
        """A model that the error's frames hold outlives its group; who does not leave keeps the other waiting."""
        assert [one["models"] for one in ends["alone bug with frames held"]] == [[1], [1]]
        first, second = ends["alone bug not left"]
        assert not first["is_left"] and not second["is_left"] and first["seconds"] > LINGER_S > second["seconds"]

    def test_a_rank_that_hangs_ends_the_others_after_a_while(self, ends: dict[str, list[dict[str, Any]]]) -> None:
        found, nothing = ends["hung"]
        kind, text = found["raised"]
        assert kind == "PeerLost" and nothing is None and found["is_left"]
        assert text.startswith("another process of this run hangs or is gone: it has not answered for 0.0")
        assert text.endswith(" minutes; the same command continues from the last checkpoint")
        assert 0.9 < found["seconds"] < LINGER_S
        assert ends["hung patient"] == [None, None]  # within the hour that is given to slow ones

    def test_a_group_of_the_script_goes_on(self, ends: dict[str, list[dict[str, Any]]]) -> None:
        for one in ends["own"]:
            assert one["raised"] == ["InputError", "told by all"] and not one["is_left"]


def test_nccl_waits_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One time for both backends of a machine with CUDA."""
    made: dict[str, Any] = {}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_: iter([[dist.HashStore()]]))

    def stop(backend: str, **given: Any) -> None:
        made.update(given, backend=backend)
        raise InterruptedError

    monkeypatch.setattr(dist, "init_process_group", stop)
    with pytest.raises(InterruptedError), distributed.init_distributed():
        pass
    assert made["backend"] == "cpu:gloo,cuda:nccl" and made["timeout"] == distributed.PEER_TIMEOUT
