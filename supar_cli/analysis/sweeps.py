"""Sweeps of the learning rate in octaves around a transferred one, and the regret of re-using the dense optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from supar_cli.analysis import figures
from supar_cli.errors import UnusableResult
from supar_cli.planning.rules import Name
from supar_cli.planning.spec import Proxy, Target
from supar_cli.planning.transfer import transfer
from supar_cli.tuning import execute

FARTHEST = 10  # chosen: a factor of a thousand from the transferred rate, beyond which no optimum is looked for


@dataclass(slots=True)
class Curve:
    """Validation losses, in nats a token, by octaves from the proxy's learning rate; inf where training diverged."""

    parameterization: Name
    density: float
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def best(self) -> int:
        return min(self.losses, key=lambda octave: (self.losses[octave], abs(octave)))


def bracket(loss_at: Callable[[int], float], start: range) -> dict[int, float]:
    """Losses at `start` and beyond, until the lowest has a higher neighbour on both sides or is FARTHEST away."""
    losses = {octave: loss_at(octave) for octave in start}
    while True:
        best = min(losses, key=lambda octave: (losses[octave], abs(octave)))
        missing = [octave for octave in (best - 1, best + 1) if octave not in losses and abs(octave) <= FARTHEST]
        if not missing:
            return losses
        losses |= {octave: loss_at(octave) for octave in missing}


def mean_loss(proxy: Proxy, target: Target, parameterization: Name, octave: int, seeds: list[int]) -> float:
    """Mean validation loss over seeds of a target trained at the proxy's rate times 2^octave; inf when one diverges."""
    tuned = proxy.hyperparameters
    scaled = proxy.model_copy(update={"hyperparameters": tuned.model_copy(update={"lr": tuned.lr * 2.0**octave})})
    total = 0.0
    for seed in seeds:
        plan = transfer(scaled, target.model_copy(update={"seed": seed}), parameterization, allow_low_wpn=True)
        try:
            total += execute.validation_loss(plan)
        except UnusableResult:
            return inf
    return total / len(seeds)


def lr_curve(proxy: Proxy, target: Target, parameterization: Name, start: tuple[int, int], seeds: list[int]) -> Curve:
    """The learning-rate curve of one target, from `start[0]` to `start[1]` octaves and as far as its optimum asks."""
    assert target.sparsity.density is not None
    losses = bracket(
        lambda octave: mean_loss(proxy, target, parameterization, octave, seeds), range(start[0], start[1] + 1)
    )
    return Curve(parameterization, target.sparsity.density, dict(sorted(losses.items())))


def dense_of(curve: Curve, curves: list[Curve]) -> Curve:
    """The curve of density 1 under the same parameterization."""
    return next(c for c in curves if c.parameterization == curve.parameterization and c.density == 1.0)


def unmeasured(curves: list[Curve]) -> list[tuple[Curve, int]]:
    """Curves that were not measured at their dense optimum, with the octave that is missing."""
    wanted = [(curve, dense_of(curve, curves).best) for curve in curves]
    return [(curve, octave) for curve, octave in wanted if octave not in curve.losses]


def regrets(curves: list[Curve]) -> list[dict[str, Any]]:
    """For each curve: where its optimum lies against the dense one's of its parameterization, and the regret there.

    None stands for a loss that is not finite. Raises UnusableResult when a curve's training diverged at every rate.
    """
    rows = []
    for curve in curves:
        dense = dense_of(curve, curves)
        if not isfinite(curve.losses[curve.best]):
            raise UnusableResult(
                f"{curve.parameterization} at density {curve.density:g}: training diverged at every rate tried"
            )
        there = curve.losses[dense.best]
        rows.append(
            {
                "parameterization": curve.parameterization,
                "density": curve.density,
                "optimum_octaves": curve.best - dense.best,
                "loss_at_optimum": curve.losses[curve.best],
                "loss_at_dense_rate": there if isfinite(there) else None,
                "regret": there - curve.losses[curve.best] if isfinite(there) else None,
            }
        )
    return rows


def lr_transfer(curves: list[Curve], lr: float) -> figures.Figure:
    """Loss over learning rate: a panel for each parameterization, a line for each density, its optimum ringed."""
    panels = []
    for name in dict.fromkeys(curve.parameterization for curve in curves):
        own = [curve for curve in curves if curve.parameterization == name]
        lines = [
            figures.line(
                f"density {figures.fraction(curve.density)}",
                {lr * 2.0**octave: loss for octave, loss in curve.losses.items()},
                ring=lr * 2.0**curve.best,
            )
            for curve in own
        ]
        vertical = lr * 2.0 ** dense_of(own[0], own).best
        panels.append({"title": figures.TITLES[name], "vertical": vertical, "lines": lines})
    return {
        "name": "lr_transfer",
        "title": "Loss over learning rate; rings are optima, the grey band is the dense one",
        "x": "learning rate of the proxy, η",
        "y": "validation loss (nats per token)",
        "x_log2": True,
        "y_log2": False,
        "y_limits": figures.loss_limits([v for curve in curves for v in curve.losses.values() if isfinite(v)]),
        "panels": panels,
    }
