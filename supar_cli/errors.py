"""The errors a user can cause, each with its exit status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class SuparError(Exception):
    """An error whose message is meant for the user. `exit_status` is what the process ends with.

    `is_collective`: every process of a run raises it, and the main one reports it for all.
    """

    exit_status = 1
    is_collective = False


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one place of a document."""

    file: str
    what: str
    expected: str = ""
    line: int | None = None
    where: str = ""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        parts = [part for part in (place, self.where) if part]
        return ": ".join([*parts, self.what + (f"; {self.expected}" if self.expected else "")])


def suggestion(word: object, known: Iterable[str]) -> str:
    """What is expected in place of an unknown word: the known one that begins so or is close to it, else one of all."""
    import difflib

    known = list(known)
    close = [one for one in known if one.startswith(str(word))] or difflib.get_close_matches(str(word), known, 1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


class InputError(SuparError):
    """Bad input: nothing was run and nothing was written (exit status 2)."""

    exit_status = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class SetupError(SuparError):
    """The environment lacks something: an extra, a device, readable data, an intact checkpoint (exit status 3)."""

    exit_status = 3


class PeerLost(SetupError):
    """Another process of the run is gone. That process's status says why; this one ends with 1."""

    exit_status = 1


class UnusableResult(SuparError):
    """The work was done but its result can't be used: a loss is not finite, or every trial diverged (exit status 4)."""

    exit_status = 4


class RunFailed(SuparError):
    """A command that trains a plan crashed, hung or reported no loss; the message has the end of its output (exit status 4)."""

    exit_status = 4


class Preempted(SuparError):
    """Training was stopped on request between two steps; the same command continues it (exit status 75)."""

    exit_status = 75
    interrupted = False  # by Ctrl-C, which has a status of its own


class CheckViolated(SuparError):
    """A check was violated (exit status 5)."""

    exit_status = 5


class TransferWarning(UserWarning):
    """What Python's `transfer` warns of; the command line says it in its own way."""
