"""Statistics of losses and sizes: parabolas through them, and confidence intervals of what is read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_FREEDOM = 2  # chosen: below it the interval is wider than any grid


@dataclass(frozen=True, slots=True)
class Fit:
    """loss = curvature·(x - x₀)² + an offset per seed; x and its best value `octaves` in octaves from the best trial's rate.

    Where no parabola is usable, `octaves` is the best rate measured with every seed.
    """

    usable: bool
    why: str
    points: int
    octaves: float = 0.0
    half_width_octaves: float = 0.0
    curvature: float = 0.0
    residual: float = 0.0

    def evidence(self, lr: float) -> dict[str, Any]:
        """The fit as proxy.yaml has it, with rates in place of octaves from the trial's rate `lr`."""
        why = {} if self.usable else {"why": self.why}
        rate = lr * 2.0**self.octaves
        found = {"usable": self.usable, **why, "points": self.points, "lr_of_trial": lr, "lr": rate}
        if self.usable:
            ends = (self.octaves - self.half_width_octaves, self.octaves + self.half_width_octaves)
            found["lr_ci95"] = [lr * 2.0**end for end in ends]
            found |= {"nats_per_octave_squared": self.curvature, "residual_nats": self.residual}
        return found


def fit_quadratic(points: list[tuple[float, int, float]]) -> Fit:
    """Least squares over points (octaves, seed, loss), a parabola common to all seeds and an offset for each.

    The interval is the delta method's for -b/(2a), at 95 %, with Student's t for the residual degrees of freedom.
    """
    x = np.array([octaves for octaves, _, _ in points])
    loss = np.array([value for _, _, value in points])
    seeds = sorted({seed for _, seed, _ in points})
    by_octaves = {octaves: [v for o, _, v in points if o == octaves] for octaves in x.tolist()}
    whole = {octaves: sum(values) for octaves, values in by_octaves.items() if len(values) == len(seeds)}
    best = min(whole, key=lambda octaves: (whole[octaves], abs(octaves)), default=0.0)
    offsets = np.array([[seed == other for other in seeds] for _, seed, _ in points], dtype=float)
    design = np.column_stack([x * x, x, offsets])
    freedom = len(points) - design.shape[1]
    if freedom < MIN_FREEDOM or len(set(x.tolist())) < 3:
        return Fit(False, f"{len(points)} finite losses are too few for a parabola", len(points), best)
    if all(len(set(loss[offsets[:, at] == 1].tolist())) == 1 for at in range(len(seeds))):
        why = "the loss is the same to the last digit at every rate, so the training does not use the plan's"
        return Fit(False, why, len(points), best)
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ loss
    a, b = float(solution[0]), float(solution[1])
    residual = float(np.sum((loss - design @ solution) ** 2)) / freedom
    if a <= 0:
        return Fit(False, "the fitted parabola opens downwards: no optimum between the rates tried", len(points), best)
    vertex = -b / (2 * a)
    if not x.min() <= vertex <= x.max():
        side = "below" if vertex < x.min() else "above"
        return Fit(False, f"the optimum lies {side} the rates tried; widen search.lr_fit_octaves", len(points), best)
    gradient = np.array([b / (2 * a * a), -1 / (2 * a), *[0.0] * len(seeds)])
    error = sqrt(residual * float(gradient @ inverse @ gradient))
    return Fit(True, "", len(points), vertex, student_t975(freedom) * error, a, sqrt(residual))


def student_t975(freedom: int) -> float:
    """97.5 % quantile of Student's t."""
    return _student_t(1.959963984540054, freedom)


def _student_t(normal: float, freedom: int) -> float:
    """A quantile of Student's t from the normal's: Abramowitz and Stegun 26.7.5 (under 1 % off from 3 on, 3 % at 2)."""
    z, v = normal, float(freedom)
    first = (z**3 + z) / (4 * v)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return z + first + second + third


