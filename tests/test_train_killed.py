"""SIGKILL at random moments, in checkpoint writes too: nothing is lost but the steps after the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, checkpoint_reader, run_directory
from tests.conftest import CHECKOUT, environment
from tests.fuzzing import MORE
from tests.test_train import trained
from tests.test_train_resume import assert_same_run, losses

MakePlan = Callable[..., Plan]

KILLS = 30 * max(1, MORE // 4)
KILLS_OF_TWO = 5
EVERY = 4  # steps between checkpoints: about as long as one takes to write


class Lives:
    """`supar` processes in a folder, forked from one that has imported all they need."""

    def __init__(self, folder: Path) -> None:
        self.said = (folder / "said").open("w+b")
        environ = environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said, "text": True}
        command = [sys.executable, str(CHECKOUT / "tests/lives.py")]
        self._server = subprocess.Popen(command, cwd=folder, env=environ, **pipes)

    def _ask(self, **asked: Any) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, *arguments: str, **environ: str) -> int:
        """The number of a new process."""
        return self._ask(arguments=arguments, environment=environ)

    def status(self, process: int) -> int:
        """How a process ended, once it has."""
        return self._ask(wait=process)

    def text(self) -> str:
        """All that the processes have said on stderr."""
        self.said.seek(0)
        return self.said.read().decode()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)
        self.said.close()


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    made = Lives(tmp_path)
    yield made
    made.close()


@pytest.fixture
def moments() -> random.Random:
    """Random moments by a seed that is printed, and taken from SUPAR_SEED where that is set."""
    seed = int(os.environ.get("SUPAR_SEED", random.SystemRandom().randrange(10**6)))
    print(f"SUPAR_SEED={seed}")
    return random.Random(seed)


def written(plan: Plan, folder: Path) -> Plan:
    (folder / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
    return plan


def seen_after_a_kill(directory: Path, plan: Plan) -> str:
    """Where in its life the process was killed; everything that bears a checkpoint's name is whole, and none is too old."""
    if not (directory / "plan.yaml").exists():
        return "before its first file"
    folder = directory / "checkpoints"
    kept = checkpoint_reader.available(folder)
    for path in folder.glob("step-*"):
        assert path in kept, f"{path.name} has no manifest"
        checkpoint_reader.weights(path)  # raises where a hash does not fit
    done = [json.loads(line)["step"] for line in rundir_lines(directory)]
    newest = int(kept[-1].name.removeprefix("step-")) if kept else 0
    assert max(done, default=0) - newest < 3 * EVERY, "a checkpoint is missing: the next one waits for it"
    if list(folder.glob(".step-*")):
        return "in a checkpoint's write"
    return "between writes" if done else "before its first step"


def rundir_lines(directory: Path) -> list[str]:
    path = directory / "metrics.jsonl"
    return path.read_text("utf-8").split("\n")[:-1] if path.exists() else []


def kill(process: int) -> None:
    with suppress(ProcessLookupError):  # it was as quick as we
        os.kill(process, signal.SIGKILL)


class TestThirtyMoments:
    def test_every_run_ends_as_the_uninterrupted_one(
        self, plan_of: MakePlan, tmp_path: Path, lives: Lives, moments: random.Random, record_property: Any
    ) -> None:
        train: Any = {"steps": 200, "batch_size": 2, "eval_every": 100}
        run: Any = {"checkpoint_every": EVERY, "log_every": 50}
        plan = written(plan_of(model={"layers": 1}, target={"width": 32}, train=train, run=run), tmp_path)
        trained(plan, tmp_path / "whole")
        for name in ("first", "timed"):  # the first waits for imports
            started = time.monotonic()
            assert lives.status(lives.start("train", "-o", name, "-q")) == 0, lives.text()
        life_s = time.monotonic() - started
        kills, ends, runs = 0, Counter[str](), 0
        while kills < KILLS:
            process = lives.start("train", "-o", f"run{runs}", "-q")
            time.sleep(moments.uniform(0.0, life_s / 3))
            kill(process)
            if lives.status(process) == -signal.SIGKILL:
                kills += 1
                ends[seen_after_a_kill(tmp_path / f"run{runs}", plan)] += 1
            else:  # it came to its end before: on with another
                assert_same_run(tmp_path / f"run{runs}", tmp_path / "whole")
                runs += 1
        assert lives.status(lives.start("train", "-o", f"run{runs}", "-q")) == 0, lives.text()
        record_property("tried", f"{kills} kills of {runs + 1} runs: {dict(ends)}")
        for directory in (tmp_path / f"run{number}" for number in range(runs + 1)):
            assert_same_run(directory, tmp_path / "whole")
            assert {path.name for path in directory.iterdir()} == {path.name for path in (tmp_path / "timed").iterdir()}
            assert not list((directory / "checkpoints").glob(".*"))
        assert "Traceback" not in lives.text() and "damaged" not in lives.text()
        assert ends["in a checkpoint's write"] >= 3, ends


