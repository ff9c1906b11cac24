"""The search for a proxy's hyperparameters: Optuna proposes, prunes and stores; the trainer runs every trial as a plan."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log2, nan
from pathlib import Path
from statistics import fmean
from typing import Unpack

import optuna
from optuna.trial import FrozenTrial, TrialState

from supar_cli.data import corpus
from supar_cli.errors import InputError, RunFailed, SetupError, UnusableResult
from supar_cli.experiments import script
from supar_cli.experiments.dry_run import Part
from supar_cli.experiments.samplers import SeededByTrialNumber, can_suggest, make_pruner, suggest
from supar_cli.experiments.statistics import Fit, fit_quadratic
from supar_cli.files import Record
from supar_cli.jobs import runs
from supar_cli.jobs.clusters import WorkerOptions, check_keywords, make_workers
from supar_cli.jobs.command import script_files
from supar_cli.jobs.queue import SharedStudy, Wanted, is_counted, state_of
from supar_cli.jobs.storage import RetryPolicy, absolute, folder_beside, redact_url
from supar_cli.jobs.workers import Local, Workers
from supar_cli.planning.advice import RATIO_STEPS, short_ratio
from supar_cli.planning.document import content_hash
from supar_cli.planning.layout_document import OwnShape
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Proxy, Search, Spec
from supar_cli.planning.transfer import as_trial
from supar_cli.training.reporter import NullReporter, Reporter, Work
from supar_cli.training.runtime import versions

Values = dict[str, float]
RUNS = "-runs"  # suffix of the name of the study that stores a study's extra runs
FILES = ".trials"  # suffix of the folder with the files of runs by a command


def study_name(spec: Spec) -> str:
    """Name of a spec's study. What changes a trial's loss or the ranges makes another study; the number of trials and the sampler don't."""
    deciding = spec.identity(include={"model", "hyperparameters", "parameterization", "sparsity", "data", "train"})
    if spec.run.command is not None:  # of a user's model, it computes the loss
        deciding["command"] = spec.run.command
    return "supar-" + content_hash({**deciding, "ranges": spec.search.ranges()})[7:19]


def parts(spec: Spec) -> list[Part]:
    """What a search runs: fewer runs if trials are pruned or diverge. The hyperparameters don't change how long a run takes."""
    search, plan = spec.search, _plan(spec, {}, spec.train.seed)
    counts = {
        "trials": search.trials,
        "finalist runs": min(search.finalists, search.trials) * (search.seeds - 1),
        "lr fit runs": len(search.lr_fit_octaves) * search.seeds if search.lr is not None else 0,
    }
    bound = "" if search.pruner == "none" else "at most "
    return [Part(what, [plan] * count, bound) for what, count in counts.items()]


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


def refused_ranges(spec: Spec) -> dict[str, str]:
    """The searched names that a model can't take, and why: nothing to fold a multiplier into, a tied head."""
    found = {}
    for name, (low, *_, high) in spec.search.ranges().items():
        try:  # a factor of 1 needs nothing to fold into
            _plan(spec, {name: low if high == 1 else high}, spec.train.seed)
        except InputError as error:
            found[name] = str(error)
    return found


