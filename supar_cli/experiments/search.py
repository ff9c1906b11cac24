"""The search for a proxy's hyperparameters: Optuna proposes, prunes and stores; the trainer runs every trial as a plan."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from supar_cli.data import corpus
from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.experiments import samplers
from supar_cli.experiments.statistics import Fit, fit_quadratic
from supar_cli.jobs import runs
from supar_cli.jobs.local import Local
from supar_cli.jobs.queue import SharedStudy, run_until_complete, state_of
from supar_cli.jobs.storage import RetryPolicy, absolute, redact_url
from supar_cli.jobs.workers import Workers, make_workers
from supar_cli.planning.document import content_hash
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Search, Spec
from supar_cli.planning.transfer import as_trial
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.runtime import versions

Values = dict[str, float]
RUNS = "-runs"  # of the name of the study that keeps a study's extra runs


@dataclass(slots=True)
class Finalist:
    """One of the best trials, run with several seeds; `losses` are validation losses in nats per token."""

    trial: int
    values: Values
    losses: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.losses)


def study_name(spec: Spec) -> str:
    """Name of a spec's study. What changes a trial's loss or its ranges makes another study; trials and sampler don't."""
    deciding = spec.identity(include={"model", "hyperparameters", "parameterization", "sparsity", "data", "train"})
    return "supar-" + content_hash({**deciding, "ranges": spec.search.ranges()})[7:19]


def proxy_of(spec: Spec, values: Values, seed: int | None = None) -> Proxy:
    """The proxy document with `values` in place of the spec's, and `seed` in place of its training seed."""
    shared = {name: getattr(spec, name) for name in ("model", "parameterization", "sparsity", "data", "target", "run")}
    train = spec.train if seed is None else spec.train.model_copy(update={"seed": seed})
    return Proxy(
        kind="supar.proxy/v1",
        parents={"spec": content_hash(spec.identity(exclude={"run", "meta"}))},
        hyperparameters=spec.hyperparameters.model_copy(update=values),
        train=train,
        **shared,
    )


def _plan(spec: Spec, values: Values, seed: int) -> Plan:
    return as_trial(proxy_of(spec, values, seed))


def tune(
    spec: Spec,
    study: str | Path = "proxy.journal",
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    verbose: bool = False,
    reporter: Reporter | None = None,
) -> Proxy:
    """Tune a spec up to its number of trials, in a study that the same call continues; the proxy with its evidence.

    `study` is a journal file or a database's URL. Raises SuparError.
    """
    if not isinstance(spec, Spec):
        raise InputError(f"{type(spec).__name__}: expected a Spec")
    spec = spec.model_copy(update={"data": corpus.identified(spec.data)})
    folder = Path("proxy" if "://" in str(study) else study).with_suffix(".slurm")
    with make_workers(
        executor, jobs=jobs, settings=executor_set, device=spec.run.device, folder=folder, verbose=verbose
    ) as workers:
        return search(spec, str(study), workers=workers, reporter=reporter or NullReporter())


def search(spec: Spec, storage: str, *, workers: Workers | None = None, reporter: Reporter) -> Proxy:
    """Tune a spec up to its number of trials and return the proxy with its evidence.

    Any number of processes, on any machines, may do so with one storage: together they make the trials and runs that
    one would, and end with the same proxy. Raises InputError when nothing is searched, UnusableResult when every trial
    diverged, SetupError when a storage or workers fail; all of them, and KeyboardInterrupt, leave a study that the same
    call continues.
    """
    ranges, workers = spec.search.ranges(), workers or Local()
    if not ranges:
        raise InputError("search: no range is given; expected one of " + ", ".join(Search.SEARCHED))
    samplers.SeededByTrialNumber(spec.search)
    runs.require_runnable(_plan(spec, {}, spec.train.seed), device=workers.is_local)  # before a study is made
    tuning = _Tuning(spec, storage, workers, reporter)
    trials = tuning.run_trials()
    complete = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: (t.value, t.number))
    if not complete:
        raise UnusableResult(
            f"all {len(trials)} trials diverged or were pruned; expected lower learning rates or init scales in search"
        )
    finalists = tuning.run_finalists(complete[: spec.search.finalists])
    winner = min(finalists, key=lambda finalist: (finalist.mean, finalist.trial))
    values, fit = dict(winner.values), None
    if "lr" in ranges and spec.search.lr_fit_octaves:
        fit = tuning.fit_lr(winner)
        values["lr"] = winner.values["lr"] * 2.0**fit.octaves
        if not fit.usable:
            reporter.warn(f"lr fit: {fit.why}; the best rate measured is taken, {values['lr']:.4g}")
    evidence = _evidence(spec, storage, trials, finalists, winner, fit)
    update = {"evidence": evidence, "meta": {**spec.meta, "tuned_with": versions()}}
    return proxy_of(spec, values).model_copy(update=update)


def best_so_far(spec: Spec, storage: str) -> str | None:
    """One line on the best trial of a study, None when there is none or it can't be read."""
    try:
        trials = SharedStudy(storage, study_name(spec), RetryPolicy(storage, limit_s=0.0), join=True).trials()
    except SetupError:
        return None
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete:
        return None
    best = min(complete, key=lambda trial: (trial.value, trial.number))
    text = format_values(best.params)
    return f"best of {len(complete)} complete trials: trial {best.number}, loss {best.value:.4f}, {text}"


