"""`supar data`: see how a corpus or a set of images is read, or turn text into token files."""

import time
from pathlib import Path
from typing import Any

from supar_cli.cli import documents, terminal
from supar_cli.cli.app import application
from supar_cli.cli.options import Flags, command
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.files import naming_write_errors
from supar_cli.planning.plan import DIGITS, Data
from supar_cli.planning.problems import validate

SAMPLE_TOKENS = 64
FILES_NAMED = 5
LOOKING = "size image label"
READING = "format tokenizer field dtype encoding separator"


@command(f"corpus {READING} json quiet")
def inspect(flags: Flags) -> None:
    """Show how a corpus is read: format, split, documents, tokens, vocabulary needed, what can't be decoded, hash.

    Examples:
      supar data inspect corpus.jsonl
      supar data inspect corpus --tokenizer tokenizer.json
    """
    import numpy as np

    from supar_cli.data import batches, tokenizer

    log, section = terminal.Log(flags.quiet), _section(flags)
    with documents.naming_flags(flags):
        found, encoder = corpus.find(section), tokenizer.load(section)
        tokens = batches.load(section, vocab=None, context=1)
    for line in tokens.lines:
        log.log(line)
    for message in tokens.warnings:
        log.warn(message)
    splits: dict[str, Any] = {"train": tokens.train, "validation": tokens.validation}
    files = {"train": found.train, "validation": found.validation}
    segments = {name: [segment.tokens for segment in split.segments] for name, split in splits.items()}
    first = np.asarray(segments["train"][0][:SAMPLE_TOKENS])
    largest = max(int(part.max()) for parts in segments.values() for part in parts if len(part))
    counts, separator = tokens.documents, None
    if encoder.separator is not None and (found.is_text or section.tokenizer != "bytes"):
        count = {name: split.count(encoder.separator) for name, split in splits.items()}
        separator = {"token": encoder.separator_text, "id": encoder.separator, "count": count}
        counts = counts or count
    total, counted = sum(split.total for split in splits.values()), sum(counts.values())
    result: dict[str, Any] = {
        "source": flags.corpus,
        "format": found.kind,
        **({} if found.is_text else {"integers": sorted({str(part.dtype) for part in segments["train"]})}),
        "tokenizer": section.tokenizer if found.is_text else None,
        "files": {name: len(paths) for name, paths in files.items()},
        "first_files": {name: found.names(paths[:FILES_NAMED]) for name, paths in files.items()},
        "split": found.why,
        "left_out": found.by_reason(),
        "bytes": sum(path.stat().st_size for path in found.files),
        "tokens": {name: split.total for name, split in splits.items()},
        "documents": counted or None,
        "tokens_per_document": round(total / counted, 1) if counted else None,
        "separator": separator,
        "undecodable": tokens.decoding.places(),
        "longest_context": {name: max(map(len, parts)) - 1 for name, parts in segments.items()},
        "largest_id": largest,
        "vocab": 1 + largest,
        "first": bytes(first).decode("utf-8", "replace")
        if section.tokenizer == "bytes" and found.is_text
        else first.tolist(),
        "hash": tokens.hash,
    }
    terminal.print_documents([result], flags, always=True)


@command(
    f"corpus {LOOKING} json quiet",
    corpus={"help": "`digits`, an .npz or Parquet file, or a folder of images.", "default": DIGITS},
)
def images(flags: Flags) -> None:
    """Show how labelled images are read: splits, classes, size, channels, mean, and what to put into a document.

    Examples:
      supar data images photos --size 32,32
      supar data images table.parquet --label fine_label
    """
    import numpy as np

    from supar_cli.data import images as reading

    log, section = terminal.Log(flags.quiet), _section(flags, LOOKING, kind="images")
    with documents.naming_flags(flags):
        found = reading.load(section, log.log)
    for line in found.lines:
        log.log(line)
    channels, *size = found.shape
    splits = {"train": found.train, "held_out": found.held_out}
    counts = {name: np.bincount(one.labels, minlength=len(found.classes)).tolist() for name, one in splits.items()}
    result = {
        "images": {name: len(one) for name, one in splits.items()},
        "classes": {name: list(own) for name, *own in zip(found.classes, *counts.values(), strict=True)},
        **found.described,
        "model": {"image": size, "channels": channels, "classes": len(found.classes)},
        "data": section.model_copy(update={"hash": found.hash}).model_dump(),
    }
    terminal.print_documents([result], flags, always=True)


@command(
    f"corpus out {READING} force json quiet",
    corpus={"help": "`stdlib`, a file of texts, or a folder of them.", "default": ...},
    out={"help": "Folder for train.bin and val.bin, or .npy where ids need 32 bits.", "default": ...},
)
def prepare(flags: Flags) -> None:
    """Tokenize text once, for `--data FOLDER`: raw uint16 tokens as nanoGPT has them, or .npy of uint32 where ids need it.

    Examples:
      supar data prepare corpus.jsonl -o tokens
      supar data prepare corpus -o tokens --tokenizer tokenizer.json
    """
    from supar_cli.data import prepare as prepared

    folder, log, section = Path(flags.out), terminal.Log(flags.quiet), _section(flags)
    existing = [path for name in prepared.FILES if (path := folder / name).exists()]
    if existing and not flags.force:
        raise InputError(f"{existing[0]}: exists; expected --force to overwrite it, or another --out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for --out")
    logged_s = time.monotonic()

    def progress(name: str, count: int) -> None:
        nonlocal logged_s
        if time.monotonic() - logged_s > terminal.Progress.EVERY_S:
            logged_s = time.monotonic()
            log.log(f"{name}: {count:,} tokens")

    with naming_write_errors(folder), documents.naming_flags(flags):
        written = prepared.prepare(section, folder, progress)
    for line in written.lines:
        log.log(line)
    for message in written.warnings:
        log.warn(message)
    log.log(
        f"wrote {' and '.join(f'{path} ({count:,} tokens)' for path, count in written.files.items())}\n"
        f"next: `data: {{source: {flags.out}}}` and `vocab: {written.vocab}` or more under `model`"
    )
    found = corpus.find(Data(source=flags.out))
    counts = dict(zip(("train", "validation"), written.files.values(), strict=True))
    hash_ = corpus.identify(Data(source=flags.out), found).hash
    terminal.print_documents(
        [{"source": flags.out, "format": found.kind, **counts, "vocab": written.vocab, "hash": hash_}], flags
    )


def _section(flags: Flags, keys: str = READING, **more: str) -> Data:
    given = {key: getattr(flags, key) for key in keys.split() if getattr(flags, key) is not None}
    with documents.naming_flags(flags):
        return validate(Data, {"source": flags.corpus, **given, **more}, "")


data = application(inspect, images, prepare, help="Inspect a corpus or images, or prepare text as token files.")
