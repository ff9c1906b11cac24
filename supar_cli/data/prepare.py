"""A text corpus written as token files, which are then read a window at a time."""

from __future__ import annotations

import io
import os
import shutil
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
        train, validation = Path(aside, f"train{suffix}"), Path(aside, f"val{suffix}")
        counts = [
            _write(path, encoder.encode(documents.texts(found.kind, files, data, decoding)), progress)
            for path, files in ((train, found.train), (validation, found.validation))
        ]
        warnings = decoding.warnings() + encoder.warnings()
        if not found.validation:
            tail = counts[0] // TAIL_SHARE
            if not tail:
                raise InputError(f"data.source: {data.source}: {counts[0]} tokens are too few for a validation split")
            counts = [counts[0] - tail, tail]
            end = len(_header(suffix, 0)) + counts[0] * INTEGERS[suffix].itemsize
            with train.open("rb") as source, validation.open("ab") as file:
                source.seek(end)
                shutil.copyfileobj(source, file)
            os.truncate(train, end)
        for path, count in ((train, counts[0]), (validation, counts[1])):
            with path.open("r+b") as file:
                file.write(_header(suffix, count))
        for other in FILES:  # of an earlier preparation
            (directory / other).unlink(missing_ok=True)
        for path in (validation, train):
            path.replace(directory / path.name)
    written = {directory / train.name: counts[0], directory / validation.name: counts[1]}
    return Prepared(written, encoder.vocab, found.lines(), warnings)


def _header(suffix: str, count: int) -> bytes:
    """What comes before the tokens; numpy leaves room, so that its length does not depend on the count."""
    if suffix == ".bin":
        return b""
    header: Any = {"descr": INTEGERS[suffix].str, "fortran_order": False, "shape": (count,)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _write(path: Path, parts: Iterator[NDArray[Any]], progress: Callable[[str, int], None]) -> int:
    count, integer = 0, INTEGERS[path.suffix]
    with path.open("wb") as file:
        file.write(_header(path.suffix, 0))
        for part in parts:
            if len(part) and int(part.max()) > np.iinfo(integer).max:
                raise InputError(
                    f"{path.name}: token {part.max()} does not fit {integer}; expected a smaller vocabulary"
                )
            file.write(part.astype(integer).tobytes())
            count += len(part)
            progress(path.stem, count)
    return count
