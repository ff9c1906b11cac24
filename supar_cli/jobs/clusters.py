"""Where runs are executed: in processes of this machine, tasks of a Ray cluster, or jobs of Slurm by way of submitit."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, redirect_stdout, suppress
from inspect import signature
from pathlib import Path
from typing import Any, TypedDict

import torch

from supar_cli.errors import InputError, SetupError, suggestion
from supar_cli.files import naming_write_errors
from supar_cli.jobs import workers
from supar_cli.jobs.workers import Answer, Call, Function, Workers

CPU_JOBS = min(8, os.cpu_count() or 1)  # chosen: one run per core on a CPU; more than 8 are rarely intended
SLURM_JOBS = 8  # chosen: a search's trials in a few rounds, and no more than most sites let one user run
LARGEST_ARRAY = 1000  # chosen: what Slurm takes unless its MaxArraySize says otherwise
SLURM_MINUTES = 60  # chosen: a trial takes minutes; Slurm kills jobs that exceed their time limit
ANSWER_S = 5.0  # chosen: seconds for a cluster's head node to accept a connection
CANCEL_S = 5.0  # chosen: for tasks that were interrupted to requeue their trials


class WorkerOptions(TypedDict, total=False):
    """Where runs are executed, a keyword of every function that makes some: `jobs` at a time, by `executor` with its settings.

    By default in processes of this machine. `verbose`: show what a Ray cluster prints.
    """

    jobs: int | None
    executor: str
    executor_set: dict[str, Any] | None
    verbose: bool


def check_keywords(function: Callable[..., Any], keywords: WorkerOptions, **counts: int | None) -> None:
    """Raise InputError for a keyword that is neither the function's nor of WorkerOptions, and for counts below 1."""
    known = [name for name in signature(function).parameters if name != "workers"] + [*WorkerOptions.__annotations__]
    if unknown := [name for name in keywords if name not in known]:
        raise InputError(*(f"{name}: unknown keyword; {suggestion(name, known)}" for name in unknown))
    for name, count in {"jobs": keywords.get("jobs"), **counts}.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise InputError(f"{name}: {count!r}; expected a whole number above 0")


