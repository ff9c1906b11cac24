"""Who proposes a trial and who stops it early: Optuna's samplers and pruners, the samplers seeded by the trial's number."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from supar_cli.errors import SetupError
from supar_cli.planning.spec import Search, Spec


class SeededByTrialNumber(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """A search's sampler, made anew for each trial from (search seed, trial number).

    Numbers are given out once by the study's storage, so no two processes draw the same proposal, and a study that is
    continued draws what it would have drawn. Raises SetupError when the sampler needs a package that is missing.
    """

    def __init__(self, search: Search) -> None:
        if search.sampler in ("qmc", "gp") and importlib.util.find_spec("scipy") is None:
            raise SetupError(f"search.sampler: {search.sampler} needs scipy: pip install scipy")
        self._search = search
        self._inner: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._inner = _make_sampler(self._search, trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> Any:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(self, *arguments: Any) -> Any:
        return self._inner.sample_independent(*arguments)

    def after_trial(self, *arguments: Any) -> None:
        self._inner.after_trial(*arguments)


def _make_sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "qmc":
        # one sequence for the study; Optuna's own place in it, an attribute of the study, is not safe from races
        first = optuna.samplers.RandomSampler(seed=seed)
        sampler = optuna.samplers.QMCSampler(
            seed=search.seed, scramble=True, independent_sampler=first, warn_independent_sampling=False
        )
        sampler._find_sample_id = lambda study, space: number
        return sampler
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.samplers.GPSampler(seed=seed)


def make_pruner(spec: Spec) -> optuna.pruners.BasePruner:
    """Stops a trial at an evaluation that is worse than the others' were at that step."""
    if spec.search.pruner == "median":
        # chosen: five trials to compare with, and a quarter of the run before the learning rates can be told apart
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=spec.train.steps // 4)
    if spec.search.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, spec.train.steps // 8), reduction_factor=2)
    return optuna.pruners.NopPruner()
