"""Loss over a hyperparameter at several sizes: the runs that bracket each optimum, and the curves they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any

from supar_cli.jobs.runs import Records, failed_record, measure_loss
from supar_cli.jobs.workers import Workers
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.sweep import Grid, Level, Sweep
from supar_cli.training.reporter import Reporter


@dataclass(slots=True)
class Curve:
    """Validation losses, in nats a token, of one parameterization at one size, by place in the grid and by seed.

    A diverged run's loss is inf, worse than any; a failed run's is nan, of which nothing is known.
    """

    name: ParameterizationName
    level: Level
    grid: Grid
    losses: dict[float, dict[int, float]] = field(default_factory=dict)

    def mean(self, place: float) -> float:
        """Mean over seeds; nan when a run failed or is missing, inf when one diverged."""
        values = list(self.losses.get(place, {}).values())
        return nan if not values or any(map(isnan, values)) else sum(values) / len(values)

    @property
    def places(self) -> list[float]:
        return sorted(self.losses)

    @property
    def best(self) -> float:
        """The place of the lowest mean loss; the lowest place when there is none."""
        known = {place: self.mean(place) for place in self.places if not isnan(self.mean(place))}
        return min(known, key=lambda place: known[place]) if known else self.places[0]

    @property
    def bracketed(self) -> bool:
        """Whether the optimum is an inner one: its neighbours on both sides were measured and are worse."""
        places, best = self.places, self.best
        at = places.index(best)
        neighbours = places[max(at - 1, 0) : at] + places[at + 1 : at + 2]
        return isfinite(self.mean(best)) and len(neighbours) == 2 and not any(isnan(self.mean(p)) for p in neighbours)

    def count(self, kind: Callable[[float], bool]) -> int:
        return sum(kind(value) for by_seed in self.losses.values() for value in by_seed.values())

    @property
    def diverged(self) -> int:
        return self.count(lambda value: value == inf)

    @property
    def failed(self) -> int:
        return self.count(isnan)


_LOSS = {"diverged": inf, "failed": nan}
Point = tuple[Curve, float]


class Measurements:
    """The runs of a study, those of its folder's records made only once."""

    def __init__(self, sweep: Sweep, folder: Path, workers: Workers, reporter: Reporter) -> None:
        self.sweep, self.workers, self.reporter = sweep, workers, reporter
        self.records = Records(folder)
        # a run that failed is tried again by the next command; what it then gives is added and counts
        self.records.by_run = {run: r for run, r in self.records.by_run.items() if r.get("state") != "failed"}
        self.asked = self.ended = 0

    def curves(self) -> list[Curve]:
        """One curve, still without losses, for each parameterization and size."""
        names, levels = self.sweep.parameterizations, self.sweep.levels
        return [Curve(name, level, self.sweep.grid(name)) for name in names for level in levels]

    def add(self, points: Iterable[Point]) -> None:
        """Measure curves at places, with every seed."""
        calls: dict[str, tuple[Plan, dict[str, Any]]] = {}
        wanted: list[tuple[Curve, float, int, str]] = []
        for one, place in points:
            for seed in self.sweep.run_seeds:
                plan = self.sweep.plan(one.name, one.level, place, seed)
                about: dict[str, Any] = {"arm": one.name, one.level.axis: one.level.value, "width": one.level.width}
                about[self.sweep.tuned] = one.grid.at(place)
                calls[plan.hash()] = (plan, {**about, "seed": seed})
                wanted.append((one, place, seed, plan.hash()))
        known = set(self.records.by_run)
        self.asked += sum(run not in known for run in calls)
        for _, _, record in self.records.complete(measure_loss, calls, self.workers, failed_record):
            if record["run"] in known:
                continue
            self.ended += 1
            if record["state"] == "failed":
                self.reporter.log(f"failed: {record['arm']}, seed {record['seed']}: {record['why']}")
            self.reporter.progress(self.ended, self.asked, nan if record["loss"] is None else record["loss"])
        for one, place, seed, run in wanted:
            record = self.records.by_run[run]
            loss = record["loss"] if record["state"] == "done" else _LOSS[record["state"]]
            one.losses.setdefault(place, {})[seed] = loss

    def bracket(self, curves: list[Curve]) -> None:
        """Measure the grid, then beyond its ends until each optimum is an inner one, then between its neighbours."""
        self.add((curve, float(place)) for curve in curves for place in range(len(curve.grid.values)))
        self._enclose(curves, [0.5**halving for halving in range(self.sweep.refine + 1)])

    def share(self, curves: list[Curve]) -> None:
        """Measure every curve at the place that is best at the first size of its parameterization."""
        while missing := [(curve, place) for curve, place in reused(curves) if place not in curve.losses]:
            self.add(missing)
            self._enclose(curves, [0.5**self.sweep.refine])  # one of them may be a new best

    def _enclose(self, curves: list[Curve], steps: list[float]) -> None:
        for step in steps:
            while missing := [point for curve in curves for point in self._missing(curve, step)]:
                self.add(missing)

    def _missing(self, curve: Curve, step: float) -> list[Point]:
        if isnan(curve.mean(curve.best)):  # nothing but failures: more of them would tell nothing
            return []
        low, high = -float(self.sweep.widen), float(len(curve.grid.values) - 1 + self.sweep.widen)
        around = (curve.best - step, curve.best + step)
        return [(curve, place) for place in around if place not in curve.losses and low <= place <= high]


def first_of(curve: Curve, curves: list[Curve]) -> Curve:
    """The curve of the same parameterization at the first size, the densest or narrowest."""
    return next(other for other in curves if other.name == curve.name)


def reused(curves: list[Curve]) -> list[Point]:
    """Each curve with the place where the first size of its parameterization has its optimum."""
    return [(curve, first_of(curve, curves).best) for curve in curves]