def _require_package(executor: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SetupError(f"--executor {executor}: {package} is not installed; expected `pip install {package}`")


def _require_known(executor: str, settings: Collection[str], known: Collection[str]) -> None:
    for key in settings:
        if key not in known:
            raise InputError(f"--executor-set {key}: not a setting of {executor}; {suggestion(key, sorted(known))}")


def _wants_gpu(device: str, has_gpus: bool) -> bool:
    """Whether each call gets a GPU; `auto` takes one if there are any. Raises InputError for a device with a number."""
    if ":" in device:
        raise InputError(f"run.device: {device}: a worker sees only its own GPU; expected cuda without a number")
    return device == "cuda" or (device == "auto" and has_gpus)


class Ray(Workers):
    """A task of one core or one GPU for each call, on the cluster of `address`, of RAY_ADDRESS or of this machine.

    If none of these clusters is running, one is started here and runs until this process ends.
    """

    def __init__(self, jobs: int | None, settings: dict[str, Any], device: str, verbose: bool) -> None:
        _require_package("ray", "ray")
        _require_known("ray", settings, {"address", "cpus"})
        cpus = settings.get("cpus", 1)
        if not isinstance(cpus, int) or cpus < 1:
            raise InputError(f"--executor-set cpus={cpus}: expected a whole number above 0")
        _wants_gpu(device, True)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise Ray warns about this variable
        import ray

        asked = settings.get("address") or os.environ.get("RAY_ADDRESS", "auto")
        address = _ray_cluster("" if asked == "auto" else str(asked))
        self._ray, self._stdout = ray, ExitStack()
        # Ray prints its daemons' messages whatever its logging settings
        self._stdout.enter_context(redirect_stdout(sys.stderr if verbose else io.StringIO()))
        level = logging.INFO if verbose else logging.CRITICAL
        dashboard = False if address == "local" else None
        try:
            ray.init(address, include_dashboard=dashboard, logging_level=level, log_to_driver=verbose)
        except Exception as error:  # connection errors of several kinds, Ray's and Python's
            self._stdout.close()
            what = " ".join(str(error).split()) or type(error).__name__
            raise SetupError(f"--executor ray: {address}: {what}") from None
        resources = ray.cluster_resources()
        on_gpu = _wants_gpu(device, resources.get("GPU", 0) > 0)
        if on_gpu and not resources.get("GPU"):
            self.close()
            raise SetupError(f"run.device: {device}: the Ray cluster has no GPU")
        super().__init__(jobs or max(1, int(resources["GPU"] if on_gpu else resources.get("CPU", 1) // cpus)))
        self._task = ray.remote(_call_in_folder).options(num_cpus=cpus, num_gpus=int(on_gpu), max_retries=0)

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        return [self._task.remote(os.getcwd(), function, call) for call in calls]

    def wait(self, handles: list[Any]) -> list[Any]:
        return list(self._ray.wait(handles, timeout=workers.POLL_S)[0])

    def answer(self, handle: Any) -> Answer:
        try:
            found: Answer = self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            raise workers.WorkerDied(" ".join(str(error).split())) from None
        return found

    def cancel(self, handles: list[Any]) -> None:
        with suppress(self._ray.exceptions.RayError):
            for handle in handles:
                self._ray.cancel(handle)  # raises KeyboardInterrupt there, if it still runs
            self._ray.wait(handles, num_returns=len(handles), timeout=CANCEL_S)

    def close(self) -> None:
        self._ray.shutdown()
        self._stdout.close()


class Slurm(Workers):
    """A job of Slurm for each call, the calls of a round one job array of which `jobs` run at the same time.

    Settings are sbatch's options as submitit names them (`partition`, `account`, `time` in minutes, …). A GPU is asked
    for where the device is `cuda`. For tests, `cluster` is `local`: submitit runs the jobs on this machine.
    """

    def __init__(
        self, jobs: int | None, settings: dict[str, Any], device: str, folder: Path, cluster: str = "slurm"
    ) -> None:
        super().__init__(jobs or SLURM_JOBS)
        if cluster == "slurm":
            self.max_in_flight = LARGEST_ARRAY  # Slurm queues the rest
        _require_package("slurm", "submitit")
        import submitit

        _require_known("slurm", settings, submitit.SlurmExecutor._valid_parameters())
        options = {"job_name": "supar", "wckey": "supar", "array_parallelism": self.jobs, **settings}
        minutes = options.pop("time", SLURM_MINUTES)
        if not isinstance(minutes, int) or minutes < 1:
            raise InputError(f"--executor-set time={minutes}: expected minutes, as a whole number")
        is_gpu_asked = options.keys() & {"gres", "gpus_per_node", "gpus_per_task"}
        if _wants_gpu(device, torch.cuda.is_available()) and not is_gpu_asked:
            options["gpus_per_node"] = 1
        if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise SetupError("--executor slurm: sbatch and srun not found; expected a machine that can submit to Slurm")
        with naming_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # calls are stored there, a database's password too
        self._errors = submitit.core.utils
        self._executor = submitit.AutoExecutor(folder=folder.absolute(), cluster=cluster)
        self._executor.update_parameters(timeout_min=minutes, **{f"slurm_{key}": options[key] for key in options})

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        columns = zip(*((os.getcwd(), function, call) for call in calls), strict=True)
        try:
            return list(self._executor.map_array(_call_in_folder, *columns))
        except (self._errors.FailedJobError, subprocess.CalledProcessError) as error:
            raise SetupError(f"--executor slurm: sbatch failed: {' '.join(str(error).split())}") from None

    def wait(self, handles: list[Any]) -> list[Any]:
        time.sleep(workers.POLL_S)
        return [job for job in handles if job.done()]  # submitit asks Slurm itself at most once a minute

    def answer(self, handle: Any) -> Answer:
        try:
            found: Answer = handle.result()
        except self._errors.FailedJobError as error:  # before the call started; the call's own errors are in `found`
            last = str(error).split("----------------------")[1].strip().splitlines()[-1]
            what = f"job {handle.job_id} can't start: {last}"
            raise SetupError(f"--executor slurm: {what}; see {handle.paths.stderr}") from None
        except self._errors.UncompletedJobError:
            how = f"job {handle.job_id} ended without a result ({handle.state})"
            raise workers.WorkerDied(f"{how}; see {handle.paths.stderr}") from None
        return found

    def cancel(self, handles: list[Any]) -> None:
        for job in handles:
            job.cancel(check=False)


def _ray_cluster(asked: str) -> str:
    """The cluster asked for, else the one this machine belongs to, else `local`, which starts one.

    Raises SetupError when the one asked for doesn't answer; Ray itself would try for many minutes.
    """
    import ray._private.utils

    found = asked or ray._private.utils.read_ray_address(None) or "local"
    if found == "local" or "://" in found:
        return str(found)
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, ValueError) as error:
        if not asked:
            return "local"  # the address is of a cluster that was killed
        what = getattr(error, "strerror", None) or "expected HOST:PORT"
        raise SetupError(f"--executor ray: no cluster answers at {found}: {what}") from None
    return str(found)


def _call_in_folder(folder: str, function: Function, call: Call) -> Answer:
    """Run a call in the caller's working directory if this machine has it, as paths may be relative."""
    with suppress(OSError):
        os.chdir(folder)
    return workers.capture_call(function, call)


def make_workers(
    executor: str = "local",
    *,
    jobs: int | None = None,
    executor_set: dict[str, Any] | None = None,
    verbose: bool = False,
    device: str = "auto",
    folder: Path = Path("."),
) -> Workers:
    """Workers of an executor. `device` is the plans'; `folder`, for Slurm's files, must be shared with its nodes.

    Default of `jobs`: one per GPU on CUDA; else one per core locally, up to CPU_JOBS, and on Ray, `clusters.SLURM_JOBS` on Slurm.
    Raises InputError for an unknown executor or setting, SetupError for a missing package or cluster.
    """
    settings = executor_set or {}
    if executor == "ray":
        return Ray(jobs, settings, device, verbose)
    if executor == "slurm":
        return Slurm(jobs, settings, device, folder)
    if executor != "local":
        raise InputError(f"--executor {executor}: expected local, ray or slurm")
    for key in settings:
        raise InputError(f"--executor-set {key}: the local executor has no settings")
    devices = workers.visible_devices(device)
    return workers.Local(jobs or len(devices) or (1 if device.startswith("cuda") else CPU_JOBS), devices)
