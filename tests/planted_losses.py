"""Losses with a known optimum in place of training: a parabola that moves with the density as a plan's β is wrong."""

from __future__ import annotations

from math import log2
from pathlib import Path

import numpy as np
import pytest

from supar_cli.jobs import runs
from supar_cli.planning.advice import density_exponent
from supar_cli.planning.plan import Plan
from supar_cli.reporting import figures

TRUE = {None: 1.0, "set": 1.0, "rigl": 0.8, "gmp": 1.0, "topk": 1.0}  # the planted β of each method


def planted(plan: Plan, noise: float = 0.002) -> float:
    """A parabola in octaves of the rate: its optimum moves with the density as far as the plan's β is off the planted one."""
    updates = plan.sparsity.updates
    gamma = density_exponent(plan) - TRUE[updates and updates.method]
    if updates is not None and updates.rates_follow == "end" and updates.start is not None:
        gamma += 0.5
    off = log2(plan.hyperparameters.lr) + 6.7 - gamma * log2(plan.sparsity.density)
    chance = np.random.default_rng(int(plan.hash()[7:15], 16)).standard_normal()
    return float(2.4 + 0.04 * off**2 + 0.02 * plan.train.seed + noise * chance)


def plant(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that are trained from now on, in order: nothing is, their losses are the planted ones, and no figure is drawn."""
    found: list[Plan] = []

    def loss(plan: Plan, folder: Path) -> float:
        found.append(plan)
        return planted(plan)

    monkeypatch.setattr(runs, "validation_loss", loss)
    monkeypatch.setattr(figures, "save", lambda *_: None)  # which takes longest; other tests draw them
    return found
