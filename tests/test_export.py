"""`supar export`: every class, against supar's own model; planted faults; what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import supar_cli
from supar_cli.errors import CheckViolated, InputError, SetupError
from supar_cli.exporting import comparison, export
from supar_cli.exporting.stored_model import open_model, open_run
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint
from supar_cli.training.distributed import ALONE
from supar_cli.training.prepare import prepare
from supar_cli.training.state import State
from tests.conftest import plan_from, proxy_fields, real_text

LLAMA = {"family": "llama", "kv_heads": 1}
COMPLETE = {"depth_rule": "completep"}
# format: what is told apart by the model section, and the rules that plan it
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gpt2 tied": ("gpt2", {}, {}),
    "gpt2 untied, biases": ("gpt2", {"tied": False, "bias": True}, {}),
    "gpt2 tied, biases, depth rule, tanh": (
        "gpt2",
        {"bias": True, "activation": "gelu_tanh", "norm_eps": 0.01},
        COMPLETE,
    ),
    "llama untied, GQA": ("llama", {**LLAMA, "tied": False}, {}),
    "llama tied, GQA, head width": ("llama", {**LLAMA, "head_width": 24}, {}),
    "llama tied, biases, depth rule": (
        "llama",
        {**LLAMA, "bias": True, "rope_theta": 500.0, "norm_eps": 0.01},
        COMPLETE,
    ),
    "granite untied, GQA": ("granite", {**LLAMA, "tied": False, "norm_eps": 0.01}, {}),
    "granite tied, biases, depth rule": ("granite", {**LLAMA, "bias": True}, COMPLETE),
    "gpt-neox untied, biases": ("gpt-neox", {"positions": "rope", "tied": False, "bias": True}, {}),
    "gpt-neox tied, depth rule, tanh": (
        "gpt-neox",
        {"positions": "rope", "activation": "gelu_tanh", "rope_theta": 500.0, "norm_eps": 0.01},
        COMPLETE,
    ),
    "mpt tied": ("mpt", {"positions": "alibi", "norm_eps": 0.01}, {}),
    "mpt untied, 3 heads, depth rule": (
        "mpt",
        {"positions": "alibi", "tied": False, "heads": 3, "width": 48},
        COMPLETE,
    ),
}
Runs = Callable[..., Path]


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """`run_of(model, rules, density)`: a run whose values are as if trained: no gain, shift or bias is at its start."""

    def make(model: dict[str, Any], rules: dict[str, Any] | None = None, density: float = 0.25, **own: Tensor) -> Path:
        text = tmp_path / "text.txt"
        text.write_bytes(real_text(4_000))
        shape = {"width": 32, "layers": 1, "heads": 2, "context": 24, "vocab": 256, **model}
        fields = proxy_fields(
            str(text),
            model=shape,
            hyperparameters={"alpha_input": 3.3, "alpha_output": 1.7, "init_std": 0.2},
            parameterization=rules or {},
            target={"width": 2 * shape["width"], "layers": 2, "sparsity": {"density": density}},
        )
        return write_run(plan_from(fields), tmp_path / "run", **own)

    return make


def write_run(plan: Plan, folder: Path, **own: Tensor) -> Path:
    """A run of a plan whose values are as if trained: no gain, shift or bias is at its start."""
    made, generator = prepare(plan, torch.device("cpu")), torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in made.tensors.items():
        spread = tensor.abs().mean().clamp(min=0.05) * 0.3
        values[name] = own.get(name, tensor.detach() + torch.randn(tensor.shape, generator=generator) * spread)
    alone: Any = SimpleNamespace(ranks=ALONE, is_sharded=False, device=torch.device("cpu"))
    with checkpoint.Writer(folder / "checkpoints", plan, "sha256:0", alone) as writer:
        writer.save(7, lambda: State(7, made.masks, values, {}))
    return folder


def hf() -> Any:
    return pytest.importorskip("transformers", reason="transformers loads what is exported")


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_the_class_computes_the_runs_logits(case: str, density: float, run_of: Runs, tmp_path: Path) -> None:
    to, model, rules = CASES[case]
    run, folder = run_of(model, rules, density), tmp_path / "out"
    hf()
    done = supar_cli.export(run, folder, to="auto" if to != "granite" else to)
    assert (done.to, done.step, done.steps) == (to, 7, 12)
    assert done.difference is not None and done.difference <= 1e-5
    assert sorted(one.name for one in folder.iterdir()) == done.files
    eager, report = hf().AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert type(eager).__name__ == done.architecture and not any(report.values())
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = supar_cli.model(run)(tokens)
        assert float((eager(input_ids=tokens).logits - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert_comes_back(run, folder)


def assert_comes_back(run: Path, folder: Path) -> None:
    """The folder, read again and unfolded, has the run's tensors: bits where the factor is a power of two; equal zeros."""
    ours, theirs = open_run(run), open_model(folder)
    assert theirs.decoder.model_copy(update={"multipliers": ours.decoder.multipliers}) == ours.decoder
    for name, factor in ours.factors.items():
        wanted, ratio = ours.read(name), theirs.factors[name] / factor
        found = (theirs.read(name).double() * ratio).float()
        assert torch.equal(found == 0, wanted == 0), name
        if math.frexp(np.float32(ratio))[0] == 0.5:
            assert torch.equal(found, wanted), name
        torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)
    zeros = [int((value == 0).sum()) for value in load_file(folder / "model.safetensors").values() if value.ndim == 2]
    assert sum(zeros) == sum(int((ours.read(name) == 0).sum()) for name in ours.factors if ours.read(name).ndim == 2)


