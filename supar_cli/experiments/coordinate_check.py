"""The coordinate check: how sizes change with width or density, compared with bounds; from a document to its result.json.

Arrays: R seeds, Z points of a sweep, S steps, N names (linears, attentions or the logits) of one quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import inf, isfinite, log2, nan
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.experiments import coordinates
from supar_cli.experiments.check_plans import SlopeSweep, sweeps_of
from supar_cli.experiments.coordinates import LINEAR, SHARE, log_sizes, why_too_hot
from supar_cli.experiments.statistics import half_widths, log_slopes
from supar_cli.files import Record
from supar_cli.jobs import runs
from supar_cli.jobs.clusters import WorkerOptions, check_keywords, make_workers
from supar_cli.jobs.workers import Workers
from supar_cli.planning import layout
from supar_cli.planning.density import Share
from supar_cli.planning.estimate import run_seconds
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.reporting import figures
from supar_cli.reporting.result import TITLES, Figure, Line, Panel, Result, Table, Verdict, with_power
from supar_cli.training.reporter import NullReporter, Reporter, Tally

# Bounds on |slope|. Right parameterizations stay below them at such sizes, and controls exceed CONTROL in the median.
# measured: the quickstart's shape over width 128 to 1024 (the harder axis), 11 seeds. Chance of a false alarm at 4 seeds:
# activations of linears that read a norm 6e-10; of those that write the residual stream .04, 1e-4 at 16 seeds; logits 2e-8.
# The gain of attn.k has .030 ± .007 at narrow ends, which a bound of .03 would take for a fault.
STEP_1 = {"activation": 0.03, "gain": 0.05, "attention": 0.05, "logits": 0.03}
WRITERS = 0.05  # at step 1 of activations that are added to the residual stream (o, down), which are noisier
MEDIAN = 0.15  # median over the linears, at every step
EACH = {"density": 0.3, "width": 0.5, "plan": 0.5}  # of each linear, at every step; narrow ends bend it over width
# Of the head's share of Δlogits in the mean over steps, as single steps are noisy; of the final norm's it is EACH.
# measured, as above at a 4th of the rate, 4 seeds: head -.009 (SE .009), final norm -.10 (.03). A head's rate m_d times too large
# has .69 over width 128 to 512 (untied), a final norm's .83 (tied), of which the sum of both shares hides all: .00.
HEAD = 0.08
CONTROL = 0.4
UNITS = {"density": "density", "width": "width", "plan": "scale (width ÷ density) from the proxy to the plan"}

LOWER_BY = 4.0  # what rates are divided by; a power of two, so that every rate stays exact
LOWEST = LOWER_BY**-4  # chosen: while rates are lowered, only the base sizes are run


@dataclass(frozen=True, slots=True)
class Finding:
    """A bound on a quantity, and the slope that comes nearest to it or exceeds it most; at step 1, the first to exceed it."""

    quantity: str
    bound: str
    limit: float
    value: float
    half_width: float = nan  # of the 95 % interval over seeds; medians have none
    step: int | None = None
    tensor: str = ""

    @property
    def within_bound(self) -> bool:
        return abs(self.value) <= self.limit  # a NaN is not

    @property
    def inconclusive(self) -> bool:
        """Whether the bound is exceeded by less than the interval, so that more seeds could decide."""
        return not self.within_bound and abs(self.value) - self.limit < self.half_width

    @property
    def text(self) -> str:
        name = self.quantity if self.tensor in ("", self.quantity) else f"{self.quantity} of {self.tensor}"
        at = f" at step {self.step}" if self.step else ""
        return f"{name}: {self.bound} slope {self.value:+.3f}{at}, bound {self.limit}"

    @property
    def cells(self) -> list[str | int]:
        """A row of the table."""
        value = f"{self.value:+.3f}" if self.tensor else f"{self.value:.3f}"
        half_width = f"±{self.half_width:.3f}" if isfinite(self.half_width) else ""
        limit, verdict = "–", ""
        if isfinite(self.limit):
            limit, verdict = f"{self.limit:g}", "kept" if self.within_bound else "exceeded"
        return [self.quantity, self.bound, value, half_width, limit, self.tensor, self.step or "", verdict]


@dataclass(slots=True)
class CheckResult:
    """The outcome of a sweep: its findings, or why it failed or can't be judged."""

    sweep: SlopeSweep
    findings: list[Finding] = field(default_factory=list)
    failure: str = ""
    unjudged: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[Finding]:
        """The bounds exceeded, by how many times, the worst first."""
        return sorted((f for f in self.findings if not f.within_bound), key=lambda f: -abs(f.value) / f.limit)

    @property
    def inconclusive(self) -> bool:
        """Whether every bound exceeded is by less than its interval, and one is."""
        return not self.sweep.is_control and bool(self.violations) and all(f.inconclusive for f in self.violations)

    @property
    def passed(self) -> bool | None:
        """Whether sizes stay within their bounds. A control passes, which it should not, if no median exceeds CONTROL."""
        if self.unjudged or self.failure:
            return None if self.unjudged else False
        medians = [abs(f.value) for f in self.findings if f.bound == "median"]
        return all(median <= CONTROL for median in medians) if self.sweep.is_control else not self.violations

    @property
    def text(self) -> str:
        """The verdict in a sentence."""
        if self.unjudged or self.failure:
            return f"can't be judged: {self.unjudged}" if self.unjudged else self.failure
        highest = max((f for f in self.findings if f.bound == "median"), key=lambda f: abs(f.value))
        if self.sweep.is_control:
            word = "passes, but should fail" if self.passed else "fails, as expected"
            median = f"median |slope| of {highest.quantity} up to {abs(highest.value):.2f}"
            return f"{word}: {median} (over {CONTROL} expected)"
        if self.passed:
            return f"every slope is within its bound; largest median |slope| {abs(highest.value):.3f}, bound {MEDIAN}"
        worst, seeds = self.violations[0], len(self.sweep.plans)
        interval = (
            f", exceeded by less than the 95 % interval ±{worst.half_width:.3g} of {seeds} seeds: more seeds may decide"
            if seeds > 1
            else ", exceeded; one seed gives no interval: more seeds may decide"
        )
        return worst.text + (interval if worst.inconclusive else "")

    @property
    def verdict(self) -> Verdict:
        return Verdict(what=self.sweep.label, passed=self.passed, control=self.sweep.is_control, text=self.text)

    @property
    def table(self) -> Table:
        sweep, columns = self.sweep, ["quantity", "bound on", "slope", "95 %", "limit", "at", "step", "verdict"]
        title = f"Slopes of log2(size) against log2({sweep.word}), {sweep.name}{', a control' * sweep.is_control}"
        return Table(title=title, columns=columns, rows=[f.cells for f in self.findings], folded=sweep.is_control)


