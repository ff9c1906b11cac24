"""What curves say about transfer: optima with intervals over seeds, their drift, and the regret of re-using the first."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, log2, nan
from typing import Any

import numpy as np

from supar_cli.experiments.curves import Curve, first_of
from supar_cli.experiments.statistics import fit_quadratic
from supar_cli.planning.sweep import Sweep
from supar_cli.reporting.result import TITLES

# chosen: a loss curve is a parabola near its optimum only; on the far side of it training soon breaks down
WINDOW_STEPS, WINDOW_OCTAVES = 2, 1.5
RESAMPLES = 2000  # chosen: the 2.5 % quantile then rests on 50 of them
MOST_DRIFT, MOST_SHIFT_OCTAVES, MOST_REGRET = 0.15, 0.5, 0.005  # the pass marks, of SPEC and README

SHORT = {**TITLES, "sp": "SP", "supar-lr-only": "SμPar's rate only"}

Interval = tuple[float, float] | None


@dataclass(slots=True)
class Optimum:
    """A curve's optimum in octaves: of the parabola, or of the best value measured where none is usable (`why`)."""

    octaves: float
    fitted: bool
    why: str
    resampled: np.ndarray  # optima of resampled seeds; empty with one seed

    @property
    def interval(self) -> Interval:
        return interval(self.resampled)


def interval(resampled: np.ndarray) -> Interval:
    """95 % of the resampled values; None with one seed, whose resamples are all itself."""
    if not len(resampled):
        return None
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def optimum(curve: Curve, draws: np.ndarray) -> Optimum:
    """The optimum, by a parabola through the finite losses near the best value; `draws` are resamples of seed indices."""
    best = curve.best
    x0 = curve.grid.octaves(best)
    window = near(curve)
    if not window:
        return Optimum(x0, False, "no run gave a finite loss", np.empty(0))
    seeds = sorted(curve.losses[best])
    points = [(curve.grid.octaves(p) - x0, s, loss) for p in window for s, loss in curve.losses[p].items()]
    fit = fit_quadratic(points)
    shift, why = (fit.octaves, "") if fit.usable else (0.0, fit.why)
    x = np.array([curve.grid.octaves(place) - x0 for place in window])
    losses_XS = np.array([[curve.losses[place][seed] for seed in seeds] for place in window])
    if not fit.usable and len(window) >= 3:  # one seed and three values: a parabola, though nothing to judge it by
        found = float(vertices(x, losses_XS.mean(1, keepdims=True))[0])
        shift, why = (found, "") if isfinite(found) else (0.0, why)
    resampled = np.empty(0)
    if len(draws):
        means_XB = losses_XS[:, draws].mean(2)
        found_B = vertices(x, means_XB) if len(x) >= 3 else np.full(len(draws), nan)
        resampled = x0 + np.where(np.isfinite(found_B), found_B, x[means_XB.argmin(0)])
    return Optimum(x0 + shift, not why, why, resampled)


def near(curve: Curve) -> list[float]:
    """Places near the best whose losses are all finite: within WINDOW_STEPS of the finest step and WINDOW_OCTAVES.

    At least the next places on both sides, however far; a diverged or failed one is none.
    """
    places, best = curve.places, curve.best
    at, x0 = places.index(best), curve.grid.octaves(best)
    distances = [abs(curve.grid.octaves(p) - x0) for p in places]
    step = min((d for d in distances if d > 1e-9), default=0.0)
    reach = min(WINDOW_STEPS * step, WINDOW_OCTAVES) + 1e-9
    found = [p for i, p in enumerate(places) if abs(i - at) <= 1 or distances[i] <= reach]
    return [place for place in found if isfinite(curve.mean(place))]


