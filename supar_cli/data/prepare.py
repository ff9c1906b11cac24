"""A text corpus written as token files, which are then read a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from supar_cli.data import corpus, documents, tokenizer
from supar_cli.data.batches import TAIL_SHARE
from supar_cli.errors import InputError
from supar_cli.planning.plan import Data

# raw uint16 is nanoGPT's format; wider integers go into numpy's, which says what it holds
INTEGERS: dict[str, np.dtype[Any]] = {".bin": np.dtype("<u2"), ".npy": np.dtype("<u4")}
FILES = tuple(f"{name}{suffix}" for suffix in INTEGERS for name in ("train", "val"))


class Prepared(NamedTuple):
    """What was written: the files for training and validation with their numbers of tokens, and what to warn of."""

    files: dict[Path, int]
    vocab: int
    lines: list[str]
    warnings: list[str]


def prepare(data: Data, directory: Path, progress: Callable[[str, int], None]) -> Prepared:
    """Write the tokens of a text corpus, split as `load` splits it: train.bin and val.bin, or .npy where ids need uint32.

    `progress(name, tokens)` reports each file's tokens so far. Raises InputError for data that are not text.
    """
    found = corpus.find(data)
    if not found.is_text:
        raise InputError(f"data.source: {data.source}: already holds tokens ({found.kind}); expected text or JSONL")
    encoder, decoding = tokenizer.load(data), documents.decoding_of(found.kind, data)
    suffix = next((one for one, integer in INTEGERS.items() if encoder.vocab <= np.iinfo(integer).max + 1), ".npy")
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".") as aside:
        integers = []
        for name, files in (("train", found.train), ("val", found.validation)):
            parts = encoder.encode(documents.texts(found.kind, files, data, decoding))
            integers.append(_write(Path(aside, name), parts, INTEGERS[suffix], progress))
        warnings = decoding.warnings() + encoder.warnings()
        if not found.validation:
            cut = len(integers[0]) - len(integers[0]) // TAIL_SHARE
            integers = [integers[0][:cut], integers[0][cut:]]
            if not len(integers[1]):
                raise InputError(f"data.source: {data.source}: {cut} tokens are too few for a validation split")
        written = {directory / f"{name}{suffix}": part for name, part in zip(("train", "val"), integers, strict=True)}
        for path, part in written.items():
            with Path(aside, path.name).open("wb") as file:
                np.save(file, part) if suffix == ".npy" else part.tofile(file)
        for other in FILES:  # of an earlier preparation
            (directory / other).unlink(missing_ok=True)
        for path in written:
            Path(aside, path.name).replace(path)
        counts = {path: len(part) for path, part in written.items()}
    return Prepared(counts, encoder.vocab, found.lines(), warnings)


def _write(
    path: Path, parts: Iterator[NDArray[Any]], integer: np.dtype[Any], progress: Callable[[str, int], None]
) -> NDArray[Any]:
    """Tokens written to a file, as an array of them that is not in memory."""
    count = 0
    with path.open("wb") as file:
        for part in parts:
            if len(part) and int(part.max()) > np.iinfo(integer).max:
                raise InputError(
                    f"{path.name}: token {part.max()} does not fit {integer}; expected a smaller vocabulary"
                )
            file.write(part.astype(integer).tobytes())
            count += len(part)
            progress(path.name, count)
    return np.memmap(path, integer, "r") if count else np.zeros(0, integer)
