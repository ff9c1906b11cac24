"""The search for a proxy's hyperparameters: Optuna proposes, prunes and stores; the trainer runs every trial as a plan."""

from __future__ import annotations

import json
import statistics
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.experiments import samplers
from supar_cli.experiments.statistics import Fit, quadratic
from supar_cli.jobs import workers as execute
from supar_cli.jobs.local import Local
from supar_cli.jobs.queue import LIVE, Shared, counts, state_of
from supar_cli.jobs.rounds import rounds
from supar_cli.jobs.storage import Patience, absolute, shown
from supar_cli.planning.document import content_hash
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Search, Spec
from supar_cli.planning.transfer import as_trial
from supar_cli.training.reporter import Reporter
from supar_cli.training.runtime import versions

Values = dict[str, float]
RUNS = "-runs"  # of the name of the study that keeps a study's further runs


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


def run_trial(spec: Spec, storage: str) -> tuple[int, str, float, Values] | None:
    """Claim one trial, run it and store it: (number, state, loss, values). None when none was left, or it was taken away.

    Raises what a bad spec raises.
    """
    shared = Shared(storage, study_name(spec), join=True)
    shared.study.sampler, shared.study.pruner = samplers.ByNumber(spec.search), samplers.pruner(spec)
    trial = shared.claim(most=spec.search.trials)
    if trial is None:
        return None

    def objective(trial: optuna.Trial) -> float:
        ranges = spec.search.ranges().items()
        values = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges}

        def on_evaluation(step: int, loss: float) -> None:
            trial.report(loss, step)
            if step < spec.train.steps and trial.should_prune():
                raise optuna.TrialPruned

        return execute.validation_loss(_plan(spec, values, spec.train.seed), on_evaluation)

    ended = shared.run(trial, objective)
    if ended is None:
        return None
    value = ended.value if ended.state == TrialState.COMPLETE and ended.value is not None else float("inf")
    return ended.number, state_of(ended), value, ended.params


def run_further(spec: Spec, storage: str, wanted: set[str]) -> tuple[Values, int, float | None] | None:
    """Claim one of the `wanted` runs outside the search, run it and store it: (values, seed, loss), diverged without one.

    None when none was left, or it was taken away.
    """
    shared = Shared(storage, study_name(spec) + RUNS, join=True)
    trial = shared.claim(among=wanted)
    if trial is None:
        return None
    values, seed = json.loads(trial.user_attrs["run"])
    ended = shared.run(trial, lambda _: execute.validation_loss(_plan(spec, values, seed)))
    return None if ended is None else (values, seed, ended.value)


def search(spec: Spec, storage: str, *, workers: execute.Workers | None = None, reporter: Reporter) -> Proxy:
    """Tune a spec up to its number of trials and return the proxy with its evidence.

    Any number of processes, on any machines, may do so with one storage: together they make the trials and runs that
    one would, and end with the same proxy. Raises InputError when nothing is searched, UnusableResult when every trial
    diverged, SetupError when a storage or workers fail; all of them, and KeyboardInterrupt, leave a study that the same
    call continues.
    """
    ranges = spec.search.ranges()
    workers = workers or Local()
    if not ranges:
        raise InputError("search: no range is given; expected one of " + ", ".join(Search.SEARCHED))
    samplers.ByNumber(spec.search)
    execute.require_runnable(_plan(spec, {}, spec.train.seed), device=workers.here)  # before a study is made
    study = Shared(storage, study_name(spec), Patience(storage, reporter.warn), at_once=True)
    own = {name: getattr(spec.hyperparameters, name) for name in ranges}
    if all(low <= own[name] <= high for name, (low, high) in ranges.items()):
        study.queue_once(own)  # the values the spec itself names are worth a trial
    finished = _run_trials(spec, study, storage, workers, reporter)
    complete = sorted((t for t in finished if t.state == TrialState.COMPLETE), key=lambda t: (t.value, t.number))
    if not complete:
        raise UnusableResult(
            f"all {len(finished)} trials diverged or were pruned; expected lower learning rates or init scales in search"
        )
    further = Further(spec, storage, workers, reporter)
    finalists = _run_finalists(spec, complete[: spec.search.finalists], further, reporter)
    winner = min(finalists, key=lambda finalist: (finalist.mean, finalist.trial))
    values, fit = dict(winner.values), None
    if "lr" in ranges and spec.search.lr_fit_octaves:
        fit = _fit_lr(spec, winner, further)
        values["lr"] = winner.values["lr"] * 2.0**fit.octaves
        if not fit.usable:
            reporter.warn(f"lr fit: {fit.why}; the best rate measured is taken, {values['lr']:.4g}")
    proxy = proxy_of(spec, values)
    evidence = _evidence(spec, storage, finished, finalists, winner, fit)
    return proxy.model_copy(update={"evidence": evidence, "meta": {**spec.meta, "tuned_with": versions()}})


