"""Run directories with damaged files or that can't be written to: what is said, what is lost, what goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import run_directory
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, environment
from tests.test_train import trained
from tests.test_train_resume import assert_same_run, cut_at, final_state, losses

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]

GARBAGE = {
    "text": b"not a record\n",
    "empty": b"\n",
    "binary": bytes(range(256)) * 40 + b"\n",
    "zeros": bytes(5000) + b"\n",
    "cut": b'{"step": 4, "lo\n',
    "no loss": b'{"step": 4}\n',
    "no step": b'{"loss": 1.0}\n',
    "another type": b'{"step": "4", "loss": 1.0}\n',
    "a text": b'{"step": 4, "loss": "low"}\n',
    "a list": b"[4, 1.0]\n",
    "nested": b'{"step": ' + b"[" * 100_000 + b"\n",
    "a huge number": b'{"step": ' + b"9" * 5000 + b', "loss": 1}\n',
}


@pytest.fixture
def cut(plan_of: MakePlan, tmp_path: Path) -> tuple[Plan, Path]:
    """A plan, in plan.yaml too, and the directory of its run, cut at step 9 with a checkpoint at step 6."""
    plan = plan_of(train={"eval_every": 3}, run={"checkpoint_every": 6})
    cut_at(plan, tmp_path / "run", 9)
    (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
    return plan, tmp_path / "run"


class TestMetrics:
    @pytest.mark.parametrize("kind", GARBAGE)
    @pytest.mark.parametrize("place", ["over a record", "between", "after the checkpoint"])
    def test_garbage_costs_its_own_record_and_is_said(
        self, cut: tuple[Plan, Path], kind: str, place: str, supar_here: Supar, tmp_path: Path
    ) -> None:
        plan, directory = cut
        path, at = directory / "metrics.jsonl", 7 if place == "after the checkpoint" else 3
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [json.loads(line)["step"] for line in lines]
        lines[at : at + (place == "over a record")] = [GARBAGE[kind]]
        path.write_bytes(damaged := b"".join(lines))
        with run_directory.Metrics(directory, 6) as metrics:
            pass
        expected = [step for step in whole if step <= 6 and (place != "over a record" or step != 4)]
        assert [step for step, loss in enumerate(metrics.history.losses, 1) if not math.isnan(loss)] == expected
        assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == expected
        assert bool(metrics.damage) == (place == "over a record")
        if metrics.damage:
            assert "metrics.jsonl: the records of 1 of the 6 steps done are missing or damaged" in metrics.damage
            assert (directory / run_directory.DAMAGED_METRICS).read_bytes() == damaged
        if kind not in ("binary", "a huge number"):  # the rest of the way is the same for all
            return
        path.write_bytes(damaged)
        called = supar_here("train", "-o", "run", "-q")
        assert called.status == 0 and "Traceback" not in called.err
        assert ("warning: " in called.err) == (place == "over a record")
        trained(plan, tmp_path / "whole")
        state, other = final_state(directory), final_state(tmp_path / "whole")
        assert all(bool((value == other[key]).all()) for key, value in state.items())
        known = [line for line in losses(tmp_path / "whole") if place != "over a record" or line[0] != 4]
        assert losses(directory) == known

    def test_none_at_all(self, cut: tuple[Plan, Path], supar_here: Supar) -> None:
        _, directory = cut
        (directory / "metrics.jsonl").unlink()
        called = supar_here("train", "-o", "run", "-q")
        assert called.status == 0
        what = "run/metrics.jsonl: the records of 6 of the 6 steps done are missing or damaged\n"
        assert called.err == f"warning: {what}"
        assert [step for step, *_ in losses(directory)] == list(range(7, 13))

    def test_they_are_on_disk_before_the_checkpoint_that_stands_for_them(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, synced, named = tmp_path / "run", list[int](), list[tuple[int, int]]()
        sync, rename = os.fsync, Path.rename

        def syncing(number: int) -> None:
            if Path(os.readlink(f"/proc/self/fd/{number}")).name == "metrics.jsonl":
                synced.append(len((run / "metrics.jsonl").read_bytes().splitlines()))
            sync(number)

        def renaming(path: Path, target: Path) -> Path:
            if target.name.startswith("step-"):
                named.append((int(target.name[5:]), synced[-1]))
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", syncing)
        monkeypatch.setattr(Path, "rename", renaming)
        trained(plan_of(run={"checkpoint_every": 4}), run)
        assert [step for step, _ in named] == [4, 8, 12] and all(step <= there for step, there in named)


class TestDocuments:
    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\0" * 100, b"[1]", b'{"kind": "supar.result/v1"}', b"[" * 100_000]
    )
    def test_a_result_is_made_anew(self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path, content: bytes) -> None:
        plan, path = plan_of(), tmp_path / "run/result.json"
        trained(plan, tmp_path / "run")
        state, before = final_state(tmp_path / "run"), json.loads(path.read_text())
        path.write_bytes(content)
        called = supar_here("train", "run", "-q")
        assert (called.status, called.err) == (0, "")
        after = json.loads(path.read_text())
        assert after.pop("resumed_at") == 12 and before.pop("resumed_at") == 0
        assert after | {"seconds": 0} == before | {"seconds": 0}
        assert all(bool((value == state[key]).all()) for key, value in final_state(tmp_path / "run").items())
        (tmp_path / "run/metrics.jsonl").unlink()  # and so without the losses: the last evaluation is made again
        path.write_bytes(content)
        called = supar_here("train", "run", "-q")
        assert called.status == 0 and "the records of 12 of the 12 steps done are missing" in called.err
        again = json.loads(path.read_text())
        assert again["validation_loss"] == before["validation_loss"] and again["train_loss"] is None

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"kind: supar.plan/v1\n", b"\0", b"- 1\n", b"a: [" * 200])
    def test_a_plan_is_named_and_force_starts_again(
        self, cut: tuple[Plan, Path], supar_here: Supar, content: bytes
    ) -> None:
        plan, directory = cut
        (directory / "plan.yaml").write_bytes(content)
        (directory / "lock").touch()
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        for source in ("plan.yaml", "run"):
            called = supar_here("train", source, "-o", "run", "-q")
            assert (called.status, called.out) == (2, "") and "Traceback" not in called.err
            assert "run/plan.yaml" in called.err
            if source == "plan.yaml":
                assert "expected this run's plan (each checkpoint has a copy), or --force" in called.err
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
        (directory / "plan.yaml").write_bytes((directory / "checkpoints/step-00000006/plan.yaml").read_bytes())
        assert supar_here("train", "run", "-q").status == 0
        (directory / "plan.yaml").write_bytes(content)
        assert supar_here("train", "-o", "run", "-q", "--force").status == 0
        assert json.loads((directory / "result.json").read_text())["plan"] == plan.hash()

    @pytest.mark.parametrize("content", [b"", b"\0" * 9, b"[1]", b'{"tensorboard": 3}', b'{"wandb": null}'])
    def test_names_for_trackers_are_given_anew(self, cut: tuple[Plan, Path], supar_here: Supar, content: bytes) -> None:
        pytest.importorskip("tensorboard")
        (cut[1] / "trackers.json").write_bytes(content)
        (cut[1] / "ended.json").write_bytes(content)
        called = supar_here("train", "-o", "run", "-q", "--tracker", "tensorboard")
        assert called.status == 0 and "Traceback" not in called.err
        assert "warning: run/trackers.json: is corrupt; trackers start a new run from here\n" in called.err

    def test_a_folder_where_a_file_should_be(self, cut: tuple[Plan, Path], supar_here: Supar) -> None:
        _, directory = cut
        for name in ("metrics.jsonl", "lock", "ended.json"):
            (directory / name).unlink(missing_ok=True)
            (directory / name).mkdir()
            called = supar_here("train", "-o", "run", "-q")
            assert (called.status, called.out) == (3, "") and "Is a directory" in called.err
            (directory / name).rmdir()
        with pytest.raises(InputError):
            run_directory.begin_run(directory / "plan.yaml", cut[0], resume=True, force=False)


class TestShown:
    """`supar runs`, `show` and `report` of a directory in which one file is damaged."""

    @pytest.mark.parametrize("name", ["plan.yaml", "metrics.jsonl", "result.json", "ended.json"])
    def test_it_is_named_and_nothing_is_written(
        self, plan_of: MakePlan, supar_here: Supar, tmp_path: Path, name: str
    ) -> None:
        trained(plan_of(), tmp_path / "runs/good")
        for kind, content in GARBAGE.items():
            folder = tmp_path / "runs/bad"
            shutil.copytree(tmp_path / "runs/good", folder)
            if name == "ended.json":  # which is of runs that did not finish
                (folder / "result.json").unlink()
            (folder / name).write_bytes(content)
            for command, statuses in (("show", (2, 3)), ("report", (2, 3))):
                called = supar_here(command, "runs/bad")
                harmless = name == "metrics.jsonl" and kind in ("no loss", "a text", "a huge number")
                harmless = harmless or (
                    name == "ended.json" and kind in ("no loss", "no step", "another type", "a text")
                )
                assert "Traceback" not in called.err
                if not harmless:
                    assert called.status in statuses and name in called.err, (kind, called)
                assert (tmp_path / "report.html").exists() == (command == "report" and not called.status)
                (tmp_path / "report.html").unlink(missing_ok=True)
            called = supar_here("runs", "--json")
            assert called.status == 0 and "Traceback" not in called.err
            states = {Path(one["run"]).name: one["state"] for one in json.loads(called.out)}
            assert states["good"] == "finished" and set(states) == {"good", "bad"}
            shutil.rmtree(folder)


def mounted(*arguments: str) -> None:
    """Mount something, or skip where that is not allowed."""
    if shutil.which("mount") is None or subprocess.run(["mount", *arguments], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@contextmanager
def disk(folder: Path, *arguments: str) -> Iterator[Path]:
    folder.mkdir()
    mounted(*arguments, str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=True)


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "supar_cli", "train", "plan.yaml", "-q", *flags]


class TestReadOnly:
    def test_a_file_system_before_the_start(self, cut: tuple[Plan, Path], supar_here: Supar, tmp_path: Path) -> None:
        with disk(tmp_path / "disk", "-t", "tmpfs", "tmpfs") as folder:
            shutil.copytree(cut[1], folder / "run")
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            for out in ("disk/run", "disk/new"):
                for flags in ((), ("--force",)):
                    called = supar_here("train", "-o", out, "-q", *flags)
                    assert (called.status, called.out) == (3, "")
                    assert called.err == f"error: {out}: can't be written: Read-only file system\n"
            assert supar_here("show", "disk/run").status == supar_here("runs", "disk").status == 0
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            assert supar_here("train", "-o", "disk/run", "-q").status == 0

    def test_a_disk_that_turns_so_under_the_run(self, plan_of: MakePlan, tmp_path: Path) -> None:
        """As ext4 does it when a disk fails: what was open for writing can't be written to either."""
        if not all(map(shutil.which, ("mkfs.ext4", "losetup", "e2fsck"))):
            pytest.skip("no ext4 can be made here")
        plan = plan_of(
            model={"layers": 1}, target={"width": 32}, train={"steps": 3000, "batch_size": 2, "eval_every": 3000}
        )
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        image, flags = tmp_path / "image", ("-o", "disk/run", "--checkpoint-every", "40")
        with image.open("wb") as file:
            file.truncate(2**25)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
        with disk(tmp_path / "disk", "-o", "loop,errors=remount-ro", str(image)):
            loop = subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True).stdout.partition(":")[
                0
            ]
            fault = Path("/sys/fs/ext4", Path(loop).name, "trigger_fs_error")
            if not fault.exists():
                pytest.skip("this kernel makes no faults")
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command(*flags), cwd=tmp_path, env=environment(), **pipes)
            kept, end = tmp_path / "disk/run/checkpoints", time.monotonic() + 60
            # until the third: only then is the second surely on the disk, name and all
            first_two = {kept / "step-00000040", kept / "step-00000080"}
            while process.poll() is None and time.monotonic() < end and set(kept.glob("step-*")) <= first_two:
                time.sleep(0.005)
            fault.write_text("x")
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (3, "") and len(err.splitlines()) == 1, err
            # what a write says that was on its way when the disk failed, or a later one
            assert re.search(r"can't be written: (Read-only file system|Input/output error)$", err.strip()), err
            assert "disk/run" in err
        subprocess.run(["e2fsck", "-f", "-y", str(image)], capture_output=True)
        (tmp_path / "disk").rmdir()
        with disk(tmp_path / "disk", "-o", "loop", str(image)):
            done = subprocess.run(command(*flags, "--max-time", "0.1s"), cwd=tmp_path, env=environment(), **pipes)
            assert done.returncode == 75 and "damaged" not in done.stderr, done.stderr
            steps = [step for step, *_ in losses(tmp_path / "disk/run")]
            assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 80

    def test_folders_of_another_user(self, cut: tuple[Plan, Path], supar_here: Supar, tmp_path: Path) -> None:
        """Root minds no permissions, so here it gives up that right."""
        bound = [] if os.getuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
        if bound and shutil.which("setpriv") is None:
            pytest.skip("root can't give up its rights here")
        pipes: Any = {"capture_output": True, "text": True, "env": environment(), "cwd": tmp_path}
        for closed, what in (("run", "run"), ("run/checkpoints", "run/checkpoints"), (".", "new")):
            os.chmod(tmp_path / closed, 0o555)
            try:
                out = "new" if closed == "." else "run"
                done = subprocess.run([*bound, *command("-o", out)], **pipes)
            finally:
                os.chmod(tmp_path / closed, 0o755)
            assert (done.returncode, done.stdout) == (3, ""), done.stderr
            assert f"error: {what}: " in done.stderr and "can't be written: Permission denied" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        called = supar_here("train", "-o", "run", "-q")
        assert (called.status, called.err) == (0, "")
        trained(cut[0], tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")


class TestNobodyReads:
    def test_a_terminal_that_is_gone_loses_nothing(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = plan_of()
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        run = [part for part in command("-o", "run") if part != "-q"]
        process = subprocess.Popen(run, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 0
        assert Trainer(plan).run(tmp_path / "run", resume=True).resumed_at == 12


def test_what_reads_run_directories_needs_no_torch() -> None:
    """`supar runs` and reports read them."""
    code = "import supar_cli.training.run_directory, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
