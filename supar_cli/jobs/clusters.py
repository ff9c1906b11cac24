"""Calls made on other machines: as tasks of a Ray cluster, or as jobs of Slurm by way of submitit."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import shutil
import socket
import sys
import time
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

from supar_cli.errors import InputError, SetupError
from supar_cli.jobs.workers import POLL_S, RETRIES, Call, Died, Function, Workers, answer

SLURM_JOBS = 8  # chosen: a search's trials in a few rounds, and no more than most sites let one user run
LARGEST_ARRAY = 1000  # chosen: what Slurm takes unless its MaxArraySize says otherwise
SLURM_MINUTES = 60  # chosen: a trial takes minutes; Slurm ends what takes longer than it said
ASK_S = 30.0  # chosen: a site's accounting is asked at most twice a minute by a command
ANSWER_S = 5.0  # chosen: for a cluster's head to accept a connection
CANCEL_S = 5.0  # chosen: for tasks that were interrupted to give their trials back


def _required(module: str, executor: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SetupError(f"--executor {executor}: {module} is not installed; expected `pip install {module}`")


def _known(executor: str, settings: dict[str, Any], known: set[str]) -> None:
    import difflib

    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            expected = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(sorted(known))}"
            raise InputError(f"--executor-set {key}: no setting of {executor}; {expected}")


def _wants_gpu(device: str, there: bool) -> bool:
    """Whether each call gets a GPU, `there` telling whether some are. Raises InputError for one by number."""
    if ":" in device:
        raise InputError(f"run.device: {device}: a worker sees its own device only; expected cuda")
    return device == "cuda" or (device == "auto" and there)


class Ray(Workers):
    """A task of one core or one GPU for each call, on the cluster of `address`, of RAY_ADDRESS or of this machine.

    Where none of them runs one is started here, for as long as this process lives. Ray itself starts a task anew whose
    worker or node died.
    """

    here: ClassVar[bool] = False
    retries: ClassVar[int] = 0  # Ray's own come before

    def __init__(self, jobs: int | None, settings: dict[str, Any], device: str, verbose: bool) -> None:
        _required("ray", "ray")
        _known("ray", settings, {"address", "cpus"})
        cpus = settings.get("cpus", 1)
        if not isinstance(cpus, int) or cpus < 1:
            raise InputError(f"--executor-set cpus={cpus}: expected a whole number above 0")
        _wants_gpu(device, True)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of it
        import ray

        address = _ray_cluster(settings.get("address") or os.environ.get("RAY_ADDRESS"))
        # Ray prints what its daemons have to say, wherever it is told to log
        self._ray, self._elsewhere = ray, ExitStack()
        self._elsewhere.enter_context(redirect_stdout(sys.stderr if verbose else io.StringIO()))
        try:
            ray.init(
                address,
                include_dashboard=False if address == "local" else None,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                log_to_driver=verbose,
            )
        except Exception as error:  # connection errors of several kinds, Ray's and Python's
            self._elsewhere.close()
            what = " ".join(str(error).split()) or type(error).__name__
            raise SetupError(f"--executor ray: {address}: {what}") from None
        there = ray.cluster_resources()
        on_gpu = _wants_gpu(device, there.get("GPU", 0) > 0)
        if on_gpu and not there.get("GPU"):
            self.close()
            raise SetupError(f"run.device: {device}: the Ray cluster has no GPU")
        super().__init__(jobs or max(1, int(there["GPU"] if on_gpu else there.get("CPU", 1) // cpus)))
        self._task = ray.remote(_in_folder).options(num_cpus=cpus, num_gpus=int(on_gpu), max_retries=RETRIES)

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        return [self._task.remote(os.getcwd(), function, call) for call in calls]

    def ended(self, handles: list[Any]) -> list[Any]:
        found: list[Any] = self._ray.wait(handles, timeout=POLL_S)[0]
        return found

    def take(self, handle: Any) -> tuple[Any, Exception | None]:
        try:
            found: tuple[Any, Exception | None] = self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            raise Died(" ".join(str(error).split())) from None
        return found

    def cancel(self, handles: list[Any]) -> None:
        with suppress(self._ray.exceptions.RayError):
            running: list[Any] = self._ray.wait(handles, num_returns=len(handles), timeout=0)[1]
            for handle in running:
                self._ray.cancel(handle)  # raises KeyboardInterrupt there
            if running:
                self._ray.wait(running, num_returns=len(running), timeout=CANCEL_S)

    def close(self) -> None:
        self._ray.shutdown()
        self._elsewhere.close()


class Slurm(Workers):
    """A job of Slurm for each call, the calls of a round one job array of which `jobs` run at the same time.

    Settings are sbatch's options as submitit names them (`partition`, `account`, `time` in minutes, …). A GPU is asked
    for where the device is `cuda`. For tests, `cluster` is `local`: submitit runs the jobs on this machine.
    """

    here: ClassVar[bool] = False

    def __init__(
        self, jobs: int | None, settings: dict[str, Any], device: str, folder: Path, cluster: str = "slurm"
    ) -> None:
        super().__init__(jobs or SLURM_JOBS)
        _required("submitit", "slurm")
        import submitit

        _known("slurm", settings, submitit.SlurmExecutor._valid_parameters())
        options = dict(settings)
        minutes = options.pop("time", SLURM_MINUTES)
        if not isinstance(minutes, int) or minutes < 1:
            raise InputError(f"--executor-set time={minutes}: expected minutes, as a whole number")
        own = {"gres", "gpus_per_node", "gpus_per_task"} & set(options)
        asks = _wants_gpu(device, torch.cuda.is_available()) and not own
        if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
            raise SetupError("--executor slurm: no sbatch and srun here; expected a machine that submits to Slurm")
        self._submitit, self._looked = submitit, time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is called is there, a database's password too
        except OSError as error:
            raise SetupError(f"{folder}: can't be written: {error.strerror or error}") from None
        self._executor = submitit.AutoExecutor(folder=folder.absolute(), cluster=cluster)
        usual = {"job_name": "supar", "wckey": "supar", "array_parallelism": self.jobs}
        options = {**usual, **({"gpus_per_node": 1} if asks else {}), **options}
        named = {f"slurm_{key}": value for key, value in options.items()}
        self._executor.update_parameters(timeout_min=minutes, **named)

    @property
    def at_once(self) -> int:
        return self.jobs if self._executor.cluster == "local" else LARGEST_ARRAY  # Slurm has them wait

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        import subprocess

        try:
            columns = zip(*((os.getcwd(), function, call) for call in calls), strict=True)
            return list(self._executor.map_array(_in_folder, *columns))
        except (self._submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise SetupError(f"--executor slurm: sbatch refuses: {' '.join(str(error).split())}") from None

    def ended(self, handles: list[Any]) -> list[Any]:
        time.sleep(POLL_S)
        # asked of Slurm itself now and then: a job that was killed leaves no result
        force = time.monotonic() - self._looked > ASK_S
        if force:
            self._looked = time.monotonic()
        return [job for job in handles if job.done(force_check=force and job is handles[0])]

    def take(self, handle: Any) -> tuple[Any, Exception | None]:
        try:
            found: tuple[Any, Exception | None] = handle.result()
        except self._submitit.core.utils.FailedJobError as error:  # before the call, whose own errors are in `found`
            last = str(error).split("----------------------")[1].strip().splitlines()[-1]
            raise SetupError(
                f"--executor slurm: job {handle.job_id} can't begin: {last}; see {handle.paths.stderr}"
            ) from None
        except self._submitit.core.utils.UncompletedJobError:
            raise Died(
                f"job {handle.job_id} ended without an answer ({handle.state}); see {handle.paths.stderr}"
            ) from None
        return found

    def cancel(self, handles: list[Any]) -> None:
        for job in handles:
            if not job.done():
                job.cancel(check=False)


def _ray_cluster(address: str | None) -> str:
    """The cluster asked for, else the one this machine belongs to, else `local`, which starts one.

    Raises SetupError when the one asked for doesn't answer; Ray itself would try for many minutes.
    """
    import ray._private.utils

    asked = address not in (None, "", "auto")
    found = str(address) if asked else ray._private.utils.read_ray_address(None)
    if found is None or found == "local" or "://" in found:
        return found or "local"
    host, _, port = found.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, ValueError) as error:
        if asked:
            what = getattr(error, "strerror", None) or "expected HOST:PORT"
            raise SetupError(f"--executor ray: no cluster answers at {found}: {what}") from None
        return "local"  # what a cluster that was killed has left
    return found


def _in_folder(folder: str, function: Function, call: Call) -> tuple[Any, Exception | None]:
    """Make a call in the folder of the process that asks for it, where this machine has it: paths may be relative."""
    with suppress(OSError):
        os.chdir(folder)
    return answer(function, call)
