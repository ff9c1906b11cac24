"""`transfer --values` on the command line: a run goes on where it ended, from itself and from its exports; files beside plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from supar_cli.planning import advice
from supar_cli.planning.plan import read_plan
from supar_cli.training.trainer import Trainer
from tests.conftest import Called


def test_a_run_goes_on_where_it_ended(proxy_file: Path, tmp_path: Path, supar_here: Callable[..., Called]) -> None:
    proxy_file.write_text(proxy_file.read_text() + "run: {device: cpu, engine: dense}\n")
    assert supar_here("transfer", "--sparsity", "0.75", "--width", "32", "-o", "first.yaml").status == 0
    trained = supar_here("train", "first.yaml", "--name", "first")
    loss = yaml.safe_load(trained.out)["validation_loss"]
    call = ("transfer", "--values", "first", "--masks", "runs/first", "--width", "32", "-o", "again/plan.yaml")
    assert supar_here(*call, "--dry-run").status == 0 and not (tmp_path / "again").exists()
    done = supar_here(*call)
    assert done.status == 0 and "values" not in done.err
    plan = read_plan(tmp_path / "again" / "plan.yaml")
    assert list(advice.of_pruning(plan, "a run", 12)) == []  # it was not pruned before
    assert plan.values.model == "runs/first/checkpoints/step-00000012"
    assert plan.values.path == str(tmp_path / "again" / "values.safetensors")
    assert Trainer(plan).evaluate()["validation_loss"] == loss
    text = supar_here("explain", "again/plan.yaml").out
    assert "values        of values.safetensors, those of the model at" in text and "init_std      rms = " in text
    for alphas in ("4", "0.7"):
        changes = ("-s", f"hyperparameters.alpha_input={alphas}", "-s", "hyperparameters.alpha_output=3", "-f")
        assert supar_here(*call, *changes).status == 0
        again = read_plan(tmp_path / "again" / "plan.yaml")
        assert again.hash() != plan.hash()
        assert Trainer(again).evaluate()["validation_loss"] == pytest.approx(loss, rel=1e-6)


def test_files_of_values_stand_beside_the_plan(
    proxy_file: Path, tmp_path: Path, supar_here: Callable[..., Called]
) -> None:
    assert supar_here("transfer", "--sparsity", "0", "--width", "32", "-o", "first.yaml").status == 0
    assert supar_here("train", "first.yaml", "--name", "first").status == 0
    call = ("transfer", "--values", "runs/first", "--width", "32")
    assert supar_here(*call, "--density", "1/2,1/4", "-o", "two/plan.yaml").status == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "plan.yaml",
        "values-0.safetensors",
        "values-1.safetensors",
    }
    for at, share in enumerate((0.5, 0.25)):
        found = load_file(tmp_path / "two" / f"values-{at}.safetensors")
        assert found["blocks.0.attn.q"].shape == (32 * 32 * share,)
    printed = supar_here(*call, "--density", "1/2", "-o", "-")
    assert yaml.safe_load(printed.out)["values"]["path"] == "values.safetensors"
    kept = (tmp_path / "values.safetensors").read_bytes()
    assert kept == (tmp_path / "two" / "values-0.safetensors").read_bytes()
    (tmp_path / "values.safetensors").write_bytes(b"another file")
    refused = supar_here(*call, "--density", "1/2", "-o", "new.yaml")
    assert refused.status == 2 and "values.safetensors: exists and differs" in refused.err
    assert not (tmp_path / "new.yaml").exists()
    missing = supar_here("transfer", "--values", "nowhere", "--density", "1")
    assert missing.status == 2 and "--values nowhere: is not there" in missing.err
    other = supar_here("transfer", "--values", "first", "--density", "1")
    assert (
        other.status == 2
        and other.err.startswith("error: --values first: runs/first/")
        and "--width 32 --lay" in other.err
    )
