"""Sweeps and comparisons from a study to its result: the runs made or read, judged, drawn and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supar_cli.errors import InputError
from supar_cli.experiments import comparison, curves, study_views, transfer_study
from supar_cli.experiments.transfer_study import Arm
from supar_cli.jobs import runs as records
from supar_cli.jobs import workers as execute
from supar_cli.planning.sweep import Sweep
from supar_cli.training.reporter import Reporter


def _measurements(
    study: Sweep, folder: Path, workers: execute.Workers, reporter: Reporter, force: bool
) -> curves.Measurements:
    """The runs of a study's folder. Raises InputError where it holds another study and `force` is not set."""
    first = study.plan(study.parameterizations[0], study.levels[0], 0, study.run_seeds[0])
    records.require_runnable(first, device=workers.is_local)
    records.open_study_folder(folder, study.identity(exclude={"run", "meta"}), force)
    return curves.Measurements(study, folder, workers, reporter)


def run_sweep(
    study: Sweep, folder: Path, workers: execute.Workers, reporter: Reporter, *, force: bool = False
) -> tuple[dict[str, Any], list[Arm]]:
    """Run what the folder has no record of yet, bracket every optimum, judge, draw and write: the result and its arms."""
    with workers:
        measured = _measurements(study, folder, workers, reporter, force)
        found = measured.curves()
        measured.bracket(found)
        measured.share(found)
    arms = transfer_study.analyse(study, found)
    result = records.result(
        "supar.sweep-result/v1",
        study.title or study.name,
        verdicts=transfer_study.verdicts(arms),
        tables=[study_views.table(study, arm) for arm in arms],
        figures=[
            study_views.loss_figure(study, [curve for arm in arms for curve in arm.curves]),
            study_views.optimum_figure(study, arms),
        ],
        parents={"sweep": study.hash()},
        environment=records.environment(workers),
        sweep=study.model_dump(),
        arms=[
            {
                "parameterization": arm.name,
                "control": arm.control,
                "drift": arm.drift,
                "drift_ci95": None if arm.drift_interval is None else list(arm.drift_interval),
                "shift_octaves": arm.shift_octaves,
                "levels": study_views.rows(study, arm),
            }
            for arm in arms
        ],
    )
    records.write_result(folder, result, reporter.log)
    return result, arms


def require_comparison(study: Sweep, name: str) -> None:
    """Raise InputError unless a study is a comparison: one value of the hyperparameter at several sizes."""
    if any(len(study.grid(one).values) != 1 for one in study.parameterizations) or not study.level_axis:
        raise InputError(f"{name}: over: not of a comparison; expected a spec or a proxy, or `supar sweep`")


def run_comparison(
    study: Sweep, folder: Path, workers: execute.Workers, reporter: Reporter, *, force: bool = False
) -> dict[str, Any]:
    """Run every parameterization at the proxy's hyperparameters, and SP re-tuned at every size; write the result."""
    with workers:
        measured = _measurements(study, folder, workers, reporter, force)
        found = measured.curves()
        measured.add((curve, 0.0) for curve in found)
        own = [curve for curve in found if curve.name == "sp"]
        measured.bracket(own)
        measured.share(own)
    rows = comparison.rows(found)
    axis = study.level_axis if study.level_axis in ("width", "layers") else "density"
    result = records.result(
        "supar.compare-result/v1",
        f"{study.title or study.name}: SP, μP and SμPar at transferred hyperparameters",
        verdicts=[],
        tables=comparison.tables(rows, axis),
        figures=[comparison.figure(rows, axis)],
        parents={"sweep": study.hash()},
        environment=records.environment(workers),
        sweep=study.model_dump(),
        levels=rows,
    )
    records.write_result(folder, result, reporter.log)
    return result
