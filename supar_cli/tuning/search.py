"""The search for a proxy's hyperparameters: Optuna proposes, prunes and stores; the trainer runs every trial as a plan."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import socket
import statistics
import warnings
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from supar_cli import __version__
from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.planning.document import content_hash
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Search, Spec
from supar_cli.planning.transfer import as_trial
from supar_cli.tuning import execute
from supar_cli.tuning.fit import Fit, quadratic

Values = dict[str, float]


class Reporter(Protocol):
    def progress(self, step: int, steps: int, loss: float) -> None: ...
    def log(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


@dataclass(slots=True)
class Finalist:
    """One of the best trials, run with several seeds; `losses` are validation losses in nats per token."""

    trial: int
    values: Values
    losses: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)


def study_name(spec: Spec) -> str:
    """Name of a spec's study. What changes a trial's loss or its ranges makes another study; trials and sampler don't."""
    deciding = spec.model_dump(include={"model", "hyperparameters", "parameterization", "sparsity", "data", "train"})
    return "supar-" + content_hash({**deciding, "ranges": spec.search.ranges()})[7:19]


def open_study(storage: str, name: str) -> optuna.Study:
    """The study in a journal file or, for a text with `://`, in any Optuna storage. Raises SetupError."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        backend: Any = storage
        if "://" not in storage:
            backend = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
        return optuna.create_study(storage=backend, study_name=name, load_if_exists=True)
    except Exception as error:  # each storage has its own errors; none of them is ours
        raise SetupError(f"--study {storage}: can't be opened: {type(error).__name__}: {error}") from None


def _sampler(search: Search, position: int) -> optuna.samplers.BaseSampler:
    """The sampler for trial number `position`: its own seed, so that a study continued repeats no proposal."""
    seed = int(np.random.SeedSequence([search.seed, position]).generate_state(1)[0])
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if search.sampler in ("qmc", "gp") and importlib.util.find_spec("scipy") is None:
        raise SetupError(f"search.sampler: {search.sampler} needs the extra: pip install 'supar[gp]'")
    if search.sampler == "qmc":  # keeps its place in the sequence in the study, under one seed
        return optuna.samplers.QMCSampler(seed=search.seed, scramble=True, warn_independent_sampling=False)
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.samplers.GPSampler(seed=seed)


def _pruner(spec: Spec) -> optuna.pruners.BasePruner:
    """Stops a trial at an evaluation that is worse than the others' were at that step."""
    if spec.search.pruner == "median":
        # chosen: five trials to compare with, and a quarter of the run before the learning rates can be told apart
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=spec.train.steps // 4)
    if spec.search.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, spec.train.steps // 8), reduction_factor=2)
    return optuna.pruners.NopPruner()


def proxy_of(spec: Spec, values: Values, seed: int | None = None) -> Proxy:
    """The proxy document with `values` in place of the spec's, and `seed` in place of its training seed."""
    shared = {name: getattr(spec, name) for name in ("model", "parameterization", "sparsity", "data", "target", "run")}
    train = spec.train if seed is None else spec.train.model_copy(update={"seed": seed})
    return Proxy(
        kind="supar.proxy/v1",
        parents={"spec": content_hash(spec.model_dump(exclude={"run", "meta"}))},
        hyperparameters=spec.hyperparameters.model_copy(update=values),
        train=train,
        **shared,
    )


def _plan(spec: Spec, values: Values, seed: int) -> Plan:
    return as_trial(proxy_of(spec, values, seed))


def run_trial(spec: Spec, storage: str, position: int) -> tuple[int, str, float, Values]:
    """Let Optuna propose one trial, run it, store it: (number, state, loss, values). Raises what a bad spec raises."""
    study = open_study(storage, study_name(spec))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.sampler, study.pruner = _sampler(spec.search, position), _pruner(spec)

    def objective(trial: optuna.Trial) -> float:
        if spec.search.sampler == "random":  # by its own number, which no other process has: no two draw the same
            study.sampler = _sampler(spec.search, trial.number)
        trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
        ranges = spec.search.ranges().items()
        values = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges}

        def on_evaluation(step: int, loss: float) -> None:
            trial.report(loss, step)
            if step < spec.train.steps and trial.should_prune():
                raise optuna.TrialPruned

        try:
            return execute.validation_loss(_plan(spec, values, spec.train.seed), on_evaluation)
        except UnusableResult as error:
            trial.set_user_attr("diverged", str(error))
            raise

    done: list[FrozenTrial] = []
    study.optimize(objective, 1, catch=(UnusableResult,), callbacks=[lambda _, trial: done.append(trial)])
    trial = done[0]
    state = "diverged" if trial.state == TrialState.FAIL else trial.state.name.lower()
    value = trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else float("inf")
    return trial.number, state, value, trial.params


