"""Plans run for their validation loss, and who runs them: processes of this machine, a Ray cluster, or Slurm."""

from __future__ import annotations

import functools
import json
import os
import pickle
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from supar_cli.data import batches
from supar_cli.errors import InputError, SuparError
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Data
from supar_cli.training.runtime import Runtime
from supar_cli.training.tasks import NextToken, Task
from supar_cli.training.trainer import Trainer


@functools.lru_cache(maxsize=1)
def _tokens(source: str, vocab: int, context: int) -> batches.Tokens:
    return batches.load(Data(**json.loads(source)), vocab=vocab, context=context)


def task_of(plan: Plan) -> Task:
    """The task of a plan; its data are read once for all plans that share them."""
    return NextToken(plan, _tokens(json.dumps(plan.data.model_dump()), plan.decoder.vocab, plan.decoder.context))


def require_runnable(plan: Plan, device: bool = True) -> None:
    """Raise what is wrong with a plan's device, if it is this machine's, or data, before any work is done."""
    if device:
        Runtime.of(plan)
    task_of(plan)


def validation_loss(plan: Plan, on_evaluation: Callable[[int, float], None] | None = None) -> float:
    """Train a plan and return its last validation loss. Raises UnusableResult when it diverges.

    Compiling, unless the plan asks for it, is left out: it takes longer than a proxy's trial.
    """
    if plan.run.compile == "auto":
        plan = plan.model_copy(update={"run": plan.run.model_copy(update={"compile": "off"})})
    return Trainer(plan, task_of(plan)).run(on_evaluation=on_evaluation).evaluations[-1][1]


RETRIES = 2  # chosen: one machine's mishap may hit twice; a run that takes its worker down thrice does so always
POLL_S = 1.0  # chosen: between two looks at what goes on elsewhere; trials take minutes

Function = Callable[..., Any]
Call = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands for the result of a call whose worker died again and again."""

    why: str


class Died(Exception):
    """A worker ended without an answer; its text says how."""


def answer(function: Function, arguments: Call) -> tuple[Any, Exception | None]:
    """A call as workers make it: (result, None), or (None, the error) in a form that can be sent and raised elsewhere."""
    try:
        return function(*arguments), None
    except Exception as error:
        if not isinstance(error, SuparError):
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
        try:
            return None, pickle.loads(pickle.dumps(error)).with_traceback(None)
        except Exception:  # whatever an error's own pickling raises
            return None, RuntimeError(f"in a worker:\n{traceback.format_exc()}")


class Workers(ABC):
    """Makes calls, `jobs` of them at a time. Use as a context manager, where results are not read to their end too."""

    here: ClassVar[bool] = True  # whether a plan's device is one of this machine
    retries: ClassVar[int] = RETRIES  # of a call whose worker died

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    @property
    def at_once(self) -> int:
        """Calls to hand over at a time, to run or to wait for others to end."""
        return self.jobs

    def results(self, function: Function, calls: list[Call]) -> Generator[tuple[int, Any]]:
        """(index of the call, its result or a Failure) in the order of completion. Raises what a call raises."""
        waiting, deaths, running = deque(range(len(calls))), Counter[int](), dict[Any, int]()
        try:
            while waiting or running:
                if waiting and len(running) < self.at_once:
                    next_ = [waiting.popleft() for _ in range(min(len(waiting), self.at_once - len(running)))]
                    running |= zip(self.submit(function, [calls[index] for index in next_]), next_, strict=True)
                for handle in self.ended(list(running)):
                    index = running.pop(handle)
                    try:
                        result, error = self.take(handle)
                    except Died as death:
                        deaths[index] += 1
                        if deaths[index] <= self.retries:
                            waiting.append(index)
                            continue
                        result, error = Failure(str(death)), None
                    if error is not None:
                        raise error
                    yield index, result
        finally:
            if running:
                self.cancel(list(running))

    @abstractmethod
    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        """Start calls; a handle for each."""

    @abstractmethod
    def ended(self, handles: list[Any]) -> list[Any]:
        """Wait until some of the calls have ended, or for a while; those that have."""

    @abstractmethod
    def take(self, handle: Any) -> tuple[Any, Exception | None]:
        """The answer of a call that has ended. Raises Died."""

    @abstractmethod
    def cancel(self, handles: list[Any]) -> None:
        """End calls that still run."""

    def close(self) -> None:  # noqa: B027
        """Let go of what outlasts calls, if anything does."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


CPU_JOBS = min(8, os.cpu_count() or 1)  # chosen: of a study's runs on a CPU, one a core; more than 8 are rarely meant
EXECUTORS = ("local", "ray", "slurm")


def workers(
    executor: str = "local",
    *,
    jobs: int | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    on_cpu: int = 1,
    folder: Path = Path("."),
    verbose: bool = False,
) -> Workers:
    """The workers of an executor. `device` is the plans'; `folder`, for Slurm's files, must be shared with its nodes.

    Jobs by default: one a GPU on CUDA, else `on_cpu` here, one a core of a Ray cluster, `clusters.SLURM_JOBS` of Slurm.
    Raises InputError for an executor or a setting it doesn't know, SetupError for a missing extra or cluster.
    """
    if executor == "local":
        from supar_cli.jobs.local import Local, visible_devices

        for key in settings or {}:
            raise InputError(f"--executor-set {key}: the local executor has no settings")
        devices = visible_devices(device)
        return Local(jobs or len(devices) or (1 if device.startswith("cuda") else on_cpu), devices)
    from supar_cli.jobs import clusters

    if executor == "ray":
        return clusters.Ray(jobs, settings or {}, device, verbose)
    if executor == "slurm":
        return clusters.Slurm(jobs, settings or {}, device, folder)
    raise InputError(f"--executor {executor}: expected {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}")
