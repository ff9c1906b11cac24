"""Calibration: the exponent β of the density in rates, fitted for a way of sparse training and verified on fresh seeds."""

from __future__ import annotations

from math import log2
from pathlib import Path
from typing import Any, Unpack

from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments.sweep import sweep
from supar_cli.files import Record
from supar_cli.jobs.clusters import WorkerOptions
from supar_cli.planning.advice import density_exponent
from supar_cli.planning.plan import Plan
from supar_cli.planning.sweep import Arm, Sweep
from supar_cli.planning.updates import METHODS
from supar_cli.training.reporter import Reporter

LEAST_OCTAVES = 2.0  # between the sparse densities, SPEC §9
LARGEST = 2.0  # as documents allow


def calibrate(
    study: Sweep,
    out: str | Path | None = None,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> Record:
    """Fit β = β₀ - γ for the study's masks and updates over its densities, and verify it on fresh seeds.

    Returns `evidence`, which a proxy keeps with the exponent, and the verdicts and tables of both sweeps. β₀ is kept where γ's
    90 % interval holds 0. `out` is the folder of the records, by default `sweeps/NAME-calibration`. Raises SuparError, such as
    UnusableResult where an optimum is not found.
    """
    plan = require_calibratable(study)
    folder, how = Path(out or f"sweeps/{study.name}-calibration"), {"force": force, "reporter": reporter, **workers}
    before = density_exponent(plan)
    found = sweep(with_exponent(study, before), folder, **how)  # type: ignore[arg-type]
    (arm,) = found["arms"]
    if outer := [f"{level['density']:g}" for level in arm["levels"] if not level["bracketed"]]:
        raise UnusableResult(
            f"calibration: no inner optimum at density {', '.join(outer)}; expected a wider axis: -s widen=N"
        )
    low, high = arm["drift_ci90"]
    is_kept = low <= 0 <= high
    exponent = before if is_kept else round(before - arm["drift"], 3)
    if not 0 <= exponent <= LARGEST:
        raise UnusableResult(
            f"calibration: β = {exponent:g}; expected 0 to {LARGEST:g}: something else than the density moves the optimum"
        )
    seeds = study.seeds_at(study.levels[0])
    again = sweep(with_exponent(study, exponent, seeds[-1] + 1), folder / "verification", **how)  # type: ignore[arg-type]
    (fresh,) = again["arms"]
    updates, passed = plan.sparsity.updates, [one["passed"] for one in again["verdicts"] if not one["control"]]
    evidence = {
        "method": "none" if updates is None else updates.method,
        "moments": updates and updates.moments,
        "pattern": plan.sparsity.pattern,
        "steps": plan.train.steps,
        "densities": [level.density for level in study.levels],
        "before": before,
        "drift": arm["drift"],
        "drift_ci90": [low, high],
        "exponent": exponent,
        "exponent_ci90": [before - high, before - low],
        "kept": is_kept,
        "seeds": seeds,
        "fresh_seeds": [seed + len(seeds) for seed in seeds],
        "verified": all(passed),
        "verification": {key: fresh[key] for key in ("drift", "drift_ci90", "regret", "regret_ci90")},
    }
    return {"evidence": evidence, "verdicts": again["verdicts"], "tables": [*found["tables"], *again["tables"]]}


def require_calibratable(study: Sweep) -> Plan:
    """The plan of the study's sparsest size. Raises InputError for a study that tells nothing of β."""
    densities = [level.density for level in study.levels]
    sparse = [density for density in densities if density < 1]
    apart = log2(max(sparse) / min(sparse)) if sparse else 0.0
    if study.arms or study.parameterizations != ["supar"]:
        raise InputError("parameterizations: can't be calibrated; expected supar alone")
    if study.tuned != "lr":
        raise InputError(f"over.{study.tuned}: can't be calibrated; expected over.lr")
    if len(sparse) == len(densities) or apart < LEAST_OCTAVES:
        expected = f"expected 1 and two densities at least {LEAST_OCTAVES:g} octaves apart, such as 1,1/4,1/16"
        raise InputError(f"over.density: {', '.join(f'{density:g}' for density in densities)}; {expected}")
    if study.seeds < 2:
        raise InputError(f"seeds: {study.seeds}; expected at least 2, as one has no interval (4 or more have power)")
    plan = study.plan("supar", study.levels[-1], 0, 0)
    updates = plan.sparsity.updates
    if updates is not None and updates.rates_follow == "end" and updates.start is not None:
        what = "end, where the density moves: the optimum then depends on its path, and no exponent holds"
        raise InputError(f"target.sparsity.updates.rates_follow: {what}; expected the density now first")
    return plan


def with_exponent(study: Sweep, exponent: float, seed: int | None = None) -> Sweep:
    """The study with β in its rates, as a proxy that keeps it would have it, judged by drift and regret; from a seed on."""
    updates, changes = study.target.sparsity.updates, dict[str, Any]()
    if updates is not None:
        changes["updates"] = updates.model_copy(update={"exponent": None})
    target = study.target.model_copy(update={"sparsity": study.target.sparsity.model_copy(update=changes)})
    name = f"{'static masks' if updates is None else METHODS[updates.method]}, β = {exponent:g}"
    return study.model_copy(
        update={
            "parameterizations": [],
            "arms": {name: Arm(marks={"drift": 0.15, "regret": 0.005})},
            "parameterization": study.parameterization.model_copy(update={"density_exponent": exponent}),
            "target": target if seed is None else target.model_copy(update={"seed": seed}),
        }
    )
