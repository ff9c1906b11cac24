"""`supar bench`: its arms compute the same numbers, its documents are whole, and its comparison can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from math import log, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.bench import layer, memory, results, start
from supar_cli.bench import step as bench_step
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.sparse.autotune import LayerCase, draw_inputs, draw_values, interleave
from supar_cli.sparse.linear import Linear
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint, tasks
from supar_cli.training.trainer import Trainer
from tests import measure_run, measure_transfer
from tests.conftest import CHECKOUT, Called, environment

CPU = torch.device("cpu")
SHAPE = (96, 64)
LAYER = ("bench", "layer", "--device", "cpu", "--precision", "float32", "--shape", "96x64", "--tokens", "40")
STEP = ("bench", "step", "--device", "cpu", "--width", "64", "--heads", "2", "--layers", "1", "--context", "16")
ARMS = ["masked", "dense", "dense_bf16", "dense_fp32", "sparse", "sparse_torch", "auto"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that `auto` keeps stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(call: Callable[..., Called], *arguments: str) -> tuple[dict[str, Any], Called]:
    done = call(*arguments, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out), done


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("block", [None, 16])
def test_all_arms_compute_the_same_numbers(block: int | None) -> None:
    """Of Y, of X's gradient and of the live values', against float64; what is asked of bfloat16 is its rounding."""
    case = LayerCase(CPU, torch.float32, tokens=40, block=block)
    mask = layer.draw_mask(SHAPE, 0.25, block)
    assert mask.count == 0.25 * mask.size
    values = draw_values(mask, CPU)
    arms, chosen = layer.make_all(mask, case)
    assert list(arms) == [*ARMS[:-1], *(["block"] if block else []), "auto"] and chosen == "dense"
    x, gradient = (tensor.detach().double() for tensor in draw_inputs(SHAPE, case, torch.float32))
    weight = torch.zeros(SHAPE, dtype=torch.float64)
    alive = torch.from_numpy(mask.alive())
    weight[alive] = values.detach().double()
    for name, arm in arms.items():
        inputs, given = draw_inputs(SHAPE, case, arm.precision)
        y = arm.step(inputs, given).detach()
        by_values = arm.parameter.grad
        assert inputs.grad is not None and by_values is not None
        by_values = by_values[alive] if by_values.shape == mask.shape else by_values
        bound = 1e-5 if arm.precision == torch.float32 else 2e-2
        assert largest(y, x @ weight.T) < bound, name
        assert largest(inputs.grad, gradient @ weight) < bound, name
        assert largest(by_values, (gradient.T @ x)[alive]) < bound, name


def test_an_arm_of_another_mask_is_told_apart() -> None:
    case = LayerCase(CPU, torch.float32, tokens=40)
    mask = layer.draw_mask(SHAPE, 0.25)
    values = draw_values(mask, CPU)
    inputs = draw_inputs(SHAPE, case, torch.float32)
    right, wrong = (
        layer.make("sparse", one, values, case).step(*inputs).detach()
        for one in (mask, Mask.of(np.roll(mask.alive(), 1)))
    )
    assert largest(wrong, right.double()) > 0.1


def test_break_even_is_interpolated_on_logarithmic_axes() -> None:
    # a ratio that falls as density^-1/2 from 8 at 1/1024 is 1 at 1/16
    points = [(2.0**-k, 2.0 ** (k / 2 - 2)) for k in (2, 6, 10)]
    found = layer.break_even(points)["density"]
    assert abs(log(found * 16)) < 1e-3
    for some, word in ((points[1:], "above 0.0156"), (points[:1], "below 0.25")):
        one = layer.break_even(some)
        assert one["density"] is None and word in one["text"] and "every measured density" in one["text"]


def test_layer_document_and_picture(supar_here: Callable[..., Called], tmp_path: Path) -> None:
    flags = ("--rounds", "3", "--density", "1/16,0.25", "--block", "16", "--picture", "layer.png", "-o", "layer.yaml")
    done = supar_here(*LAYER, *flags, "--json")
    result = json.loads((tmp_path / "layer.yaml").read_text("utf-8"))  # `-o FILE` is the file alone, as JSON
    assert (done.status, done.out) == (0, "")
    assert result["kind"] == "supar.bench/v1" and result["density"] == [0.0625, 0.25]
    assert set(result) >= {"bench", "shape", "tokens", "block", "device", "precision", "rounds", "break_even"}
    assert set(result["environment"]) >= {"device", "threads", "torch", "numba", "date", "command"}
    for one in result["densities"]:
        assert sorted(one["arms"]) == sorted([*ARMS, "block"]) and one["auto"] in ("dense", "sparse", "block")
        for arm in one["arms"].values():
            low, high = arm["ratio_quartiles"]
            assert arm["ms"] > 0 and 0 < low <= arm["ratio"] <= high and arm["best_dense"] in ARMS[:4]
        assert one["arms"]["masked"]["ratio_quartiles"] == [1, 1]
        assert one["arms"]["dense_bf16"]["best_dense"] == "dense_bf16"
    assert sorted(result["break_even"]) == ["block", "sparse", "sparse_torch"]
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG"
    assert max(map(len, done.err.splitlines())) <= 80


@pytest.mark.parametrize("name", ["x.foo", "x", "x.yaml"])
def test_a_picture_of_no_known_kind_is_refused_before_anything_is_measured(
    name: str, supar_here: Callable[..., Called], tmp_path: Path
) -> None:
    called = supar_here("bench", "layer", *LAYER[2:], "--picture", name, "-o", "layer.yaml")
    assert called.status == 2 and f"error: --picture {name}: not the name of a picture" in called.err
    assert not (tmp_path / "layer.yaml").exists()


def test_compare_passes_and_fails(supar_here: Callable[..., Called], tmp_path: Path) -> None:
    flags = (*LAYER, "--rounds", "3", "--density", "0.25")
    result, _ = run(supar_here, *flags)
    arms = result["densities"][0]["arms"]

    def doctored(factor: float) -> Called:
        """How the command ends against a file whose ratios of `sparse` are a thousand times better or worse."""
        arm = {key: value for key, value in arms["sparse"].items()}
        arm |= {"ratio": factor * arm["ratio"], "ratio_quartiles": [factor * value for value in arm["ratio_quartiles"]]}
        slow = {**arms["dense"], "ratio": 1e-9, "ratio_quartiles": [1e-9, 1e-9]}
        changed = {name: slow for name in arms} | {"masked": arms["masked"], "sparse": arm}
        (tmp_path / "then.json").write_text(
            json.dumps({**result, "densities": [{**result["densities"][0], "arms": changed}]})
        )
        return supar_here(*flags, "--json", "--compare", "then.json")

    fallen = doctored(1000.0)
    assert fallen.status == 5 and "larger is better" in fallen.err and "error: sparse at 0.25: " in fallen.err
    assert [row["what"] for row in json.loads(fallen.out)["compared"] if row["worse"]] == ["sparse at 0.25"]
    assert doctored(0.001).status == 0


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    supar_here: Callable[..., Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = run(supar_here, *LAYER, "--rounds", "3", "--density", "0.25")
    monkeypatch.setattr(layer, "measure_density", lambda *_: pytest.fail("measured"))
    (tmp_path / "then.json").write_text(json.dumps(result))
    compare = ("--density", "0.25", "--compare", "then.json")
    other = supar_here(*LAYER[:-1], "41", *compare)
    assert other.status == 2 and other.out == ""
    assert other.err == "error: then.json: tokens: is 40 in the earlier result, 41 now; expected the same settings\n"
    assert supar_here("bench", "memory", *compare).err.startswith(
        "error: then.json: bench: is 'layer'; expected memory"
    )
    arms = {"sparse": {"ratio": "fast", "ratio_quartiles": [1, 2]}}
    for broken in ({}, {"density": 0.25, "arms": arms}):
        (tmp_path / "then.json").write_text(json.dumps({**result, "densities": [broken]}))
        called = supar_here(*LAYER, *compare)
        assert called.status == 2 and "then.json: is not a complete document of `supar bench layer`" in called.err
    (tmp_path / "then.json").write_text("[1]")
    assert supar_here(*LAYER, *compare).status == 2
    assert supar_here(*LAYER, "--compare", "none.json").status == 2


@pytest.mark.parametrize(
    ("then", "now", "worse"),
    [
        ((2.0, 1.9, 2.1), (1.7, 1.6, 1.8), True),
        ((2.0, 1.9, 2.1), (1.85, 1.8, 1.89), False),  # apart, but not by a tenth
        ((2.0, 1.7, 2.1), (1.7, 1.6, 1.8), False),  # a tenth, but within the spread
        ((2.0, 1.9, 2.1), (3.0, 2.9, 3.1), False),
    ],
)
def test_a_ratio_is_worse_by_a_tenth_and_beyond_the_spread(then: Any, now: Any, worse: bool) -> None:
    def document_of(kind: str, value: float, low: float, high: float) -> dict[str, Any]:
        if kind == "step":  # there the stored ratio is of times, ours above: less is better
            own = {"ratio": 1 / value, "ratio_quartiles": [1 / high, 1 / low]}
            return {"bench": kind, **own, "masked_dense_ratio": 1.0, "masked_dense_ratio_quartiles": [1.0, 1.0]}
        arms = {"sparse": {"ratio": value, "ratio_quartiles": [low, high]}}
        return {"bench": kind, "densities": [{"density": 0.25, "arms": arms}]}

    for kind, readings in (("layer", layer.readings), ("step", bench_step.readings)):
        rows = results.compare(readings(document_of(kind, *then)), readings(document_of(kind, *now)))
        assert [row["worse"] for row in rows] == ([worse] if kind == "layer" else [False, worse])


def test_memory_is_worse_when_it_rises() -> None:
    def document_of(value: float) -> dict[str, Any]:
        return {"bench": "memory", "arms": {"sparse": {"bytes_per_position": value}}}

    for value, worse in ((1.2, True), (1.05, False), (0.5, False)):
        rows = results.compare(memory.readings(document_of(1.0)), memory.readings(document_of(value)))
        assert rows[0]["worse"] is worse


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("layer", "--shape", "12"), "--shape 12"),
        (("layer", "--density", "2"), "0 < density <= 1"),
        (("layer", "--density", "a"), "--density a"),
        (("layer", "--block", "24"), "--block 24"),
        (("layer", "--shape", "40x64", "--block", "16"), "40×64"),
        (("layer", "--precision", "float8"), "--precision float8: "),
        (("memory", "--density", "0.1,0.2"), "one density"),
        (("step", "--density", "0.5", "--sparsity", "0.5"), "only one of them"),
        (("step", "--engine", "fast"), "--engine"),
        (("step", "--block", "24"), "--block 24: should be 16, 32, 64 or 128"),
        (("step", "--batch-size", "0"), "--batch-size 0: "),
    ],
)
def test_bad_flags_are_named(supar_here: Callable[..., Called], flags: tuple[str, ...], what: str) -> None:
    done = supar_here("bench", *flags)
    assert done.status == 2 and what in done.err and done.out == ""


def test_step_document(supar_here: Callable[..., Called], tmp_path: Path) -> None:
    flags = (*STEP, "--batch-size", "2", "--steps", "3", "--density", "0.25", "--engine", "dense")
    result, done = run(supar_here, *flags)
    before = {"kind", "shape", "batch_size", "sparsity", "device", "precision", "compiled", "steps", "ratio"}
    assert set(result) >= before | {"masked_ms", "dense_ms", "ratio_quartiles"}
    assert result["sparsity"] == 0.75 and result["engines"] == {"dense": 6}
    low, high = result["masked_dense_ratio_quartiles"]
    assert 0 < low <= result["masked_dense_ratio"] <= high and result["masked_dense_ms"] > 0
    assert "plain masked dense" in done.err
    (tmp_path / "then.json").write_text(json.dumps(result))
    assert supar_here(*flags, "-q", "--sparsity", "0.5", "--compare", "then.json").status == 2


def test_what_slows_a_checkpoint_is_measured(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that waits for the disk, as one without a thread would, costs as many steps as it takes."""
    trainer = Trainer(plan_of(), bench_step.RandomTokens(plan_of()))
    trainer.step()
    quick = measure_run.save(trainer, tmp_path / "quick")
    save = checkpoint.Writer.save

    def waits(writer: checkpoint.Writer, *arguments: Any) -> None:
        save(writer, *arguments)
        time.sleep(0.5)
        writer.wait()

    monkeypatch.setattr(checkpoint.Writer, "save", waits)
    slow = measure_run.save(trainer, tmp_path / "slow")
    assert slow["lost"] >= 0.5 > quick["lost"] and slow["returns"] >= 0.5


