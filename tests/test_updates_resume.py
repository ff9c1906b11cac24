"""Runs whose masks change go on from any step and from any moment of a change, and say what their masks are."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import supar_cli
from supar_cli.errors import SuparError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint_reader, run_directory
from supar_cli.training.state import State
from supar_cli.training.trainer import Trainer
from tests.conftest import Called
from tests.test_train import trained
from tests.test_train_resume import assert_same_run, losses, rewrite_manifest, rewrite_state

MakePlan = Callable[..., Plan]
STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "set": {"method": "set", "every_steps": 2},
    "set, keep": {"method": "set", "moments": "keep", "min_per_neuron": 2},
    "rigl": {"method": "rigl", "every_steps": 3, "end": 1.0, "drop_schedule": "linear"},
    "gmp": {"method": "gmp", "every_steps": 2},
    "topk": {"method": "topk", "end": 0.75},
}


@pytest.fixture
def moving(plan_of: MakePlan) -> MakePlan:
    """`moving("gmp", engine="sparse")`: a small plan of 12 steps with masks that change, a checkpoint after each step."""

    def make(kind: str, checkpoint_every: int = 1, **run: Any) -> Plan:
        sparsity = {"density": 0.25, "updates": KINDS[kind]}
        train = {"steps": STEPS, "batch_size": 4, "eval_every": 6, "eval_batches": 2}
        run = {"checkpoint_every": checkpoint_every, "keep": STEPS + 1, "log_every": 1, **run}
        return plan_of(model={"layers": 1}, train=train, run=run, target={"width": 32, "sparsity": sparsity})

    return make


def assert_same_state(one: State, other: State) -> None:
    """Bit for bit: masks, values and moments."""
    assert one.step == other.step and one.masks == other.masks and one.values.keys() == other.values.keys()
    for name, value in one.values.items():
        assert torch.equal(value, other.values[name]), name
        assert one.moments[name].keys() == other.moments[name].keys()
        assert all(torch.equal(moment, other.moments[name][key]) for key, moment in one.moments[name].items()), name


def goes_on(plan: Plan, path: Path) -> tuple[list[float], State]:
    """The losses of a fresh trainer from a checkpoint to the end, and its state there."""
    trainer = Trainer(plan)
    trainer.restore(path)
    return [trainer.step().loss for _ in range(plan.train.steps - trainer.done)], trainer.capture()


class TestResumed:
    @pytest.mark.parametrize(
        ("kind", "engine"), [*((kind, "dense") for kind in KINDS), *((kind, "sparse") for kind in ("rigl", "gmp"))]
    )
    def test_after_every_step(self, moving: MakePlan, tmp_path: Path, kind: str, engine: str) -> None:
        plan = moving(kind, engine=engine)
        trainer, history = trained(plan, tmp_path / "whole")
        end, paths = trainer.capture(), checkpoint_reader.available(tmp_path / "whole/checkpoints")
        assert len(paths) == STEPS
        before: Trainer | None = None
        for done, path in enumerate(paths, 1):  # each makes one step, after which it is what the next checkpoint holds
            found = Trainer(plan)
            found.restore(path)
            if before is not None:
                assert before.step().loss == history.losses[done - 1], done
                assert_same_state(before.capture(), found.capture())
            before = found
        assert before is not None
        assert_same_state(before.capture(), end)

    def test_a_model_that_is_made_anew_leaves_none_behind(self, moving: MakePlan) -> None:
        """Without a search for cycles, which takes longer than a small step; the control holds one model in a cycle."""
        gone = []
        for is_held in (False, True):
            trainer = Trainer(moving("gmp"))
            first, before = weakref.ref(trainer.sparse_model.model), trainer.sparse_model.tensors
            if is_held:
                trainer.sparse_model.model.itself = [trainer.sparse_model.model]  # type: ignore[assignment]
            gc.disable()
            while trainer.sparse_model.tensors is before:
                trainer.step()
            gone.append(first() is None)
            gc.enable()
        assert gone == [True, False]

    @pytest.mark.parametrize("kind", ["rigl", "gmp", "topk"])
    def test_a_lost_state_would_be_seen(self, moving: MakePlan, tmp_path: Path, kind: str) -> None:
        plan = moving(kind)
        _, history = trained(plan, tmp_path / "whole")
        trainer = Trainer(plan)
        trainer.restore(checkpoint_reader.available(tmp_path / "whole/checkpoints")[5])
        name = "blocks.0.mlp.up"
        trainer.optimizer.state[trainer.sparse_model.tensors[name]]["exp_avg"].zero_()
        assert [trainer.step().loss for _ in range(6)] != history.losses[6:]

    @pytest.mark.parametrize("kind", ["rigl", "gmp", "topk"])
    @pytest.mark.parametrize("makes_fit", [False, True], ids=["moved", "too many"])
    def test_other_masks_in_a_checkpoint_are_refused(
        self, moving: MakePlan, tmp_path: Path, kind: str, makes_fit: bool
    ) -> None:
        """One weight elsewhere, which the manifest shows; one too many, though the manifest fits."""
        plan = moving(kind)
        trained(plan, tmp_path / "whole")
        path, name = checkpoint_reader.available(tmp_path / "whole/checkpoints")[5], "blocks.0.mlp.up"
        found: dict[str, Mask] = {}

        def change(state: dict[str, torch.Tensor]) -> None:
            row = next(row for row in plan.tensors if row.name == name)
            alive = Mask(tuple(row.shape), state[f"mask/{name}"].numpy()).alive().copy()
            dead = np.flatnonzero(~alive)[0]
            alive.reshape(-1)[[np.flatnonzero(alive)[0], dead]] = makes_fit, True
            found[name] = Mask.of(alive)
            state[f"mask/{name}"] = torch.from_numpy(found[name].bits.copy())

        rewrite_state(path, change)
        if makes_fit:
            masks = json.loads((path / "manifest.json").read_text())["masks"]
            rewrite_manifest(path, masks={**masks, name: found[name].fingerprint})
        count = found[name].count
        what = rf"the mask of {name} has {count} live weights; the plan keeps {count - 1} after step 6"
        with pytest.raises(SuparError, match=what if makes_fit else "its masks are not those of its manifest"):
            Trainer(plan).restore(path)

    def test_by_the_run_itself(self, moving: MakePlan, tmp_path: Path) -> None:
        """Between two checkpoints: the step after the last one is done again."""

        class Cut(Exception):
            pass

        def stop(step: int, loss: float) -> None:
            raise Cut

        plan = moving("rigl", checkpoint_every=5)
        trained(plan, tmp_path / "whole")
        run_directory.begin_run(tmp_path / "cut", plan, resume=False, force=False)
        with pytest.raises(Cut):
            Trainer(plan).run(tmp_path / "cut", on_evaluation=stop)
        _, history = trained(plan, tmp_path / "cut", resume=True)
        assert history.resumed_at == 5
        assert_same_run(tmp_path / "cut", tmp_path / "whole")


WATCHED = ("mask_updates.py", "state.py", "checkpoint.py", "masks.py", "updates.py")


def run_until(plan: Plan, directory: Path, kill_at: int, counter: int) -> None:
    """Train in this process, and kill it at a call of the functions that change masks or store a state."""
    seen = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal seen
        if event == "call" and frame.f_code.co_filename.endswith(WATCHED):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    with run_directory.open_run(directory, plan, resume=True, force=False):
        trainer = Trainer(plan)
        sys.setprofile(watch)
        trainer.run(directory, resume=True)
        sys.setprofile(None)
    os.write(counter, str(seen).encode())


def in_a_fork(plan: Plan, directory: Path, kill_at: int) -> tuple[int, int]:
    """How such a process ended, and how many calls it made."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        try:
            run_until(plan, directory, kill_at, write)
        finally:
            os._exit(0)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with os.fdopen(read) as pipe:
        return status, int(pipe.read() or 0)


