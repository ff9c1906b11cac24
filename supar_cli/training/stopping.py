"""Asked to stop: a signal or a limit of time is noted, and the training loop stops between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from supar_cli.training.membership import is_member

# Slurm's `--signal=USR1@120` and clusters' SIGTERM before SIGKILL; SIGINT is Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopping:
    """While entered, notes signals instead of ending; `reason` says why to stop, None while there is no reason.

    The second of SIGTERM or SIGINT has its usual effect at once. `max_seconds` count from here. One of several processes
    also stops when the launcher that started it is gone: nobody else would end it.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self._end = None if max_seconds is None else time.monotonic() + max_seconds
        self._max_seconds = max_seconds
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = os.getppid() if is_member() else None
        self.signal: signal.Signals | None = None

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
        asked = signal.Signals(number)
        if self.signal in (None, signal.SIGUSR1):  # SIGUSR1 announces the SIGTERM that follows it
            self.signal = asked
        elif asked != signal.SIGUSR1:
            signal.signal(number, self._before[asked] if callable(self._before[asked]) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
