"""The verdict on a parameterization: slopes of log2(size) over log2(density) and log2(width), and the bounds they must keep.

Arrays: R seeds, Z points of a sweep, S steps, N names (linears, attentions or the logits) of one quantity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import log2, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supar_cli.experiments.coordinates import LINEAR
from supar_cli.experiments.statistics import student_t975
from supar_cli.files import Record
from supar_cli.planning.plan import Plan
from supar_cli.reporting import result as figures

Array = NDArray[np.float64]

# The bounds of SPEC's acceptance test, measured on the authors' model: right parameterizations stay below them at such
# sizes, and controls exceed CONTROL in the median.
FIRST = 0.05  # each |slope| at step 1
MEDIAN = 0.15  # median |slope| over the linears, at every step
EACH = {"density": 0.3, "width": 0.5, "plan": 0.5}  # each |slope|, at every step; narrow ends bend it over width
CONTROL = 0.4
AT_FIRST = ("activation", "gain", "attention", "logits")
THROUGHOUT = (*LINEAR, "attention", "Δlogits")
UNITS = {"density": "density", "width": "width", "plan": "scale (width ÷ density) from the proxy to the plan"}


@dataclass(slots=True)
class Sweep:
    """Plans over one axis under one parameterization: `plans[z][r]` at `sizes[z]` with seed number r, of `planned(r)[z]`.

    `logits_slope` is what the rules make of the logits' size at step 1: over width they fall by 1/√m_d.
    """

    arm: str
    axis: str
    sizes: list[float]
    planned: Callable[[int], list[Plan]]
    control: bool
    logits_slope: float = 0.0
    plans: list[list[Plan]] = field(default_factory=list)

    def grow(self, seeds: int) -> Sweep:
        """Plan as many seeds."""
        self.plans = self.plans or [[] for _ in self.sizes]
        for seed in range(len(self.plans[0]), seeds):
            for row, plan in zip(self.plans, self.planned(seed), strict=True):
                row.append(plan)
        return self

    @property
    def label(self) -> str:
        return f"{self.arm} over {self.axis}"

    def runs(self) -> Iterator[Plan]:
        for plans in self.plans:
            yield from plans


@dataclass(slots=True)
class Slopes:
    """Slopes of one quantity less what is expected of them, for each seed: (R, S, N)."""

    quantity: str
    names: list[str]
    slope_RSN: Array

    @property
    def slope_SN(self) -> Array:
        return np.asarray(self.slope_RSN.mean(axis=0))

    def interval(self, step: int, name: int) -> float:
        """Half width of the slope's 95 % interval over seeds; infinite for one seed."""
        seeds = len(self.slope_RSN)
        if seeds < 2:
            return float("inf")
        spread = float(self.slope_RSN[:, step, name].std(ddof=1)) / sqrt(seeds)
        return spread * (student_t975(seeds - 1) if seeds > 3 else {2: 12.706, 3: 4.303}[seeds])

    def steepest(self, steps: slice) -> tuple[float, int, int]:
        """(slope, step, index of the name) of the largest |slope| among `steps`; a slope that is no number is the largest."""
        size_SN = np.abs(self.slope_SN[steps])
        worst = int(np.where(np.isnan(size_SN), np.inf, size_SN).argmax())
        step, name = worst // size_SN.shape[1] + (steps.start or 0), worst % size_SN.shape[1]
        return float(self.slope_SN[step, name]), step, name


@dataclass(slots=True)
class Finding:
    """One bound on one quantity of a sweep: the slope that came nearest to it or exceeded it most; at step 1, exceeded it first."""

    quantity: str
    bound: str
    limit: float
    value: float
    interval: float = float("nan")
    step: int = 0
    tensor: str = ""

    @property
    def kept(self) -> bool:
        return abs(self.value) <= self.limit  # a NaN is not

    @property
    def open(self) -> bool:
        """Whether the bound is exceeded by less than the 95 % interval: more seeds would tell. Medians have none."""
        return not self.kept and abs(self.value) - self.limit < self.interval


