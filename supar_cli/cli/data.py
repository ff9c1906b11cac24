"""`supar data`: see how a corpus is read, or turn one into token files."""

import time
from pathlib import Path
from typing import Any

from supar_cli.cli import documents, terminal
from supar_cli.cli.app import application
from supar_cli.cli.options import Flags, command
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.files import naming_write_errors
from supar_cli.planning.plan import Data
from supar_cli.planning.problems import validate

SAMPLE_TOKENS = 64
FILES_NAMED = 5


@command("corpus format tokenizer field json quiet")
def inspect(flags: Flags) -> None:
    """Show how a corpus is read: format, split, number of tokens, vocabulary needed, first tokens, hash.

    Examples:
      supar data inspect corpus.jsonl
      supar data inspect corpus --tokenizer tokenizer.json
    """
    import numpy as np

    from supar_cli.data import batches

    section = _section(flags)
    known, found = corpus.identify(section), corpus.find(section)
    is_text = found.kind in ("text", "jsonl")
    # token files are only checked against uint16 here; training checks them against the model's vocabulary
    tokens = batches.load(known, vocab=batches.tokenizer(section)[1] if is_text else 2**16, context=1)
    first = np.asarray(tokens.train.segments[0].tokens[:SAMPLE_TOKENS])
    splits = {"train": tokens.train, "validation": tokens.validation}
    files = {"train": found.train, "validation": found.validation}
    segments = {name: [segment.tokens for segment in split.segments] for name, split in splits.items()}
    result: dict[str, Any] = {
        "source": flags.corpus,
        "format": found.kind,
        "tokenizer": flags.tokenizer if is_text else None,
        "files": {name: len(paths) for name, paths in files.items()},
        "first_files": {
            name: [path.relative_to(found.root).as_posix() for path in paths[:FILES_NAMED]]
            for name, paths in files.items()
        },
        "bytes": sum(path.stat().st_size for path in found.files),
        "tokens": {name: split.total for name, split in splits.items()},
        "longest_context": {name: max(map(len, parts)) - 1 for name, parts in segments.items()},
        "vocab": 1 + max(int(part.max()) for parts in segments.values() for part in parts if len(part)),
        "first": bytes(first).decode("utf-8", "replace")
        if section.tokenizer == "bytes" and is_text
        else first.tolist(),
        "hash": tokens.hash,
    }
    if not found.validation:
        terminal.Log(flags.quiet).log(f"one file: its last tenth is held out for validation ({found.train[0]})")
    terminal.print_documents([result], flags, always=True)


@command(
    "corpus out format tokenizer field force json quiet",
    corpus={"help": "`stdlib`, a text or JSONL file, or a folder of them.", "default": ...},
    out={"help": "Folder for train.bin and val.bin.", "default": ...},
)
def prepare(flags: Flags) -> None:
    """Tokenize text once and write nanoGPT's format (raw uint16 tokens), for `--data FOLDER`.

    Examples:
      supar data prepare corpus.jsonl -o tokens
      supar data prepare corpus -o tokens --tokenizer tokenizer.json
    """
    from supar_cli.data import batches

    folder, log, section = Path(flags.out), terminal.Log(flags.quiet), _section(flags)
    existing = [path for name in ("train.bin", "val.bin") if (path := folder / name).exists()]
    if existing and not flags.force:
        raise InputError(f"{existing[0]}: exists; expected --force to overwrite it, or another --out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    corpus.identify(section)
    logged_s = time.monotonic()

    def progress(name: str, count: int) -> None:
        nonlocal logged_s
        if time.monotonic() - logged_s > terminal.Progress.EVERY_S:
            logged_s = time.monotonic()
            log.log(f"{name}: {count:,} tokens")

    with naming_write_errors(folder):
        counts = batches.prepare(section, folder, progress)
    log.log(
        f"wrote {folder / 'train.bin'} ({counts['train']:,} tokens) and {folder / 'val.bin'} ({counts['validation']:,})\n"
        f"next: `data: {{source: {flags.out}}}` and `vocab: {counts['vocab']}` or more under `model`"
    )
    prepared = corpus.identify(Data(source=flags.out))
    terminal.print_documents([{"source": flags.out, "format": "nanogpt", **counts, "hash": prepared.hash}], flags)


def _section(flags: Flags) -> Data:
    keys = {"source": flags.corpus, "format": flags.format, "tokenizer": flags.tokenizer, "field": flags.field}
    with documents.naming_flags(flags):
        return validate(Data, keys, "")


data = application(inspect, prepare, help="Inspect a corpus, or prepare one as token files.")
