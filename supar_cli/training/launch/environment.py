"""A process's launcher and rank, from the environment. Imports no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

LAUNCH_DIR = "SUPAR_LAUNCH"  # the folder that the launcher of `--nproc` and its processes share
LAUNCHER = "SUPAR_LAUNCHER"  # the process number of `--nproc`'s launcher
SIGNAL_FILE = "heard"  # in that folder: the last signal that the launcher received
STDIN = "SUPAR_STDIN"  # a file with the standard input that the launcher has read
TORCHRUN = "TORCHELASTIC_RUN_ID"


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