@dataclass(slots=True)
class Verdict:
    """What became of a sweep: its findings, and why nothing could be found."""

    sweep: Sweep
    findings: list[Finding] = field(default_factory=list)
    slopes: dict[str, Slopes] = field(default_factory=dict)
    broken: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def violated(self) -> list[Finding]:
        """The bounds exceeded, by how many times, the worst first."""
        return sorted((f for f in self.findings if not f.kept), key=lambda f: -abs(f.value) / f.limit)

    @property
    def open(self) -> bool:
        """Whether every bound exceeded is by less than its interval, and one is."""
        return not self.sweep.control and bool(self.violated) and all(finding.open for finding in self.violated)

    @property
    def passed(self) -> bool:
        """A subject keeps every bound; a control is far from keeping them."""
        if not self.sweep.control:
            return not self.broken and not self.violated
        return bool(self.broken) or any(
            f.bound == "median" and not abs(f.value) <= CONTROL for f in self.findings if f.quantity in LINEAR
        )

    def text(self) -> str:
        """The verdict in a sentence."""
        if self.broken:
            return self.broken
        medians = [f for f in self.findings if f.bound == "median"]
        highest = max(medians, key=lambda f: abs(f.value))
        if self.sweep.control:
            word = "fails, as it must" if self.passed else "does not fail: this check can't tell right from wrong here"
            return (
                f"{word}: median |slope| of {highest.quantity} up to {abs(highest.value):.2f} (over {CONTROL} expected)"
            )
        if not self.violated:
            return f"every slope keeps its bound; median |slope| up to {abs(highest.value):.3f} of {MEDIAN}"
        worst = self.violated[0]
        where = f" of {worst.tensor}" if worst.tensor else ""
        said = (
            f"{worst.quantity}{where}: {worst.bound} slope {worst.value:+.3f} at step {worst.step}, bound {worst.limit}"
        )
        if worst.open:
            said += f", within it by the 95 % interval ±{worst.interval:.3g} of {len(self.sweep.plans[0])} seeds: more would tell"
        return said


def judge(sweep: Sweep, by_run: dict[str, Record]) -> Verdict:
    """Fit a sweep's slopes and hold them against the bounds. `by_run` has the record of each plan's hash."""
    verdict = Verdict(sweep)
    records = [[by_run[plan.hash()] for plan in plans] for plans in sweep.plans]
    bad = [record for row in records for record in row if record["state"] != "done"]
    if bad:
        verdict.broken = f"{len(bad)} of {sum(map(len, records))} runs {bad[0]['state']}: {bad[0].get('why', '')}"
        return verdict
    for quantity in records[0][0]["steps"][0]:
        names = list(records[0][0]["steps"][0][quantity])
        log_ZRSN = np.log2([[_sizes(record, quantity, names) for record in row] for row in records])
        if not np.isfinite(log_ZRSN[:, :, 0]).any():  # a zero unembedding has no gradients at step 1
            verdict.notes.append(f"{quantity} is zero everywhere at step 1, so it is fitted from step 2 on")
            log_ZRSN = log_ZRSN[:, :, 1:]
        slope_RSN = _fit(log_ZRSN, sweep.sizes)
        if quantity == "logits":
            slope_RSN = slope_RSN - sweep.logits_slope
        verdict.slopes[quantity] = Slopes(quantity, names, slope_RSN)
    steps = len(records[0][0]["steps"])
    for quantity in verdict.slopes:
        verdict.findings += _findings(verdict.slopes[quantity], sweep.axis, steps)
    return verdict


def _sizes(record: Record, quantity: str, names: list[str]) -> list[list[float]]:
    read = [[step[quantity][name] for name in names] for step in record["steps"]]
    return [[value or float("nan") for value in row] for row in read]


def _fit(log_ZRSN: Array, sizes: list[float]) -> Array:
    """Least-squares slope of each column of the logs against log2 of the sizes, for each seed."""
    axis_Z = np.log2(sizes)
    axis_Z = axis_Z - axis_Z.mean()
    return np.asarray(np.tensordot(axis_Z / (axis_Z @ axis_Z), log_ZRSN, axes=1))