def format_values(values: Values) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def run_next(spec: Spec, storage: str, among: Collection[str] | None = None) -> FrozenTrial | None:
    """Claim a trial, or one of the extra runs `among`, run it as a plan and store it: the trial that ended.

    None when none was left, or it was taken away. Raises what a bad spec raises.
    """
    study = SharedStudy(storage, study_name(spec) + ("" if among is None else RUNS), join=True)
    study.study.sampler, study.study.pruner = samplers.SeededByTrialNumber(spec.search), samplers.make_pruner(spec)
    trial = study.claim(spec.search.trials if among is None else None, among)

    def try_values(trial: optuna.Trial) -> float:
        ranges = spec.search.ranges().items()
        values = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges}

        def on_evaluation(step: int, loss: float) -> None:
            trial.report(loss, step)
            if step < spec.train.steps and trial.should_prune():
                raise optuna.TrialPruned

        return runs.validation_loss(_plan(spec, values, spec.train.seed), on_evaluation)

    def run_again(trial: optuna.Trial) -> float:
        return runs.validation_loss(_plan(spec, *json.loads(trial.user_attrs["run"])))

    return None if trial is None else study.run(trial, try_values if among is None else run_again)


@dataclass(frozen=True, slots=True)
class _Tuning:
    """What is run for a spec: trials, and extra runs of their values, which a study of their own keeps and shares."""

    spec: Spec
    storage: str
    workers: Workers
    reporter: Reporter

    def _open(self, suffix: str = "", at_once: bool = False) -> SharedStudy:
        retries = RetryPolicy(self.storage, self.reporter.warn)
        return SharedStudy(self.storage, study_name(self.spec) + suffix, retries, at_once=at_once)

    def _run(self, study: SharedStudy, **wanted: Any) -> Generator[FrozenTrial]:
        """Have the trials or runs that are missing made, here or elsewhere: those that ended here."""
        call = (self.spec, absolute(self.storage), wanted.get("among"))
        return run_until_complete(study, self.workers, self.reporter, run_next, call, **wanted)

    def run_trials(self) -> list[FrozenTrial]:
        """Have the spec's trials run; those that count."""
        spec, reporter, total = self.spec, self.reporter, self.spec.search.trials
        study = self._open(at_once=True)
        ranges = spec.search.ranges()
        own = {name: getattr(spec.hyperparameters, name) for name in ranges}
        if all(low <= own[name] <= high for name, (low, high) in ranges.items()):
            study.queue_once(own)  # the values the spec itself names are worth a trial
        counted = study.counted()
        if counted:
            reporter.log(f"study {study.study.study_name}: {len(counted)} of {total} trials are there already")
        for trial in self._run(study, most=total):
            state, counted = state_of(trial), study.counted()
            outcome = f"loss {trial.value:.4f}" if state == "complete" else state
            reporter.log(f"trial {trial.number}: {outcome}, {format_values(trial.params)}")
            best = min((t.value for t in counted if t.state == TrialState.COMPLETE), default=float("inf"))
            reporter.progress(len(counted), total, best)
        return study.counted()

    def losses(self, wanted: list[tuple[Values, int]], what: str) -> list[float | None]:
        """Losses of runs (values, seed), None of one that diverges. Each is made once, by whichever process comes to it."""
        if not wanted:
            return []
        study, keys = self._open(RUNS), [json.dumps([values, seed], sort_keys=True) for values, seed in wanted]
        for count, trial in enumerate(self._run(study, among=keys), 1):
            outcome = "diverged" if trial.value is None else f"loss {trial.value:.4f}"
            values, seed = json.loads(trial.user_attrs["run"])
            self.reporter.log(f"{what} {count}/{len(keys)}: {outcome}, {format_values(values)}, seed {seed}")
        found = {trial.user_attrs["run"]: trial.value for trial in study.counted()}
        return [found[key] for key in keys]

    def run_finalists(self, best: list[FrozenTrial]) -> list[Finalist]:
        """Run the best trials with further seeds. Raises UnusableResult when each diverges with one."""
        search, seed = self.spec.search, self.spec.train.seed
        seeds = range(seed + 1, seed + search.seeds)
        losses = iter(self.losses([(trial.params, seed) for trial in best for seed in seeds], "finalist run"))
        finalists = []
        for trial in best:
            own = [trial.value, *(next(losses) for _ in seeds)]
            if None in own:
                self.reporter.warn(f"trial {trial.number} diverges with another seed; it is not a finalist")
            else:
                finalists.append(Finalist(trial.number, trial.params, own))
        if not finalists:
            raise UnusableResult(
                "every finalist diverges with another seed; expected lower learning rates in search.lr"
            )
        return finalists

    def fit_lr(self, winner: Finalist) -> Fit:
        """Run the winner at other learning rates, and fit the losses over the rate."""
        search, seed, lr = self.spec.search, self.spec.train.seed, winner.values["lr"]
        seeds = range(seed, seed + search.seeds)
        places = [(octaves, seed) for octaves in search.lr_fit_octaves for seed in seeds]
        wanted = [({**winner.values, "lr": lr * 2.0**octaves}, seed) for octaves, seed in places]
        losses = self.losses(wanted, "lr fit run")
        points = [(0.0, seed, loss) for seed, loss in zip(seeds, winner.losses, strict=True)]
        points += [(x, seed, loss) for (x, seed), loss in zip(places, losses, strict=True) if loss is not None]
        return fit_quadratic(points)


def _evidence(
    spec: Spec, storage: str, trials: list[FrozenTrial], finalists: list[Finalist], winner: Finalist, fit: Fit | None
) -> dict[str, Any]:
    states = [state_of(trial) for trial in trials]
    return {
        "study": {"storage": redact_url(storage), "name": study_name(spec)},
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
