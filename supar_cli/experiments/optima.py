"""Where the optima of measured curves lie, how far they drift over the sizes, and whether that passes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, isnan, log2, nan

import numpy as np

from supar_cli.experiments.curves import Curve
from supar_cli.experiments.statistics import Interval, fit_quadratic, interval, resample, slope, vertices
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.sweep import Sweep
from supar_cli.reporting.result import TITLES, Verdict

# chosen: a loss curve is a parabola near its optimum only; on the far side of it training soon breaks down
WINDOW_STEPS, WINDOW_OCTAVES = 2, 1.5
MAX_DRIFT, MAX_SHIFT_OCTAVES, MAX_REGRET = 0.15, 0.5, 0.005  # the pass marks, of SPEC and README

SHORT = {**TITLES, "sp": "SP", "supar-lr-only": "SμPar's rate only"}


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
        return None if octaves is None else (2.0 ** octaves[0], 2.0 ** octaves[1])


def find_optimum(curve: Curve, draws: np.ndarray) -> Optimum:
    """The lowest point of a parabola through the finite losses near the best value; `draws` are resampled seeds."""
    x0 = curve.grid.octaves(curve.best)
    window = _near_best(curve)
    if not window:
        return Optimum(x0, "no run gave a finite loss", np.empty(0))
    seeds = sorted(curve.losses[curve.best])
    x = np.array([curve.grid.octaves(index) - x0 for index in window])
    losses_XS = np.array([[curve.losses[index][seed] for seed in seeds] for index in window])
    fit = fit_quadratic([(float(x[i]), seeds[s], float(loss)) for (i, s), loss in np.ndenumerate(losses_XS)])
    shift, why = (fit.octaves, "") if fit.usable else (0.0, fit.why)
    if not fit.usable and len(window) >= 3:  # one seed and three values: a parabola, though nothing to judge it by
        vertex = float(vertices(x, losses_XS.mean(1, keepdims=True))[0])
        shift, why = (vertex, "") if isfinite(vertex) else (0.0, why)
    resampled = np.empty(0)
    if len(draws):
        means_XB = losses_XS[:, draws].mean(2)
        found_B = vertices(x, means_XB) if len(x) >= 3 else np.full(len(draws), nan)
        resampled = x0 + np.where(np.isfinite(found_B), found_B, x[means_XB.argmin(0)])
    return Optimum(x0 + shift, why, resampled)


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


@dataclass(slots=True)
class ParameterizationResult:
    """One parameterization's curves, from its first size on, and their optima.

    `drift` is the slope of log2(optimum) on log2(size); a regret is the share of the loss that is lost at a size by
    re-using the first size's best value, nan where it isn't known.
    """

    name: ParameterizationName
    curves: list[Curve]
    optima: list[Optimum]
    drift: float | None
    drift_interval: Interval | None
    shift_octaves: float
    regrets: list[float]
    is_control: bool


def summarize(sweep: Sweep, curves: list[Curve]) -> list[ParameterizationResult]:
    """What each parameterization's curves say. All are resampled with the same draws: they have their seeds in common."""
    draws, found = resample(sweep.seeds), []
    for name in sweep.parameterizations:
        own = [curve for curve in curves if curve.name == name]
        optima = [find_optimum(curve, draws) for curve in own]
        octaves, resampled = [optimum.octaves for optimum in optima], [optimum.resampled for optimum in optima]
        drift = drift_interval = None
        if len(own) > 1:
            sizes = np.array([log2(curve.level.scale) for curve in own])
            drift = float(slope(sizes, np.array(octaves)[:, None])[0])
            drift_interval = interval(slope(sizes, np.array(resampled))) if all(map(len, resampled)) else None
        losses = [(curve.mean(own[0].best), curve.mean(curve.best)) for curve in own]
        regrets = [(reused - best) / best if isfinite(best) else nan for reused, best in losses]
        shift, is_control = max(octaves) - min(octaves), not is_subject(sweep, name)
        found.append(ParameterizationResult(name, own, optima, drift, drift_interval, shift, regrets, is_control))
    return found


def is_subject(sweep: Sweep, name: str) -> bool:
    """Whether a parameterization's optimum is to hold over the study's sizes; if not, it is a control."""
    if sweep.level_axis == "layers" and sweep.parameterization.depth_rule == "none":
        return False
    if any(level.density != sweep.levels[0].density for level in sweep.levels):
        return name == "supar"
    return name != "sp"


def verdicts(one: ParameterizationResult) -> list[Verdict]:
    """Three of a parameterization at several sizes; `passed` is None where an optimum isn't bracketed."""
    if one.drift is None:
        return []
    shift, worst = one.shift_octaves, max(one.regrets, key=lambda value: inf if isnan(value) else value)
    between = "" if one.drift_interval is None else " [{:+.3f}, {:+.3f}]".format(*one.drift_interval)
    lost = "diverged" if worst == inf else "unknown" if isnan(worst) else f"{100 * worst:.2f} %"
    marks = {
        "drift": (abs(one.drift) < MAX_DRIFT, f"γ = {one.drift:+.3f}{between}; |γ| < {MAX_DRIFT:g}"),
        "shift": (shift < MAX_SHIFT_OCTAVES, f"at most {shift:.2f} octaves; < {MAX_SHIFT_OCTAVES:g}"),
        "regret": (worst < MAX_REGRET, f"at most {lost}; < {100 * MAX_REGRET:g} %"),
    }
    outer = [f"{curve.level.axis} {curve.level.value:g}" for curve in one.curves if not curve.bracketed]
    found = []
    for what, (is_met, text) in marks.items():
        passed: bool | None = is_met
        if outer or (what == "regret" and isnan(worst)):
            passed = None
            text += f" (unknown: no inner optimum at {', '.join(outer)})" if outer else " (unknown: a run failed)"
        elif one.is_control:
            text += " (a control, yet it holds here)" if is_met else " (a control, misses it as it should)"
        found.append(Verdict(what=f"{SHORT[one.name]}: {what}", passed=passed, control=one.is_control, text=text))
    return found
