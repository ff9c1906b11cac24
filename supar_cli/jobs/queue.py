"""One study, any number of processes: which trials count, who may run one, and what becomes of a dead process's trials.

Optuna's storages give out trial numbers one by one, and a trial that exists only ever moves from waiting to running to
an end. So a process that holds trial n, and counts which of the trials below n have counted or still may, can't exceed a
total together with any other.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from supar_cli.errors import SuparError, UnusableResult
from supar_cli.jobs.storage import Patience, open_study

BEAT_S = 15.0  # chosen: a line in a journal or a row updated four times a minute costs nothing beside training
GRACE_S = 90.0  # chosen: six beats missed; a machine that swaps or a disk that stalls misses one or two
AGAIN = 3  # chosen: a trial that takes its process down each time is not what killed a whole cluster three times

LIVE = (TrialState.WAITING, TrialState.RUNNING)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of a study's total: complete, pruned or diverged. One that was interrupted is done again."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "diverged" in trial.user_attrs


def state_of(trial: FrozenTrial) -> str:
    return "diverged" if "diverged" in trial.user_attrs else str(trial.state.name).lower()


def _may_count(trial: FrozenTrial) -> bool:
    return trial.state in LIVE or counts(trial)


def _identity(trial: FrozenTrial) -> Any:
    """What a trial was queued for, None of one that a sampler fills in."""
    return trial.user_attrs.get("run") or trial.system_attrs.get("fixed_params")


def machine() -> str:
    """Where a process id means the same process: a booted kernel and, in it, a container. The host's name without /proc."""
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
    with suppress(OSError):  # one that was killed and not yet waited for still has a number
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return True


class Shared:
    """A study that any number of processes work on at the same time.

    Its methods raise SetupError when its storage is away for longer than `storage.PATIENCE_S`.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        patience: Patience | None = None,
        *,
        join: bool = False,
        at_once: bool = False,
    ) -> None:
        self.patience = patience or Patience(storage)
        self.study = open_study(storage, name, self.patience, join=join, at_once=at_once)
        self._seen: dict[int, tuple[Any, float, float]] = {}

    def trials(self) -> list[FrozenTrial]:
        found: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return found

    def queue(self, params: dict[str, float], **attributes: Any) -> None:
        """Let the next process that claims a trial take this one. A second one of the same will be withdrawn."""
        self.study.enqueue_trial(params, attributes)

    def queue_once(self, params: dict[str, float]) -> None:
        """Queue a trial unless an equal one has counted or still may."""
        if not any(params in (_identity(t), t.params) for t in self.trials() if _may_count(t)):
            self.queue(params)

    def claim(self, most: int | None = None, among: set[str] | None = None) -> optuna.Trial | None:
        """A trial for this process to run, None where none is left: `most` count or run, or none waits `among` the runs."""
        self.give_back()
        trials = self.trials()
        if most is not None and sum(counts(t) or t.state == TrialState.RUNNING for t in trials) >= most:
            return None
        if among is not None and not any(
            t.state == TrialState.WAITING and t.user_attrs.get("run") in among for t in trials
        ):
            return None
        trial = self.study.ask()
        try:
            trial.set_user_attr("process", [socket.gethostname(), os.getpid(), machine()])
            if not (why := self._excess(trial, most, among)):
                return trial
            trial.set_user_attr("withdrawn", why)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # this process was silent for so long that the trial was given back
        return None

    def _excess(self, trial: optuna.Trial, most: int | None, among: set[str] | None) -> str:
        """Why a trial is not to be run, if so. The earlier of two equal ones is run, the first `most` of all."""
        trials = self.trials()
        own = _identity(trials[trial.number])
        earlier = [t for t in trials[: trial.number] if _may_count(t)]
        if among is not None and own not in among:
            return "nobody here waits for it"
        if own is not None and any(own in (_identity(t), t.params) for t in earlier):
            return "an earlier trial is the same"
        return "the study has its trials" if most is not None and len(earlier) >= most else ""

    def run(self, trial: optuna.Trial, objective: Callable[[optuna.Trial], float]) -> FrozenTrial | None:
        """Run a claimed trial and store what became of it: None when it was given to another process meanwhile.

        Whatever but divergence ends it early, Ctrl-C too, is raised, with the trial given back.
        """
        value: float | None = None
        try:
            with _beating(trial):
                try:
                    value, state = objective(trial), TrialState.COMPLETE
                except optuna.TrialPruned:
                    state = TrialState.PRUNED
                except UnusableResult as error:
                    trial.set_user_attr("diverged", str(error))
                    state = TrialState.FAIL
            told: FrozenTrial = self.study.tell(trial, value, state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return None
        except BaseException:
            self.patience.limit_s = 0.0  # the error is what matters now; a trial left running is found by others
            with suppress(SuparError):
                self._give_back(self.trials()[trial.number], died=False)
            raise
        return told if told.state == state else None

    def give_back(self) -> list[FrozenTrial]:
        """Fail the trials whose processes are gone, and queue them again: those given back by this very call."""
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if self._is_abandoned(trial) and self._give_back(trial)]

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        """Whether a process of this machine is gone, or a trial has shown no sign of life for as long as was looked.

        Only time between looks is counted, and no more than a beat of each, so that an outage in which nobody could
        write is not held against anybody, and clocks are never compared.
        """
        _, process, where = (*trial.user_attrs.get("process", []), None, None, None)[:3]
        if process is not None and where == machine() and not _is_alive(process):
            return True
        now = time.monotonic()
        sign = (process, where, trial.user_attrs.get("beat"), len(trial.params), trial.last_step)
        before, silent_s, looked = self._seen.get(trial.number, (None, 0.0, now))
        silent_s = silent_s + min(now - looked, BEAT_S) if before == sign else 0.0
        self._seen[trial.number] = (sign, silent_s, now)
        return silent_s > GRACE_S

    def _give_back(self, trial: FrozenTrial, died: bool = True) -> bool:
        """Fail a trial and queue it again; False when another process was faster or it ended."""
        try:
            self.study.tell(trial.number, state=TrialState.FAIL)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
            return False
        values, again = _identity(trial) or trial.params, trial.user_attrs.get("again", 0) + died
        run = trial.user_attrs.get("run")
        if not counts(trial) and values and again <= AGAIN:
            self.queue({} if run else values, again=again, **({"run": run} if run else {}))
        return True


@contextmanager
def _beating(trial: optuna.Trial) -> Iterator[None]:
    """Show that a trial's process lives, from a thread of its own, until the block ends."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT_S):
            count += 1
            try:
                trial.set_user_attr("beat", count)
            except Exception:  # the trial has ended, or the storage has; who runs the trial will be told
                return

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def where(trial: FrozenTrial) -> str:
    """A running trial and its process, in words."""
    host, process = (*trial.user_attrs.get("process", []), None, None)[:2]
    return f"trial {trial.number}" + (f" (process {process} on {host})" if process else "")
