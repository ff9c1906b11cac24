"""Dry runs: what each command would run, with its time; nothing is written, and no device is needed but this machine's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.data import corpus
from supar_cli.experiments import check_plans, dry_run
from supar_cli.planning import estimate
from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.training import timing
from supar_cli.training.trainer import Trainer

from .conftest import Called
from .test_sweep import sweep_of

Supar = Callable[..., Called]
TUNING = (
    "-s",
    "search.trials=3",
    "-s",
    "search.seeds=2",
    "-s",
    "search.finalists=1",
    "-s",
    "search.lr_fit_octaves=[1.0]",
)
SHAPE = (
    "--width",
    "32",
    "--heads",
    "1",
    "--context",
    "16",
    "--steps",
    "5",
    "-s",
    "train.batch_size=2",
    "--data",
    "text.txt",
)
# what a command would run, and the runs of each of its parts
COMMANDS = {
    "tune-proxy": ((*SHAPE, *TUNING), "at most 3 trials, at most 1 finalist runs, at most 2 lr fit runs; 30 steps"),
    "sweep": (("--seeds", "2", "--over", "lr=0.01,0.02", "--over", "density=1,0.5"), "at least 24 runs of the sweep's grid"),
    "compare": (("--seeds", "1", "--sparsity", "0,0.5"), "at least 6 runs of the sweep's grid"),
    "check": (("--width", "32,64", "--density", "1,0.5", "--seeds", "3", "--steps", "4"), " runs of the check"),
    "demo": (("--data", "text.txt", "--steps", "8", "--trials", "2"), "at most 2 trials, at least 30 runs of the sweep's grid"),
}  # fmt: skip


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, which is to stay empty."""
    folder = tmp_path.parent / f"{tmp_path.name}-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(autotune, "MIN_MULTIPLY_ADDS", 1)  # every engine is measured
    yield folder
    assert not (folder / "supar").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_runs_memory_and_time(
    command: str,
    supar_here: Supar,
    proxy_file: Path,
    unchanged: Any,
    caches: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "run", None)  # nothing is trained
    unchanged()
    flags, runs = COMMANDS[command]
    called = supar_here(command, *flags, "--device", "cpu", "--jobs", "1", "--dry-run")
    assert (called.status, called.out) == (0, ""), called.err
    said = called.err
    assert runs in said and "memory of weights" in said and "H200/H100" in said and "MiB" in said
    (here,) = [line for line in said.splitlines() if line.startswith("here")]
    assert here.startswith("here, by timing a few steps: at ") and here[-1] in "smh"


def test_engines_that_are_timed_are_remembered_otherwise(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "MIN_MULTIPLY_ADDS", 1)
    plan = plan_of(target={"sparsity": {"density": 0.5}})
    timing.time_run(plan)
    assert not (tmp_path / "cache").exists()
    Trainer(plan)
    assert (tmp_path / "cache").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is planned for is here")
def test_the_gpu_that_it_plans_for_is_not_needed(supar_here: Supar, proxy_file: Path, unchanged: Any) -> None:
    unchanged()
    for arguments in (("sweep", "--over", "lr=0.01,0.02"), ("check",), ("compare",)):
        called = supar_here(*arguments, "--device", "cuda", "--dry-run")
        assert called.status == 0 and "here: not timed: run.device: cuda" in called.err


def test_what_can_t_be_run_is_refused(supar_here: Supar, proxy_file: Path, unchanged: Any) -> None:
    unchanged()
    for arguments in (
        ("compare", "-s", "over.lr=x:-1..1/1"),
        ("check", "--width", "32,50"),
        ("demo", "--data", "no.txt"),
    ):
        called = supar_here(*arguments, "--dry-run")
        assert (called.status, called.out) == (2, "") and "error: " in called.err


def test_what_is_too_large_here_is_not_timed(supar_here: Supar, proxy_file: Path, unchanged: Any) -> None:
    unchanged()
    called = supar_here("sweep", "--over", "lr=0.01,0.02", "--width", "16384", "--dry-run")
    assert called.status == 0 and "here: not timed, as three steps and an evaluation may take" in called.err


