"""What reaches a process from outside: its launcher and rank, from the environment, and signals to stop. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

LAUNCH_DIR = "SUPAR_LAUNCH"  # the folder that the launcher of `--nproc` and its processes share
LAUNCHER = "SUPAR_LAUNCHER"  # the process number of `--nproc`'s launcher
SIGNAL_FILE = "heard"  # in that folder: the last signal that the launcher received
STDIN = "SUPAR_STDIN"  # a file with the standard input that the launcher has read
TORCHRUN = "TORCHELASTIC_RUN_ID"

INSISTENT = (signal.SIGTERM, signal.SIGINT)  # clusters, before SIGKILL; Ctrl-C. A second one ends the process at once
# announce a SIGTERM or repeat it. SIGUSR1, SIGUSR2: Slurm's `--signal=USR1@120`, Grid Engine and LSF; SIGHUP: a terminal that
# closes, and systemd; SIGXCPU: the limit of CPU time, each second
ANNOUNCING = tuple(
    signal.Signals[name] for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU") if hasattr(signal, name)
)
SIGNALS = (*INSISTENT, *ANNOUNCING)

ONE_REQUEST_S = 1.0  # chosen: a launcher passes a signal on, and a cluster signals a process and its group, in less
ONE_KEY_S = 0.005  # chosen: no hand is so fast; `timeout -s INT` signals a process and then its group


def is_rank_process() -> bool:
    """Whether torchrun or `--nproc` started this process as one of its ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_worker_rank() -> bool:
    """Whether it is a rank other than 0, which writes messages for all."""
    return is_rank_process() and os.environ["RANK"] != "0"


def under_torchrun() -> bool:
    """Whether torchrun, and not `--nproc`, started it. A restart by torchrun looks like a first start."""
    return is_rank_process() and LAUNCH_DIR not in os.environ


def launcher_process() -> int:
    """The number of the launcher's process. If this process has another parent, the launcher is gone."""
    return int(os.environ.get(LAUNCHER, os.getppid()))


def launcher_id() -> str:
    """A name that tells this process's launcher from any other, also on other machines."""
    return f"{os.uname().nodename} {os.getppid()} {_launcher_start_s()}"


def launcher_age_s() -> float:
    """Seconds since this process's launcher started, 0 if unknown."""
    start_s = _launcher_start_s()
    return 0.0 if start_s is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start_s)


def _launcher_start_s() -> float | None:
    """When this process's parent started, in seconds since the machine started; None if unknown."""
    try:
        fields = Path(f"/proc/{os.getppid()}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc_pid_stat(5); 2 are before ")"
    except (OSError, ValueError, IndexError):
        return None


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of SIGNALS and return the former ones. Ignored signals, as SIGINT in background jobs, stay so."""
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def restore_signals(handlers: dict[signal.Signals, Any], is_ending: bool) -> None:
    """Set the former handlers. In a process that ends on request, ignore repeats of the request, but for Ctrl-C."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_IGN if is_ending and number != signal.SIGINT else handler)


class StopSignals:
    """A context in which signals don't end the process; `reason` says why to stop, None if there is no reason.

    A second SIGTERM or SIGINT has its usual effect at once, unless it is the same request: within a second, or within the time
    of a key for Ctrl-C of a process alone. `max_seconds` count from now or, in a rank, from the start of its
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
        self.is_ending = False  # whether the process ends with this context, as requested

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
        restore_signals(self._handlers, self.is_ending and self._signal is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        one_request_s = ONE_KEY_S if received == signal.SIGINT and self._launcher is None else ONE_REQUEST_S
        if received == self._signal and now - self._noted_at < one_request_s:
            return  # a cluster signals all processes, and the launcher passes its signal on
        if self._signal is None or (received in INSISTENT and self._signal in ANNOUNCING):
            self._signal, self._noted_at = received, now
        elif received in INSISTENT:
            handler = self._handlers[received]
            signal.signal(number, handler if callable(handler) else signal.SIG_DFL)
            os.kill(os.getpid(), number)
