"""`supar compare`: SP, μP and SμPar with the same hyperparameters as weights go sparse, and SP re-tuned at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import study, terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command, require_one, workers_of

# one value, the transferred one; SP's search goes on from it by octaves
DEFAULTS = {
    "over": {"lr": "x:0..0/1", "sparsity": [0.0, 0.75, 0.9375]},
    "parameterizations": ["sp", "mup", "supar"],
    "widen": 8,
}


@command(
    "source sparsity density parameterization",
    study.OPTIONS,
    source={"metavar": "[PROXY|SPEC|-]"},
    sparsity={"help": "Levels. [default: 0,0.75,0.9375]", "read": None},
    density={"help": "Levels, instead of --sparsity.", "read": None},
    out={"help": "Folder. [default: compare/NAME]"},
    **study.MEANINGS,
)
def compare(flags: Flags) -> None:
    """Compare SP, μP and SμPar over sparsities at a fixed budget, nothing re-tuned.

    Beside it SP with a learning rate of its own, tuned when dense or at every size."""
    require_one(flags, "density", "sparsity")
    log, read = terminal.Log(flags.quiet), study.read(flags.source, DEFAULTS)
    axes = [f"{name}={getattr(flags, name)}" for name in ("sparsity", "density") if getattr(flags, name) is not None]
    wanted = study.plan_study(read, axes, flags, log)
    from supar_cli.experiments.sweep import require_comparison

    require_comparison(wanted, read.name)
    study.describe(wanted, log)
    folder = Path(flags.out or f"compare/{wanted.name}")
    with terminal.Progress("compare", flags.quiet, folder / "records.jsonl") as progress:
        result = supar_cli.compare(wanted, folder, force=flags.force, reporter=progress, **workers_of(flags))
    if not flags.quiet:
        terminal.show_tables(result["tables"])
        _explain(result["levels"], log)
    terminal.print_documents([result], flags)


def _explain(rows: list[dict[str, Any]], log: terminal.Log) -> None:
    """Say what the columns of the tables mean."""
    log.log(
        "tuned dense: SP at the learning rate that is its best in the first row, re-used\n"
        "re-tuned: SP at its best for that row, found by octaves and judged by the same\n"
        "  runs, which flatters it a little. SμPar is for not having to do that.\n"
        "the others: at the proxy's learning rate"
    )
    if rows[0]["cells"] and all(cell["standard_error"] is None for row in rows for cell in row["cells"].values()):
        log.log("one seed: no standard errors; what it shows may be chance")


app = command_app(compare)