def tune(
    spec: Spec,
    study: str | Path = "proxy.journal",
    *,
    reporter: Reporter | None = None,
    **workers: Unpack[WorkerOptions],
) -> Proxy:
    """Tune a spec up to its number of trials, in a study that the same call continues; return the proxy with its evidence.

    `study` is a journal file or a database's URL. Raises SuparError.
    """
    if not isinstance(spec, Spec):
        raise InputError(f"{type(spec).__name__}: expected a Spec")
    check_keywords(tune, workers)
    if spec.data is not None:
        spec = spec.model_copy(update={"data": corpus.identify(spec.data)})
    spec = corpus.with_hash(spec)
    folder = folder_beside(str(study), ".slurm")
    with make_workers(device=spec.run.device, folder=folder, **workers) as ready:
        return search(spec, str(study), workers=ready, reporter=reporter or NullReporter())


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
    SeededByTrialNumber(spec.search)
    first = _plan(spec, {}, spec.train.seed)
    if refused := refused_ranges(spec):
        raise InputError(*(f"search.{name}: {why}; expected null" for name, why in refused.items()))
    if "embedding_lr_ratio" in ranges and spec.train.steps < RATIO_STEPS:
        reporter.warn(f"search.embedding_lr_ratio: in runs of {short_ratio(spec.train.steps)}")
    runs.require_runnable(first, device=workers.is_local, warn=reporter.warn)  # before a study is made
    tuning = _Tuning(spec, storage, workers, reporter, parts(spec))
    trials = tuning.run_trials()
    complete = _rank(trials)
    if not complete:
        raise UnusableResult(
            f"all {len(trials)} trials diverged or were pruned; expected lower learning rates or init scales in search"
        )
    # choices are soon drawn again: the best trial of each combination of values
    different = _rank(list({tuple(sorted(one.params.items())): one for one in reversed(complete)}.values()))
    script.require_different_losses([trial.value for trial in different], spec.run, "trials")
    finalists = tuning.run_finalists(different[: spec.search.finalists])
    script.warn_of_equal_seeds([one["losses"] for one in finalists], spec.run, reporter, "search.seeds")
    winner = min(finalists, key=lambda finalist: (finalist["mean"], finalist["trial"]))
    values, fit = {name: winner[name] for name in ranges}, None
    if "lr" in ranges and spec.search.lr_fit_octaves:
        fit = tuning.fit_lr(values, finalists, complete)
        values["lr"] = winner["lr"] * 2.0**fit.octaves
        if not fit.usable:
            reporter.warn(f"lr fit: {fit.why}; using the best measured rate, {values['lr']:.4g}")
    evidence = tuning.evidence(trials, finalists, winner, fit)
    update = {"evidence": evidence, "meta": {**spec.meta, "tuned_with": versions()}}
    return proxy_of(spec, values).model_copy(update=update)


def best_so_far(spec: Spec, storage: str) -> str | None:
    """One line on the best trial of a study, None when there is none or it can't be read."""
    with suppress(SetupError):
        study = SharedStudy(storage, study_name(spec), RetryPolicy(storage, limit_s=0.0), join=True)
        if ranked := _rank(study.trials()):
            what = f"trial {ranked[0].number}, loss {ranked[0].value:.4f}, {format_values(ranked[0].params)}"
            return f"best of {len(ranked)} complete trials: {what}"
    return None


def _rank(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Complete trials, the best first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (trial.value, trial.number))


def format_values(values: Values) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def run_next(spec: Spec, storage: str, wanted: Wanted) -> FrozenTrial | None:
    """Claim a trial or a wanted extra run, run it as a plan and store its result; return the finished trial.

    None if none is left or another process took it over. Raises the errors of a bad spec.
    """
    study = SharedStudy(storage, study_name(spec) + ("" if isinstance(wanted, int) else RUNS), join=True)
    steps = spec.train.steps
    if isinstance(spec.model, OwnShape):  # its script may count otherwise: a whole run has the steps of the longest
        steps = max((trial.last_step or 0 for trial in _rank(study.trials())), default=0)
    study.study.sampler, study.study.pruner = SeededByTrialNumber(spec.search), make_pruner(spec.search, steps)
    trial, folder = study.claim(wanted), folder_beside(storage, FILES)

    def try_values(trial: optuna.Trial) -> float:
        ranges = spec.search.ranges().items()
        values = {name: suggest(trial, name, bounds) for name, bounds in ranges}

        def on_evaluation(step: int, loss: float) -> None:
            trial.report(loss, step)
            if step < steps and trial.should_prune():
                raise optuna.TrialPruned

        history = runs.train_plan(_plan(spec, values, spec.train.seed), on_evaluation, folder)
        trial.set_user_attr("clipped_share", history.clipped_share)
        return history.evaluations[-1][1]

    def run_again(trial: optuna.Trial) -> float:
        return runs.validation_loss(_plan(spec, *json.loads(trial.user_attrs["run"])), folder)

    return None if trial is None else study.run(trial, try_values if isinstance(wanted, int) else run_again)


