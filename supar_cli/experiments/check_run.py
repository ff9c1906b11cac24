"""A coordinate check from a document to its result: which runs, made or read, judged, drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supar_cli.errors import InputError
from supar_cli.experiments import check_plans, coordinates
from supar_cli.experiments import coordinate_check as verdicts
from supar_cli.experiments.coordinate_check import Sweep, Verdict
from supar_cli.jobs import runs as records
from supar_cli.jobs import workers as execute
from supar_cli.planning.density import Share, literal
from supar_cli.planning.patterns import density_of
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.training.reporter import Reporter

TOKENS = 512  # chosen: of a batch; fewer make single gradients noisy, more make the check slow


@dataclass(frozen=True, slots=True)
class Checked:
    """A check's result document and what it was judged from."""

    result: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def violations(self) -> list[str]:
        return [f"{one.sweep.label}: {one.text()}" for one in self.verdicts if not one.passed]


def sweeps_of(
    wanted: Spec | Proxy | Plan,
    parameterization: ParameterizationName = "supar",
    *,
    widths: Sequence[int] = (),
    densities: Sequence[Share] = (),
    seeds: int = 4,
    steps: int = 10,
    batch_size: int | None = None,
) -> list[Sweep]:
    """The runs that a check of a document needs, those of a plan as it stands. Raises InputError for what can't be planned."""
    for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", 1 if batch_size is None else batch_size)):
        if value < 1:
            raise InputError(f"{name}: {value}; expected a number above 0")
    _require_sizes(widths, densities)
    run = wanted.run.model_copy(update={"precision": "float32", "compile": "off", "micro_batch_size": None})
    wanted = wanted.model_copy(update={"run": run})
    if isinstance(wanted, Plan):
        if widths or densities or parameterization != "supar":
            raise InputError(
                "a plan is checked as it stands; expected a proxy or a spec for widths, densities and others"
            )
        rows = batch_size or max(1, TOKENS // wanted.decoder.context)
        return check_plans.plan_sweeps(wanted, seeds=seeds, steps=steps, batch_size=rows)
    return check_plans.proxy_sweeps(
        wanted,
        parameterization,
        widths=list(widths) or [wanted.model.width * factor for factor in check_plans.WIDTHS],
        densities=list(densities) or _default_densities(wanted.target.sparsity.pattern),
        seeds=seeds,
        steps=steps,
        batch_size=batch_size or max(1, TOKENS // wanted.model.context),
    )


def _require_sizes(widths: Sequence[int], densities: Sequence[Share]) -> None:
    for width in widths:
        if width < 1:
            raise InputError(f"width: {width}; expected widths above 0")
    for density in densities:
        try:
            fits = 0 < literal(density) <= 1
        except ValueError as error:
            raise InputError(f"density: {error}") from None
        if not fits:
            raise InputError(f"density: {density}; expected 0 < density <= 1")


def _default_densities(pattern: str) -> list[Share]:
    """Those of a check that was told none: N:M has a density of its own."""
    own = density_of(pattern)
    return list(check_plans.DENSITIES) if own is None else [1.0, str(own)]


def run_check(
    sweeps: list[Sweep],
    folder: Path,
    workers: execute.Workers,
    reporter: Reporter,
    *,
    max_seeds: int = 16,
    force: bool = False,
) -> Checked:
    """Run what the folder has no record of yet, judge, draw and write result.json.

    Raises InputError where the folder holds another check and `force` is not set.
    """
    first, steps = sweeps[0].plans[0][0], sweeps[0].plans[0][0].train.steps
    records.require_runnable(first, device=workers.is_local)
    # what identifies the question is its first seed: more seeds go on with what is there
    question = {
        "runs": sorted({row[0].hash() for sweep in sweeps for row in sweep.plans}),
        "sweeps": [[sweep.arm, sweep.axis, sweep.sizes] for sweep in sweeps],
    }
    records.open_study_folder(folder, question, force)
    store = records.Records(folder)
    with workers:
        found = _judged(sweeps, store, workers, max_seeds, reporter)
    result = records.result(
        "supar.check-result/v1",
        "Coordinate check: sizes over density and width",
        verdicts=[
            # of a control, whether it keeps the bounds, which it is not to
            {"what": v.sweep.label, "passed": v.passed != v.sweep.control, "control": v.sweep.control, "text": v.text()}
            for v in found
        ],
        tables=[verdicts.table(verdict) for verdict in found if verdict.findings],
        figures=verdicts.pictures(sweeps, store.by_run, steps),
        parents={},
        environment=records.environment(workers),
        notes=[f"{v.sweep.label}: {note}" for v in found for note in v.notes],
    )
    records.write_result(folder, result, reporter.log)
    return Checked(result, found)


def _judged(
    sweeps: list[Sweep], store: records.Records, workers: execute.Workers, max_seeds: int, reporter: Reporter
) -> list[Verdict]:
    """The verdicts, of more seeds where a bound lies within a slope's interval; of no more where another fails for certain."""
    while True:
        plans = {plan.hash(): plan for sweep in sweeps for plan in sweep.runs()}
        calls = {run: (plan,) for run, plan in sorted(plans.items(), key=lambda item: -item[1].parameters)}
        for done, total, record in store.complete(coordinates.measure, calls, workers):
            reporter.progress(done, total, record["losses"][-1] if record["losses"] else float("nan"))
        found = [verdicts.judge(sweep, store.by_run) for sweep in sweeps]
        short = [v for v in found if v.open and len(v.sweep.plans[0]) < max_seeds]
        if not short or any(not v.passed and not v.open for v in found if not v.sweep.control):
            return found
        for verdict in short:
            seeds = min(2 * len(verdict.sweep.plans[0]), max_seeds)
            reporter.log(f"{verdict.sweep.label}: {verdict.text()}; going on to {seeds}")
            verdict.sweep.grow(seeds)
