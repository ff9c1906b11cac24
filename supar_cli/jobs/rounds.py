"""Calls to workers until a shared study has what is wanted, whoever else works on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import Any

from optuna.trial import FrozenTrial

from supar_cli.errors import SetupError, SuparError
from supar_cli.jobs.queue import Shared, where
from supar_cli.jobs.workers import POLL_S, Call, Failure, Function, Workers
from supar_cli.training.reporter import Reporter

SAY_S = 60.0  # chosen: rare enough for a log, often enough to see what a command waits for


def rounds(
    study: Shared,
    workers: Workers,
    reporter: Reporter,
    look: Callable[[list[FrozenTrial]], tuple[int, list[FrozenTrial]]],
    function: Function,
    call: Call,
) -> Generator[Any]:
    """Make as many calls as are missing, again and again, until none is: their results, without those that found nothing.

    `look` says of the study's trials how many are missing, and which of these run already. Where all of them do, they
    are waited for: they end, or are given back. Raises SetupError when a call takes its workers down each time; that and
    any other end leaves no trial of a dead worker behind.
    """
    said = time.monotonic()
    try:
        while True:
            _give_back(study, reporter)
            missing, running = look(study.trials())
            if missing <= 0:
                return
            found = False
            if missing > len(running):
                with closing(workers.results(function, [call] * (missing - len(running)))) as results:
                    for _, result in results:
                        if isinstance(result, Failure):
                            raise SetupError(f"a trial's worker died each time it was started: {result.why}")
                        if result is not None:
                            found = True
                            yield result
                        _give_back(study, reporter)
            elif time.monotonic() - said > SAY_S:
                said = time.monotonic()
                reporter.log(f"waiting for {', '.join(map(where, running))} of other processes")
            if not found:
                time.sleep(POLL_S)
    except BaseException:
        study.patience.limit_s = 0.0  # the error is what matters now
        with suppress(SuparError):
            study.give_back()
        raise


def _give_back(study: Shared, reporter: Reporter) -> None:
    for trial in study.give_back():
        reporter.log(f"{where(trial)} is given back: its process is gone")
