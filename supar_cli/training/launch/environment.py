"""What a process learns of its launcher from the environment: whether it is one of several, and which. Imports no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

LAUNCH_DIR = "SUPAR_LAUNCH"  # the folder in which `--nproc` and its processes find each other
LAUNCHER = "SUPAR_LAUNCHER"  # the process number of `--nproc`'s launcher
SIGNAL_FILE = "heard"  # there: the last signal that the launcher got
STDIN = "SUPAR_STDIN"  # the file that stands for standard input, which `--nproc` has read
TORCHRUN = "TORCHELASTIC_RUN_ID"


def is_rank_process() -> bool:
    """Whether this process was started as one of several, by torchrun or by `--nproc`."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_worker_rank() -> bool:
    """Whether it is another of them than the main one, which speaks for all."""
    return is_rank_process() and os.environ["RANK"] != "0"


def under_torchrun() -> bool:
    """Whether another launcher than `--nproc` started it: one that may start it again, which looks like the first time."""
    return is_rank_process() and LAUNCH_DIR not in os.environ


def launcher_process() -> int:
    """The number of the process that started this one; another parent means that it is gone."""
    return int(os.environ.get(LAUNCHER, os.getppid()))


def launcher_id() -> str:
    """What tells this process's launcher from any other, of this machine or another."""
    return f"{os.uname().nodename} {os.getppid()} {_launcher_start_s()}"


def launcher_age_s() -> float:
    """Seconds since this process's launcher started, 0 where the system doesn't tell."""
    start_s = _launcher_start_s()
    return 0.0 if start_s is None else max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start_s)


def _launcher_start_s() -> float | None:
    """When this process's parent started, in seconds since the machine did."""
    try:
        fields = Path(f"/proc/{os.getppid()}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc_pid_stat(5); two stand before the bracket
    except (OSError, ValueError, IndexError):
        return None
