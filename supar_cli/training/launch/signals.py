"""Requests to stop: signals and limits of this process, and what all ranks agree on between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from supar_cli.training.distributed import Ranks
from supar_cli.training.launch.environment import is_rank_process, launcher_age_s, launcher_process

# SIGUSR1: Slurm's `--signal=USR1@120`; SIGTERM: clusters, before SIGKILL; SIGINT: Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

ONE_REQUEST_S = 1.0  # chosen: longer than a launcher takes to pass a signal on


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of SIGNALS and return the former ones. Ignored signals, as SIGINT in background jobs, stay so."""
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


class StopSignals:
    """A context in which signals don't end the process; `reason` says why to stop, None if there is no reason.

    A second SIGTERM or SIGINT has its usual effect at once. `max_seconds` count from now or, in a rank, from the start of its
    launcher, so that a restart gets no more time. A rank also stops when its launcher is gone.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        elapsed_s = launcher_age_s() if is_rank_process() else 0.0
        self._end = None if max_seconds is None else time.monotonic() + max_seconds - elapsed_s
        self._max_seconds = max_seconds
        self._handlers: dict[signal.Signals, Any] = {}
        self._launcher = launcher_process() if is_rank_process() else None
        self._signal: signal.Signals | None = None
        self._noted_at = 0.0

    def reason(self) -> str | None:
        if self._signal is not None:
            return self._signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return f"the limit of {self._max_seconds:g} s"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows it only there
            self._handlers = handle_signals(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self._launcher is not None and received == self._signal and now - self._noted_at < ONE_REQUEST_S:
            return  # a cluster signals all processes, and the launcher passes its signal on
        self._noted_at = now
        if self._signal in (None, signal.SIGUSR1):  # SIGUSR1 announces a SIGTERM
            self._signal = received
        elif received != signal.SIGUSR1:
            handler = self._handlers[received]
            signal.signal(number, handler if callable(handler) else signal.SIG_DFL)
            os.kill(os.getpid(), number)


class StopRequest:
    """Decides between two steps whether all ranks stop, even if only one was asked to.

    `own_reason()` is this rank's reason. The ranks exchange reasons only after a step whose votes say that there is one:
    each adds its `vote` to the step's loss, which is summed over them in any case, and sets `votes` to the sum.
    """

    def __init__(self, ranks: Ranks, own_reason: Callable[[], str | None] = lambda: None) -> None:
        self._ranks, self._own_reason = ranks, own_reason
        self.votes = 1.0  # there are no votes before the first step: exchange reasons

    def vote(self) -> float:
        """1 if this rank was asked to stop, else 0."""
        return float(self._ranks.is_distributed and self._own_reason() is not None)

    def reason(self) -> str | None:
        """Why to stop now, the same in every rank; None to go on."""
        if not self._ranks.is_distributed:
            return self._own_reason()
        if not self.votes:
            return None
        self.votes = 0.0
        return next((reason for reason in self._ranks.gather(self._own_reason()) if reason), None)
