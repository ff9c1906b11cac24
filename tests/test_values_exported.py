"""`transfer --values` on the command line: a run goes on where it ended, from itself and from its exports; files beside plans."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import supar_cli
from supar_cli.errors import InputError, SetupError
from supar_cli.exporting.stored_model import StoredModel, open_model
from supar_cli.planning import advice
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import read_plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, proxy_fields

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")


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
    assert plan.values.path == str(tmp_path / "again" / "plan.values.safetensors")
    assert Trainer(plan).evaluate()["validation_loss"] == loss
    text = supar_here("explain", "again/plan.yaml").out
    assert "values        of plan.values.safetensors, those of the model at" in text and "init_std      rms = " in text
    changes = ("-s", "hyperparameters.alpha_input=0.7", "-s", "hyperparameters.alpha_output=3", "-f")
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
        "plan.values-0.safetensors",
        "plan.values-1.safetensors",
    }
    for at, share in enumerate((0.5, 0.25)):
        found = load_file(tmp_path / "two" / f"plan.values-{at}.safetensors")
        assert found["blocks.0.attn.q"].shape == (32 * 32 * share,)
    printed = supar_here(*call, "--density", "1/2", "-o", "-")
    assert yaml.safe_load(printed.out)["values"]["path"] == "plan.values.safetensors"
    kept = (tmp_path / "plan.values.safetensors").read_bytes()
    assert kept == (tmp_path / "two" / "plan.values-0.safetensors").read_bytes()
    (tmp_path / "new.values.safetensors").write_bytes(b"another file")
    refused = supar_here(*call, "--density", "1/2", "-o", "new.yaml")
    assert refused.status == 2 and "new.values.safetensors: exists and differs" in refused.err
    assert not (tmp_path / "new.yaml").exists()
    for out in ("values.safetensors", "masks.safetensors"):  # the plan never takes the place of its files
        assert supar_here(*call, "--density", "1/2", "-o", out, "-f").status == 0 and read_plan(tmp_path / out)
    masked = supar_here(*call, "--masks", "runs/first", "-o", "new.yaml")
    assert masked.status == 2 and not (tmp_path / "new.masks.safetensors").exists()
    missing = supar_here("transfer", "--values", "nowhere", "--density", "1")
    assert missing.status == 2 and "--values nowhere: is not there" in missing.err
    other = supar_here("transfer", "--values", "first", "--density", "1")
    assert (
        other.status == 2
        and other.err.startswith("error: --values first: runs/first/")
        and "--width 32 --lay" in other.err
    )


GPT2, LLAMA = {"family": "gpt2", "context": 8, "vocab": 256}, {"family": "llama", "context": 8, "vocab": 256}
EXPORTS: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "bias": True},
    "llama": {**LLAMA, "kv_heads": 1},
    "granite": {**LLAMA, "tied": False, "bias": True},
    "gpt-neox": {**GPT2, "positions": "rope", "bias": True},
    "mpt": {**GPT2, "positions": "alibi"},
    "safetensors": {**GPT2, "positions": "alibi", "tied": False, "head_width": 24},
    "npz": {**LLAMA, "kv_heads": 1},
}
POWERS, OTHERS = (2.0, 0.25), (0.6, 3.0)  # α_input and α_output of the run that starts from an export
CASES = [(to, OTHERS) for to in EXPORTS] + [(to, POWERS) for to in ("gpt2", "granite", "npz")]
STILL = 1e-30  # a learning rate that moves no weight


def train(text: Path, run: Path, keys: dict[str, Any], alphas: tuple[float, float], lr: float, **target: Any) -> float:
    """The validation loss of a run of two steps."""
    hyper = {"lr": lr, "init_std": 0.2, "alpha_input": alphas[0], "alpha_output": alphas[1], "weight_decay": 0.1}
    model = {**keys, "width": 16, "layers": 1, "heads": 1} | ({"kv_heads": 1} if keys.get("kv_heads") else {})
    changes = {"model": model, "hyperparameters": hyper, "parameterization": {"depth_rule": "completep"}}
    changes |= {"train": {"steps": 2, "eval_every": 2, "eval_batches": 1}, "target": {"width": 32, "layers": 2}}
    proxy = validate(Proxy, proxy_fields(str(text), **changes, run={"device": "cpu", "engine": "dense"}), "proxy")
    size = {"heads": 2, "kv_heads": keys.get("kv_heads"), "allow_low_wpn": True}
    files = {f"{key}_out": run.parent / f"{run.name}-{key}.safetensors" for key in ("masks", "values")}
    return supar_cli.train(supar_cli.transfer(proxy, **size, **files, **target), run)["validation_loss"]  # type: ignore[no-any-return]


def export(text: Path, folder: Path, to: str) -> float:
    """Train a run, write it into the folder `one` and return its validation loss."""
    loss = train(text, folder / "first", EXPORTS[to], (1.75, 0.3), 0.03, density=0.25)
    supar_cli.export(folder / "first", folder / "one", to=to)
    return loss


@pytest.mark.parametrize(("to", "alphas"), CASES)
def test_an_export_that_is_started_from_is_exported_again(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, alphas: tuple[float, float]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # its logits are compared in another test
    loss, given = export(text_file, tmp_path, to), {"values": tmp_path / "one", "masks": tmp_path / "one"}
    again = train(text_file, tmp_path / "again", EXPORTS[to], alphas, STILL, **given)
    assert again == pytest.approx(loss, rel=1e-6)
    supar_cli.export(tmp_path / "again", tmp_path / "two", to=to)
    one, two = (open_model(tmp_path / name) for name in ("one", "two"))
    own = standard_factors(read_plan(tmp_path / "again" / "plan.yaml").decoder)
    assert standard_factors(read_plan(tmp_path / "first" / "plan.yaml").decoder) != own
    for name in own:
        before, after = ((each.read(name).double() * each.factors[name]).float() for each in (one, two))
        assert torch.equal(before == 0, after == 0)
        assert (after - before).abs().max() <= (0 if alphas == POWERS else 1e-6) * before.abs().max()


def test_multipliers_of_a_folder_that_are_left_out_are_seen(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    loss, given = export(text_file, tmp_path, "granite"), {"values": tmp_path / "one", "density": 1}
    dense = train(text_file, tmp_path / "dense", EXPORTS["granite"], OTHERS, STILL, **given)
    assert dense == pytest.approx(loss, rel=1e-6)
    monkeypatch.setattr(StoredModel, "factors", dict.fromkeys(open_model(tmp_path / "one").factors, 1.0))
    again = train(text_file, tmp_path / "again", EXPORTS["granite"], OTHERS, STILL, **given)
    assert abs(again / loss - 1) > 1e-3


def test_a_damaged_file_of_arrays_is_named(text_file: Path, tmp_path: Path) -> None:
    export(text_file, tmp_path, "npz")
    path = tmp_path / "one" / "model.npz"
    for content, what in (
        (path.read_bytes()[:-400], "model.npz: is not an intact file of arrays"),
        (b"", "model.npz: is not an intact file of arrays"),
    ):
        path.write_bytes(content)
        with pytest.raises(SetupError, match=what):
            open_model(tmp_path / "one")
    np.savez(path, embedding=np.ones((256, 32)))
    with pytest.raises(InputError, match=r"its arrays are not the tensors of plan.yaml"):
        open_model(tmp_path / "one")
    np.savez(path, embedding=np.array([None]))
    with pytest.raises(SetupError, match="Object arrays cannot be loaded"):
        open_model(tmp_path / "one")
