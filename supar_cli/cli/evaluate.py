"""`supar evaluate`: a run's loss, perplexity and bits per byte on text; its loss and accuracy on images."""

from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.data import LOOKING, READING
from supar_cli.cli.options import Flags, command
from supar_cli.cli.runs import find_run

CLASSES = 20  # chosen: as many classes in a line are read; all are in the document


@command(
    f"directory data {READING} {LOOKING} tokens device precision out force json quiet",
    directory={"help": "A run directory or a checkpoint. [default: the newest of runs/]"},
    data={
        "help": "Text, JSONL, tokens or images: a file or a folder of them. [default: what the run holds out of its own]"
    },
    tokenizer={"help": "bytes, a tokenizer.json or its folder. [default: the run's]"},
    tokens={"help": "Score only the first tokens, so many. [default: all]", "path": "", "minimum": 1},
    device={"default": "auto"},
    precision={"default": "float32"},
)
def evaluate(flags: Flags) -> None:
    """Score a run on text or images: loss, perplexity and bits per byte, or loss and accuracy, with standard errors.

    Each document is scored by itself, its first token too, in windows of the model's context: the rolling log-likelihood of
    lm-evaluation-harness. Every image is scored once. Of a folder: its validation split, else its test split, else all. The
    run is not changed.

    Examples:
      supar evaluate runs/NAME --json
      supar evaluate runs/NAME --data corpus.jsonl --field page --tokens 100000
    """
    log = terminal.Log(flags.quiet)
    names = ("data", "tokens", "device", "precision", *READING.split(), *LOOKING.split())
    options: dict[str, Any] = {name: value for name in names if (value := getattr(flags, name)) is not None}
    run = find_run(flags.directory, log)
    with terminal.Progress("evaluate", flags.quiet) as progress, documents.naming_flags(flags):
        record = supar_cli.evaluate(run, reporter=progress, **options)
    for message in record["warnings"]:
        log.warn(message)
    for one in record["data"]:
        log.log(f"{one['source']}: {one['part']}")
    log.log(f"{run}: {_describe(record)}")
    classes = record.get("classes", {})
    shown = [f"{name} {one['accuracy']:.2f}" for name, one in list(classes.items())[:CLASSES]]
    if classes:
        more = f" and {len(classes) - CLASSES} more classes (--json)" if len(classes) > CLASSES else ""
        log.log(f"accuracy by class: {', '.join(shown)}{more}")
    terminal.emit([record], flags, log, None)


def _describe(record: dict[str, Any]) -> str:
    """The figures in a line."""
    unit = "image" if "images" in record else "token"
    words = {"loss": f"loss {{}} nats per {unit}", "accuracy": "accuracy {}"}
    words |= {"perplexity": "perplexity {}", "bits_per_byte": "{} bits per byte"}
    found = []
    for name, text in words.items():
        if (value := record.get(name)) is not None:
            error = record[f"{name}_se"]
            found.append(text.format(f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")))
    if "images" in record:
        return f"{', '.join(found)}; {record['images']:,} images (± a standard error)"
    over = record["standard_errors"]
    counts = f"{record['tokens']:,} tokens of {record['documents']:,} document{'s' * (record['documents'] > 1)}"
    said = (
        "no standard error of one window"
        if record["loss_se"] is None
        else f"± a standard error, over {over['count']:,} {over['over']}"
    )
    return f"{', '.join(found)}; {counts} ({said})"
