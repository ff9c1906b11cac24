"""The coordinate check: how sizes change with width or density; from a document to its result.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from math import log2, nan
from pathlib import Path
from typing import Any, Unpack

from supar_cli.errors import InputError
from supar_cli.experiments import coordinates, own_coordinates
from supar_cli.experiments.check_plans import SlopeSweep, sweeps_of, with_layout
from supar_cli.experiments.coordinate_bounds import CheckResult, judge
from supar_cli.experiments.coordinates import LINEAR, SHARE, why_too_hot
from supar_cli.experiments.own_coordinates import Function, OwnCode, own_code
from supar_cli.files import Record
from supar_cli.jobs import runs
from supar_cli.jobs.clusters import WorkerOptions, check_keywords, make_workers
from supar_cli.jobs.workers import Call, Workers
from supar_cli.planning.density import Share
from supar_cli.planning.estimate import run_seconds
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.reporting import figures
from supar_cli.reporting.result import TITLES, Figure, Line, Panel, Result, with_power
from supar_cli.training.reporter import NullReporter, Reporter, Tally

UNITS = {"density": "density", "width": "width", "plan": "scale (width ÷ density) from the proxy to the plan"}


LOWER_BY = 4.0  # what rates are divided by; a power of two, so that every rate stays exact
LOWEST = LOWER_BY**-4  # chosen: while rates are lowered, only the base sizes are run


def check(
    subject: Spec | Proxy | Plan,
    *,
    parameterization: ParameterizationName = "supar",
    width: int | Sequence[int] = (),
    density: Share | Sequence[Share] = (),
    seeds: int = 4,
    max_seeds: int = 16,
    steps: int = 10,
    batch_size: int | None = None,
    factory: Function | None = None,
    batches: Function | None = None,
    loss: Function | None = None,
    layout: str | Path | None = None,
    out: str | Path = "check",
    force: bool = False,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> dict[str, Any]:
    """The coordinate check of a proxy's or spec's shape, or of a plan as it stands: its result document.

    Of a model of your own it needs the functions, or their names as `module:function`: `factory(**size)` makes the model,
    `batches(seed, step)` a batch, and `loss(model, batch)` the loss, which the model returns otherwise. `layout` is the
    path of its layout: by default that of the proxy, and for a plan layout.yaml.

    Each of its `verdicts` has `passed` and `control`: `passed` is None if it could not be judged; a control should not
    pass. Where learning rates are too high, all are multiplied by `lr_factor`. `out` is the folder of its records: finished
    runs are not repeated. Raises SuparError.
    """
    if not isinstance(subject, Spec | Proxy | Plan):
        raise InputError(f"{type(subject).__name__}: expected a Spec or Proxy or Plan")
    check_keywords(check, workers, seeds=seeds, max_seeds=max_seeds, steps=steps, batch_size=batch_size)
    if max_seeds < seeds:
        raise InputError(f"max_seeds: {max_seeds}, but {seeds} seeds to begin with; expected as many at least")
    width = [width] if isinstance(width, int) else width
    density = [density] if isinstance(density, float | str) else density
    subject, own = with_layout(subject, None if layout is None else str(layout))
    code = own_code(own, factory, batches, loss)
    _keep_here(code, workers)
    folder, reporter = Path(out), reporter or NullReporter()
    sizes: dict[str, Any] = {"widths": width, "densities": density, "steps": steps, "batch_size": batch_size}
    sweeps_at = partial(sweeps_of, subject, parameterization, seeds=seeds, own=own, **sizes)
    sweeps = sweeps_at()
    first, hashes = sweeps[0].base[0], {plan.hash() for sweep in sweeps for plans in sweep.plans for plan in plans}
    reporter.log(f"{len(hashes)} runs of {steps} steps, {_batch_text(first, code)}")
    with make_workers(device=first.run.device, folder=folder / "slurm", **workers) as ready:
        if code is None:
            runs.require_runnable(first, device=ready.is_local, warn=reporter.warn)
        runs.open_study_folder(folder, _question(sweeps, code), force)
        check_runs = _Runs(folder, ready, reporter, code)
        lr_factor, results = check_runs.lower_rates(sweeps_at)
        if not any(one.unjudged for one in results):
            results = check_runs.judge_all([one.sweep for one in results], max_seeds)
    result = check_runs.result(results, steps, lr_factor, runs.environment(ready, check_runs.by_run.values()))
    figures.write_result(result, folder, reporter.log)
    return result.document()


def _keep_here(code: OwnCode | None, workers: WorkerOptions) -> None:
    """Make one run at a time where functions are given, not names. Raises InputError if more were asked for."""
    if code is None or not code.stays_here:
        return
    jobs = workers["jobs"] = workers.get("jobs") or 1
    if jobs > 1 or workers.get("executor", "local") != "local":
        raise InputError("factory: functions stay in this process; expected their names, module:function, or jobs=1")


def _batch_text(plan: Plan, code: OwnCode | None) -> str:
    if code is not None or plan.data is None:
        return "batches of your own"
    return f"{plan.train.batch_size} {plan.decoder.rows_text}, {plan.data.source}"


def _question(sweeps: list[SlopeSweep], code: OwnCode | None) -> Record:
    """What identifies a check: its first seed at the requested rates; more seeds continue the same folder."""
    hashes = {plan.hash() for sweep in sweeps for plan in sweep.plans[0]}
    found: Record = {"runs": sorted(hashes), "sweeps": [[sweep.name, sweep.axis, sweep.sizes] for sweep in sweeps]}
    return found if code is None else {**found, "code": code.text}


class _Runs:
    """The runs of a check, each made once, and their records by the plan's hash."""

    def __init__(self, folder: Path, workers: Workers, reporter: Reporter, code: OwnCode | None) -> None:
        self._workers, self._reporter, self._code = workers, reporter, code
        # a folder of an earlier version has records without the newer quantities
        self._records = runs.Records(folder, lambda record: not record["steps"] or SHARE in record["steps"][0])
        self.by_run, self.notes = self._records.by_run, list[str]()
        self._tally = Tally(reporter, workers.jobs)

    def _make(self, plans: Iterable[Plan], sweeps: list[SlopeSweep]) -> None:
        """Make the runs of plans, which are some of the sweeps'."""
        all_plans = {plan.hash(): plan for sweep in sweeps for row in sweep.plans for plan in row}
        self._tally.expect({run: run_seconds(plan) for run, plan in all_plans.items() if run not in self.by_run})
        ordered = sorted(plans, key=lambda plan: -plan.parameters)
        calls: dict[str, Call] = {plan.hash(): (plan,) for plan in ordered}
        function: Callable[..., Record] = coordinates.measure
        if self._code is not None:
            function, calls = own_coordinates.measure, {run: (*call, self._code) for run, call in calls.items()}
        for _, _, record in self._records.complete(function, calls, self._workers):
            self._tally.end(record["run"], record["losses"][-1] if record["losses"] else nan)

    def lower_rates(self, sweeps_at: Callable[..., list[SlopeSweep]]) -> tuple[float, list[CheckResult]]:
        """Lower all rates until no base's rate is too high; return the factor and the results. At LOWEST the results can't be judged."""
        factor = 1.0
        while True:
            sweeps = sweeps_at(lr_factor=factor)
            own = [sweep for sweep in sweeps if not sweep.is_control]
            self._make((plan for sweep in own for plan in sweep.base), sweeps)
            reasons = [(sweep, why_too_hot([self.by_run[plan.hash()] for plan in sweep.base])) for sweep in own]
            hot = [f"{sweep.label}: at its base {why}" for sweep, why in reasons if why]
            lr = f"lr {sweeps[0].base[0].hyperparameters.lr:.3g} is too high"
            if not hot:
                return factor, [CheckResult(sweep) for sweep in sweeps]
            if factor <= LOWEST:
                return factor, [CheckResult(sweep, unjudged=f"{lr}: {hot[0]}") for sweep in own]
            self.notes.append(f"{lr} for slopes to be judged ({'; '.join(hot)}); all rates are divided by {LOWER_BY:g}")
            self._reporter.log(self.notes[-1])
            factor /= LOWER_BY

    def judge_all(self, sweeps: list[SlopeSweep], max_seeds: int) -> list[CheckResult]:
        """The results; more seeds are run while a bound lies within a slope's interval, unless another bound is certainly exceeded."""
        while True:
            self._make((plan for sweep in sweeps for plans in sweep.plans for plan in plans), sweeps)
            results = [judge(sweep, self.by_run) for sweep in sweeps]
            short = [one for one in results if one.inconclusive and len(one.sweep.plans) < max_seeds]
            if not short or any(not (one.passed or one.inconclusive) for one in results if not one.sweep.is_control):
                return results
            for one in short:
                seeds = min(2 * len(one.sweep.plans), max_seeds)
                self._reporter.log(f"{one.sweep.label}: {one.text}; continuing with {seeds} seeds")
                one.sweep.grow(seeds)

    def result(self, results: list[CheckResult], steps: int, lr_factor: float, environment: Record) -> Result:
        """The result document of the sweeps' results."""
        missing = [text for record in self.by_run.values() for text in record.get("not_measured", ())]
        notes = [f"{one.sweep.label}: {note}" for one in results for note in one.notes]
        return Result(
            kind="supar.check-result/v1",
            title="Coordinate check: sizes over density and width",
            verdicts=with_power([one.verdict for one in results]),
            tables=[one.table for one in results if one.findings],
            figures=list(_figures([one.sweep for one in results if not one.unjudged], self.by_run, steps)),
            parents={},
            environment=environment,
            **Record(notes=[*self.notes, *dict.fromkeys(missing), *notes], lr_factor=lr_factor),
        )


