"""`supar export`: a run's model as a folder that other programs load."""

import os
from dataclasses import asdict

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command
from supar_cli.cli.runs import find_run
from supar_cli.cli.values import one_of

FOLDER = "export"


@command(
    "directory to dtype",
    "out force json quiet",
    directory={
        "metavar": "[RUN|CHECKPOINT]",
        "help": "A run, or one of its checkpoints. [default: the newest of runs/]",
    },
    dtype={
        "help": "float32, bfloat16 or float16.",
        "path": "",
        "default": "float32",
        "read": one_of("float32", "bfloat16", "float16"),
    },
    out={"help": f"The folder. [default: {FOLDER}]", "metavar": "FOLDER"},
    force={"help": "Replace an earlier export."},
    json={"help": "Write what was done as JSON to stdout."},
)
def export(flags: Flags) -> None:
    """Write a run's model as a folder of a class that transformers and other programs load.

    Multipliers are folded into the weights, and dead weights are 0. Where transformers is installed it loads the folder, and
    its logits on 256 tokens or 16 images are compared: status 5, and nothing written, if they differ by more than 1e-5 of the largest.

    Examples:
      supar export runs/NAME -o my-model
      supar export runs/NAME/checkpoints/step-00001000 --to granite --dtype bfloat16
    """
    # transformers' own messages, where it is imported to compare
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    log = terminal.Log(flags.quiet)
    folder = terminal.folder_of(flags, FOLDER)
    run = find_run(flags.directory, log)
    with documents.naming_flags(flags):
        found = supar_cli.export(run, folder, to=flags.to, dtype=flags.dtype, force=flags.force)
    what = f"{found.architecture or found.to}, {found.dtype}, after step {found.step:,} of {found.steps:,}"
    log.log(f"wrote {found.folder}: {what}; {', '.join(found.files)}")
    is_open = found.architecture is not None and found.difference is None
    (log.warn if is_open else log.log)(found.compared)
    for note in found.notes:
        log.log(note)
    terminal.print_documents([asdict(found)], flags)
