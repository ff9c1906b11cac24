"""What a process learns of its launcher from the environment: whether it is one of several, and which. Imports no torch."""

from __future__ import annotations

import os

LAUNCH = "SUPAR_LAUNCH"  # the folder in which `--nproc` and its processes find each other
STDIN = "SUPAR_STDIN"  # the file that stands for standard input, which `--nproc` has read
RESTARTED = "SUPAR_RESTARTED"  # set where `--nproc` has started its processes again
TORCHRUN = "TORCHELASTIC_RUN_ID"


def is_member() -> bool:
    """Whether this process was started as one of several, by torchrun or by `--nproc`."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def is_restarted() -> bool:
    """Whether an earlier life of this process's group ended before its work was done, so that it has to go on with that."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or RESTARTED in os.environ


def is_follower() -> bool:
    """Whether it is not the first of them, which speaks for all."""
    return is_member() and os.environ["RANK"] != "0"
