"""Sweeps, comparisons and the demo: a study's runs, measured, judged, drawn and written. One mechanism, three presets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_cli import files
from supar_cli.data import corpus
from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments import optima, search, sweep_views
from supar_cli.experiments.curves import Curve, first_of, measure_curves
from supar_cli.jobs import runs
from supar_cli.jobs.workers import CPU_JOBS, Workers, workers
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep, plan_all, require_comparison
from supar_cli.reporting.result import Result, finite, fraction
from supar_cli.training.reporter import NullReporter, Reporter


@dataclass(frozen=True, slots=True)
class Preset:
    """What a command asks of a study: which curves are searched for their optimum, and what its result shows of all."""

    kind: str
    folder: str
    title: str  # {} is the study's
    searched: tuple[str, ...]  # parameterizations; none: all
    views: Callable[[Sweep, list[Curve]], dict[str, Any]]


SWEEP = Preset("supar.sweep-result/v1", "sweeps", "{}", (), sweep_views.transfer)
COMPARE = Preset(
    "supar.compare-result/v1",
    "compare",
    "{}: SP, μP and SμPar at transferred hyperparameters",
    ("sp",),
    sweep_views.comparison,
)


def sweep(
    study: Sweep,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    verbose: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Sweep a hyperparameter at the study's sizes and judge whether its optimum transfers: the result document.

    `out` is the folder of its records, by default `sweeps/NAME`; no finished run is made again. Raises SuparError.
    """
    return _run(SWEEP, study, out, force, reporter, executor, jobs=jobs, settings=executor_set, verbose=verbose)


