"""`supar sweep`: does a hyperparameter's optimum stay where it is over density or width? Measured, with a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import study, terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command, workers_of
from supar_cli.errors import CheckViolated, InputError
from supar_cli.files import template

PRESETS = ("fig1", "fig6", "fig7", "fig9", "fig10", "fig11", "fig13", "fig14")
DEFAULTS = {"over": {"lr": "x:-2..2/1", "density": [1.0, 0.25, 0.0625]}, "parameterizations": ["sp", "mup", "supar"]}


@command(
    "source over parameterization iso preset full",
    study.OPTIONS,
    source={"metavar": "[SPEC|PROXY|SWEEP|-]"},
    preset={"help": "A figure of the paper, small: " + ", ".join(PRESETS) + "."},
    out={"help": "Folder. [default: sweeps/NAME]"},
    **study.MEANINGS,
)
def sweep(flags: Flags) -> None:
    """Sweep a hyperparameter at several densities or widths and judge whether its optimum transfers.

    An optimum at the end of the axis extends it, by its own step. The same command again repeats no finished run. Ends
    with 5 when SμPar misses a pass mark: |γ| < 0.15, largest shift < 0.5 octave, regret < 0.5 %.
    """
    source, preset, log = flags.source, flags.preset, terminal.Log(flags.quiet)
    if preset is not None:
        if source is not None:
            raise InputError(f"--preset {preset}: cannot be combined with a document; expected only one of them")
        if preset not in PRESETS:
            raise InputError(f"--preset {preset}: expected {', '.join(PRESETS)}")
        source = str(template(f"{preset}.yaml"))
    read = study.read(source, DEFAULTS, flags.full)
    if preset:
        read.name = f"--preset {preset}"
    wanted = study.plan_study(read, flags.over or [], flags, log)
    study.describe(wanted, log)
    folder = Path(flags.out or f"sweeps/{wanted.name}")
    with terminal.Progress("sweep", flags.quiet, folder / "records.jsonl") as progress:
        result = supar_cli.sweep(wanted, folder, force=flags.force, reporter=progress, **workers_of(flags))
    if not flags.quiet:
        terminal.show_tables(result["tables"])
        _explain(result, log)
        terminal.show_verdicts(result["verdicts"])
    terminal.print_documents([result], flags)
    if missed := [one for one in result["verdicts"] if one["passed"] is False and not one["control"]]:
        raise CheckViolated("\n".join(f"{one['what']}: {one['text']}" for one in missed))


def _explain(result: dict[str, Any], log: terminal.Log) -> None:
    """Say what the columns of the tables mean, and what was left open."""
    from supar_cli.experiments.transfer_study import RESAMPLES

    log.log(
        "octaves: the best value against the first row's\n"
        "re-used: loss at the first row's best of the values measured\n"
        "γ: slope of log2(best value) on log2(size); best values are a parabola's through\n"
        "  the losses within 2 steps and 1.5 octaves of the best one measured"
    )
    levels = [level for arm in result["arms"] for level in arm["levels"]]
    for arm in result["arms"]:
        counts = {word: sum(level[word] for level in arm["levels"]) for word in ("diverged", "failed")}
        if any(counts.values()):
            runs = sum(len(loss["by_seed"]) for level in arm["levels"] for loss in level["losses"])
            said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
            log.log(f"{arm['parameterization']}: of {runs} runs {said}; a diverged one counts as worse than any loss")
    seeds, widen = result["sweep"]["seeds"], result["sweep"]["widen"]
    if seeds == 1:
        log.log("one seed: no interval; what it shows may be chance")
    else:
        log.log(f"95 % intervals: {RESAMPLES} resamples of the {seeds} seeds")
    if at_end := sum(not level["bracketed"] for level in levels):
        log.warn(
            f"{at_end} optima lie at the end of their axis, extended by at most {widen} steps; -s widen=N allows more"
        )


app = command_app(sweep)
