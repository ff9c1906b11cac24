"""What a search asks of the user's script that makes its runs: that it is still the same, trains its plans, and uses seeds."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from supar_cli.errors import UnusableResult
from supar_cli.files import Record
from supar_cli.jobs.command import script_files
from supar_cli.planning.spec import Run
from supar_cli.training.reporter import Reporter


def compare_scripts(study: optuna.Study, run: Run, folder: Path, reporter: Reporter) -> None:
    """Say where the runs' files are, and warn if the script is not the one that the study began with."""
    if run.command is None:
        return
    reporter.log(f"plan, output and reports of each run: {folder}/")
    files = script_files(run.command)
    before = study.user_attrs.get("script", files)
    study.set_user_attr("script", before)
    if changed := sorted({name for name, _ in before.items() ^ files.items()}):
        what = "changed since the study began, so its earlier losses may not compare"
        reporter.warn(f"{', '.join(changed)}: {what}; another --study starts anew")


def require_different_losses(complete: list[FrozenTrial], run: Run) -> None:
    """Raise UnusableResult where several trials, sorted by their loss, have the same one: the script trains no plan."""
    if run.command is not None and len(complete) > 2 and complete[0].value == complete[-1].value:
        what = f"all {len(complete)} trials have the loss {complete[0].value}, whatever their values"
        raise UnusableResult(f"{what}; expected a script that trains the plan that it is given")


def warn_of_equal_seeds(finalists: list[Record], run: Run, reporter: Reporter) -> None:
    """Warn where a seed changes no loss: then runs with several say nothing about chance."""
    if run.command is not None and all(len(one["losses"]) > 1 and len(set(one["losses"])) == 1 for one in finalists):
        reporter.warn("another seed changes no loss; expected a script that uses plan.train.seed, or search.seeds: 1")


def evidence(run: Run) -> Record:
    """What trained a user's model, as proxy.yaml has it."""
    return {} if run.command is None else {"command": run.command, "script": script_files(run.command)}
