"""A plan's file of values: what is wrong with it is named, and the plan says what its rows start from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import supar_cli
from supar_cli.errors import InputError, SetupError
from supar_cli.files import file_hash
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.planning.problems import validate
from supar_cli.sparse.mask_files import write_values
from supar_cli.training.prepare import prepare
from tests.conftest import Called, plan_from, proxy_fields, real_text

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")
MASKED, GAIN = "blocks.0.mlp.up", "blocks.0.mlp_norm"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def dense(folder: Path) -> Plan:
    text_file = folder / "text.txt"
    text_file.write_bytes(real_text(20_000))
    train = {"steps": 2, "eval_every": 2, "eval_batches": 1}
    model, target = {"layers": 1}, {"width": 32, "sparsity": 0}
    return plan_from(proxy_fields(str(text_file), model=model, train=train, target=target))


@pytest.fixture(scope="module")
def made(dense: Plan, folder: Path) -> Plan:
    supar_cli.train(dense, folder / "runs" / "dense")
    files: dict[str, Any] = {f"{key}_out": folder / f"{key}.safetensors" for key in ("masks", "values")}
    return supar_cli.prune(folder / "runs" / "dense", density="1/4", **files)


@pytest.fixture
def plan(made: Plan, folder: Path, tmp_path: Path) -> Plan:
    """A pruned plan, with files of its own and the run that it was made from beside it."""
    for name in ("masks.safetensors", "values.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    return made.with_files(str(tmp_path / "masks.safetensors"), str(tmp_path / "values.safetensors"))


def with_values(plan: Plan, change: Callable[[Tensors], Any], rehash: bool = True) -> Plan:
    """The plan with other content in its file of values, and by default the hash of that."""
    path = Path(str(plan.values.path))
    values = load_file(path)
    change(values)
    save_file(values, path)
    source = plan.values.model_copy(update={"hash": file_hash(path)}) if rehash else plan.values
    return plan.model_copy(update={"values": source})


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda v: v.pop(MASKED), f"has no values of {MASKED}"),
    "unknown": (lambda v: v.update(other=torch.ones(1)), "other: the plan has no such tensor"),
    "shape": (lambda v: v.update({GAIN: torch.ones(33)}), rf"{GAIN}: has the shape \[33\]; expected \[32\]"),
    "whole": (
        lambda v: v.update({MASKED: torch.ones(128, 32)}),
        rf"{MASKED}: has the shape \[128, 32\]; expected \[1024\]",
    ),
    "dtype": (
        lambda v: v.update({GAIN: torch.ones(32).double()}),
        f"{GAIN}: holds torch.float64; expected torch.float32",
    ),
    "nan": (lambda v: v[MASKED].__setitem__(3, float("nan")), f"{MASKED}: holds values that are not finite"),
    "inf": (lambda v: v[GAIN].__setitem__(3, float("inf")), f"{GAIN}: holds values that are not finite"),
    "unscaled": (lambda v: v[MASKED].mul_(0.999), f"{MASKED}: measured init std"),
    "another": (lambda v: v[GAIN].mul_(1.001), f"{GAIN}: measured init std"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_wrong_is_named(plan: Plan, change: str) -> None:
    made, what = CHANGES[change]
    with pytest.raises(InputError, match=what):
        prepare(with_values(plan, made), torch.device("cpu"))


def test_several_problems_are_said_at_once(plan: Plan) -> None:
    def change(values: Tensors) -> None:
        for name in ("missing", "unknown", "dtype"):
            CHANGES[name][0](values)

    with pytest.raises(InputError) as found:
        prepare(with_values(plan, change), torch.device("cpu"))
    assert len(found.value.problems) == 3


def test_all_zeros_under_a_mask_are_refused(plan: Plan) -> None:
    rows = [row.model_copy(update={"init_std": 0.0}) if row.name == MASKED else row for row in plan.tensors]
    zeros = with_values(plan.model_copy(update={"tensors": rows}), lambda v: v[MASKED].zero_())
    with pytest.raises(InputError, match=f"{MASKED}: all its live weights start at 0"):
        prepare(zeros, torch.device("cpu"))


def test_other_files_are_refused(plan: Plan) -> None:
    with pytest.raises(InputError, match="is not the plan's file of values"):
        prepare(with_values(plan, lambda v: v[GAIN].mul_(1.0000001), rehash=False), torch.device("cpu"))
    Path(str(plan.values.path)).unlink()
    with pytest.raises(SetupError, match="can't be read"):
        prepare(plan, torch.device("cpu"))


def test_other_masks_are_refused(plan: Plan) -> None:
    path = Path(str(plan.sparsity.source.path))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="is not the plan's mask file"):
        prepare(plan, torch.device("cpu"))


@pytest.mark.parametrize("what", ["masks", "values", "scale"])
def test_every_file_is_of_the_plans_identity(plan: Plan, what: str) -> None:
    other = {"masks": "sparsity", "values": "values", "scale": "values"}[what]
    data = plan.model_dump()
    section = data["sparsity"]["source"] if what == "masks" else data[other]
    section["path"] = "elsewhere"
    moved = validate(Plan, data, "plan")
    assert moved.hash() == plan.hash()
    section.update({"scale": "none"} if what == "scale" else {"hash": "sha256:0"})
    assert validate(Plan, data, "plan").hash() != plan.hash()


DOCUMENTS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d["values"].update(source="random"), "path: is given; expected it with source: file only"),
    (lambda d: d["values"].pop("hash"), "hash: is missing"),
    (lambda d: d.update(values={"scale": "energy"}), "scale: energy; expected it with source: file only"),
    (lambda d: d.update(values={}), r"tensors\[0\]\.init: file; expected it as values\.source says, which is random"),
    (lambda d: d["tensors"][2].pop("init"), r"init_std: .*; expected init_constant|init: normal; expected it as"),
    (lambda d: d["tensors"][0].pop("init_std"), "init_std: expected either init_std or init_constant"),
    (
        lambda d: d["tensors"][0].update(init_std=None, init_constant=1.0),
        "init_std: is missing; expected the root mean",
    ),
]


@pytest.mark.parametrize(("change", "what"), DOCUMENTS)
def test_a_plan_that_contradicts_itself_is_refused(plan: Plan, change: Callable[..., Any], what: str) -> None:
    data = plan.model_dump()
    change(data)
    with pytest.raises(InputError, match=what):
        validate(Plan, data, "plan")


def test_a_plan_of_drawn_values_has_no_new_key(dense: Plan) -> None:
    assert dense.model_dump()["values"] == {"source": "random", "draw": "positions"}
    assert "values" not in dense.experiment()


def test_the_same_values_are_the_same_file(tmp_path: Path) -> None:
    values = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(2)}
    assert write_values(tmp_path / "1", values) == write_values(tmp_path / "2", dict(reversed(values.items())))
    assert torch.equal(load_file(tmp_path / "1")["b"], values["b"])


class TestCommand:
    """A whole round and the next one, by the command line."""

    @pytest.mark.usefixtures("plan")
    def test_from_a_dense_run_to_a_second_round(
        self, dense: Plan, tmp_path: Path, supar: Callable[..., Called], supar_here: Callable[..., Called]
    ) -> None:
        pruned = supar("prune", "dense", "--density", "1/4", "-o", "a/round-1.yaml")
        assert pruned.status == 0 and pruned.out == "" and "next: supar train a/round-1.yaml" in pruned.err
        trained = supar("train", "a/round-1.yaml", "--name", "one", "--json")
        assert trained.status == 0, trained.err
        result = document.read(trained.out, "stdout")[0].data
        plan = read_plan(tmp_path / "a" / "round-1.yaml")
        assert result["plan"] == plan.hash() and result["live_parameters"] == plan.live
        assert plan.parents["plan"] == dense.hash() and len(plan.parents["checkpoint"]) == 71
        assert {row.density for row in plan.tensors if row.role == "hidden"} == {0.25}
        again = supar_here("prune", "one", "--density", "1/8", "--scope", "global", "-o", "a/round-2.yaml")
        assert again.status == 0 and "warning: runs/one: was pruned before" in again.err
        assert supar_here("train", "a/round-2.yaml", "-q", "--name", "two").status == 0

    def test_what_it_says_and_shows(self, plan: Plan, tmp_path: Path, supar_here: Callable[..., Called]) -> None:
        call = ("prune", "runs/dense", "--density", "1/4")
        assert supar_here(*call, "--dry-run").status == 0 and not (tmp_path / "pruned.yaml").exists()
        assert supar_here(*call).status == 0 and supar_here(*call).status == 0  # the same again
        text = " ".join(supar_here("explain", "pruned.yaml", MASKED).out.split())
        assert "of pruned.values.safetensors, live weights scaled by g to keep each tensor's energy" in text
        assert "init_std g·rms = 1." in text and "[D] (measured on the file's values)" in text
        assert "edited" not in text and "η/(m_d·m_ρ) = 0.01/(1·0.25) = 0.04" in text
        assert supar_here("train", "pruned.yaml", "--name", "p", "-q").status == 0
        shown = supar_here("show", "p").err
        assert "*.mlp.up" in shown and supar_here("report", "runs/p", "-o", "page.html").status == 0
        page = (tmp_path / "page.html").read_text()
        assert all(part in page for part in ("parents.checkpoint", "pruned.rewind", str(plan.values.hash)))
        (tmp_path / "pruned.values.safetensors").write_bytes(b"another file")
        assert "pruned.values.safetensors: exists and differs" in supar_here(*call).err
        for flags, what in (
            (("--density", "1/2,1/4"), "--density 1/2,1/4: 2 levels; expected one"),
            (("--density", "1/4", "--sparsity", "1/2"), "--density: cannot be combined with --sparsity"),
            (("--density", "1/4", "--rewind", "1"), "--rewind 1: runs/dense has no checkpoint of step 1"),
            ((), "density: is missing"),
        ):
            refused = supar_here("prune", "dense", *flags)
            assert refused.status == 2 and what in refused.err
