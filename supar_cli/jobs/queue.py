"""One study, any number of processes: which trials count, who runs one, and what becomes of a dead process's trials.

Optuna's storages number trials one by one, and a trial only moves from waiting to running to finished. So a process that
holds trial n, and counts the trials below n that count or may still count, never exceeds the total, whatever other
processes do.

What is `wanted` of a study is a number of trials, which a sampler proposes, or runs by their names.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from supar_cli.errors import RunFailed, SetupError, SuparError, UnusableResult
from supar_cli.jobs.storage import RetryPolicy, open_study
from supar_cli.jobs.workers import POLL_S, WorkerFailure, Workers
from supar_cli.training.reporter import Reporter

HEARTBEAT_S = 15.0  # chosen: a line in a journal or a row updated four times a minute costs nothing beside training
STALE_AFTER_S = 90.0  # chosen: six beats missed; a machine that swaps or a disk that stalls misses one or two
MAX_REQUEUES = 3  # chosen: a trial that ends its process this often is the cause; a cluster rarely fails three times
REPORT_EVERY_S = 60.0  # chosen: rare enough for a log, often enough to see what a command waits for

Asked = dict[str, float] | str  # the values of a trial, or the name of a run
Wanted = int | Collection[str]


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards a study's total: complete, pruned or diverged. An interrupted trial is run again."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "diverged" in trial.user_attrs


def state_of(trial: FrozenTrial) -> str:
    return next((one for one in ("diverged", "failed") if one in trial.user_attrs), str(trial.state.name).lower())


def run_of(trial: FrozenTrial) -> Any:
    """The name of the extra run that a trial stands for; None for a trial of the search."""
    return trial.user_attrs.get("run")


def describe_trial(trial: FrozenTrial) -> str:
    """A running trial and its process, in words."""
    host, process = (*trial.user_attrs.get("process", []), None, None)[:2]
    return f"trial {trial.number}" + (f" (process {process} on {host})" if process else "")


def _is_pending_or_counted(trial: FrozenTrial) -> bool:
    return not trial.state.is_finished() or is_counted(trial)


def _identity(trial: FrozenTrial) -> Any:
    """What a trial was queued for; None if a sampler chooses its values."""
    return run_of(trial) or trial.system_attrs.get("fixed_params")


def _known(trials: Iterable[FrozenTrial]) -> list[Any]:
    """What trials were queued for, and their values."""
    return [one for trial in trials for one in (_identity(trial), trial.params)]


def machine() -> str:
    """The scope in which a process id is unique: a booted kernel and a container in it; the host's name without /proc."""
    with suppress(OSError):
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{booted}:{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # a killed process that its parent has not reaped still has a process id
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


class SharedStudy:
    """A study that any number of processes work on at the same time.

    Its methods raise SetupError if its storage is unreachable for longer than `storage.RETRY_LIMIT_S`.
    """

    def __init__(
        self, storage: str, name: str, retries: RetryPolicy | None = None, *, join: bool = False, at_once: bool = False
    ) -> None:
        self.retries = retries or RetryPolicy(storage)
        self.study = open_study(storage, name, self.retries, join=join, at_once=at_once)
        self._seen: dict[int, tuple[Any, float, float]] = {}

    def trials(self) -> list[FrozenTrial]:
        return list(self.study.get_trials(deepcopy=False))

    def counted(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if is_counted(trial)]

    def queue(self, asked: Asked, **attributes: Any) -> None:
        """Let the next process that claims a trial take these values or this run. A duplicate is withdrawn."""
        params, run = ({}, {"run": asked}) if isinstance(asked, str) else (asked, {})
        self.study.enqueue_trial(params, {**run, **attributes})

    def queue_once(self, *asked: Asked) -> None:
        """Queue the values and runs of which no trial is finished, running or waiting."""
        known = _known(filter(_is_pending_or_counted, self.trials()))
        for one in asked:
            if one not in known:
                self.queue(one)

    def missing(self, wanted: Wanted) -> tuple[int, list[FrozenTrial]]:
        """The number of unfinished trials or runs, and those trials of them that are running."""
        trials = self.trials()
        running = [trial for trial in trials if trial.state == TrialState.RUNNING and not is_counted(trial)]
        if isinstance(wanted, int):
            return wanted - sum(map(is_counted, trials)), running
        left = set(wanted) - {run_of(trial) for trial in trials if is_counted(trial)}
        return len(left), [trial for trial in running if run_of(trial) in left]

    def claim(self, wanted: Wanted) -> optuna.Trial | None:
        """A trial for this process to run; None if enough trials are finished or running, or no wanted run is waiting."""
        self.requeue_abandoned()
        trials = self.trials()
        if isinstance(wanted, int):
            is_left = sum(is_counted(t) or t.state == TrialState.RUNNING for t in trials) < wanted
        else:
            is_left = any(t.state == TrialState.WAITING and run_of(t) in wanted for t in trials)
        if not is_left:
            return None
        trial = self.study.ask()
        try:
            trial.set_user_attr("process", [socket.gethostname(), os.getpid(), machine()])
            if not (why := self._withdraw_reason(trial, wanted)):
                return trial
            trial.set_user_attr("withdrawn", why)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # this process was silent for so long that the trial was requeued
        return None

    def _withdraw_reason(self, trial: optuna.Trial, wanted: Wanted) -> str:
        """Why a trial must not run; empty if it may. Of two equal trials only the earlier runs; beyond the wanted number none runs."""
        trials = self.trials()
        own = _identity(trials[trial.number])
        earlier = [t for t in trials[: trial.number] if _is_pending_or_counted(t)]
        if own is not None and own in _known(earlier):
            return "an earlier trial has the same values"
        if isinstance(wanted, int):
            return "the study already has enough trials" if len(earlier) >= wanted else ""
        return "" if own in wanted else "this command does not need it"

    def run(self, trial: optuna.Trial, objective: Callable[[optuna.Trial], float]) -> FrozenTrial | None:
        """Run a claimed trial and store what became of it: None when it was given to another process meanwhile.

        Anything else that ends it early, including Ctrl-C, requeues the trial and is raised.
        """
        value: float | None = None
        try:
            with _heartbeat(trial):
                try:
                    value, state = objective(trial), TrialState.COMPLETE
                except optuna.TrialPruned:
                    state = TrialState.PRUNED
                except UnusableResult as error:
                    trial.set_user_attr("diverged", str(error))
                    state = TrialState.FAIL
                except RunFailed as error:
                    if self._has_failed_before(trial):
                        trial.set_user_attr("diverged", "it failed twice")  # as its values make it, it seems: it counts
                    trial.set_user_attr("failed", str(error))
                    state = TrialState.FAIL
            ended: FrozenTrial = self.study.tell(trial, value, state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        except BaseException:
            self.retries.limit_s = 0.0  # the error is what matters now; a trial left running is found by others
            with suppress(SuparError):
                self._requeue(self.trials()[trial.number], died=False)
            raise
        return ended if ended.state == state else None

    def _has_failed_before(self, trial: optuna.Trial) -> bool:
        """Whether a run of a name failed in an earlier trial too. A trial that a sampler proposes is made once."""
        run = trial.user_attrs.get("run")
        return run is not None and any(run_of(one) == run for one in self.trials() if "failed" in one.user_attrs)

    def requeue_abandoned(self) -> list[FrozenTrial]:
        """Fail the trials whose processes are gone, and queue them again: those requeued by this very call."""
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if self._is_abandoned(trial) and self._requeue(trial)]

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        """Whether a trial's process on this machine is gone, or its heartbeat is overdue.

        Only time between polls counts, at most one heartbeat's of each, so that an outage of the storage is not counted,
        and clocks are never compared.
        """
        _, process, where = (*trial.user_attrs.get("process", []), None, None, None)[:3]
        if process is not None and where == machine() and not _is_alive(process):
            return True
        now = time.monotonic()
        sign = (process, where, trial.user_attrs.get("beat"), len(trial.params), trial.last_step)
        before, silent_s, looked = self._seen.get(trial.number, (None, 0.0, now))
        silent_s = silent_s + min(now - looked, HEARTBEAT_S) if before == sign else 0.0
        self._seen[trial.number] = (sign, silent_s, now)
        return silent_s > STALE_AFTER_S

    def _requeue(self, trial: FrozenTrial, died: bool = True) -> bool:
        """Fail a trial and queue it again; False when another process was faster or it ended."""
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            return False
        asked, again = _identity(trial) or trial.params, trial.user_attrs.get("again", 0) + died
        if not is_counted(trial) and asked and again <= MAX_REQUEUES:
            self.queue(asked, again=again)
        return True

    def run_until_complete(
        self, wanted: Wanted, task: Callable[[], Any], workers: Workers, reporter: Reporter
    ) -> Generator[Any]:
        """Have workers run the task until no trial or run is missing; yield the results that are not None.

        If all missing ones are running, here or elsewhere, wait until they end or are requeued. Raises SetupError when a
        task kills its workers each time. However it ends, no trial of a dead worker is left running.
        """
        reported = time.monotonic()
        try:
            while True:
                self._report_requeued(reporter)
                if not isinstance(wanted, int):
                    self.queue_once(*wanted)
                missing, running = self.missing(wanted)
                if missing <= 0:
                    return
                found = False
                if missing > len(running):
                    with closing(workers.results(task, [()] * (missing - len(running)))) as results:
                        for _, result in results:
                            if isinstance(result, WorkerFailure):
                                raise SetupError(f"a trial's worker died each time it was started: {result.why}")
                            if result is not None:
                                found = True
                                yield result
                            self._report_requeued(reporter)
                elif time.monotonic() - reported > REPORT_EVERY_S:
                    reported = time.monotonic()
                    reporter.log(f"waiting for {', '.join(map(describe_trial, running))} of other processes")
                if not found:
                    time.sleep(POLL_S)
        except BaseException:
            self.retries.limit_s = 0.0  # the error is what matters now
            with suppress(SuparError):
                self.requeue_abandoned()
            raise

    def _report_requeued(self, reporter: Reporter) -> None:
        for trial in self.requeue_abandoned():
            reporter.log(f"{describe_trial(trial)} is requeued: its process is gone")


@contextmanager
def _heartbeat(trial: optuna.Trial) -> Iterator[None]:
    """Show that a trial's process lives, from a thread of its own, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(HEARTBEAT_S):
            count += 1
            try:
                trial.set_user_attr("beat", count)
            except Exception:  # the trial has ended or the storage has failed; who runs the trial gets the error
                return

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
