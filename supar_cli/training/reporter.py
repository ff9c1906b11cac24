"""The receiver of a run's progress, messages and warnings: the command line shows them, trials drop them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Work:
    """How much of a command's runs is done, `jobs` at a time. `done` and `total` are in any one unit, such as runs or seconds.

    `bound` goes before a total: "at most " where runs may be pruned, "at least " where more may follow.
    """

    done: float
    total: float
    jobs: int = 1
    bound: str = ""


class Reporter(Protocol):
    """`done` of `total` counts steps of one run, or with `work` all runs of a command. Without a loss, which is nan then, it begins."""

    def progress(self, done: int, total: int, loss: float, work: Work | None = None) -> None: ...
    def warn(self, message: str) -> None: ...
    def log(self, message: str) -> None: ...


class NullReporter:
    """A reporter that says nothing."""

    def progress(self, done: int, total: int, loss: float, work: Work | None = None) -> None: ...
    def warn(self, message: str) -> None: ...
    def log(self, message: str) -> None: ...


@dataclass(slots=True)
class Tally:
    """Counts the runs that end of those expected, which may become more, by their work in any one unit."""

    reporter: Reporter
    jobs: int
    _left: dict[str, float] = field(default_factory=dict)
    _ended: int = 0
    _work: float = 0.0

    def expect(self, left: dict[str, float]) -> None:
        """From now on these runs, by name, are left."""
        self._left = left
        self._report(nan)

    def end(self, run: str, loss: float) -> None:
        """Count a run, unless it was done before."""
        if run in self._left:
            self._work += self._left.pop(run)
            self._ended += 1
            self._report(loss)

    def _report(self, loss: float) -> None:
        if total := self._ended + len(self._left):
            work = Work(self._work, self._work + sum(self._left.values()), self.jobs, "at least ")
            self.reporter.progress(self._ended, total, loss, work)


@dataclass(frozen=True, slots=True)
class PartReporter:
    """A reporter of a part of a command: `before` and `after` are the runs of the other parts, each as much work as one here."""

    whole: Reporter
    before: int
    after: int
    bound: str

    def progress(self, done: int, total: int, loss: float, work: Work | None = None) -> None:
        done, total, jobs = self.before + done, self.before + total + self.after, work.jobs if work else 1
        self.whole.progress(done, total, loss, Work(done, total, jobs, self.bound))

    def warn(self, message: str) -> None:
        self.whole.warn(message)

    def log(self, message: str) -> None:
        self.whole.log(message)