def compare(
    study: Sweep,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    verbose: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compare parameterizations at one value of a hyperparameter, and SP re-tuned at every size: the result document.

    SP has three lines: the proxy's value as the others have it; the value that is best for SP at the first size, re-used
    (what people do); and its value re-tuned at every size (what nobody can afford, and the fair comparison of what is
    possible). `out` is the folder of its records, by default `compare/NAME`. Raises SuparError.
    """
    return _run(COMPARE, study, out, force, reporter, executor, jobs=jobs, settings=executor_set, verbose=verbose)


def _run(
    preset: Preset,
    study: Sweep,
    out: str | Path | None,
    force: bool,
    reporter: Reporter | None,
    executor: str,
    **how: Any,
) -> dict[str, Any]:
    """Make the runs that the folder has no record of yet, judge, draw and write."""
    if not isinstance(study, Sweep):
        raise InputError(f"{type(study).__name__}: expected a Sweep")
    if preset is COMPARE:
        require_comparison(study)
    study = corpus.with_hash(study)
    first, *_ = plan_all(study)
    folder, reporter = Path(out or f"{preset.folder}/{study.name}"), reporter or NullReporter()
    with _workers(executor, study.run.device, folder, **how) as ready:
        runs.require_runnable(first, device=ready.here)
        runs.open_study_folder(folder, study.identity(exclude={"run", "meta"}), force)
        curves = measure_curves(study, folder, ready, reporter, preset.searched)
    result = Result(
        kind=preset.kind,
        title=preset.title.format(study.title or study.name),
        parents={"sweep": study.hash()},
        environment=runs.environment(ready),
        **{"sweep": study.model_dump(), **preset.views(study, curves)},
    )
    result.write(folder, reporter.log)
    return result.document()


def _workers(executor: str, device: str, folder: Path, **how: Any) -> Workers:
    return workers(executor, device=device, on_cpu=CPU_JOBS, folder=folder / "slurm", **how)


DENSITIES = (1.0, 1 / 4, 1 / 16)
# octaves from the proxy's rate; the last: how far beyond them, a factor of a thousand from the transferred rate
FIRST_OCTAVE, LAST_OCTAVE, WIDEN = -2, 2, 8


def demo(
    data: str | None = None,
    *,
    steps: int = 120,
    trials: int = 6,
    seeds: int = 1,
    jobs: int | None = None,
    device: str | None = None,
    out: str | Path = "demo",
    verbose: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Tune a tiny dense proxy, transfer it to lower densities under SP and SμPar, and sweep the rate there.

    Returns the document that it writes to results.json in the folder `out`. Raises SuparError.
    """
    started, folder, reporter = time.monotonic(), Path(out), reporter or NullReporter()
    spec = _demo_spec(data, steps, trials, device)
    with files.naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _workers("local", spec.run.device, folder, jobs=jobs, verbose=verbose) as ready:
        shape = f"width {spec.model.width}, {spec.model.layers} layers"
        reporter.log(f"1. Tuning a dense proxy: {shape}, {steps} steps on {spec.data.source}.")
        proxy = search.search(spec, str(folder / "proxy.journal"), workers=ready, reporter=reporter)
        files.write_file(folder / "proxy.yaml", document.write([proxy.model_dump()]))
        reporter.log(
            "2. Transferring it to densities 1, 1/4, 1/16 under SP and SμPar; at each, the learning rate is swept\n"
            "   by factors of 2 around the transferred one."
        )
        study = _demo_study(proxy, seeds)
        curves = measure_curves(study, folder, ready, reporter)
    for curve in curves:
        size = f"{optima.SHORT[curve.name]} at density {fraction(curve.level.density)}"
        best = f"η·2^{_octave(curve.best)}, loss {curve.mean(curve.best):.4f}"
        reporter.log(f"   {size}: best at {best} ({len(curve.losses)} rates)")
    result = {
        "kind": "supar.demo/v1",
        "proxy": proxy.hash(),
        "lr": proxy.hyperparameters.lr,
        "seeds": seeds,
        "steps": steps,
        "regrets": [_regret(curve, first_of(curve, curves)) for curve in curves],
        "curves": [_demo_curve(curve) for curve in curves],
        "meta": {
            "seconds": round(time.monotonic() - started, 1),
            "machine": runs.environment(ready)["machine"],
        },
    }
    sweep_views.loss_figure(study, curves).save(folder / "lr_transfer.png")
    files.write_file(folder / "results.json", json.dumps(result, indent=1) + "\n")
    return result


def _demo_spec(data: str | None, steps: int, trials: int, device: str | None) -> Spec:
    """The quickstart's spec on a demo's budget: shorter runs, of fewer tokens."""
    (read,) = document.read_file(str(files.template("quickstart.yaml")))
    read.data["model"] |= {"context": 64}
    read.data["train"] |= {"steps": steps, "batch_size": 16, "eval_every": max(1, steps // 4), "eval_batches": 8}
    read.data["search"] |= {"trials": trials, "finalists": 1, "seeds": 1, "lr_fit_octaves": []}
    for section, key, value in (("data", "source", data), ("run", "device", device)):
        if value is not None:
            read.data.setdefault(section, {})[key] = value
    return corpus.with_hash(parse(Spec, read))


def _demo_study(proxy: Proxy, seeds: int) -> Sweep:
    keys = {"model", "hyperparameters", "parameterization", "sparsity", "data", "train", "run"}
    return Sweep(
        kind="supar.sweep/v1",
        name="demo",
        over={"lr": f"x:{FIRST_OCTAVE}..{LAST_OCTAVE}/1", "density": list(DENSITIES)},
        parameterizations=["sp", "supar"],
        seeds=seeds,
        widen=WIDEN,
        **proxy.model_dump(include=keys),
    )


def _octave(index: float) -> int:
    """Octaves from the proxy's rate, of an index of the demo's grid."""
    return FIRST_OCTAVE + round(index)


def _demo_curve(curve: Curve) -> dict[str, Any]:
    losses = {_octave(index): finite(curve.mean(index)) for index in curve.indices}
    return {"parameterization": curve.name, "density": curve.level.density, "losses": losses}


def _regret(curve: Curve, dense: Curve) -> dict[str, Any]:
    """Where a curve's optimum lies against the dense one's, and the regret of the dense one's rate; None: not finite.

    Raises UnusableResult when training diverged at every rate.
    """
    loss, reused = curve.mean(curve.best), curve.mean(dense.best)
    if loss != finite(loss):
        raise UnusableResult(f"{curve.name} at density {curve.level.density:g}: training diverged at every rate tried")
    return {
        "parameterization": curve.name,
        "density": curve.level.density,
        "optimum_octaves": round(curve.best - dense.best),
        "loss_at_optimum": loss,
        "loss_at_dense_rate": finite(reused),
        "regret": finite(reused - loss),
    }
