"""What a search or a sweep asks of the user's script that makes its runs: that it is still the same, trains its plans, uses seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from supar_cli.errors import UnusableResult
from supar_cli.files import Record
from supar_cli.jobs.command import script_files
from supar_cli.planning.spec import Run
from supar_cli.training.reporter import Reporter

# failed runs in a row that end a search or a sweep: of the first ones, for the script is wrong then, and later ones of a search.
# chosen: where each fourth trial fails by its values, the one ends a search in 60, the other in 50
FIRST_FAILURES, FAILURES = 3, 5


def compare_scripts(before: dict[str, str], run: Run, folder: Path, reporter: Reporter, anew: str) -> None:
    """Say where the runs' files are, and warn if the script is not the one that the study began with, `before`.

    `anew` is the flag that starts another one.
    """
    if run.command is None:
        return
    reporter.log(f"plan, output and reports of each run: {folder}/")
    files = script_files(run.command)
    if changed := sorted({name for name, _ in before.items() ^ files.items()}):
        what = "changed since the study began, so its earlier losses may not compare"
        reporter.warn(f"{', '.join(changed)}: {what}; {anew} starts anew")


def require_different_losses(losses: Sequence[float | None], run: Run, what: str) -> None:
    """Raise UnusableResult where several runs, `what`, all have the same loss, none diverged: the script trains no plan."""
    is_same = len(losses) > 2 and len(set(losses)) == 1 and losses[0] is not None and isfinite(losses[0])
    if run.command is not None and is_same:
        same = f"all {len(losses)} {what} have the loss {losses[0]}, whatever their values"
        raise UnusableResult(f"{same}; expected a script that trains the plan that it is given")


def warn_of_equal_seeds(by_values: Sequence[Sequence[float | None]], run: Run, reporter: Reporter, key: str) -> None:
    """Warn where a seed changes no loss of the same values: then runs with several say nothing about chance.

    `key` is the document's number of seeds.
    """
    known = [losses for losses in by_values if all(loss is not None and isfinite(loss) for loss in losses)]
    if run.command is not None and known and all(len(losses) > 1 and len(set(losses)) == 1 for losses in known):
        reporter.warn(f"another seed changes no loss; expected a script that uses plan.train.seed, or {key}: 1")


def evidence(run: Run) -> Record:
    """What trained a user's model, as a proxy's evidence and a sweep's question have it."""
    return {} if run.command is None else {"command": run.command, "script": script_files(run.command)}
