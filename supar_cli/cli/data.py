"""`supar data`: see how a corpus is read, or turn one into token files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.data import corpus
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

SAMPLE_TOKENS = 64
FILES_NAMED = 5

Format = Annotated[
    str, typer.Option("--format", help="auto (by suffix and first bytes), text, jsonl, nanogpt or llmc.")
]
Tokenizer = Annotated[str, typer.Option(help="bytes, or a tokenizer.json (needs the package tokenizers).")]
Field = Annotated[str, typer.Option(help="The key that holds the text in a line of JSONL.")]


@app.callback()
def _data() -> None:
    """Inspect a corpus, or prepare one as token files."""


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def inspect(
    source: Annotated[str, typer.Argument(help="`stdlib`, a file, or a folder.")] = "stdlib",
    format_: Format = "auto",
    tokenizer: Tokenizer = "bytes",
    field: Field = "text",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Show how a corpus is read: format, split, number of tokens, vocabulary needed, first tokens, hash."""
    import numpy as np

    from supar_cli.data import batches

    section = _section(source, format_, tokenizer, field)
    known = corpus.identified(section)
    found = corpus.find(section)
    words = found.kind in ("text", "jsonl")
    # a corpus of tokens is bounded by its integers only; what a model's vocabulary has is checked when it is trained
    tokens = batches.load(known, vocab=batches.tokenizer(section)[1] if words else 2**16, context=1)
    first = np.asarray(tokens.train.segments[0].tokens[:SAMPLE_TOKENS])
    splits = {"train": tokens.train, "validation": tokens.validation}
    result: dict[str, Any] = {
        "source": source,
        "format": found.kind,
        "tokenizer": tokenizer if words else None,
        "files": {"train": len(found.train), "validation": len(found.validation)},
        "first_files": {
            name: [path.relative_to(found.root).as_posix() for path in files[:FILES_NAMED]]
            for name, files in (("train", found.train), ("validation", found.validation))
        },
        "bytes": sum(path.stat().st_size for path in found.files),
        "tokens": {name: split.total for name, split in splits.items()},
        "longest_context": {name: max(len(s.tokens) for s in split.segments) - 1 for name, split in splits.items()},
        "vocab": 1 + max(int(s.tokens.max()) for split in splits.values() for s in split.segments if len(s.tokens)),
        "first": bytes(first).decode("utf-8", "replace") if words and tokenizer == "bytes" else first.tolist(),
        "hash": tokens.hash,
    }
    if not found.validation:
        console.Talk(quiet).log(f"one file: its last tenth is held out for validation ({found.train[0]})")
    console.emit([result], "-", None, force=True, as_json=as_json, talk=console.Talk(quiet))


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def prepare(
    source: Annotated[str, typer.Argument(help="`stdlib`, a text or JSONL file, or a folder of them.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for train.bin and val.bin.")],
    format_: Format = "auto",
    tokenizer: Tokenizer = "bytes",
    field: Field = "text",
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Tokenize text once, into nanoGPT's format: raw uint16 tokens, as `--data FOLDER` reads them."""
    from supar_cli.data import batches

    folder, talk = Path(out), console.Talk(quiet)
    section = _section(source, format_, tokenizer, field)
    taken = [name for name in ("train.bin", "val.bin") if (folder / name).exists()]
    if taken and not force:
        raise InputError(f"{folder / taken[0]}: exists; expected --force to overwrite it, or another --out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    corpus.identified(section)
    said = time.monotonic()

    def progress(name: str, count: int) -> None:
        nonlocal said
        if time.monotonic() - said > console.Progress.EVERY_S:
            said = time.monotonic()
            talk.log(f"{name}: {count:,} tokens")

    try:
        counts = batches.prepare(section, folder, progress)
    except OSError as error:
        raise SetupError(f"{folder}: can't be written: {error.strerror or error}") from None
    talk.log(
        f"wrote {folder / 'train.bin'} ({counts['train']:,} tokens) and {folder / 'val.bin'} ({counts['validation']:,})\n"
        f"next: `data: {{source: {out}}}` and `vocab: {counts['vocab']}` or more under `model`"
    )
    result = {"source": out, "format": "nanogpt", **counts, "hash": corpus.identified(Data(source=out)).hash}
    console.emit([result], None, None, force=True, as_json=as_json, talk=talk)


def _section(source: str, format_: str, tokenizer: str, field: str) -> Data:
    try:
        return Data(source=source, format=format_, tokenizer=tokenizer, field=field)  # type: ignore[arg-type]
    except ValueError as error:
        raise console.input_error(error) from None
