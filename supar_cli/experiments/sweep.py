"""Sweeps, comparisons and the demo: a study's runs, measured, judged, drawn and written. One mechanism, three presets."""

from __future__ import annotations

import json
import time
from math import isfinite
from pathlib import Path
from typing import Unpack

from supar_cli.data import corpus
from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments import script
from supar_cli.experiments.comparison_views import comparison, regret_verdicts
from supar_cli.experiments.curves import RUNS, Curve, first_of, grid_plans, measure_curves
from supar_cli.experiments.dry_run import Part
from supar_cli.experiments.sweep_views import SHORT, curves_figure, has_promise, transfer
from supar_cli.files import Record, naming_write_errors, template, write_file
from supar_cli.jobs import runs
from supar_cli.jobs.clusters import WorkerOptions, check_keywords, make_workers
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep, plan_all, require_comparison
from supar_cli.reporting import figures
from supar_cli.reporting.result import Result, finite, fraction, with_power
from supar_cli.training.reporter import NullReporter, PartReporter, Reporter


def sweep(
    study: Sweep,
    out: str | Path | None = None,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> Record:
    """Sweep a hyperparameter at the study's sizes and judge whether its optimum transfers: the result document.

    `out` is the folder of its records, by default `sweeps/NAME`; no finished run is made again. Raises SuparError.
    """
    return _run("sweep", study, out, force, reporter, workers)


def compare(
    study: Sweep,
    out: str | Path | None = None,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> Record:
    """Compare parameterizations at one value of a hyperparameter, and SP re-tuned at every size: the result document.

    SP has three lines: the proxy's value as the others have it; the value that is best for SP at the first size, re-used
    (what people do); and its value re-tuned at every size (what nobody can afford, and the fair comparison of what is
    possible). `out` is the folder of its records, by default `compare/NAME`. Raises SuparError.
    """
    return _run("compare", study, out, force, reporter, workers)


def _run(
    kind: str, study: Sweep, out: str | Path | None, force: bool, reporter: Reporter | None, options: WorkerOptions
) -> Record:
    """Make the runs that the folder has no record of yet, judge, draw and write."""
    if not isinstance(study, Sweep):
        raise InputError(f"{type(study).__name__}: expected a Sweep")
    check_keywords(sweep, options)
    if is_comparison := kind == "compare":
        require_comparison(study)
    reporter = reporter or NullReporter()
    study = corpus.with_hash(study, reporter.log)
    first, *_ = plan_all(study)
    folder = Path(out or f"{'compare' if is_comparison else 'sweeps'}/{study.name}")
    with make_workers(device=study.run.device, folder=folder / "slurm", **options) as workers:
        runs.require_runnable(first, device=workers.is_local, warn=reporter.warn)
        asked = {**study.identity(exclude={"run", "meta"}), **script.evidence(study.run)}
        began = runs.open_study_folder(folder, asked, force)
        script.compare_scripts(began.get("script", {}), study.run, folder / RUNS, reporter, "--force or another --out")
        curves = measure_curves(study, folder, workers, reporter, ("sp",) if is_comparison else ())
    by_values = [list(filter(isfinite, losses.values())) for curve in curves for losses in curve.losses.values()]
    script.require_different_losses([loss for losses in by_values for loss in losses], study.run, "runs")
    script.warn_of_equal_seeds(by_values, study.run, reporter, "seeds")
    parts = (comparison if is_comparison else transfer)(study, curves)
    # over depth without a rule no parameterization is expected to pass, and none to miss
    if has_promise(study) or study.arms:
        parts["verdicts"] = with_power(parts["verdicts"])
    result = Result(
        kind=f"supar.{kind}-result/v1",
        parents={"sweep": study.hash()},
        environment={
            **runs.environment(workers, runs.Records(folder).by_run.values()),
            **script.evidence(study.run),
        },
        **{"sweep": study.seen_from(folder).model_dump(), **parts},
    )
    figures.write_result(result, folder, reporter.log)
    return result.document()


# octaves from the proxy's rate; WIDEN: beyond them, a factor of a thousand from the transferred rate
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
) -> Record:
    """Tune a tiny dense proxy, transfer it to lower densities under SP and SμPar, and sweep the learning rate there.

    Returns the document that it writes to results.json in the folder `out`. Raises SuparError.
    """
    from supar_cli.experiments import search  # imports Optuna, which sweeps don't need

    started, folder, reporter = time.monotonic(), Path(out), reporter or NullReporter()
    check_keywords(demo, {"jobs": jobs}, steps=steps, trials=trials, seeds=seeds)
    spec = _demo_spec(data, steps, trials, device)
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with make_workers(device=spec.run.device, jobs=jobs, verbose=verbose) as ready:
        model, source = spec.decoder, spec.data.source if spec.data else ""
        shape = f"width {model.width}, {model.layers} layers, {steps} steps on {source}"
        reporter.log(f"1. Tuning a dense proxy: {shape}.")
        swept = len(grid_plans(_demo_study(search.proxy_of(spec, {}), seeds)))
        proxy = search.search(
            spec, str(folder / "proxy.journal"), workers=ready, reporter=PartReporter(reporter, 0, swept, "at least ")
        )
        write_file(folder / "proxy.yaml", document.write([proxy.model_dump()]))
        reporter.log(
            "2. Transferring it to densities 1, 1/4, 1/16 under SP and SμPar; at each, the learning rate is swept\n"
            "   by factors of 2 around the transferred one."
        )
        study = _demo_study(proxy, seeds)
        curves = measure_curves(study, folder, ready, PartReporter(reporter, trials, 0, "at least "))
    for curve in curves:
        ratio = f"2^{round(curve.best - first_of(curve, curves).best)}"
        best = f"best rate ÷ dense {ratio}, loss {curve.mean(curve.best):.4f} ({len(curve.losses)} rates)"
        reporter.log(f"   {SHORT[curve.name]} at density {fraction(curve.level.density)}: {best}")
    regrets = [_regret(curve, first_of(curve, curves)) for curve in curves]
    figures.save(curves_figure(study, curves), folder / "lr_transfer.png")
    result = {
        "kind": "supar.demo/v1",
        "proxy": proxy.hash(),
        "lr": proxy.hyperparameters.lr,
        "seeds": seeds,
        "steps": steps,
        "regrets": regrets,
        "verdicts": [verdict.model_dump() for verdict in with_power(regret_verdicts(study, curves))],
        "curves": [_losses(curve) for curve in curves],
        "meta": {"seconds": round(time.monotonic() - started, 1), "machine": runs.environment(ready)["machine"]},
    }
    write_file(folder / "results.json", json.dumps(result, indent=1) + "\n")
    return result


def demo_parts(data: str | None, steps: int, trials: int, seeds: int, device: str | None) -> list[Part]:
    """What the demo runs, for a dry run. Raises InputError."""
    from supar_cli.experiments import search

    spec = _demo_spec(data, steps, trials, device)
    return [*search.parts(spec), *sweep_parts(_demo_study(search.proxy_of(spec, {}), seeds))]


def sweep_parts(study: Sweep, is_comparison: bool = False) -> list[Part]:
    """What a sweep or a comparison runs, for a dry run. Raises InputError for a study that is no comparison."""
    if is_comparison:
        require_comparison(study)
    return [Part("runs of the sweep's grid", grid_plans(study), "at least ")]


def _demo_spec(data: str | None, steps: int, trials: int, device: str | None) -> Spec:
    """The quickstart's spec on a demo's budget: shorter runs, of fewer tokens."""
    (read,) = document.read_file(str(template("quickstart.yaml")))
    read.data["model"] |= {"context": 64}
    read.data["train"] |= {"steps": steps, "batch_size": 16, "eval_every": max(1, steps // 4), "eval_batches": 8}
    read.data["search"] |= {"trials": trials, "finalists": 1, "seeds": 1, "lr_fit_octaves": []}
    read.data |= {"data": {"source": data or "stdlib"}, "run": {"device": device or "auto"}}
    return corpus.with_hash(parse(Spec, read))


def _demo_study(proxy: Proxy, seeds: int) -> Sweep:
    over = {"lr": f"x:{FIRST_OCTAVE}..{LAST_OCTAVE}/1", "density": [1.0, 1 / 4, 1 / 16]}
    keys = {"model", "hyperparameters", "parameterization", "sparsity", "data", "train", "run"}
    own: Record = {"name": "demo", "over": over, "parameterizations": ["sp", "supar"], "seeds": seeds, "widen": WIDEN}
    return Sweep(kind="supar.sweep/v1", **own, **proxy.model_dump(include=keys))


def _octave(index: float) -> int:
    """Octaves from the proxy's rate, of an index of the demo's grid."""
    return FIRST_OCTAVE + round(index)


def _losses(curve: Curve) -> Record:
    losses = {_octave(index): finite(curve.mean(index)) for index in curve.indices}
    return {"parameterization": curve.name, "density": curve.level.density, "losses": losses}


def _regret(curve: Curve, dense: Curve) -> Record:
    """Where a curve's optimum lies against the dense one's, and the regret of the dense one's rate; None: not finite.

    Raises UnusableResult when training diverged at every rate.
    """
    loss, reused = curve.mean(curve.best), curve.mean(dense.best)
    if finite(loss) is None:
        raise UnusableResult(f"{curve.name} at density {curve.level.density:g}: training diverged at every rate tried")
    return {
        "parameterization": curve.name,
        "density": curve.level.density,
        "optimum_octaves": round(curve.best - dense.best),
        "loss_at_optimum": loss,
        "loss_at_dense_rate": finite(reused),
        "regret": finite(reused - loss),
    }