def test_masked_dense_steps_as_ours_do(plan_of: Callable[..., Plan]) -> None:
    """With SP and the plain step's rate and decay, from equal weights, equal losses; without the masks, others."""
    plan = plan_of(
        "sp",
        hyperparameters={"lr": 3e-4, "init_std": 0.1},
        train={"schedule": "constant", "warmup_fraction": 0.0},
        run={"engine": "dense", "precision": "float32"},
    )
    ours, other = (Trainer(plan, bench_step.RandomTokens(plan)) for _ in range(2))
    masked = bench_step.masked_dense(ours.sparse_model, plan.model)
    unmasked = bench_step.masked_dense(other.sparse_model, plan.model)
    for module in unmasked.modules():
        if isinstance(module, Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
            module.engine = layer.WholeWeight(None)
    steps = [bench_step.plain_step(ours, masked), bench_step.plain_step(ours, unmasked)]
    losses = [(ours.step()[0], *(step() for step in steps)) for _ in range(4)]
    assert max(abs(mine - theirs) for mine, theirs, _ in losses) < 1e-4, losses
    assert max(abs(mine - theirs) for mine, _, theirs in losses) > 1e-3


def test_each_arm_of_a_step_finds_its_batch_made_ahead(plan_of: Callable[..., Plan], monkeypatch: Any) -> None:
    """On CUDA a loader makes the next batch while a step runs: one for all arms would favour the first of them."""
    get, asked = tasks.BatchLoader.get, dict[int, list[int]]()

    def noted(loader: tasks.BatchLoader, step: int) -> tasks.Batch:
        asked.setdefault(id(loader), []).append(step)
        return get(loader, step)

    monkeypatch.setattr(tasks.BatchLoader, "get", noted)
    bench_step.measure(plan_of(run={"engine": "dense"}), rounds=3)
    rounds = 3 + bench_step.WARMUP
    assert [len(steps) for steps in asked.values()] == [rounds] * 3
    assert all(steps == list(range(steps[0], steps[0] + rounds)) for steps in asked.values())


@pytest.mark.skipif(not memory.STATUS.exists(), reason="reads Linux's /proc")
def test_memory_follows_the_live_weights() -> None:
    """A real measurement, each arm in a process: sparse below dense below masked dense, whatever else runs here."""
    arms = memory.measure_arms((2048, 2048), 2**-7, LayerCase(CPU, torch.float32, 64))["arms"]
    peaks = {name: arm["peak_bytes"] for name, arm in arms.items()}
    assert 0 < peaks["sparse"] < peaks["dense"] < peaks["masked"], peaks
    assert arms["masked"]["bytes_per_position"] > 20  # weight, gradient and two moments in float32, and products
    assert arms["masked"]["share_of_masked"] == 1 and arms["sparse"].get("bytes_per_live", nan) > 16


@pytest.mark.skipif(not memory.STATUS.exists(), reason="reads Linux's /proc")
def test_what_a_start_costs_is_measured(supar_here: Callable[..., Called], tmp_path: Path) -> None:
    result, done = run(supar_here, "bench", "start", "--width", "1024", "--engine", "dense")
    narrow, wide = result["starts"]
    assert (narrow["width"], wide["width"]) == (512, 1024) and wide["seconds"] > 0
    assert wide["live"] == 2 * narrow["live"] and wide["times_the_width_before"] > 0
    weights = 12 * (1024**2 - 512**2) * 4  # the dense engine holds float32 for each position of a layer's 12 D² weights
    assert wide["kept_bytes"] - narrow["kept_bytes"] > 0.9 * weights and wide["peak_bytes"] >= wide["kept_bytes"]
    refused = supar_here("bench", "start", "--engine", "auto")
    assert refused.status == 2 and "--engine auto" in refused.err
    assert "start of 1 layer, 16 live weights a neuron, engine dense" in done.err
    rows = start.readings({"starts": [{**wide, "seconds": 9.0}]})
    assert results.compare(start.readings({"starts": [wide]}), rows)[0]["worse"]


def test_runs_alternate_and_those_that_warm_up_are_not_counted() -> None:
    made: list[str] = []
    seconds = interleave({name: partial(made.append, name) for name in "abc"}, 3, CPU, warmup=2)
    assert "".join(made) == "cbaabc" * 2 + "cba" and {
        name: len(spent) for name, spent in seconds.items()
    } == dict.fromkeys("abc", 3)


def test_what_a_run_costs_is_measured(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """By the script, as its user calls it."""
    (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]))
    run = [sys.executable, "-m", "tests.measure_run", str(tmp_path / "plan.yaml"), "3"]
    result = json.loads(subprocess.run(run, capture_output=True, check=True, cwd=CHECKOUT, env=environment()).stdout)
    assert 0 < result["checkpoint_returns_ms"] <= result["checkpoint_lost_ms"] and result["log_every"] == 10
    assert result["checkpoint_bytes"] > 10_000 and result["checkpoint_written_ms"] > 0 and result["step_ms"] > 0
    parallel = result["parallel"]
    assert parallel["processes"] == 2 and min(parallel[f"{name}_ms"] for name in ("alone", "beside", "exchanging")) > 0
    for found, name in (
        (result, "checkpoint"),
        (result, "metrics"),
        (parallel, "over_alone"),
        (parallel, "over_beside"),
    ):
        low, high = found[f"{name}_quartiles"]
        assert 0 < low <= found[name] <= high


def test_what_planning_costs_is_measured() -> None:
    result = measure_transfer.measure(3)
    assert set(result["seconds"]) == set(measure_transfer.COMMANDS) and min(result["seconds"].values()) > 0
    assert result["transfer_over_imports"] > 1
