"""One run killed at random moments and resumed, as `python tests/killed_runs.py PLAN DIRECTORY KILLS SEED` prints it: JSON.

Lives are forked from a process that has imported torch, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from supar_cli import load
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, rundir
from supar_cli.training.trainer import Trainer


def train(plan: Plan, directory: Path) -> None:
    with rundir.opened(directory, plan, resume=True, force=False):
        Trainer(plan).run(directory, resume=True)


def life(plan: Plan, directory: Path, seconds: float | None) -> int:
    """Train in a process of its own, killed after some seconds of training; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            train(plan, directory)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        before, end = size(directory), time.monotonic() + 20
        while size(directory) <= before and time.monotonic() < end and not gone(child):
            before = min(before, size(directory))  # steps that are to be done again are dropped first
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def gone(child: int) -> bool:
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def size(directory: Path) -> int:
    metrics = directory / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def main(plan_file: str, folder: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    plan, directory, moments = load(plan_file), Path(folder), random.Random(int(seed))
    assert isinstance(plan, Plan)
    found: list[dict[str, Any]] = []
    for _ in range(int(kills)):
        status = life(plan, directory, moments.uniform(0.0, 0.12))
        held = checkpoint.available(directory / "checkpoints")
        for path in held:  # each that is there is whole, whatever the moment
            checkpoint.weights(path, plan)
        writing = len(list((directory / "checkpoints").glob(".step-*")))
        found.append({"status": status, "writing": writing, "newest": held[-1].name if held else None})
    last = life(plan, directory, None)
    sys.stdout.write(json.dumps({"kills": found, "last": last}))


if __name__ == "__main__":
    main(*sys.argv[1:])
