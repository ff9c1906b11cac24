"""Calls made in processes of this machine, each with its share of the cores and its own CUDA device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from supar_cli.jobs.workers import Call, Died, Function, Workers, answer

STOP_S = 5.0  # chosen: for a worker to give its trial back, between two operations of training


def visible_devices(device: str) -> list[str]:
    """CUDA devices for trials to have one each, as CUDA_VISIBLE_DEVICES names them; none for `cpu` and for `cuda:N`."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name.strip() for name in outer.split(",")][:count] if outer else [str(index) for index in range(count)]


class Local(Workers):
    """One process a job, kept for further calls; in this very process when there is one job, or one call and no process yet.

    A process that dies takes its own call with it and no other; its place is filled again.
    """

    def __init__(self, jobs: int = 1, devices: list[str] | None = None) -> None:
        super().__init__(jobs)
        self._devices = devices or []
        self._slots: dict[int, _Slot] = {}

    def results(self, function: Function, calls: list[Call]) -> Generator[tuple[int, Any]]:
        if self.jobs > 1 and (len(calls) > 1 or self._slots):
            yield from super().results(function, calls)
            return
        for index, call in enumerate(calls):
            yield index, function(*call)

    def submit(self, function: Function, calls: list[Call]) -> list[Any]:
        free = [place for place in range(self.jobs) if place not in self._slots or self._slots[place].idle]
        handles = []
        for place, call in zip(free, calls, strict=False):
            if place not in self._slots:
                self._slots[place] = _Slot(self._environment(place), max(1, _cores() // self.jobs))
            self._slots[place].start(function, call)
            handles.append(self._slots[place])
        return handles

    def _environment(self, place: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self._devices[place % len(self._devices)]} if self._devices else {}

    def ended(self, handles: list[Any]) -> list[Any]:
        ready = connection.wait([slot.channel for slot in handles])
        return [slot for slot in handles if slot.channel in ready]

    def take(self, handle: Any) -> tuple[Any, Exception | None]:
        try:
            return handle.take()  # type: ignore[no-any-return]
        except Died:
            self.cancel([handle])
            raise

    def cancel(self, handles: list[Any]) -> None:
        for slot in handles:
            slot.stop()
        for slot in handles:
            slot.end()
        self._slots = {place: slot for place, slot in self._slots.items() if slot not in handles}

    def close(self) -> None:
        self.cancel(list(self._slots.values()))


class _Slot:
    """A process that makes one call after another."""

    def __init__(self, environment: dict[str, str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, environment, threads), daemon=True)
        with _without_interrupts():
            self._process.start()
        theirs.close()
        self.idle = True

    def start(self, function: Function, call: Call) -> None:
        self.idle = False
        with suppress(OSError):  # a process that died while idle: `take` finds out
            self.channel.send((function, call))

    def take(self) -> tuple[Any, Exception | None]:
        try:
            found: tuple[Any, Exception | None] = self.channel.recv()
        except (EOFError, OSError):
            self._process.join()
            raise Died(_death(self._process.exitcode)) from None
        self.idle = True
        return found

    def stop(self) -> None:
        """Ask the process to give back what it does."""
        self._process.terminate()

    def end(self) -> None:
        """Wait until the process is gone, and after a while kill it."""
        self._process.join(STOP_S)
        self._process.kill()
        self._process.join()
        self.channel.close()


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"its process was killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    return f"its process ended with status {status}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started inside doesn't get Ctrl-C, which a terminal sends to all; this one gets it afterwards."""
    resource_tracker.ensure_running()  # else its start, with the first process, would let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(channel: Any, environment: dict[str, str], threads: int) -> None:
    os.environ.update(environment)  # before CUDA is first used
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a study's trial is given back
        threading.Thread(target=_end_with_parent, daemon=True).start()
        while True:
            function, call = channel.recv()
            channel.send(answer(function, call))


def _end_with_parent() -> None:
    """A worker whose parent was killed has nobody to answer to; it would hold its device."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
