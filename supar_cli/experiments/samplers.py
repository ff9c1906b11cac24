"""What proposes a search's values and prunes its trials: Optuna's samplers and pruners, as a spec asks for them."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from supar_cli.errors import SetupError
from supar_cli.planning.spec import Search


class SeededByTrialNumber(optuna.samplers.RandomSampler):  # type: ignore[misc]
    """A search's sampler, made anew for each trial from (search seed, trial number).

    Numbers are given out once by the study's storage, so no two processes draw the same proposal, and a study that is
    continued draws what it would have drawn. Raises SetupError when the sampler needs a package that is missing.
    """

    def __init__(self, search: Search) -> None:
        if search.sampler in ("qmc", "gp") and importlib.util.find_spec("scipy") is None:
            raise SetupError(f"search.sampler: {search.sampler} needs scipy: pip install scipy")
        super().__init__()
        self._search = search

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _make_sampler(self._search, trial.number)
        sampler.before_trial(study, trial)
        for asked in ("infer_relative_search_space", "sample_relative", "sample_independent", "after_trial"):
            setattr(self, asked, getattr(sampler, asked))


def suggest(trial: optuna.Trial, name: str, values: list[float]) -> float:
    """A value of a range [low, high], proposed on a log scale, or one of three or more choices."""
    if len(values) == 2:
        return trial.suggest_float(name, *values, log=True)  # type: ignore[no-any-return]
    return trial.suggest_categorical(name, values)  # type: ignore[no-any-return]


def can_suggest(values: list[float], value: float) -> bool:
    """Whether a value is within a range, or is one of the choices."""
    return values[0] <= value <= values[1] if len(values) == 2 else value in values


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


def make_pruner(search: Search, steps: int) -> optuna.pruners.BasePruner:
    """Stops a trial at an evaluation that is worse than the others' were at that step. A whole run has that many steps."""
    if search.pruner == "median":
        # chosen: five trials to compare with, and a quarter of the run before the learning rates can be told apart
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=steps // 4)
    if search.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, steps // 8), reduction_factor=2)
    return optuna.pruners.NopPruner()