def measure(spec: Spec, values: Values, seed: int) -> float | None:
    """Validation loss of one more run outside the search; None when it diverges."""
    try:
        return execute.validation_loss(_plan(spec, values, seed))
    except UnusableResult:
        return None


def search(spec: Spec, storage: str, *, jobs: int = 1, reporter: Reporter) -> Proxy:
    """Tune a spec up to its number of trials and return the proxy with its evidence.

    Raises InputError when nothing is searched, UnusableResult when every trial diverged; KeyboardInterrupt leaves a
    study that the same call continues.
    """
    ranges = spec.search.ranges()
    if not ranges:
        raise InputError("search: no range is given; expected one of " + ", ".join(Search.SEARCHED))
    execute.require_runnable(_plan(spec, {}, spec.train.seed))  # before a study is made
    study = open_study(storage, study_name(spec))
    _fail_abandoned(study)
    own = {name: getattr(spec.hyperparameters, name) for name in ranges}
    if all(low <= own[name] <= high for name, (low, high) in ranges.items()):
        waiting = [t for t in study.get_trials() if t.state in (TrialState.WAITING, TrialState.RUNNING)]
        if not any((t.system_attrs.get("fixed_params") or t.params) == own for t in (*waiting, *_finished(study))):
            study.enqueue_trial(own)  # the values the spec itself names are worth a trial
    workers = execute.Workers(jobs)
    _run_trials(spec, study, storage, workers, reporter)
    finished = _finished(study)
    complete = sorted((t for t in finished if t.state == TrialState.COMPLETE), key=lambda t: (t.value, t.number))
    if not complete:
        raise UnusableResult(
            f"all {len(finished)} trials diverged or were pruned; expected lower learning rates or init scales in search"
        )
    finalists = _run_finalists(spec, study, complete[: spec.search.finalists], workers, reporter)
    winner = min(finalists, key=lambda finalist: (finalist.mean, finalist.trial))
    values, fit = dict(winner.values), None
    if "lr" in ranges and spec.search.lr_fit_octaves:
        fit = _fit_lr(spec, study, winner, workers, reporter)
        values["lr"] = winner.values["lr"] * 2.0**fit.octaves
        if not fit.usable:
            reporter.warn(f"lr fit: {fit.why}; the best rate measured is taken, {values['lr']:.4g}")
    proxy = proxy_of(spec, values)
    evidence = _evidence(spec, storage, finished, finalists, winner, fit)
    environment = {"supar": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return proxy.model_copy(update={"evidence": evidence, "meta": {**spec.meta, "tuned_with": environment}})


def _fail_abandoned(study: optuna.Study) -> None:
    """Give up trials that a process of this host left running when it was killed."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get("process", [socket.gethostname(), 0])
        if host == socket.gethostname() and not _alive(process):
            study.tell(trial.number, state=TrialState.FAIL)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process > 0


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count: complete, pruned or diverged. One that was interrupted is done again."""
    counted = (TrialState.COMPLETE, TrialState.PRUNED)
    return [t for t in study.get_trials() if t.state in counted or "diverged" in t.user_attrs]


def _without_password(storage: str) -> str:
    """A storage URL as it may stand in a document."""
    parts = urlsplit(storage)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "://" in storage else storage


def best_so_far(spec: Spec, storage: str) -> str | None:
    """One line on the best trial of a study, None when there is none."""
    complete = [t for t in _finished(open_study(storage, study_name(spec))) if t.state == TrialState.COMPLETE]
    if not complete:
        return None
    best = min(complete, key=lambda trial: (trial.value, trial.number))
    return f"best of {len(complete)} complete trials: trial {best.number}, loss {best.value:.4f}, {words(best.params)}"


def words(values: Values) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _run_trials(spec: Spec, study: optuna.Study, storage: str, workers: execute.Workers, reporter: Reporter) -> None:
    done = _finished(study)
    best = min((t.value for t in done if t.value is not None and t.state == TrialState.COMPLETE), default=float("inf"))
    if done:
        reporter.log(f"study {study.study_name}: {len(done)} of {spec.search.trials} trials are there already")
    first = sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    missing = spec.search.trials - len(done)
    calls = [(spec, storage, first + offset) for offset in range(max(0, missing))]
    for count, (_, (number, state, loss, values)) in enumerate(workers.results(run_trial, calls), len(done) + 1):
        best = min(best, loss)
        said = f"loss {loss:.4f}" if state == "complete" else state
        reporter.log(f"trial {number}: {said}, {words(values)}")
        reporter.progress(count, spec.search.trials, best)


def _losses(
    spec: Spec,
    study: optuna.Study,
    wanted: list[tuple[Values, int]],
    workers: execute.Workers,
    reporter: Reporter,
    what: str,
) -> list[float | None]:
    """Losses of further runs (values, seed). The study keeps them, so that a run is never done twice."""
    keys = [f"run {json.dumps([values, seed], sort_keys=True)}" for values, seed in wanted]
    known = dict(study.user_attrs)
    missing = [index for index, key in enumerate(keys) if key not in known]
    calls = [(spec, *wanted[index]) for index in missing]
    for count, (place, loss) in enumerate(workers.results(measure, calls), 1):
        known[keys[missing[place]]] = loss
        study.set_user_attr(keys[missing[place]], loss)
        values, seed = wanted[missing[place]]
        said = "diverged" if loss is None else f"loss {loss:.4f}"
        reporter.log(f"{what} {count}/{len(calls)}: {said}, {words(values)}, seed {seed}")
    return [known[key] for key in keys]


def _run_finalists(
    spec: Spec, study: optuna.Study, best: list[FrozenTrial], workers: execute.Workers, reporter: Reporter
) -> list[Finalist]:
    seeds = [spec.train.seed + offset for offset in range(1, spec.search.seeds)]
    wanted = [(trial.params, seed) for trial in best for seed in seeds]
    losses = _losses(spec, study, wanted, workers, reporter, "finalist run")
    finalists = []
    for index, trial in enumerate(best):
        own = [trial.value, *losses[index * len(seeds) : (index + 1) * len(seeds)]]
        if all(loss is not None for loss in own):
            finalists.append(Finalist(trial.number, trial.params, [loss for loss in own if loss is not None]))
        else:
            reporter.warn(f"trial {trial.number} diverges with another seed; it is no finalist")
    if not finalists:
        raise UnusableResult("every finalist diverges with another seed; expected lower learning rates in search.lr")
    return finalists


def _fit_lr(spec: Spec, study: optuna.Study, winner: Finalist, workers: execute.Workers, reporter: Reporter) -> Fit:
    seeds = [spec.train.seed + offset for offset in range(spec.search.seeds)]
    wanted = [
        ({**winner.values, "lr": winner.values["lr"] * 2.0**octaves}, seed)
        for octaves in spec.search.lr_fit_octaves
        for seed in seeds
    ]
    losses = _losses(spec, study, wanted, workers, reporter, "lr fit run")
    points = [(0.0, seed, loss) for seed, loss in zip(seeds, winner.losses, strict=True)]
    places = [(octaves, seed) for octaves in spec.search.lr_fit_octaves for seed in seeds]
    points += [(x, seed, loss) for (x, seed), loss in zip(places, losses, strict=True) if loss is not None]
    return quadratic(points)


def _evidence(
    spec: Spec, storage: str, finished: list[FrozenTrial], finalists: list[Finalist], winner: Finalist, fit: Fit | None
) -> dict[str, Any]:
    states = [("diverged" if "diverged" in trial.user_attrs else trial.state.name.lower()) for trial in finished]
    return {
        "study": {"storage": _without_password(storage), "name": study_name(spec)},
        "sampler": spec.search.sampler,
        "pruner": spec.search.pruner,
        "seed": spec.search.seed,
        "ranges": {name: list(bounds) for name, bounds in spec.search.ranges().items()},
        "trials": {state: states.count(state) for state in ("complete", "pruned", "diverged")},
        "finalists": [
            {"trial": f.trial, **f.values, "losses": f.losses, "mean": f.mean, "chosen": f is winner} for f in finalists
        ],
        "lr_fit": None if fit is None else fit.evidence(winner.values["lr"]),
    }
