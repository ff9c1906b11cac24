"""Who makes the runs: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from supar_cli.errors import InputError
from supar_cli.jobs.calls import Workers as Workers
from supar_cli.jobs.clusters import Ray, Slurm
from supar_cli.jobs.local import Local, visible_devices

CPU_JOBS = min(8, os.cpu_count() or 1)  # chosen: of a study's runs on a CPU, one a core; more than 8 are rarely meant
EXECUTORS = ("local", "ray", "slurm")


def make_workers(
    executor: str = "local",
    *,
    jobs: int | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    on_cpu: int = 1,
    folder: Path = Path("."),
    verbose: bool = False,
) -> Workers:
    """Workers of an executor. `device` is the plans'; `folder`, for Slurm's files, must be shared with its nodes.

    Default of `jobs`: one a GPU on CUDA, else `on_cpu` here, one a core of a Ray cluster, `clusters.SLURM_JOBS` of Slurm.
    Raises InputError for an unknown executor or setting, SetupError for a missing package or cluster.
    """
    if executor == "ray":
        return Ray(jobs, settings or {}, device, verbose)
    if executor == "slurm":
        return Slurm(jobs, settings or {}, device, folder)
    if executor != "local":
        raise InputError(f"--executor {executor}: expected {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}")
    for key in settings or {}:
        raise InputError(f"--executor-set {key}: the local executor has no settings")
    devices = visible_devices(device)
    return Local(jobs or len(devices) or (1 if device.startswith("cuda") else on_cpu), devices)