@dataclass(frozen=True, slots=True)
class _Tuning:
    """The runs of a spec's parts: trials, and extra runs with their values, which a separate shared study stores."""

    spec: Spec
    storage: str
    workers: Workers
    reporter: Reporter
    parts: list[Part]

    def _open(self, suffix: str = "", at_once: bool = False) -> SharedStudy:
        retries = RetryPolicy(self.storage, self.reporter.warn)
        return SharedStudy(self.storage, study_name(self.spec) + suffix, retries, at_once=at_once)

    def _run(self, study: SharedStudy, wanted: Wanted) -> Generator[FrozenTrial]:
        """Make the missing trials or runs, here or in other processes; return those that ended here."""
        task = partial(run_next, self.spec, absolute(self.storage), wanted)
        return study.run_until_complete(wanted, task, self.workers, self.reporter)

    def _report(self, done: int, loss: float = nan) -> None:
        """Report that this many of all runs, trials first, are done."""
        total = sum(len(part.plans) for part in self.parts)
        self.reporter.progress(done, total, loss, Work(done, total, self.workers.jobs, self.parts[0].bound))

    def run_trials(self) -> list[FrozenTrial]:
        """Run the spec's trials; return those that count."""
        spec, reporter, total = self.spec, self.reporter, self.spec.search.trials
        study = self._open(at_once=True)
        ranges = spec.search.ranges()
        own = {name: getattr(spec.hyperparameters, name) for name in ranges}
        # None is a model's own std, which is not one number
        if all(own[name] is not None and can_suggest(bounds, own[name]) for name, bounds in ranges.items()):
            study.queue_once(own)  # the spec's own values are run as a trial
        counted = study.counted()
        if counted:
            reporter.log(f"study {study.study.study_name}: {len(counted)} trials done, {total} wanted")
        if spec.run.command is not None:
            began = study.study.user_attrs.get("script") or script_files(spec.run.command)
            study.study.set_user_attr("script", began)
            script.compare_scripts(began, spec.run, folder_beside(self.storage, FILES), reporter, "another --study")
        self._report(len(counted))
        failures = 0
        for trial in self._run(study, total):
            state, counted = state_of(trial), study.counted()
            outcome = f"loss {trial.value:.4f}" if state == "complete" else state
            reporter.log(f"trial {trial.number}: {outcome}, {format_values(trial.params)}")
            failures = failures + 1 if state == "failed" else 0
            if failures == (script.FAILURES if counted else script.FIRST_FAILURES):
                raise RunFailed(f"the last {failures} trials failed; trial {trial.number}: {trial.user_attrs[state]}")
            if failures:
                reporter.warn(f"trial {trial.number}: {trial.user_attrs[state]}")
            best = next((best.value for best in _rank(counted)), float("inf"))
            self._report(len(counted), best)
        return study.counted()

    def losses(self, asked: list[tuple[Values, int]], index: int) -> list[float | None]:
        """The loss of each run asked for by its values and seed, those of the part at an index; None if it diverges.

        Each is made once, by any process.
        """
        if not asked:
            return []
        wanted = [json.dumps(one, sort_keys=True) for one in asked]
        study = self._open(RUNS)
        before = sum(len(part.plans) for part in self.parts[:index])
        count = failures = 0
        for trial in self._run(study, wanted):
            count += is_counted(trial)
            outcome = state_of(trial) if trial.value is None else f"loss {trial.value:.4f}"
            values, seed = json.loads(trial.user_attrs["run"])
            what = f"{self.parts[index].what[:-1]} {count}/{len(wanted)}"
            self.reporter.log(f"{what}: {outcome}, {format_values(values)}, seed {seed}")
            if "failed" in trial.user_attrs:
                then = "counts as diverged" if is_counted(trial) else "is made again"
                self.reporter.warn(f"this run {then}: {trial.user_attrs['failed']}")
            failures += not count
            if failures == script.FIRST_FAILURES:
                raise RunFailed(f"the first {failures} runs failed; the last: {trial.user_attrs['failed']}")
            self._report(before + len(wanted) - study.missing(wanted)[0], trial.value or nan)
        self._report(before + len(wanted))
        found = {trial.user_attrs["run"]: trial.value for trial in study.counted()}
        return [found[key] for key in wanted]

    def run_finalists(self, best: list[FrozenTrial]) -> list[Record]:
        """Run the best trials with further seeds: trial, values, losses in nats per token, their mean.

        Raises UnusableResult when each diverges with one.
        """
        first, count = self.spec.train.seed, self.spec.search.seeds
        asked = [(trial.params, first + at) for trial in best for at in range(1, count)]
        found = iter(self.losses(asked, 1))
        finalists = []
        for trial in best:
            losses = [next(found) for _ in range(1, count)]
            finite = [loss for loss in (trial.value, *losses) if loss is not None]
            if len(finite) == count:
                finalists.append({"trial": trial.number, **trial.params, "losses": finite, "mean": fmean(finite)})
            else:
                self.reporter.warn(f"trial {trial.number} diverges with another seed; it is not a finalist")
        if not finalists:
            what = "every finalist diverges with another seed"
            raise UnusableResult(f"{what}; expected lower learning rates in search.lr")
        return finalists

    def fit_lr(self, winner: Values, finalists: list[Record], complete: list[FrozenTrial]) -> Fit:
        """Fit the losses of the winner's values over the rate: of trials that differ in it alone, and of runs where none is near."""
        first, octaves = self.spec.train.seed, self.spec.search.lr_fit_octaves
        places = sorted({0.0, *octaves})
        near = min((after - before for before, after in pairwise(places)), default=0.0) / 2
        known = [(trial.params, first, trial.value) for trial in complete]
        known += [(one, first + at, loss) for one in finalists for at, loss in enumerate(one["losses"])]
        points: dict[tuple[float, int], float] = {}
        for values, seed, loss in known:
            at = log2(values["lr"] / winner["lr"])
            if places[0] <= at <= places[-1] and all(values[name] == winner[name] for name in winner.keys() - {"lr"}):
                points[at, seed] = loss
        seeds = range(first, first + self.spec.search.seeds)
        asked = [(x, seed) for x in octaves for seed in seeds]
        asked = [(x, seed) for x, seed in asked if all(seed != own or abs(x - at) >= near for at, own in points)]
        losses = self.losses([({**winner, "lr": winner["lr"] * 2.0**x}, seed) for x, seed in asked], 2)
        points |= {key: loss for key, loss in zip(asked, losses, strict=True) if loss is not None}
        return fit_quadratic([(at, seed, loss) for (at, seed), loss in points.items()])

    def evidence(self, trials: list[FrozenTrial], finalists: list[Record], winner: Record, fit: Fit | None) -> Record:
        """How the values were found, as proxy.yaml has it."""
        search, states = self.spec.search, [state_of(trial) for trial in trials]
        clipped = next(one.user_attrs.get("clipped_share") for one in trials if one.number == winner["trial"])
        known = {} if clipped is None else {"clipped_share": clipped}  # studies of earlier versions don't have it
        return {
            "study": {"storage": redact_url(self.storage), "name": study_name(self.spec)},
            **script.evidence(self.spec.run),
            **search.model_dump(include={"sampler", "pruner", "seed"}),
            "ranges": {name: list(bounds) for name, bounds in search.ranges().items()},
            "trials": {state: states.count(state) for state in ("complete", "pruned", "diverged")},
            "finalists": [{**finalist, "chosen": finalist is winner} for finalist in finalists],
            "lr_fit": fit and fit.evidence(winner["lr"]),
            **known,
        }