def interquartile_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean of the middle half of finite values along an axis: Agarwal et al. 2021, arXiv 2108.13264.

    Of a number of values that is not divisible by 4, the outermost ones of that half count in part.
    """
    count = values.shape[axis]
    weights = np.diff(np.clip(np.arange(count + 1), count / 4, 3 * count / 4)) / (count / 2)
    return np.asarray(np.tensordot(np.sort(values, axis), weights, axes=(axis, 0)))


def share_of(lost: float, loss: float) -> float:
    """What is lost as a share of a loss' size, which may be below 0, as that of a return is; nan of a loss of 0."""
    return lost / abs(loss) if loss else nan


RESAMPLES = 2000  # chosen: the 2.5 % quantile then rests on 50 of them

Interval = list[float]  # low, high


def resample(count: int, more: int = 0) -> np.ndarray:
    """RESAMPLES rows of `count` indices drawn with replacement, always the same ones; no rows if there is a single index.

    `more` columns of the indices that follow are drawn apart, so that what has the first indices alone stays paired with it.
    """
    rows = RESAMPLES if count > 1 else 0
    further = np.random.default_rng(1).integers(count, count + max(more, 1), size=(rows, more))
    return np.hstack([np.random.default_rng(0).integers(count, size=(rows, count)), further])


def interval(resampled: np.ndarray) -> Interval | None:
    """95 % of the resampled values; None of no values."""
    return np.quantile(resampled, [0.025, 0.975]).tolist() if len(resampled) else None


T95_OF_TWO = 6.313751514675043  # Student's t for one degree of freedom, where the expansion is 12 % off


def interval_of_few(value: float, resampled: np.ndarray, count: int) -> Interval | None:
    """90 % around a value from resamples of `count` seeds; None of no resamples.

    Student's t times the resamples' standard error, as quantiles of so few cover too little (of 4 at most 87.5 %).
    """
    if not len(resampled) or not isfinite(value):
        return None
    t = T95_OF_TWO if count == 2 else _student_t(1.6448536269514722, count - 1)
    half = t * float(resampled.std()) * sqrt(count / (count - 1))
    return [value - half, value + half]


def vertices(x: np.ndarray, y_XB: np.ndarray) -> np.ndarray:
    """Lowest point of the parabola through each column of `y_XB`; nan where it has none within `x`."""
    scale = float(np.abs(x).max()) or 1.0
    a_B, b_B, _ = np.polyfit(x / scale, y_XB, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        found_B = -b_B / (2 * a_B) * scale
    return np.where((a_B > 0) & (found_B >= x.min()) & (found_B <= x.max()), found_B, nan)


def slope(x: np.ndarray, y_XB: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column of `y_XB` against `x`."""
    centred = x - x.mean()
    return np.asarray(centred @ y_XB / (centred @ centred))


def standard_error(values: Sequence[float], is_iqm: bool = False) -> float | None:
    """Standard error of the mean, or by resampling of the interquartile mean; None for one value or where one isn't finite."""
    if len(values) < 2 or not all(map(isfinite, values)):
        return None
    if is_iqm:
        resampled = interquartile_mean(np.array(values)[resample(len(values))], axis=1)
        return float(resampled.std()) * sqrt(len(values) / (len(values) - 1))
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def log_slopes(log_RZSN: NDArray[np.float64], at: list[float]) -> NDArray[np.float64]:
    """Least-squares slopes of log2(size) at Z points against log2 of the points, for R seeds, S steps and N names: (R, S, N)."""
    x_Z = np.log2(at) - np.mean(np.log2(at))
    return np.tensordot(log_RZSN, x_Z / (x_Z @ x_Z), axes=(1, 0))


def half_widths(values_RSN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the widths of the 95 % intervals of means over R seeds: (S, N); infinite for one seed."""
    freedom = len(values_RSN) - 1
    if not freedom:
        return np.full(values_RSN.shape[1:], inf)
    quantile = {1: 12.706, 2: 4.303}.get(freedom) or student_t975(freedom)
    return np.asarray(quantile * values_RSN.std(axis=0, ddof=1) / sqrt(freedom + 1))