def vertices(x: np.ndarray, y_XB: np.ndarray) -> np.ndarray:
    """Lowest point of the parabola through each column of `y_XB`; nan where it has none within `x`."""
    scale = float(np.abs(x).max()) or 1.0
    a_B, b_B, _ = np.polyfit(x / scale, y_XB, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found_B = -b_B / (2 * a_B) * scale
    good = (a_B > 0) & (found_B >= x.min()) & (found_B <= x.max())
    return np.where(good, found_B, nan)


def slope(x: np.ndarray, y_XB: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column of `y_XB` against `x`."""
    centred = x - x.mean()
    return np.asarray(centred @ y_XB / (centred @ centred))


@dataclass(slots=True)
class Arm:
    """One parameterization's curves, its optima and what they say; `drift` is the slope of log2 optimum on log2 size."""

    name: str
    curves: list[Curve]
    optima: list[Optimum]
    drift: float | None
    drift_interval: Interval
    shift_octaves: float
    control: bool

    @property
    def regrets(self) -> list[float]:
        """Share of the loss lost at each size by re-using the first size's best value; nan where it isn't known."""
        there = first_of(self.curves[0], self.curves).best
        best = [curve.mean(curve.best) for curve in self.curves]
        return [_regret(curve.mean(there), own) for curve, own in zip(self.curves, best, strict=True)]

    @property
    def unknown(self) -> list[Curve]:
        """Curves whose optimum is not bracketed."""
        return [curve for curve in self.curves if not curve.bracketed]


def _regret(there: float, best: float) -> float:
    if not isfinite(best):
        return nan
    return (there - best) / best if there != inf else inf


def analyse(sweep: Sweep, curves: list[Curve]) -> list[Arm]:
    """The arms of a measured study. Resamples are drawn once, so that arms and sizes keep their seeds in common."""
    seeds = sweep.seeds
    draws = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds)) if seeds > 1 else np.empty((0, seeds))
    arms = []
    for name in sweep.parameterizations:
        own = [curve for curve in curves if curve.name == name]
        optima = [optimum(curve, draws) for curve in own]
        x = np.array([log2(curve.level.scale) for curve in own])
        drift, spread = None, None
        if len(own) > 1:
            drift = float(slope(x, np.array([[o.octaves] for o in optima]))[0])
            if all(len(o.resampled) for o in optima):
                spread = interval(slope(x, np.array([o.resampled for o in optima])))
        found = [o.octaves for o in optima]
        arms.append(Arm(name, own, optima, drift, spread, max(found) - min(found), not promised(sweep, name)))
    return arms


def promised(sweep: Sweep, name: str) -> bool:
    """Whether a parameterization's optimum is to hold over the study's sizes; if not, it is a control."""
    if sweep.level_axis == "layers" and sweep.parameterization.depth_rule == "none":
        return False
    if any(level.density != sweep.levels[0].density for level in sweep.levels):
        return name == "supar"
    return name != "sp"


def verdicts(arms: list[Arm]) -> list[dict[str, Any]]:
    """Three a parameterization: {what, passed, control, text}; `passed` is None when an optimum isn't bracketed."""
    found = []
    for arm in arms:
        if arm.drift is None:
            continue
        worst = max(arm.regrets, key=lambda value: inf if value != value else value)
        between = "" if arm.drift_interval is None else " [{:+.3f}, {:+.3f}]".format(*arm.drift_interval)
        lost = "diverged" if worst == inf else "unknown" if worst != worst else f"{100 * worst:.2f} %"
        for what, passed, text in (
            ("drift", abs(arm.drift) < MOST_DRIFT, f"γ = {arm.drift:+.3f}{between}; |γ| < {MOST_DRIFT:g}"),
            (
                "shift",
                arm.shift_octaves < MOST_SHIFT_OCTAVES,
                f"at most {arm.shift_octaves:.2f} octaves; < {MOST_SHIFT_OCTAVES:g}",
            ),
            ("regret", worst < MOST_REGRET, f"at most {lost}; < {100 * MOST_REGRET:g} %"),
        ):
            known = not arm.unknown and (what != "regret" or worst == worst)
            found.append(_verdict(arm, what, passed if known else None, text))
    return found


def _verdict(arm: Arm, what: str, passed: bool | None, text: str) -> dict[str, Any]:
    if passed is None:
        open_ = ", ".join(f"{curve.level.axis} {curve.level.value:g}" for curve in arm.unknown)
        text += f" (unknown: no inner optimum at {open_})" if open_ else " (unknown: a run failed)"
    elif arm.control:
        text += " (a control, misses it as it should)" if not passed else " (a control, yet it holds here)"
    return {"what": f"{SHORT[arm.name]}: {what}", "passed": passed, "control": arm.control, "text": text}


def violated(found: list[dict[str, Any]]) -> list[str]:
    """What a check ends with status 5 for: marks missed by what is no control."""
    return [f"{one['what']}: {one['text']}" for one in found if one["passed"] is False and not one["control"]]