def factor_of(change: Callable[[float], float], *sites: str) -> Any:
    """A fault in the factors of tensors."""

    def plant(contents: Any) -> Any:
        factors = {name: change(f) if name.endswith(sites) else f for name, f in contents.factors.items()}
        assert factors != contents.factors
        return replace(contents, factors=factors)

    return plant


def values_of(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """A fault in the values."""

    def plant(contents: Any) -> Any:
        values = {name: value.detach() for name, value in contents.values.items()}
        return replace(contents, values=values | change(values))

    return plant


def adjacent_pairs(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys as rotations of neighbours want them, in heads of 32."""
    names = [name for name in values if name.endswith(("attn.q", "attn.k"))]
    return {name: values[name].view(-1, 2, 16, 64).transpose(1, 2).reshape(values[name].shape) for name in names}


def swapped(one: str, other: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {name: values[name.replace(one, other)] for name in values if name.endswith(one)}


FAULTS: dict[str, tuple[str, Any]] = {
    "input not folded": ("gpt2 tied", factor_of(lambda _: 1.0, "embedding")),
    "input folded twice": ("gpt2 tied", factor_of(lambda f: f * f, "embedding")),
    "input not folded into positions": ("gpt2 tied", factor_of(lambda _: 1.0, "positions")),
    "tied head unscaled": ("gpt2 tied", factor_of(lambda _: 1.0, "final_norm")),
    "shift before a tied head unscaled": (
        "gpt2 tied, biases, depth rule, tanh",
        factor_of(lambda _: 1.0, "final_norm.bias"),
    ),
    "output not folded": ("llama untied, GQA", factor_of(lambda _: 1.0, "unembedding")),
    "attention not folded": ("llama untied, GQA", factor_of(lambda _: 1.0, "attn.q")),
    "residual not folded": ("llama tied, biases, depth rule", factor_of(lambda _: 1.0, "attn.o", "mlp.down")),
    "residual not in biases": ("llama tied, biases, depth rule", factor_of(lambda _: 1.0, "down.bias")),
    "pairs of neighbours rotated": ("llama untied, GQA", values_of(adjacent_pairs)),
    "pairs of neighbours rotated, gpt-neox": ("gpt-neox untied, biases", values_of(adjacent_pairs)),
    "keys for queries": ("gpt2 untied, biases", values_of(swapped("attn.k", "attn.q"))),
    "keys for values": ("mpt tied", values_of(swapped("attn.v", "attn.k"))),
    "up for gate": ("llama untied, GQA", values_of(swapped("mlp.gate", "mlp.up"))),
    "one gain for another": ("llama untied, GQA", values_of(swapped("mlp_norm", "attn_norm"))),
    "final gain of 1": (
        "gpt-neox tied, depth rule, tanh",
        values_of(lambda v: {"final_norm": torch.ones_like(v["final_norm"])}),
    ),
    "heads not interleaved": (
        "gpt-neox untied, biases",
        lambda contents: replace(contents, tensors=[replace(one, groups=1) for one in contents.tensors]),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_is_written(
    fault: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, plant = FAULTS[fault]
    to, model, rules = CASES[case]
    run, of, seen = run_of(model, rules), export._Contents.of, list[float]()
    hf()
    monkeypatch.setattr(export._Contents, "of", lambda *given: plant(of(*given)))
    judge = comparison.require_equal
    monkeypatch.setattr(comparison, "require_equal", lambda found, *given: (seen.append(found), judge(found, *given)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckViolated, match=r"logits differ from supar's by \S+ of the largest"):
        supar_cli.export(run, tmp_path / "out", to=to)
    assert seen[0] > 1e-3, seen
    assert sorted(tmp_path.iterdir()) == before


def test_rounding_of_a_model_that_magnifies_it_is_no_fault(run_of: Runs) -> None:
    """With sharp attention float32 itself moves logits by more than 1e-5, in supar's model as in the class."""
    model = supar_cli.model(run_of({**LLAMA, "tied": False}))
    comparison.require_equal(1e-5, model, "it")
    with pytest.raises(CheckViolated):
        comparison.require_equal(2e-5, model, "it")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(100)
    comparison.require_equal(2e-5, model, "it")
    with pytest.raises(CheckViolated):
        comparison.require_equal(float("nan"), model, "it")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precisions_are_rounded_from_the_compared_values(dtype: str, run_of: Runs, tmp_path: Path) -> None:
    run = run_of({**LLAMA, "tied": False})
    hf()
    exact = supar_cli.export(run, tmp_path / "exact")
    done = supar_cli.export(run, tmp_path / "rounded", dtype=dtype)
    assert done.difference == exact.difference and done.rounding is not None and 1e-5 < done.rounding < 0.1
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    kind = getattr(torch, dtype)
    assert all(torch.equal(found[name], value.to(kind)) for name, value in wanted.items())
    assert exact.rounding is None and not any("live weights" in note for note in done.notes)


def test_weights_that_a_precision_cannot_hold(run_of: Runs, tmp_path: Path) -> None:
    tiny = torch.full((256, 64), 1e-9)
    tiny[0] = 0.0
    run = run_of({}, embedding=tiny)
    done = supar_cli.export(run, tmp_path / "out", to="safetensors", dtype="float16")
    assert f"{255 * 64:,} live weights are 0 in float16, which has no smaller numbers" in done.notes
    run_of({}, embedding=torch.full((256, 64), 1e6))
    with pytest.raises(InputError, match="embedding: holds values that are not finite in float16"):
        supar_cli.export(run, tmp_path / "big", dtype="float16")
    assert not (tmp_path / "big").exists()


def test_the_plans_own_names_hold_every_model(run_of: Runs, tmp_path: Path) -> None:
    run = run_of({"positions": "alibi", "activation": "swiglu"})
    with pytest.raises(InputError) as raised:
        supar_cli.export(run, tmp_path / "out")
    problems = list(map(str, raised.value.problems))
    assert len(problems) == 5 and all("expected safetensors or npz" in problem for problem in problems)
    assert "MptForCausalLM can't hold activation swiglu (it has gelu)" in problems[4]
    for to in ("safetensors", "npz"):
        assert supar_cli.export(run, tmp_path / to, to=to).difference is None
    ours, again = open_run(run), open_model(tmp_path / "safetensors")
    arrays = np.load(tmp_path / "npz/model.npz")
    assert again.factors == ours.factors and set(arrays) == set(ours.factors)
    for name in ours.factors:
        assert torch.equal(again.read(name), ours.read(name)) and np.array_equal(arrays[name], ours.read(name))


@pytest.mark.parametrize(
    ("to", "model", "reason"),
    [
        ("gpt2", {"kv_heads": 1}, r"GPT2LMHeadModel can't hold kv_heads 2 \(it has 4\); expected safetensors or npz"),
        ("gpt2", {"head_width": 24}, r"can't hold head_width 24 \(it has width / heads\)"),
        ("mpt", {"positions": "alibi", "bias": True}, r"can't hold bias True \(it has False\)"),
        ("mpt", {"positions": "alibi", "ffn_width": 96}, r"can't hold ffn_width 192 \(it has 256\)"),
        (
            "gpt2",
            LLAMA,
            r"norm rmsnorm \(it has layernorm\).*positions rope.*expected llama, granite, safetensors or npz",
        ),
        ("lama", {}, "to: 'lama'; did you mean 'llama'"),
    ],
)
def test_what_a_class_cannot_hold_is_named(to: str, model: Any, reason: str, run_of: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        supar_cli.export(run_of(model), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_export_is_replaced(run_of: Runs, tmp_path: Path) -> None:
    run, folder = run_of({}), tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    supar_cli.export(run, folder, to="npz")
    with pytest.raises(InputError, match="exists; expected another folder, or --force"):
        supar_cli.export(run, folder)
    supar_cli.export(run, folder, to="safetensors", force=True)
    assert (folder / "model.safetensors").exists() and not (folder / "model.npz").exists()
    (folder / "notes.txt").write_text("x")
    (tmp_path / "mine/supar.json").write_text("[1]")
    for kept in (folder, tmp_path / "mine"):
        with pytest.raises(InputError, match=r"notes.txt is of no export of supar, so it is not replaced"):
            supar_cli.export(run, kept, force=True)


def test_without_transformers_it_says_how_to_compare(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of({})
    monkeypatch.setattr(export, "find_spec", lambda _: True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = supar_cli.export(run, tmp_path / "one", dtype="bfloat16")
    assert done.difference is None and "can't be used here: import of transformers halted" in done.compared

    def breaks(*_: Any) -> float:  # as transformers' own imports do
        raise ImportError("Could not import module 'GPT2LMHeadModel'.") from RuntimeError("operator nms does not exist")

    monkeypatch.setattr(export.comparison, "difference", breaks)
    done = supar_cli.export(run, tmp_path / "one", dtype="bfloat16", force=True)
    assert "were not compared: transformers can't be used here: operator nms does not exist" in done.compared
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    done = supar_cli.export(run, tmp_path / "two", dtype="bfloat16")
    assert "`pip install transformers`" in done.compared
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one | two)


@pytest.mark.parametrize(
    "content", ["raise RuntimeError('does not fit')", "raise OSError('does not fit')", "AutoModel = 1"]
)
def test_a_transformers_that_does_not_import_is_as_none(
    content: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "transformers.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path / "broken")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    done = supar_cli.export(run_of({}), tmp_path / "one")
    assert "were not compared: transformers can't be used here: " in done.compared
    sys.modules.pop("transformers", None)


def test_an_interrupted_export_leaves_nothing(run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of({})

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "difference", interrupted)
    monkeypatch.setattr(export, "find_spec", lambda _: True)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        supar_cli.export(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_corrupt_checkpoint_and_a_model_of_ones_own_are_refused(run_of: Runs, tmp_path: Path) -> None:
    run = run_of({})
    file = next(run.glob("checkpoints/*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SetupError, match="its content has changed since it was written"):
        supar_cli.export(run, tmp_path / "out")
    with pytest.raises(InputError, match="has no checkpoint"):
        supar_cli.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestCommand:
    def test_writes_a_record_of_what_was_done(self, run_of: Runs, supar_here: Any, tmp_path: Path) -> None:
        run = run_of({})
        done = supar_here("export", str(run), "--to", "npz", "-o", "out", "--json")
        record = json.loads(done.out)
        assert done.status == 0 and record == json.loads((tmp_path / "out/supar.json").read_text())
        assert record["step"] == 7 and "wrote out: npz, float32, after step 7 of 12" in done.err
        done = supar_here("export", str(run), "--to", "mpt", "-o", "other")
        assert done.status == 2 and done.err.startswith("error: --to mpt: MptForCausalLM can't hold positions learned")

    def test_a_full_disk_leaves_nothing(self, run_of: Runs, supar_here: Any, tmp_path: Path) -> None:
        """No file may become larger than 40 KiB."""
        run_of({})
        before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
        for to in ("safetensors", "npz", "gpt2"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, limits[1]))
            try:
                done = supar_here("export", "run", "-o", "out", "--to", to)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert done.status == 3 and "out: can't be written: " in done.err, done.err
            assert sorted(tmp_path.iterdir()) == before