def _findings(slopes: Slopes, axis: str, steps: int) -> Iterator[Finding]:
    offset = steps - slopes.slope_RSN.shape[1]  # 1 where step 1 could not be measured
    if slopes.quantity in AT_FIRST and not offset:
        yield _finding(slopes, "step 1", FIRST, slice(0, 1), 0)
    if slopes.quantity in THROUGHOUT:
        # attention and logits are shown: they have no bound in the paper's sense, and are noisy where linears are not
        limit = EACH[axis] if slopes.quantity in LINEAR else float("inf")
        yield _finding(slopes, "each", limit, slice(0, None), offset)
    if slopes.quantity in LINEAR:
        median_S = np.median(np.abs(slopes.slope_SN), axis=1)
        step = int(np.argmax(np.where(np.isnan(median_S), np.inf, median_S)))
        yield Finding(slopes.quantity, "median", MEDIAN, float(median_S[step]), step=step + offset + 1)


def _finding(slopes: Slopes, bound: str, limit: float, steps: slice, offset: int) -> Finding:
    value, step, name = slopes.steepest(steps)
    if bound == "step 1":  # what is wrong in a tensor shows, then, in those after it too, and may be larger there
        beyond = np.flatnonzero(~(np.abs(slopes.slope_SN[0]) <= limit))
        name = int(beyond[0]) if len(beyond) else name
        value = float(slopes.slope_SN[0, name])
    return Finding(
        slopes.quantity, bound, limit, value, slopes.interval(step, name), step + offset + 1, slopes.names[name]
    )


def table(verdict: Verdict) -> dict[str, Any]:
    """A sweep's findings as a table of result.json."""
    rows = [
        [
            f.quantity,
            f.bound,
            f"{f.value:+.3f}" if f.tensor else f"{f.value:.3f}",
            f"±{f.interval:.3f}" if np.isfinite(f.interval) else "",
            f"{f.limit:g}" if np.isfinite(f.limit) else "–",
            f.tensor,
            f.step,
            ("kept" if f.kept else "exceeded") if np.isfinite(f.limit) else "",
        ]
        for f in verdict.findings
    ]
    control = ", a control" if verdict.sweep.control else ""
    return {
        "title": f"Slopes of log2(size) against log2({verdict.sweep.axis}), {verdict.sweep.arm}{control}",
        "columns": ["quantity", "bound on", "slope", "95 %", "limit", "at", "step", "verdict"],
        "rows": rows,
    }


def pictures(sweeps: list[Sweep], by_run: dict[str, Record], steps: int) -> list[dict[str, Any]]:
    """Sizes over density or width, as the paper's Figure 5: a panel for each parameterization, a line for each step."""
    shown = sorted({1, 2, 1 + steps // 2, steps})
    made = []
    for axis in dict.fromkeys(sweep.axis for sweep in sweeps):
        for quantity in LINEAR:
            panels = [
                {
                    "title": figures.TITLES.get(sweep.arm, sweep.arm),
                    "vertical": None,
                    "lines": _lines(sweep, by_run, quantity, shown),
                }
                for sweep in sweeps
                if sweep.axis == axis
            ]
            made.append(
                {
                    "name": f"{quantity}_over_{axis}",
                    "title": f"Mean |{quantity}| of the hidden linears over {axis}, geometric mean over linears and seeds",
                    "x": UNITS[axis],
                    "y": {"activation": "mean |Y|", "gain": "|dL/dX| ÷ |dL/dY|", "update": "mean |ΔY|"}[quantity],
                    "x_log2": True,
                    "y_log2": True,
                    "y_limits": None,
                    "panels": [panel for panel in panels if panel["lines"]],
                }
            )
    return [figure for figure in made if figure["panels"]]


def _lines(sweep: Sweep, by_run: dict[str, Record], quantity: str, shown: list[int]) -> list[dict[str, Any]]:
    lines = []
    for step in shown:
        points: dict[float, float | None] = {}
        for size, plans in zip(sweep.sizes, sweep.plans, strict=True):
            found = [by_run[plan.hash()]["steps"] for plan in plans]
            values = [v for steps in found if len(steps) >= step for v in steps[step - 1][quantity].values() if v]
            points[size] = 2.0 ** (sum(log2(v) for v in values) / len(values)) if values else None
        lines.append(figures.line(f"step {step}", points))
    return lines