def test_without_numba_it_says_so(supar_here: Supar, proxy_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install numba" not in supar_here("transfer", "--dry-run").err
    monkeypatch.setattr(estimate, "find_spec", lambda name: None)
    assert "once numba is installed: `pip install numba`" in supar_here("transfer", "--dry-run").err


@pytest.mark.parametrize("jobs", [1, 3])
def test_time_is_that_of_all_runs(jobs: int, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that take 8 s when dense and 2 s when sparse: those of each part share the workers."""

    def timed(plan: Plan, step_of: Any = None) -> tuple[float, float]:
        return (8.0 if plan.sparsity.density == 1 else 2.0), 0.0

    class Here(dry_run.Workers):  # type: ignore[name-defined, misc]
        results = lambda self, function, calls: ((i, function(*call)) for i, call in enumerate(calls))  # noqa: E731
        submit = wait = answer = cancel = None

    monkeypatch.setattr(dry_run, "time_run", timed)
    monkeypatch.setattr(dry_run, "make_workers", lambda **options: Here(options["jobs"]))
    monkeypatch.chdir(text_file.parent)
    study = corpus.with_hash(sweep_of(over={"lr": "0.01,0.02", "density": "1,0.5"}, seeds=3))
    dense, sparse = ([plan for plan in _grid(study) if plan.sparsity.density == density] for density in (1, 0.5))
    assert len(dense) == len(sparse) > 4
    parts = [dry_run.Part("first", dense, "at most "), dry_run.Part("then", sparse)]
    said = dry_run.time_here(parts, time.monotonic(), jobs=jobs)
    seconds = len(dense) * 10.0 / jobs
    assert said.endswith(f": at most {estimate.duration(seconds)}") or said.endswith(
        f"{estimate.duration(seconds + 1)}"
    )
    assert (f", {jobs} runs at a time" in said) == (jobs > 1)


def _grid(study: Any) -> list[Plan]:
    from supar_cli.experiments.curves import grid_plans

    return grid_plans(study)


def test_a_checks_steps_are_timed_with_what_they_measure(plan_of: Callable[..., Plan]) -> None:
    from supar_cli.experiments import coordinates

    step = coordinates.measured_step(plan_of())
    first, second = step(), step()
    assert isinstance(first, tuple) and set(first[1]) >= {"activation", "update"} and first != second
    plans = [plan_of(), plan_of(train={"seed": 1}), plan_of()]
    sweep = check_plans.SlopeSweep("supar", "width", {}, plans=[plans])
    assert [len(part.plans) for part in check_plans.parts([sweep])] == [2]  # each once


SIZES = [(32, 1, 16, 2), (64, 2, 32, 4), (128, 2, 64, 8), (64, 6, 16, 4)]


@pytest.mark.parametrize(("width", "layers", "context", "batch"), SIZES)
def test_small_models_are_not_taken_for_their_flops(
    width: int, layers: int, context: int, batch: int, plan_of: Callable[..., Plan]
) -> None:
    """CPU time of one thread, which other processes don't lengthen much; the estimate is for two cores of another machine."""
    shape = {"width": width, "layers": layers, "heads": 1, "context": context}
    plan = plan_of(
        model=shape,
        target={"width": width},
        train={"steps": 100, "batch_size": batch, "eval_every": 100, "eval_batches": 1},
    )
    trainer, threads = Trainer(plan), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer.step()
        began_s = time.process_time()
        for _ in range(10):
            trainer.step()
        step_s = (time.process_time() - began_s) / 10
    finally:
        torch.set_num_threads(threads)
    assert 1 / 4 < estimate.run_seconds(plan) / 100 / step_s < 4
    by_flops_s = plan.flops_per_token * batch * context / estimate.RATES["2 CPU cores"]  # the control: what it was
    assert width > 32 or by_flops_s < step_s / 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1s"),
        (44.6, "45s"),
        (600, "10m"),
        (12_000, "3h20m"),
        (5 * 86_400, "5 days"),
        (1739.9 * 86_400, "4.8 years"),
    ],
)
def test_durations_are_round(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text
