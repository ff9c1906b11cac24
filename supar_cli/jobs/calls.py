"""Calls handed to workers: made a number at a time, again where a worker died, and answered as they end."""

from __future__ import annotations

import pickle
import traceback
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from supar_cli.errors import SuparError

RETRIES = 2  # chosen: one machine's mishap may hit twice; a run that takes its worker down thrice does so always
POLL_S = 1.0  # chosen: between two looks at what goes on elsewhere; trials take minutes

Function = Callable[..., Any]
Call = tuple[Any, ...]
Answer = tuple[Any, Exception | None]


class WorkerDied(Exception):
    """A worker ended without an answer; the text says how."""


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """The result of a call whose worker died each time."""

    why: str


def capture_call(function: Function, call: Call) -> Answer:
    """Make a call in a worker: (result, None), or (None, the error) in a form that can be sent and raised elsewhere."""
    try:
        return function(*call), None
    except Exception as error:
        if not isinstance(error, SuparError):
            error.add_note(f"in a worker:\n{traceback.format_exc()}")
        try:
            return None, pickle.loads(pickle.dumps(error)).with_traceback(None)
        except Exception:  # whatever an error's own pickling raises
            return None, RuntimeError(f"in a worker:\n{traceback.format_exc()}")


class Workers(AbstractContextManager["Workers"]):
    """Makes calls, `jobs` of them at a time. Leaving the context ends the workers, and what they still do."""

    is_local: ClassVar[bool] = True  # whether a plan's device is one of this machine

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_in_flight(self) -> int:
        """Number of calls to hand over at a time, to run or to wait for others to end."""
        return self.jobs

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
        """The answer of a call that has ended. Raises WorkerDied."""

    @abstractmethod
    def cancel(self, handles: list[Any]) -> None:
        """End calls that still run."""

    def close(self) -> None:
        """Release what outlasts calls, if anything does."""
