"""`supar prune`: a run becomes the plan of its largest weights."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command, require_one
from supar_cli.cli.runs import find_run
from supar_cli.cli.values import parameterization
from supar_cli.errors import InputError, TransferWarning
from supar_cli.planning.spec import Sparsity

PLAN = "pruned.yaml"


@command(
    "directory density sparsity rewind scope scale parameterization",
    "explain dry_run out force json quiet",
    density={"help": "Share of each tensor's weights that is to live, of all of them: 0.25 or 1/4."},
    sparsity={"help": "Share of the weights that is to be zero, instead of --density."},
    parameterization={
        "help": "Another name for the rates: mup leaves them as they are. [default: the run's]",
        "read": parameterization,
    },
    out={"help": f"The plan; its masks and values are written beside it. [default: {PLAN}]"},
)
def prune(flags: Flags) -> None:
    """Keep a run's largest weights, and plan to train them again from the values that they had at its start.

    The plan has all steps of the run's, warm-up included, and rates for the new density; --rewind STEP takes the values
    after that step of the run. Pruning such a run again goes a round further: what is dead stays dead.

    Examples:
      supar prune runs/NAME --density 1/4
      supar prune runs/NAME --density 1/8 --scope global --rewind 100 -o round-1.yaml
    """
    log = terminal.Log(flags.quiet)
    require_one(flags, "density", "sparsity")
    level = {word: given for word in ("density", "sparsity") if (given := getattr(flags, word))}
    for word, shares in level.items():
        if len(shares) > 1:
            raise InputError(f"{flags.places[word]}: {len(shares)} levels; expected one, as each round prunes a run")
    with documents.naming_flags(flags):
        Sparsity(**{word: shares[0] for word, shares in level.items()})  # refused before a run is looked for
    options: dict[str, Any] = {word: shares[0] for word, shares in level.items()}
    options |= {name: getattr(flags, name) for name in ("rewind", "scope", "scale", "parameterization")}
    out = Path(PLAN if flags.out in (None, "-") else flags.out)
    names = {key: f"{out.stem}.{key}.safetensors" for key in ("masks", "values")}
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TransferWarning)
        files = {key: Path(folder, name) for key, name in names.items()}
        options |= {f"{key}_out": path for key, path in files.items()}
        run = find_run(flags.directory, log)
        with documents.naming_flags(flags):
            plan = supar_cli.prune(run, **options).with_files(**names)  # sought beside the plan
        terminal.keep_files(Path(folder), [plan.model_dump()], flags, PLAN)
    terminal.log_plans([plan], flags, log)
    for message in caught:
        log.warn(str(message.message))
    if flags.dry_run:
        return
    terminal.emit([plan.model_dump()], flags, log, PLAN)
    if not terminal.prints(flags):
        log.next(f"supar train {out}")
