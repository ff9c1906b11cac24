"""Loss over a hyperparameter at several sizes: the runs that bracket each optimum, the curves they form, and the optima."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from math import inf, isfinite, isinf, isnan, nan
from pathlib import Path

import numpy as np

from supar_cli.errors import RunFailed, SetupError, TransferWarning
from supar_cli.experiments.script import FIRST_FAILURES
from supar_cli.experiments.statistics import Interval, fit_quadratic, interquartile_mean, interval, share_of, vertices
from supar_cli.files import Record
from supar_cli.jobs.pruning import prune
from supar_cli.jobs.runs import Records, failed_record, measure_loss
from supar_cli.jobs.workers import Local, WorkerFailure, Workers
from supar_cli.planning.axes import Grid
from supar_cli.planning.estimate import run_seconds
from supar_cli.planning.plan import Plan
from supar_cli.planning.pruning import with_rate
from supar_cli.planning.sweep import Aggregate, Level, Sweep
from supar_cli.training.reporter import Reporter, Tally
from supar_cli.training.train import train

RUNS = "runs"  # the folder in a sweep's with the plan, output and reports of each run of a user's model

# chosen: a loss curve is a parabola only near its optimum; well beyond it training diverges
WINDOW_STEPS, WINDOW_OCTAVES = 2, 1.5


@dataclass(slots=True)
class Curve:
    """Validation losses of one arm at one size, by index of the grid and by seed: nats per token, or what a user's script reports.

    A diverged run's loss is inf, worse than any; a failed run's is nan, because nothing is known of it. What the losses of
    several seeds become by `aggregate` is called their mean.
    """

    name: str
    level: Level
    grid: Grid
    losses: dict[float, dict[int, float]] = field(default_factory=dict)
    aggregate: Aggregate = "mean"

    def mean(self, index: float) -> float:
        """Mean over seeds; nan when a run failed or is missing, inf when one diverged."""
        values = list(self.losses.get(index, {}).values())
        if self.aggregate == "iqm" and values and all(map(isfinite, values)):
            return float(interquartile_mean(np.array(values)))
        return nan if not values or any(map(isnan, values)) else sum(values) / len(values)

    @property
    def indices(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best(self) -> float:
        """The index of the lowest mean loss; the lowest index when there is none."""
        known = [index for index in self.indices if not isnan(self.mean(index))]
        return min(known, key=self.mean, default=self.indices[0])

    @property
    def bracketed(self) -> bool:
        """Whether the optimum is an inner one: its neighbours on both sides were measured and are worse."""
        at = self.indices.index(self.best)
        around = [self.mean(index) for index in self.indices[max(at - 1, 0) : at + 2]]
        return isfinite(self.mean(self.best)) and len(around) == 3 and not any(map(isnan, around))

    def regret(self, index: float) -> float:
        """The share of the best loss that is lost at an index; nan where it isn't known."""
        best = self.mean(self.best)
        return share_of(self.mean(index) - best, best) if isfinite(best) else nan

    def loss_at(self, octaves: float) -> float:
        """The mean loss at a value between those measured, on the parabola through the three nearest; nan beyond them.

        inf beyond the last one that didn't diverge.
        """
        means = {self.grid.octaves(index): self.mean(index) for index in self.indices}
        finite = {x: loss for x, loss in means.items() if isfinite(loss)}
        if len(finite) < 3 or not min(finite) - 1e-9 <= octaves <= max(finite) + 1e-9:
            return inf if any(isinf(loss) and x <= octaves + 1e-9 for x, loss in means.items()) else nan
        near = sorted(finite, key=lambda x: abs(x - octaves))[:3]
        return float(np.polyfit(np.array(near) - octaves, [finite[x] for x in near], 2)[-1])

    def means(self, losses: np.ndarray, axis: int) -> np.ndarray:
        """Finite losses of several seeds along an axis as one number each."""
        return interquartile_mean(losses, axis) if self.aggregate == "iqm" else losses.mean(axis)

    def count_runs(self, is_counted: Callable[[float], bool]) -> int:
        return sum(is_counted(loss) for by_seed in self.losses.values() for loss in by_seed.values())


def first_of(curve: Curve, curves: list[Curve]) -> Curve:
    """The curve of the same arm at the first size, the densest or narrowest."""
    return next(other for other in curves if other.name == curve.name)


def measure_curves(
    sweep: Sweep, folder: Path, workers: Workers, reporter: Reporter, searched: Collection[str] = ()
) -> list[Curve]:
    """A curve for each arm and size, measured on the study's grid.

    Curves of the `searched` arms (all by default) are also measured beyond the grid and between its points
    until each optimum is bracketed, and at the optimum of their first size. Runs that the folder has records of are not
    made again, except those that failed.
    """
    curves = [
        Curve(name, level, sweep.grid(name), aggregate=sweep.aggregate)
        for name in sweep.all_arms
        for level in sweep.levels_of(name)
    ]
    measurements = _Measurements(sweep, folder, workers, reporter)
    measurements.add((curve, float(index)) for curve in curves for index in range(len(curve.grid.values)))
    measurements.search([curve for curve in curves if not searched or curve.name in searched])
    return curves