def _figures(sweeps: list[SlopeSweep], by_run: dict[str, Record], steps: int) -> Iterator[Figure]:
    """Sizes over density or width, as the paper's Figure 5: a panel for each parameterization, a line for each step."""
    shown = sorted({1, 2, 1 + steps // 2, steps})
    units = {"activation": "mean |Y|", "gain": "|dL/dX| ÷ |dL/dY|", "update": "mean |ΔY|"}
    for axis, quantity in product(dict.fromkeys(sweep.axis for sweep in sweeps), LINEAR):
        panels = []
        for one in (sweep for sweep in sweeps if sweep.axis == axis):
            lines = [_line(one, by_run, quantity, step) for step in shown]
            panels.append(Panel(title=TITLES.get(one.name, one.name), vertical=None, lines=lines))
        name, x, y = f"{quantity}_over_{axis}", UNITS[axis], units[quantity]
        title = f"Mean |{quantity}| of the hidden linears over {axis}, geometric mean over linears and seeds"
        yield Figure(name=name, title=title, x=x, y=y, x_log2=True, y_log2=True, y_limits=None, panels=panels)


def _line(sweep: SlopeSweep, by_run: dict[str, Record], quantity: str, step: int) -> Line:
    points: dict[float, float | None] = {}
    for z, size in enumerate(sweep.sizes):
        records = [by_run[plans[z].hash()]["steps"] for plans in sweep.plans]
        values = [v for steps in records if len(steps) >= step for v in steps[step - 1][quantity].values() if v]
        points[size] = 2.0 ** (sum(map(log2, values)) / len(values)) if values else None
    return Line.through(f"step {step}", points)