def judge(sweep: SlopeSweep, by_run: dict[str, Record]) -> CheckResult:
    """Fit a sweep's slopes and compare them with the bounds. `by_run` has the record of each plan's hash."""
    result = CheckResult(sweep)
    records = [[by_run[plan.hash()] for plan in plans] for plans in sweep.plans]
    bad = [record for row in records for record in row if record["state"] != "done"]
    if bad:
        result.failure = f"{len(bad)} of {sum(map(len, records))} runs {bad[0]['state']}: {bad[0].get('why', '')}"
        return result
    for quantity in records[0][0]["steps"][0]:
        log_RZSN = np.stack([log_sizes(row, quantity) for row in records])
        measured_S = np.flatnonzero(np.isfinite(log_RZSN).any(axis=(0, 1, 3)))
        if not len(measured_S):  # a zero unembedding has no gradients at step 1
            result.unjudged = f"{quantity} is zero in every step; expected more than {log_RZSN.shape[2]}"
            break
        first = int(measured_S[0])
        if first:
            zero = f"{quantity} is zero everywhere at step {first}"
            result.notes.append(f"{zero}, so it is fitted from step {first + 1} on")
        names = list(records[0][0]["steps"][0][quantity])
        slope_RSN = log_slopes(log_RZSN[:, :, first:], sweep.sizes)
        result.findings += _findings(sweep, quantity, names, slope_RSN, first + 1)
    return result


