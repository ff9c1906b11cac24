"""Asked to stop: a signal or a limit of time is noted, and the training loop stops between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from supar_cli.training.launch.environment import is_member, launched_s, launcher_process

# Slurm's `--signal=USR1@120` and clusters' SIGTERM before SIGKILL; SIGINT is Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


ONE_REQUEST_S = 1.0  # chosen: longer than a launcher takes to hand on what its processes have got from elsewhere too


class Stopping:
    """While entered, notes signals instead of ending; `reason` says why to stop, None while there is no reason.

    The second of SIGTERM or SIGINT has its usual effect at once. `max_seconds` count from here, in one of several
    processes from its launcher's start, so that a restart gives no more of them. Such a process also stops when its
    launcher is gone: nobody else would end it.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        gone = launched_s() if is_member() else 0.0
        self._end = None if max_seconds is None else time.monotonic() + max_seconds - gone
        self._max_seconds = max_seconds
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = launcher_process() if is_member() else None
        self.signal: signal.Signals | None = None
        self._noted = 0.0

    def reason(self) -> str | None:
        if self.signal is not None:
            return self.signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return f"the limit of {self._max_seconds:g} s"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return None

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # only there can Python handle signals
            heard = [
                number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
            ]  # not in background jobs
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        asked, now = signal.Signals(number), time.monotonic()
        if self._launcher is not None and asked == self.signal and now - self._noted < ONE_REQUEST_S:
            return  # a cluster's signal to all processes, the launcher among them
        self._noted = now
        if self.signal in (None, signal.SIGUSR1):  # SIGUSR1 announces the SIGTERM that follows it
            self.signal = asked
        elif asked != signal.SIGUSR1:
            signal.signal(number, self._before[asked] if callable(self._before[asked]) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