def grid_plans(sweep: Sweep) -> list[Plan]:
    """The plans of a study's grid, before it is extended; arms share the dense ones.

    For an arm that prunes runs, which there are none of yet, plans of as many random weights: they cost the same.
    """
    plans = (
        sweep.plan(name, level, float(index), seed)
        for name in sweep.all_arms
        for level in sweep.levels_of(name)
        for index in range(len(sweep.grid(name).values))
        for seed in sweep.seeds_at(level)
    )
    return list({plan.hash(): plan for plan in plans}.values())


Point = tuple[Curve, float]


class _Measurements:
    """The runs of a study; those that its folder has records of are not made again."""

    def __init__(self, sweep: Sweep, folder: Path, workers: Workers, reporter: Reporter) -> None:
        self.sweep, self.workers, self.reporter, self._folder = sweep, workers, reporter, folder
        self._pruned: dict[str, Plan] = {}
        # a run that failed is tried again by the next command; its new record is added and counts
        self.records = Records(folder, lambda record: record.get("state") != "failed")
        self._tally = Tally(reporter, workers.jobs)

    def add(self, points: Iterable[Point]) -> None:
        """Measure curves at indices, with every seed."""
        calls: dict[str, tuple[Plan, Record, Path]] = {}
        wanted: list[tuple[Curve, float, int, str]] = []
        for curve, index in points:
            level, value = curve.level, curve.grid.value(index)
            width = self.sweep.size_at(level).get("width")
            about = {"arm": curve.name, level.axis: level.value, "width": width, self.sweep.tuned: value}
            for seed in self.sweep.seeds_at(level):
                plan = self._plan(curve, index, seed)
                run = plan.hash()
                calls.setdefault(
                    run, (plan, {**about, "seed": seed}, self._folder / RUNS)
                )  # of a shared run, about the first arm
                wanted.append((curve, index, seed, run))
        left = {run: run_seconds(plan) for run, (plan, *_) in calls.items() if run not in self.records.by_run}
        self._tally.expect(left)
        failures = 0
        for _, _, record in self.records.complete(measure_loss, calls, self.workers, failed_record):
            if record["state"] == "failed":
                self.reporter.log(f"failed: {record['arm']}, seed {record['seed']}: {record['why']}")
                failures += 1
            if self.sweep.data is None and failures == len(self.records.by_run) == FIRST_FAILURES:
                raise RunFailed(f"the first {failures} runs failed; the last: {record['why']}")
            self._tally.end(record["run"], nan if record["loss"] is None else record["loss"])
        for curve, index, seed, run in wanted:
            record = self.records.by_run[run]
            loss = {"done": record["loss"], "diverged": inf, "failed": nan}[record["state"]]
            curve.losses.setdefault(index, {})[seed] = loss

    def _plan(self, curve: Curve, index: float, seed: int) -> Plan:
        """The plan of a run; of an arm that prunes, of the dense run's largest weights, trained anew from its start."""
        name, level, scale = curve.name, curve.level, self.sweep.all_arms[curve.name].prune
        if scale is None or level.density == 1:
            return self.sweep.plan(name, level, index, seed)
        dense = self.sweep.plan_to_prune(name, seed)  # arms may have dense runs of their own
        key = f"{dense.hash()[7:15]}-{level.density:g}-{scale}"
        if key not in self._pruned:
            source, files = self._folder / f"dense-{dense.hash()[7:15]}", self._folder / "pruned"
            files.mkdir(exist_ok=True)
            # by a worker, so that this process takes no device; those elsewhere may not see the folder
            ((_, found),) = (self.workers if self.workers.is_local else Local()).results(train, [(dense, source)])
            if isinstance(found, WorkerFailure):
                raise SetupError(f"{source}: its worker died each time it was started: {found.why}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TransferWarning)  # the study's plans have been warned of
                self._pruned[key] = prune(
                    source,
                    density=level.share,
                    scale=scale,
                    masks_out=files / f"masks-{key}.safetensors",
                    values_out=files / f"values-{key}.safetensors",
                )
        return with_rate(self._pruned[key], curve.grid.value(index))

    def search(self, curves: list[Curve]) -> None:
        """Measure beyond the grid's ends until each optimum is an inner one, then between its neighbours.

        Then all curves of an arm at the best index of its first size, whose neighbours may be new optima.
        """
        for halving in range(self.sweep.refine + 1):
            self._enclose(curves, 0.5**halving)
        while missing := [(c, best) for c in curves if (best := first_of(c, curves).best) not in c.losses]:
            self.add(missing)
            self._enclose(curves, 0.5**self.sweep.refine)
        if self.sweep.robustness:
            self.add(point for curve in curves for point in self._beside(curve, first_of(curve, curves).best))
            self._enclose(curves, 0.5**self.sweep.refine)

    def _beside(self, curve: Curve, reused: float) -> list[Point]:
        """Half and twice the re-used value, where the losses around don't tell what they cost."""
        octave = 1 / (curve.grid.octaves(reused + 1) - curve.grid.octaves(reused))
        ends = {by: curve.loss_at(curve.grid.octaves(reused) + by) for by in (-1, 1)}
        return [(curve, round(reused + by * octave, 6)) for by, loss in ends.items() if isnan(loss)]

    def _enclose(self, curves: list[Curve], step: float) -> None:
        """Measure on both sides of each optimum, as far from the grid as `widen` allows, until it stays the optimum."""
        while missing := [point for curve in curves for point in self._neighbours(curve, step)]:
            self.add(missing)

    def _neighbours(self, curve: Curve, step: float) -> list[Point]:
        """The points next to the optimum that are not measured yet; none if all runs failed, as more would tell nothing."""
        widen, last = self.sweep.widen, len(curve.grid.values) - 1
        around = () if isnan(curve.mean(curve.best)) else (curve.best - step, curve.best + step)
        return [(curve, i) for i in around if i not in curve.losses and -widen <= i <= last + widen]


@dataclass(slots=True)
class Optimum:
    """A curve's optimum in octaves: a parabola's, or the best value measured where none is usable (`why`)."""

    octaves: float
    why: str
    resampled: np.ndarray  # optima of resampled seeds; empty with one seed

    @property
    def bounds(self) -> Interval | None:
        """The 95 % interval of its value over seeds."""
        octaves = interval(self.resampled)
        return octaves and [2.0**end for end in octaves]


def find_optimum(curve: Curve, draws: np.ndarray) -> Optimum:
    """The lowest point of a parabola through the finite losses near the best value; `draws` are resampled seeds."""
    x0 = curve.grid.octaves(curve.best)
    window = _near_best(curve)
    if not window:
        return Optimum(x0, "no run gave a finite loss", np.empty(0))
    seeds = sorted(curve.losses[curve.best])
    x = np.array([curve.grid.octaves(index) - x0 for index in window])
    losses_XS = np.array([[curve.losses[index][seed] for seed in seeds] for index in window])
    means_X1 = curve.means(losses_XS, 1)[:, None]
    fitted_XS = losses_XS if curve.aggregate == "mean" else means_X1  # an offset for each seed cancels in means alone
    fit = fit_quadratic([(float(x[i]), seeds[s], float(loss)) for (i, s), loss in np.ndenumerate(fitted_XS)])
    shift, why = (fit.octaves, "") if fit.usable else (0.0, fit.why)
    if not fit.usable and len(window) >= 3:  # one number at each of three values: an exact parabola, its error unknown
        vertex = float(vertices(x, means_X1)[0])
        shift, why = (vertex, "") if isfinite(vertex) else (0.0, why)
    resampled = np.empty(0)
    if len(draws):
        means_XB = curve.means(losses_XS[:, draws], 2)
        found_B = vertices(x, means_XB) if len(x) >= 3 else np.full(len(draws), nan)
        resampled = x0 + np.where(np.isfinite(found_B), found_B, x[means_XB.argmin(0)])
    return Optimum(x0 + shift, why, resampled)


def find_regrets(curve: Curve, optimum: Optimum, first: Optimum, draws: np.ndarray) -> tuple[float, np.ndarray]:
    """What re-using the first size's optimum loses, as a share of the lowest loss; and for each row of resampled seeds.

    By the parabola near the curve's own optimum, which pools the runs there: nan, and none, where the first optimum lies
    beyond the losses that it goes through, or either of the two is no parabola's.
    """
    window = _near_best(curve)
    x = np.array([curve.grid.octaves(index) for index in window])
    places_B = np.array([first.octaves, *first.resampled])
    if optimum.why or first.why or len(window) < 3 or not x.min() <= first.octaves <= x.max():
        return nan, np.empty(0)
    losses_XS = np.array([[curve.losses[index][seed] for seed in sorted(curve.losses[index])] for index in window])
    means_XB = np.column_stack([curve.means(losses_XS, 1), curve.means(losses_XS[:, draws], 2)])
    a_B, b_B, c_B = np.polyfit(x - first.octaves, means_XB, 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # of losses that are all the same, or of a lowest loss of 0
        at_B, lowest_B = places_B - first.octaves, c_B - b_B**2 / (4 * a_B)
        found_B = np.where(a_B > 0, (a_B * at_B**2 + b_B * at_B + c_B - lowest_B) / np.abs(lowest_B), nan)
    return float(found_B[0]), found_B[1:]


def _near_best(curve: Curve) -> list[float]:
    """Indices near the best whose losses are all finite: within WINDOW_STEPS of the finest step and WINDOW_OCTAVES.

    At least the next ones on both sides, however far, if their losses are finite.
    """
    at, x0 = curve.indices.index(curve.best), curve.grid.octaves(curve.best)
    distances = [abs(curve.grid.octaves(index) - x0) for index in curve.indices]
    step = min((distance for distance in distances if distance > 1e-9), default=0.0)
    reach = min(WINDOW_STEPS * step, WINDOW_OCTAVES) + 1e-9
    near = [index for i, index in enumerate(curve.indices) if abs(i - at) <= 1 or distances[i] <= reach]
    return [index for index in near if isfinite(curve.mean(index))]