def _findings(
    sweep: SlopeSweep, quantity: str, names: list[str], slope_RSN: NDArray[np.float64], first_step: int
) -> Iterator[Finding]:
    each = EACH[sweep.axis]
    if quantity == "logits":
        slope_RSN = slope_RSN - sweep.logits_slope
    if quantity == SHARE:  # the mean over the steps that have numbers
        slope_RSN = np.ma.masked_invalid(slope_RSN).mean(axis=1, keepdims=True).filled(nan)
    mean_SN, half_SN = slope_RSN.mean(axis=0), half_widths(slope_RSN)

    def finding(bound: str, limit: float, name: int, step: int = 0) -> Finding:
        value, half_width = float(mean_SN[step, name]), float(half_SN[step, name])
        shown_step = None if bound == "mean" else first_step + step
        return Finding(quantity, bound, limit, value, half_width, shown_step, names[name])

    if quantity == SHARE:
        yield from (finding("mean", limit, name) for name, limit in enumerate((HEAD, each)))
        return
    size_SN = np.nan_to_num(np.abs(mean_SN), nan=inf)
    if quantity in STEP_1 and first_step == 1:
        writers = {tensor.name for tensor in layout.tensors(sweep.base[0].decoder) if tensor.writes_residual}
        limits = [WRITERS if quantity == "activation" and name in writers else STEP_1[quantity] for name in names]
        for limit in dict.fromkeys(limits):
            at = [n for n in range(len(names)) if limits[n] == limit]
            # an error in a tensor also shows in later tensors and may be larger there, so the first one is named
            exceeded, largest = [n for n in at if size_SN[0, n] > limit], max(at, key=size_SN[0].__getitem__)
            yield finding("step 1", limit, (exceeded or [largest])[0])
    if quantity != "logits":
        # attention and all of Δlogits are shown without a bound: the paper has none for them, and they are noisier than linears
        step, name = divmod(int(size_SN.argmax()), len(names))
        yield finding("each", each if quantity in LINEAR else inf, name, step)
    if quantity in LINEAR:
        median_S = np.median(size_SN, axis=1)
        step = int(median_S.argmax())
        yield Finding(quantity, "median", MEDIAN, float(median_S[step]), step=first_step + step)


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
    out: str | Path = "check",
    force: bool = False,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> dict[str, Any]:
    """The coordinate check of a proxy's or spec's shape, or of a plan as it stands: its result document.

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
    subject = corpus.with_hash(subject)
    folder, reporter = Path(out), reporter or NullReporter()
    sizes: dict[str, Any] = {"widths": width, "densities": density, "steps": steps, "batch_size": batch_size}
    sweeps_at = partial(sweeps_of, subject, parameterization, seeds=seeds, **sizes)
    sweeps = sweeps_at()
    first, hashes = sweeps[0].base[0], {plan.hash() for sweep in sweeps for plans in sweep.plans for plan in plans}
    batch = f"{first.train.batch_size} sequences of {first.decoder.context} tokens"
    reporter.log(f"{len(hashes)} runs of {steps} steps, {batch}, {subject.data and subject.data.source}")
    with make_workers(device=first.run.device, folder=folder / "slurm", **workers) as ready:
        runs.require_runnable(first, device=ready.is_local, warn=reporter.warn)
        runs.open_study_folder(folder, _question(sweeps), force)
        check_runs = _Runs(folder, ready, reporter)
        lr_factor, results = check_runs.lower_rates(sweeps_at)
        if not any(one.unjudged for one in results):
            results = check_runs.judge_all([one.sweep for one in results], max_seeds)
    check_runs.notes += [f"{one.sweep.label}: {note}" for one in results for note in one.notes]
    result = Result(
        kind="supar.check-result/v1",
        title="Coordinate check: sizes over density and width",
        verdicts=with_power([one.verdict for one in results]),
        tables=[one.table for one in results if one.findings],
        figures=list(_figures([one.sweep for one in results if not one.unjudged], check_runs.by_run, steps)),
        parents={},
        environment=runs.environment(ready),
        **Record(notes=check_runs.notes, lr_factor=lr_factor),
    )
    figures.write_result(result, folder, reporter.log)
    return result.document()


def _question(sweeps: list[SlopeSweep]) -> Record:
    """What identifies a check: its first seed at the requested rates; more seeds continue the same folder."""
    hashes = {plan.hash() for sweep in sweeps for plan in sweep.plans[0]}
    return {"runs": sorted(hashes), "sweeps": [[sweep.name, sweep.axis, sweep.sizes] for sweep in sweeps]}


class _Runs:
    """The runs of a check, each made once, and their records by the plan's hash."""

    def __init__(self, folder: Path, workers: Workers, reporter: Reporter) -> None:
        self._workers, self._reporter = workers, reporter
        # a folder of an earlier version has records without the newer quantities
        self._records = runs.Records(folder, lambda record: not record["steps"] or SHARE in record["steps"][0])
        self.by_run, self.notes = self._records.by_run, list[str]()
        self._tally = Tally(reporter, workers.jobs)

    def _make(self, plans: Iterable[Plan], sweeps: list[SlopeSweep]) -> None:
        """Make the runs of plans, which are some of the sweeps'."""
        all_plans = {plan.hash(): plan for sweep in sweeps for row in sweep.plans for plan in row}
        self._tally.expect({run: run_seconds(plan) for run, plan in all_plans.items() if run not in self.by_run})
        calls = {plan.hash(): (plan,) for plan in sorted(plans, key=lambda plan: -plan.parameters)}
        for _, _, record in self._records.complete(coordinates.measure, calls, self._workers):
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