def best_so_far(spec: Spec, storage: str) -> str | None:
    """One line on the best trial of a study, None when there is none or it can't be read."""
    try:
        trials = Shared(storage, study_name(spec), Patience(storage, limit_s=0.0), join=True).trials()
    except SetupError:
        return None
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    if not complete:
        return None
    best = min(complete, key=lambda trial: (trial.value, trial.number))
    return f"best of {len(complete)} complete trials: trial {best.number}, loss {best.value:.4f}, {words(best.params)}"


def words(values: Values) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def _run_trials(
    spec: Spec, study: Shared, storage: str, workers: execute.Workers, reporter: Reporter
) -> list[FrozenTrial]:
    """Have the study's trials run, here or elsewhere; those that count."""
    total = spec.search.trials
    done = [trial for trial in study.trials() if counts(trial)]
    best = min((t.value for t in done if t.value is not None and t.state == TrialState.COMPLETE), default=float("inf"))
    if done:
        reporter.log(f"study {study.study.study_name}: {len(done)} of {total} trials are there already")

    def look(trials: list[FrozenTrial]) -> tuple[int, list[FrozenTrial]]:
        running = [trial for trial in trials if trial.state == TrialState.RUNNING and not counts(trial)]
        return total - sum(map(counts, trials)), running

    call = (spec, absolute(storage))
    with closing(rounds(study, workers, reporter, look, run_trial, call)) as results:
        for number, state, loss, values in results:
            best = min(best, loss)
            said = f"loss {loss:.4f}" if state == "complete" else state
            reporter.log(f"trial {number}: {said}, {words(values)}")
            reporter.progress(sum(map(counts, study.trials())), total, best)
    return [trial for trial in study.trials() if counts(trial)]


@dataclass(slots=True)
class Further:
    """Runs beside the search's trials, (values, seed) each, kept as trials of a study of their own and shared like those."""

    spec: Spec
    storage: str
    workers: execute.Workers
    reporter: Reporter

    def losses(self, wanted: list[tuple[Values, int]], what: str) -> list[float | None]:
        """Losses of runs, None of one that diverges. Each is made once, by whichever process comes to it."""
        if not wanted:
            return []
        study = Shared(self.storage, study_name(self.spec) + RUNS, Patience(self.storage, self.reporter.warn))
        keys = [json.dumps([values, seed], sort_keys=True) for values, seed in wanted]

        def look(trials: list[FrozenTrial]) -> tuple[int, list[FrozenTrial]]:
            missing = set(keys) - {trial.user_attrs.get("run") for trial in trials if counts(trial)}
            running = [t for t in trials if t.state == TrialState.RUNNING and t.user_attrs.get("run") in missing]
            held = {t.user_attrs.get("run") for t in trials if t.state in LIVE}
            for key in keys:
                if key in missing and key not in held:
                    study.queue({}, run=key)
            return len(missing), running

        call = (self.spec, absolute(self.storage), set(keys))
        with closing(rounds(study, self.workers, self.reporter, look, run_further, call)) as results:
            for count, (values, seed, loss) in enumerate(results, 1):
                said = "diverged" if loss is None else f"loss {loss:.4f}"
                self.reporter.log(f"{what} {count}/{len(keys)}: {said}, {words(values)}, seed {seed}")
        found = {trial.user_attrs.get("run"): trial.value for trial in study.trials() if counts(trial)}
        return [found[key] for key in keys]


def _run_finalists(spec: Spec, best: list[FrozenTrial], further: Further, reporter: Reporter) -> list[Finalist]:
    seeds = [spec.train.seed + offset for offset in range(1, spec.search.seeds)]
    losses = further.losses([(trial.params, seed) for trial in best for seed in seeds], "finalist run")
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


def _fit_lr(spec: Spec, winner: Finalist, further: Further) -> Fit:
    seeds = [spec.train.seed + offset for offset in range(spec.search.seeds)]
    places = [(octaves, seed) for octaves in spec.search.lr_fit_octaves for seed in seeds]
    wanted = [({**winner.values, "lr": winner.values["lr"] * 2.0**octaves}, seed) for octaves, seed in places]
    losses = further.losses(wanted, "lr fit run")
    points = [(0.0, seed, loss) for seed, loss in zip(seeds, winner.losses, strict=True)]
    points += [(x, seed, loss) for (x, seed), loss in zip(places, losses, strict=True) if loss is not None]
    return quadratic(points)


def _evidence(
    spec: Spec, storage: str, finished: list[FrozenTrial], finalists: list[Finalist], winner: Finalist, fit: Fit | None
) -> dict[str, Any]:
    states = [state_of(trial) for trial in finished]
    return {
        "study": {"storage": shown(storage), "name": study_name(spec)},
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
