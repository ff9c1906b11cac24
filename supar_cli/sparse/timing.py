"""Seconds of several ways to do the same work, interleaved, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=str)


def interleave(
    runs: Mapping[Name, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
) -> dict[Name, list[float]]:
    """Seconds of each run by round, after `warmup` rounds that do not count; the order alternates between rounds."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name in runs if turn % 2 else reversed(list(runs)):
            spent_s = timed(runs[name], device)
            if turn >= warmup:  # earlier ones compile and touch memory
                seconds[name].append(spent_s)
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, all that it put on a CUDA device included."""
    started_s = _now(device)
    run()
    return _now(device) - started_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
