"""What a cluster does to a run: kills, data that change, directories that can't be written, files that are damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli import api
from supar_cli.errors import SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, data
from tests.conftest import CHECKOUT, TEXT_BYTES, Called, environment, real_text
from tests.test_train import trained
from tests.test_train_parallel import member
from tests.test_train_parallel import started as launched
from tests.test_train_preempted import ended, started
from tests.test_train_resume import assert_same_run, losses

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]

KILLS = 30
SEED = 20261124


def write(plan: Plan, folder: Path) -> None:
    (folder / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")


def lives(folder: Path, directory: str, kills: int) -> tuple[dict[str, Any], str]:
    """What `killed_runs` did in a directory, and what it said."""
    command = [sys.executable, str(CHECKOUT / "tests/killed_runs.py"), "plan.yaml", directory, str(kills), str(SEED)]
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


class TestKilled:
    def test_at_thirty_random_moments(self, plan_of: MakePlan, tmp_path: Path) -> None:
        """A checkpoint after every second step, so that kills meet writes; the end is that of the uninterrupted run."""
        train = {"steps": 600, "batch_size": 2, "eval_every": 200}
        plan = plan_of(
            model={"layers": 1}, target={"width": 32}, train=train, run={"checkpoint_every": 2, "log_every": 100}
        )
        write(plan, tmp_path)
        found, said = lives(tmp_path, "run", KILLS)
        statuses = [kill["status"] for kill in found["kills"]]
        assert statuses == [-signal.SIGKILL] * KILLS, said
        newest = [kill["newest"] for kill in found["kills"] if kill["newest"]]
        assert newest == sorted(newest) and len(set(newest)) >= 8  # no step is lost that a checkpoint had
        assert sum(kill["writing"] > 0 for kill in found["kills"]) >= 5, "too few kills met a write to say anything"
        assert found["last"] == 0 and json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] > 0
        assert lives(tmp_path, "whole", 0)[0]["last"] == 0
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_all_processes_at_random_moments(self, plan_of: MakePlan, tmp_path: Path) -> None:
        """Launcher and both ranks, checkpoints in shards after every second step."""
        train = {"steps": 300, "batch_size": 2, "eval_every": 300}
        plan = plan_of(model={"layers": 1}, target={"width": 32}, train=train)
        write(plan, tmp_path)
        moments, flags = random.Random(SEED), ("--nproc", "2", "--parallel", "fsdp")
        for _ in range(2):
            process = launched(tmp_path, *flags, "--checkpoint-every", "2", steps=4)
            time.sleep(moments.uniform(0, 0.2))
            for number in (process.pid, *(member(process.pid, rank) for rank in (0, 1))):
                os.kill(number, signal.SIGKILL)
            process.communicate()
            for path in checkpoint.available(tmp_path / "run/checkpoints"):
                checkpoint.weights(path, plan)
        code, _, err = ended(launched(tmp_path, *flags))
        assert code == 0, err
        assert json.loads((tmp_path / "run/result.json").read_text())["resumed_at"] >= 4
        trained(plan, tmp_path / "whole")
        for one, other in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
            assert one[0] == other[0] and abs(one[1] - other[1]) < 1e-3


class TestData:
    """Token files under a run of some seconds."""

    @pytest.fixture
    def tokens(self, tmp_path: Path) -> Path:
        path = tmp_path / "tokens.bin"
        np.frombuffer(real_text(TEXT_BYTES), np.uint8).astype("<u2").tofile(path)
        return path

    @pytest.fixture
    def plan(self, plan_of: MakePlan, tokens: Path, tmp_path: Path) -> Plan:
        train = {"steps": 300, "batch_size": 2, "eval_every": 150}
        plan = plan_of(model={"layers": 1}, target={"width": 32}, train=train, data={"source": str(tokens)})
        write(plan, tmp_path)
        return plan

    @pytest.mark.parametrize("how", ["cut", "emptied", "rewritten", "one token"])
    def test_that_change_end_it_by_name(
        self, plan: Plan, tokens: Path, supar_here: Supar, tmp_path: Path, how: str
    ) -> None:
        trained(plan, tmp_path / "whole")
        original = tokens.read_bytes()
        process = started(tmp_path, "--checkpoint-every", "10", "-q", steps=15)
        with tokens.open("r+b") as file:
            if how == "one token":
                file.write(b"\1\0")
            elif how == "rewritten":
                file.write(original[::-1])
            else:
                file.truncate(1000 if how == "cut" else 0)
        code, out, err = ended(process)
        assert (code, out) == (3, ""), err
        said = f"error: {tokens}: changed while it is in use; put back what it was, and the same command goes on"
        assert err.startswith(said) and len(err.splitlines()) == 1
        refused = supar_here("train", "-o", "run", "-q")  # not with what there is now
        assert refused.status in (2, 3) and str(tokens) in refused.err and "Traceback" not in refused.err
        tokens.write_bytes(original)
        assert supar_here("train", "-o", "run", "-q").status == 0
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_replaced_under_their_name_are_read_on_as_they_were(self, plan: Plan, tokens: Path, tmp_path: Path) -> None:
        trained(plan, tmp_path / "whole")
        process = started(tmp_path, "-q", steps=15)
        other = tokens.with_suffix(".new")
        other.write_bytes(tokens.read_bytes()[::-1])
        other.replace(tokens)
        code, _, err = ended(process)
        assert (code, err) == (0, "")
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_changed_between_hash_and_use(self, plan: Plan, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        identified = data.corpus.identified

        def late(section: Any) -> Any:
            found = identified(section)
            tokens.write_bytes(tokens.read_bytes()[::-1])
            return found

        monkeypatch.setattr(data.corpus, "identified", late)
        with pytest.raises(SetupError, match=r"tokens\.bin: changed while it is in use"):
            data.load(plan.data, vocab=256, context=16)


class TestReadOnly:
    """A directory on a file system that can't be written: a tmpfs, where one may be mounted."""

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        yield folder
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)

    def remount(self, disk: Path, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], capture_output=True, check=True)

    def test_before_and_after_a_start(self, plan_of: MakePlan, disk: Path, supar_here: Supar, tmp_path: Path) -> None:
        write(plan_of(), tmp_path)
        self.remount(disk, "ro")
        done = supar_here("train", "-o", "disk/run", "-q")
        assert (done.status, done.out) == (3, "")
        assert done.err == "error: disk/run: can't be written: Read-only file system\n"
        self.remount(disk, "rw")
        assert supar_here("train", "-o", "disk/run", "-q", "--max-time", "0.001s").status == 75
        self.remount(disk, "ro")
        done = supar_here("train", "-o", "disk/run", "-q")
        assert done.status == 3 and done.err == "error: disk/run: can't be written: Read-only file system\n"
        self.remount(disk, "rw")
        assert supar_here("train", "-o", "disk/run", "-q").status == 0
        self.remount(disk, "ro")
        assert supar_here("runs", "disk").status == 0
        assert supar_here("show", "disk/run").status == 0