class TestTwoProcesses:
    def start(self, lives: Lives, out: str) -> list[int]:
        """Both processes of a run, as a launcher starts them."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = str(one.getsockname()[1])
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        flags = ("train", "-o", out, "-q", "--parallel", "fsdp")
        return [lives.start(*flags, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]

    def test_in_shards(
        self, plan_of: MakePlan, tmp_path: Path, lives: Lives, moments: random.Random, record_property: Any
    ) -> None:
        train: Any = {"steps": 80, "batch_size": 2, "eval_every": 80}
        run: Any = {"checkpoint_every": EVERY, "log_every": 50}
        plan = written(plan_of(model={"layers": 1}, target={"width": 32}, train=train, run=run), tmp_path)
        for name in ("first", "whole"):
            started = time.monotonic()
            assert [lives.status(process) for process in self.start(lives, name)] == [0, 0], lives.text()
        life_s = time.monotonic() - started
        kills, ends, runs = 0, Counter[str](), 0
        while kills < KILLS_OF_TWO:
            processes = self.start(lives, f"run{runs}")
            time.sleep(moments.uniform(0.1 * life_s, 0.7 * life_s))
            for process in processes:
                kill(process)
            if {lives.status(process) for process in processes} != {0}:
                kills += 1
                ends[seen_after_a_kill(tmp_path / f"run{runs}", plan)] += 1
            else:
                runs += 1
        assert [lives.status(process) for process in self.start(lives, f"run{runs}")] == [0, 0], lives.text()
        record_property("tried", f"{kills} kills of {runs + 1} runs of two processes: {dict(ends)}")
        for directory in (tmp_path / f"run{number}" for number in range(runs + 1)):
            assert losses(directory) == losses(tmp_path / "whole")
            newest, whole = (max((one / "checkpoints").glob("step-*")) for one in (directory, tmp_path / "whole"))
            shards = sorted(path.name for path in whole.glob("shard-*.safetensors"))
            assert len(shards) == 2 and shards == sorted(path.name for path in newest.glob("*.safetensors"))
            for name in shards:
                state, other = load_file(newest / name), load_file(whole / name)
                assert state.keys() == other.keys() and any(key.startswith("optimizer/") for key in state)
                assert all(bool((value == other[key]).all()) for key, value in state.items())
        assert "Traceback" not in lives.text() and "damaged" not in lives.text()


class TestLeftOvers:
    """What a kill may leave, placed by hand: each of these moments is short."""

    def test_of_the_first_file(self, plan_of: MakePlan, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/.plan.yaml.99").write_text("kind: supar.p")
        with run_directory.open_run(tmp_path / "run", plan_of(), resume=True, force=False):
            assert {path.name for path in (tmp_path / "run").iterdir()} == {"plan.yaml", "lock"}

    def test_of_files_replaced_and_of_checkpoints_removed(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = plan_of()
        trained(plan, tmp_path / "run")
        before = {path.name for path in (tmp_path / "run").iterdir()}
        for name in (".metrics.jsonl.1", ".result.json.22", ".ended.json.333", ".checkpoints.old"):
            (tmp_path / "run" / name).mkdir() if name.endswith("old") else (tmp_path / "run" / name).touch()
        with run_directory.open_run(tmp_path / "run", plan, resume=True, force=False):
            assert {path.name for path in (tmp_path / "run").iterdir()} == before | {"lock"}

    def test_an_old_checkpoint_loses_its_name_before_its_files(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remove, removed = checkpoint.shutil.rmtree, list[str]()

        def seen(path: Path, **options: Any) -> None:
            removed.append(Path(path).name)
            remove(path, **options)

        monkeypatch.setattr(checkpoint.shutil, "rmtree", seen)
        trained(plan_of(run={"checkpoint_every": 3}), tmp_path / "run")
        assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2
        assert removed and all(name.startswith(".") for name in removed)
