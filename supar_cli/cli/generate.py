"""`supar generate`: text from a run, streamed to stdout."""

import os
import shlex
import sys

import supar_cli
from supar_cli import standard_streams
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command
from supar_cli.cli.runs import find_run
from supar_cli.errors import InputError
from supar_cli.planning import document

SHOWN = 60  # chosen: characters of a text in a message


@command(
    "directory prompt tokens temperature top_k seed tokenizer device quiet",
    directory={"help": "A run directory or a checkpoint. [default: the newest of runs/]"},
    tokens={"help": "Tokens to make, unless the document ends before. [default: 200]", "path": ""},
    seed={"help": "Seed of what is drawn. [default: 0]", "path": "", "minimum": 0},
    tokenizer={"help": "bytes, a tokenizer.json or its folder. [default: the run's]"},
)
def generate(flags: Flags) -> None:
    """Continue a prompt with a run's model: print the prompt and what follows it, as it comes.

    Without a prompt it begins a new document. One argument alone is the run, unless it is -, the prompt on stdin. It ends
    at the end of the document or after --tokens. A text longer than the model's context goes on from its newest half.

    Examples:
      supar generate runs/NAME "def f("
      supar generate runs/NAME --temperature 0.8 --top-k 40 --tokens 400
    """
    log = terminal.Log(flags.quiet)
    run, prompt = flags.directory, flags.prompt
    if run == "-" and prompt is None:
        run, prompt = None, "-"
    if run is not None and not (os.path.isdir(run) or os.path.isdir(os.path.join("runs", run))):  # of any text, too
        shown = run if len(run) <= SHOWN else run[:SHOWN] + "…"
        what = "not a run; expected a run directory or checkpoint, and then the prompt"
        raise InputError(f"{shown!r}: {what}: supar generate runs/NAME {shlex.quote(shown if prompt is None else '…')}")
    found = find_run(run, log)
    if prompt == "-":
        prompt = document.standard_input().decode("utf-8", "surrogateescape")
    names = ("tokens", "temperature", "top_k", "seed", "tokenizer", "device")
    options = {name: value for name in names if (value := getattr(flags, name)) is not None}
    notes = list[str]()  # said behind the text
    with documents.naming_flags(flags):
        for piece in supar_cli.generate(found, prompt, note=notes.append, **options):
            terminal.to_stdout(piece)
            if standard_streams.is_output_lost():
                return
    if sys.stdout.isatty():
        terminal.to_stdout("\n")
    for message in notes:
        log.log(message)
