"""Resuming: a run that was cut anywhere ends as the uninterrupted one, and no other checkpoint is taken for its own."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import run_directory
from supar_cli.training.trainer import Trainer
from tests.conftest import Called
from tests.test_train import trained

MakePlan = Callable[..., Plan]


class Cut(Exception):
    """Ends a run early, from its evaluation hook, as a killed process would: nothing is written after."""


def cut_at(plan: Plan, directory: Path, step: int) -> None:
    """Train in a directory until the evaluation after `step`, then stop dead."""

    def stop(done: int, loss: float) -> None:
        if done == step:
            raise Cut

    run_directory.begin_run(directory, plan, resume=False, force=False)
    with pytest.raises(Cut):
        Trainer(plan).run(directory, on_evaluation=stop)


def losses(directory: Path) -> list[Any]:
    """(step, loss, validation loss) of a run's metrics."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text("utf-8").splitlines())
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]


def final_state(directory: Path) -> dict[str, torch.Tensor]:
    """Weights, masks and optimizer state of the newest checkpoint."""
    return load_file(max((directory / "checkpoints").glob("step-*")) / "state.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: losses and state."""
    assert losses(one) == losses(other)
    state, other_state = final_state(one), final_state(other)
    assert state.keys() == other_state.keys() and any(key.startswith("optimizer/") for key in state)
    assert [key for key, value in state.items() if not torch.equal(value, other_state[key])] == []


class TestUninterrupted:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"train": {"steps": 12, "batch_size": 4, "eval_every": 1, "optimizer": "sgd"}},
            {"run": {"micro_batch_size": 2}},
            {"model": {"family": "llama", "bias": False, "kv_heads": 1, "tied": False}},
        ],
        ids=["adamw", "sgd", "accumulating", "llama"],
    )
    def test_a_resumed_run_equals_it_bit_for_bit(self, plan_of: MakePlan, tmp_path: Path, changes: Any) -> None:
        train = {"eval_every": 1, **changes.get("train", {})}
        plan = plan_of(**{**changes, "train": train, "run": {**changes.get("run", {}), "checkpoint_every": 5}})
        trained(plan, tmp_path / "whole")
        cut_at(plan, tmp_path / "cut", 8)  # three steps after the checkpoint, which are done again
        assert len(losses(tmp_path / "cut")) == 8
        _, history = trained(plan, tmp_path / "cut", resume=True)
        assert history.resumed_at == 5
        assert_same_run(tmp_path / "cut", tmp_path / "whole")
        results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("cut", "whole")]
        assert [result.pop("resumed_at") for result in results] == [5, 0]
        assert all(result.pop("seconds") > 0 for result in results) and results[0] == results[1]

    def test_the_comparison_sees_a_lost_optimizer_state(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: Any
    ) -> None:
        plan = plan_of(train={"eval_every": 1}, run={"checkpoint_every": 5})
        trained(plan, tmp_path / "whole")
        cut_at(plan, tmp_path / "cut", 8)
        trainer = Trainer(plan)
        restore = Trainer.restore

        def forgetful(trainer: Trainer, path: Path) -> None:
            restore(trainer, path)
            trainer.optimizer.state.clear()

        monkeypatch.setattr(Trainer, "restore", forgetful)
        trainer.run(tmp_path / "cut", resume=True)
        with pytest.raises(AssertionError):
            assert_same_run(tmp_path / "cut", tmp_path / "whole")

    def test_resuming_a_complete_run_changes_nothing(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan, directory = plan_of(), tmp_path / "run"
        trained(plan, directory)
        before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        _, history = trained(plan, directory, resume=True)
        assert history.resumed_at == 12 and len(history.losses) == 12
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before

    def test_another_checkpoint_interval_or_micro_batch_is_the_same_experiment(
        self, plan_of: MakePlan, tmp_path: Path
    ) -> None:
        cut_at(plan_of(run={"checkpoint_every": 6}), tmp_path / "run", 6)
        other = plan_of(run={"checkpoint_every": 2, "micro_batch_size": 1})
        _, history = trained(other, tmp_path / "run", resume=True)
        assert history.resumed_at == 6
        assert len(losses(tmp_path / "run")) == 12


@pytest.fixture
def stored(plan_of: MakePlan, tmp_path: Path) -> tuple[Plan, Path, Path]:
    """A plan, the directory of its run cut at step 9, and that run's checkpoint at step 6."""
    plan = plan_of(train={"eval_every": 3}, run={"checkpoint_every": 6})
    cut_at(plan, tmp_path / "run", 9)
    return plan, tmp_path / "run", tmp_path / "run/checkpoints/step-00000006"


def rewrite_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a checkpoint's tensors and make its manifest fit again."""
    state = load_file(folder / "state.safetensors")
    change(state)
    save_file(state, folder / "state.safetensors")
    rewrite_manifest(folder)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change a manifest and make its hashes fit again."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["files"] = {
        name: "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]
    }
    del manifest["hash"]
    manifest["hash"] = document.content_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestLeftOvers:
    def test_a_half_written_checkpoint_is_ignored(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, good = stored
        aside = directory / "checkpoints/.step-00000008.123"
        shutil.copytree(good, aside)
        (aside / "state.safetensors").write_bytes(b"half")
        (directory / "checkpoints/step-00000007").mkdir()  # a folder without manifest is none either
        assert trained(plan, directory, resume=True)[1].resumed_at == 6

    def test_a_line_cut_in_the_metrics_is_dropped(self, stored: tuple[Plan, Path, Path], tmp_path: Path) -> None:
        plan, directory, _ = stored
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"step": 10, "lo')
        trained(plan, directory, resume=True)
        trained(plan, tmp_path / "whole")
        assert_same_run(directory, tmp_path / "whole")


class TestRefused:
    """A checkpoint that is not this plan's, by name and with exit status 2."""

    def refuse(self, plan: Plan, directory: Path, what: str) -> None:
        with pytest.raises(InputError, match=what) as caught:
            Trainer(plan).run(directory, resume=True)
        assert caught.value.exit_status == 2

    def test_of_another_plan(self, stored: tuple[Plan, Path, Path], plan_of: MakePlan) -> None:
        _, directory, _ = stored
        other = plan_of(train={"eval_every": 3}, hyperparameters={"lr": 0.02}, run={"checkpoint_every": 6})
        self.refuse(other, directory, r"step-00000006: belongs to another plan \(sha256:")
        with pytest.raises(InputError, match=r"run: holds a run of another plan"):
            run_directory.begin_run(directory, other, resume=True, force=False)

    def test_of_other_data(self, stored: tuple[Plan, Path, Path], text_file: Path) -> None:
        plan, directory, folder = stored
        rewrite_manifest(folder, data="sha256:" + "0" * 64)
        self.refuse(plan, directory, r"step-00000006: was trained on other data \(sha256:000000")
        text_file.write_bytes(text_file.read_bytes()[:-1])
        self.refuse(plan, directory, r"data\.hash: .*text\.txt is not the data")

    def test_of_another_mask(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, folder = stored

        def swap(state: dict[str, torch.Tensor]) -> None:
            mask = np.unpackbits(state["mask/blocks.1.attn.k"].numpy())
            one, zero = np.flatnonzero(mask == 1)[0], np.flatnonzero(mask == 0)[0]
            mask[[one, zero]] = mask[[zero, one]]  # as many live weights, one of them elsewhere
            state["mask/blocks.1.attn.k"] = torch.from_numpy(np.packbits(mask))

        rewrite_state(folder, swap)
        self.refuse(plan, directory, r"step-00000006: the mask of blocks\.1\.attn\.k is not the one this plan draws")

    def test_without_a_mask(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, folder = stored
        rewrite_state(folder, lambda state: state.__delitem__("mask/blocks.0.mlp.up"))
        self.refuse(plan, directory, r"the mask of blocks\.0\.mlp\.up")

    def test_with_a_weight_of_another_shape(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, folder = stored
        rewrite_state(folder, lambda state: state.update({"weight/final_norm": torch.ones(3)}))
        self.refuse(plan, directory, r"weight/final_norm is missing or has another shape than \(64,\)")

    def test_rewriting_alone_does_no_harm(self, stored: tuple[Plan, Path, Path], tmp_path: Path) -> None:
        plan, directory, folder = stored
        rewrite_state(folder, lambda state: None)
        trained(plan, directory, resume=True)
        trained(plan, tmp_path / "whole")
        assert_same_run(directory, tmp_path / "whole")


class TestCorrupt:
    """A checkpoint that is damaged: a matter of the environment, exit status 3, the file named."""

    def refuse(self, plan: Plan, directory: Path, what: str) -> None:
        with pytest.raises(SetupError, match=what) as caught:
            Trainer(plan).run(directory, resume=True)
        assert caught.value.exit_status == 3

    @pytest.mark.parametrize("rehash", [False, True], ids=["hash kept", "hash made to fit"])
    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_a_truncated_state(self, stored: tuple[Plan, Path, Path], share: float, rehash: bool) -> None:
        plan, directory, folder = stored
        content = (folder / "state.safetensors").read_bytes()
        (folder / "state.safetensors").write_bytes(content[: math.floor(share * len(content))])
        if rehash:
            rewrite_manifest(folder)
        self.refuse(plan, directory, r"step-00000006/state\.safetensors: a corrupt checkpoint")

    def test_one_flipped_bit(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, folder = stored
        content = bytearray((folder / "state.safetensors").read_bytes())
        content[-5] ^= 1
        (folder / "state.safetensors").write_bytes(content)
        self.refuse(
            plan, directory, r"state\.safetensors: a corrupt checkpoint: its content has changed since it was written"
        )

    def test_a_missing_state(self, stored: tuple[Plan, Path, Path]) -> None:
        plan, directory, folder = stored
        (folder / "state.safetensors").unlink()
        self.refuse(plan, directory, r"state\.safetensors")

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"kind": "supar.checkpoint/v3", "step": "6"}'])
    def test_a_manifest_that_is_none(self, stored: tuple[Plan, Path, Path], text: str) -> None:
        plan, directory, folder = stored
        (folder / "manifest.json").write_text(text)
        self.refuse(plan, directory, r"step-00000006/manifest\.json: a corrupt checkpoint manifest")

    @pytest.mark.parametrize("version", [1, 2])
    def test_one_of_an_older_version(self, stored: tuple[Plan, Path, Path], version: int) -> None:
        plan, directory, folder = stored
        (folder / "manifest.json").write_text(f'{{"kind": "supar.checkpoint/v{version}", "step": 6}}')
        self.refuse(plan, directory, "step-00000006: a checkpoint of an older version")

    def test_deleting_it_continues_from_the_one_before_as_the_message_says(
        self, plan_of: MakePlan, tmp_path: Path
    ) -> None:
        plan = plan_of(train={"eval_every": 1}, run={"checkpoint_every": 3})
        cut_at(plan, tmp_path / "run", 8)
        newest = tmp_path / "run/checkpoints/step-00000006"
        (newest / "manifest.json").write_text("{}")
        self.refuse(plan, tmp_path / "run", "delete the folder to continue from the previous checkpoint")
        shutil.rmtree(newest)
        assert trained(plan, tmp_path / "run", resume=True)[1].resumed_at == 3


class TestDirectory:
    def test_a_run_is_neither_overwritten_nor_mixed(self, plan_of: MakePlan, tmp_path: Path) -> None:
        plan = plan_of()
        trained(plan, tmp_path / "run")
        with pytest.raises(InputError, match=r"holds a run already; expected --resume .* or --force"):
            run_directory.begin_run(tmp_path / "run", plan, resume=False, force=False)
        (tmp_path / "other").mkdir()
        (tmp_path / "other/thesis.txt").write_text("x")
        with pytest.raises(InputError, match=r"other: exists and is not a run directory"):
            run_directory.begin_run(tmp_path / "other", plan, resume=False, force=False)
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match=r"file: is a file"):
            run_directory.begin_run(tmp_path / "file", plan, resume=False, force=False)
        assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["thesis.txt"]

    def test_force_starts_again(self, plan_of: MakePlan, tmp_path: Path) -> None:
        trained(plan_of(), tmp_path / "run")
        other = plan_of(train={"steps": 4})
        run_directory.begin_run(tmp_path / "run", other, resume=False, force=True)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["plan.yaml"]
        Trainer(other).run(tmp_path / "run")
        assert len(losses(tmp_path / "run")) == 4


def test_the_command_ends_with_these_statuses(
    stored: tuple[Plan, Path, Path], supar_here: Callable[..., Called], plan_of: MakePlan, tmp_path: Path
) -> None:
    _, _, folder = stored
    ended = supar_here("train", "run", "--set", "hyperparameters.lr=0.5", "--resume")
    assert ended.status == 2 and "error: run: holds a run of another plan" in ended.err and ended.out == ""
    assert "  hyperparameters.lr: 0.01 → 0.5\n" in ended.err and "train." not in ended.err
    ended = supar_here("train", "run", "--no-resume")
    assert ended.status == 2 and "error: run: holds a run already" in ended.err
    (folder / "state.safetensors").write_bytes(b"")
    ended = supar_here("train", "run", "--resume")
    assert ended.status == 3 and "step-00000006/state.safetensors: a corrupt checkpoint" in ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    huge = plan_of(hyperparameters={"lr": 1e30})
    (tmp_path / "huge.yaml").write_text(document.write([huge.model_dump()]), "utf-8")
    ended = supar_here("train", "huge.yaml", "-o", "huge")
    assert ended.status == 4 and "error: step 2: the loss is" in ended.err and ended.out == ""