class TestDamaged:
    """Files of a run directory that hold something else than was written."""

    @pytest.fixture
    def run(self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> Path:
        write(plan_of(run={"checkpoint_every": 6}), tmp_path)
        assert supar_here("train", "-o", "runs/one", "-q", "--steps", "12").status == 0
        shutil.rmtree(tmp_path / "runs/one/checkpoints/step-00000012")
        (tmp_path / "runs/one/result.json").unlink()
        return tmp_path / "runs/one"

    @pytest.mark.parametrize(
        "junk", [b"{]\n", b"\0\0\0\0\n", b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "3", "loss": 1}\n']
    )
    def test_metrics(self, run: Path, supar_here: Supar, junk: bytes) -> None:
        whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join([*whole[:3], junk, *whole[3:]]))
        done = supar_here("train", "-o", "runs/one", "-q")
        assert done.status == 3 and done.err.startswith("error: runs/one/metrics.jsonl:4: not a record")
        (run / "metrics.jsonl").write_bytes(b"".join([*whole[:6], junk]))  # after the last step of the checkpoint
        done = supar_here("train", "-o", "runs/one", "-q")
        assert (done.status, done.err) == (0, "")
        assert [step for step, *_ in losses(run)] == list(range(1, 13))

    def test_metrics_that_are_lost(self, run: Path, supar_here: Supar) -> None:
        whole = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join(whole[:4]))
        done = supar_here("train", "-o", "runs/one", "-q")
        assert done.status == 0
        assert done.err == "warning: runs/one/metrics.jsonl: 2 of the 6 steps before have no record any more\n"

    @pytest.mark.parametrize("junk", ["", "{", "[]", "3", '{"kind": "supar.result/v2"}', "\0"])
    def test_the_result_of_a_complete_run(self, run: Path, supar_here: Supar, junk: str) -> None:
        assert supar_here("train", "-o", "runs/one", "-q").status == 0
        (run / "result.json").write_text(junk)
        for command in (("train", "-o", "runs/one", "-q"), ("show", "runs/one"), ("report", "runs/one")):
            done = supar_here(*command)
            assert done.status == 3 and done.err.startswith("error: runs/one/result.json: is "), command
        done = supar_here("runs", "--json")
        assert done.status == 0 and json.loads(done.out)[0]["state"] == "unreadable"
        (run / "result.json").unlink()
        assert supar_here("train", "-o", "runs/one", "-q").status == 0

    @pytest.mark.parametrize("junk", ["", "{", "[]", "3", '{"state": 1}', "\0"])
    def test_how_it_ended(self, run: Path, supar_here: Supar, junk: str) -> None:
        (run / "ended.json").write_text(junk)
        assert supar_here("runs").status == 0 and supar_here("show", "runs/one").status in (0, 3)
        assert supar_here("train", "-o", "runs/one", "-q").status == 0

    @pytest.mark.parametrize("junk", ["", "{", "[]", "kind: supar.plan/v1", "\0"])
    def test_its_plan(self, run: Path, supar_here: Supar, junk: str) -> None:
        (run / "plan.yaml").write_text(junk)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = supar_here("train", "-o", "runs/one", "-q")
        assert done.status == 2 and done.err.startswith("error: runs/one/plan.yaml")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"} == {
            path: content for path, content in before.items() if path.name != "lock"
        }
        assert supar_here("runs").status == 0

    def test_the_names_its_trackers_know(self, run: Path, supar_here: Supar) -> None:
        (run / "trackers.json").write_text("{")
        done = supar_here("train", "-o", "runs/one", "-q", "--tracker", "tensorboard")
        assert done.status == 0 and "trackers.json: is corrupt; the trackers begin a run of their own" in done.err

    def test_weights_of_a_damaged_checkpoint(self, run: Path) -> None:
        state = run / "checkpoints/step-00000006/state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])
        with pytest.raises(SetupError, match=r"state\.safetensors: a corrupt checkpoint"):
            api.weights(run)