class TestKilled:
    @pytest.mark.parametrize("kind", ["set", "rigl", "gmp", "topk"])
    def test_at_any_call_of_a_change(self, moving: MakePlan, tmp_path: Path, kind: str, record_property: Any) -> None:
        """SIGKILL at 5 random calls, one after the other in the same run, which ends as the uninterrupted one."""
        seed = int(os.environ.get("SUPAR_SEED", random.SystemRandom().randrange(10**6)))
        print(f"SUPAR_SEED={seed}")
        moments, plan = random.Random(seed), moving(kind, checkpoint_every=2)
        trained(plan, tmp_path / "whole")
        status, calls = in_a_fork(plan, tmp_path / "alone", 0)
        assert status == 0 and calls > 100
        ends = Counter[int]()
        for _ in range(5):
            status, _ = in_a_fork(plan, tmp_path / "run", moments.randrange(1, calls // 3))
            assert status in (0, -signal.SIGKILL)
            ends[status] += 1
        assert ends[-signal.SIGKILL] >= 3
        assert in_a_fork(plan, tmp_path / "run", 0)[0] == 0
        record_property("tried", f"{ends[-signal.SIGKILL]} kills")
        assert_same_run(tmp_path / "run", tmp_path / "whole")


class TestCommand:
    @pytest.mark.parametrize("kind", ["set, keep", "rigl", "topk"])
    def test_a_plan_through_a_pipe(
        self, moving: MakePlan, supar_here: Callable[..., Called], tmp_path: Path, kind: str, monkeypatch: Any
    ) -> None:
        import io

        plan = moving(kind)
        text = document.write([plan.model_dump()])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        done = supar_here("train", "-", "-o", "run", "--json", "-q")
        assert (done.status, done.err) == (0, ""), done.err
        self.assert_says_its_masks(plan, tmp_path / "run", json.loads(done.out))

    def test_as_a_process(self, moving: MakePlan, supar: Callable[..., Called], tmp_path: Path) -> None:
        plan = moving("gmp")
        done = supar("train", "-", "-o", "run", "-q", "--json", stdin=document.write([plan.model_dump()]))
        assert (done.status, done.err) == (0, ""), done.err
        self.assert_says_its_masks(plan, tmp_path / "run", json.loads(done.out))
        trained(plan, tmp_path / "here")
        assert losses(tmp_path / "run") == losses(tmp_path / "here")

    @staticmethod
    def assert_says_its_masks(plan: Plan, run: Path, printed: dict[str, Any]) -> None:
        schedule = MaskSchedule.of(plan)
        assert schedule is not None
        rows = {row.name: row for row in plan.tensors if row.kept < row.size}
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        size = sum(row.size for row in rows.values())
        for line in lines:
            live = sum(schedule.kept(row, line["step"]) for row in rows.values())
            assert line["density"] == pytest.approx(live / size, rel=1e-12)
            assert 0 <= line.get("mask_changed", 0) <= 1 and line["dead_rows"] >= 0
        weights, masks = supar_cli.weights(run), json.loads((run / "result.json").read_text())["masks"]
        assert printed["masks"] == masks and masks.keys() == rows.keys()
        state = Trainer(plan)
        state.restore(max((run / "checkpoints").glob("step-*")))
        for name, row in rows.items():
            mask = state.capture().masks[name]
            assert masks[name] == mask.fingerprint and mask.count == row.kept
            assert not weights[name][torch.from_numpy(~mask.alive())].any()
            # a live weight may be exactly 0: one that grew after the last step
            assert int((weights[name] != 0).sum()) >= row.kept - schedule.dropped(row, STEPS)
        assert printed["live_parameters"] == plan.live
