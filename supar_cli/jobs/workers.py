"""Calls run by workers: several at a time, retried if a worker dies, results as they end; and the workers of this machine.

Processes of this machine each have their share of the cores and their own CUDA device.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, ClassVar

import torch

from supar_cli import standard_streams
from supar_cli.errors import SuparError

RETRIES = 2  # chosen: a machine failure may hit a run twice; a run that kills its worker three times is at fault
POLL_S = 1.0  # chosen: between two polls of other processes; trials take minutes
STOP_S = 5.0  # chosen: seconds for a worker to requeue its trial after its current operation

Function = Callable[..., Any]
Call = tuple[Any, ...]
Answer = tuple[Any, Exception | None]


class WorkerDied(Exception):
    """A worker ended without a result; the text says how."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """The result of a call whose worker died each time."""

    why: str


def capture_call(function: Function, call: Call) -> Answer:
    """Make a call in a worker: (result, None), or (None, the error), which can be pickled and raised in another process."""
    try:
        return function(*call), None
    except Exception as error:
        if not isinstance(error, SuparError):
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
        try:
            return None, pickle.loads(pickle.dumps(error)).with_traceback(None)
        except Exception:  # pickling an error may raise anything
            return None, RuntimeError(f"in a worker:\n{traceback.format_exc()}")


class Workers(AbstractContextManager["Workers"]):
    """Runs calls, `jobs` at a time. Leaving the context stops the workers and their unfinished calls."""

    is_local: ClassVar[bool] = False  # whether a plan's device is one of this machine

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.max_in_flight = jobs  # most calls submitted at a time; some may wait for others to end

    def __exit__(self, *_: object) -> None:
        self.close()

    def results(self, function: Function, calls: list[Call]) -> Generator[tuple[int, Any]]:
        """(index of the call, its result or a WorkerFailure) in the order of completion. Raises what a call raises."""
        waiting, deaths, running = deque(range(len(calls))), Counter[int](), dict[Any, int]()
        try:
            while waiting or running:
                started = [waiting.popleft() for _ in range(min(len(waiting), self.max_in_flight - len(running)))]
                if started:
                    running |= zip(self.submit(function, [calls[index] for index in started]), started, strict=True)
                for handle in self.wait(list(running)):
                    index = running.pop(handle)
                    try:
                        result, error = self.answer(handle)
                    except WorkerDied as death:
                        deaths[index] += 1
                        if deaths[index] <= RETRIES:
                            waiting.append(index)
                            continue
                        result, error = WorkerFailure(str(death)), None
                    if error is not None:
                        raise error
                    yield index, result
        finally:
            if running:
                self.cancel(list(running))

    @abstractmethod
    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        """Start calls and return a handle for each."""

    @abstractmethod
    def wait(self, handles: list[Any]) -> list[Any]:
        """Wait until some of the calls have ended, or for a while, and return those that have."""

    @abstractmethod
    def answer(self, handle: Any) -> Answer:
        """The result of a finished call. Raises WorkerDied."""

    @abstractmethod
    def cancel(self, handles: list[Any]) -> None:
        """End calls that still run."""

    def close(self) -> None:
        """Release resources that outlive the calls, if any."""


def visible_devices(device: str) -> list[str]:
    """CUDA devices, one for each trial, as CUDA_VISIBLE_DEVICES names them; none for `cpu` and for `cuda:N`."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if not outer:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in outer.split(",")]
    # a process sees one MIG device, however many are named
    return names if all(name.startswith("MIG-") for name in names) else names[:count]


class Local(Workers):
    """One process per job, reused for later calls. Calls run in this process if there is one job, or one call, no worker yet
    and no device, whose memory this process would keep from the workers to come.

    A process that dies loses only its own call and is replaced.
    """

    is_local: ClassVar[bool] = True

    def __init__(self, jobs: int = 1, devices: list[str] | None = None) -> None:
        super().__init__(jobs)
        self._devices = devices or []
        self._workers: dict[int, _Worker] = {}  # by slot

    def results(self, function: Function, calls: list[Call]) -> Generator[tuple[int, Any]]:
        if self.jobs > 1 and (len(calls) > 1 or self._workers or self._devices):
            yield from super().results(function, calls)
            return
        for index, call in enumerate(calls):
            yield index, function(*call)

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        free = [slot for slot in range(self.jobs) if slot not in self._workers or self._workers[slot].is_idle]
        started = []
        for slot, call in zip(free, calls, strict=False):
            if slot not in self._workers:
                device = self._devices[slot % len(self._devices)] if self._devices else None
                self._workers[slot] = _Worker(device, max(1, _cores() // self.jobs))
            worker = self._workers[slot]
            worker.is_idle = False
            with suppress(OSError):  # a worker that died while idle: `answer` finds out
                worker.channel.send((function, call))
            started.append(worker)
        return started

    def wait(self, handles: list[Any]) -> list[Any]:
        ready = connection.wait([worker.channel for worker in handles])
        return [worker for worker in handles if worker.channel in ready]

    def answer(self, handle: Any) -> Answer:
        try:
            found: Answer = handle.channel.recv()
        except (EOFError, OSError):
            handle.process.join()
            self.cancel([handle])
            raise WorkerDied(describe_end(handle.process.exitcode)) from None
        handle.is_idle = True
        return found

    def cancel(self, handles: list[Any]) -> None:
        """Interrupt workers, so that they requeue their trials, and kill those that take too long."""
        for worker in handles:
            worker.process.terminate()
        for worker in handles:
            worker.process.join(STOP_S)
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
        self._workers = {slot: worker for slot, worker in self._workers.items() if worker not in handles}

    def close(self) -> None:
        self.cancel(list(self._workers.values()))


class _Worker:
    """A process that makes one call after another."""

    def __init__(self, device: str | None, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device, threads), daemon=True)
        with _without_interrupts():
            self.process.start()
        theirs.close()
        self.is_idle = True


def describe_end(status: int | None) -> str:
    """How a process ended, in words."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"its process was killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    return f"its process ended with status {status}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started inside don't get Ctrl-C, which a terminal sends to all; this process gets it afterwards."""
    resource_tracker.ensure_running()  # started here, because its own start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(channel: Any, device: str | None, threads: int) -> None:
    standard_streams.protect()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA is first used
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a study's trial is requeued
        threading.Thread(target=_end_with_parent, daemon=True).start()
        while True:
            channel.send(capture_call(*channel.recv()))


def _end_with_parent() -> None:
    """End a worker whose parent was killed: it would keep its device for nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
