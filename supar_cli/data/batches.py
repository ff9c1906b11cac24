"""Token streams and batches. A batch is a pure function of (seed, step), so resuming needs nothing but a counter."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.data import corpus, tokens
from supar_cli.data.corpus import Corpus
from supar_cli.data.tokens import Stamp, StampedFile, TokenFile
from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import Data
from supar_cli.streams import stream

SEPARATOR_BYTE = 0  # chosen: NUL separates documents in byte tokens; no text contains it
TAIL_SHARE = 10  # chosen: a corpus of one file holds out its last tenth
LLMC_HEADER_BYTES = 1024
ENCODED_AT_ONCE = 256  # chosen: documents per batch, enough for the tokenizer's threads, few enough for memory
ALL = slice(None)

Encoder = Callable[[list[str]], list[list[int]]]


class Segment(NamedTuple):
    """One run of tokens and the file it came from."""

    name: str
    tokens: NDArray[Any] | TokenFile


class Split:
    """Training or validation tokens as segments; a window never crosses from one segment into another."""

    def __init__(self, segments: list[Segment], vocab: int) -> None:
        self.segments, self.vocab = segments, vocab
        lengths = [len(segment.tokens) for segment in segments]
        self.total = sum(lengths)
        # by a window's length: the number of windows up to the end of each segment
        self._ends_of = cache(lambda length: list(accumulate(max(0, tokens - length + 1) for tokens in lengths)))

    def windows(self, length: int) -> int:
        """The number of windows of `length` tokens."""
        ends = self._ends_of(length)
        return ends[-1] if ends else 0

    def window(self, index: int, length: int) -> NDArray[np.int64]:
        """Window number `index` of `length` tokens.

        Raises SetupError for a token outside the vocabulary and for a file that has changed.
        """
        ends = self._ends_of(length)
        at = bisect_right(ends, index)
        if at == len(ends):
            raise IndexError(index)
        segment, start = self.segments[at], index - (ends[at - 1] if at else 0)
        tokens = np.asarray(segment.tokens[start : start + length]).astype(np.int64)
        if tokens.max() >= self.vocab:
            wrong = int(np.argmax(tokens >= self.vocab))
            what = f"token {start + wrong} is {tokens.max()}; expected less than the vocabulary size {self.vocab}"
            raise SetupError(f"{segment.name}: {what} (a corrupt file, or one made with another tokenizer)")
        return tokens

    def batch(self, seed: int, step: int, rows: int, context: int, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, each (rows, context) int64, at windows drawn from (seed, step).

        `share` selects the rows to return; the batch itself does not depend on it.
        """
        draws = stream(seed, "batch", step).random_raw(rows)[share]
        available = np.uint64(self.windows(context + 1))
        return self._pair([int(draw % available) for draw in draws], context)

    def evaluation(self, index: int, count: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `count` evenly spaced evaluation batches, the same at every evaluation."""
        available = self.windows(context + 1)
        return self._pair([(index * rows + row) * available // (count * rows) for row in range(rows)], context)

    def _pair(self, starts: list[int], context: int) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(np.stack([self.window(start, context + 1) for start in starts]))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Tokens(NamedTuple):
    train: Split
    validation: Split
    hash: str


def load(data: Data, *, vocab: int, context: int) -> Tokens:
    """Tokens of a data section. Raises InputError for the wrong data, SetupError for data that can't be used.

    They match the given hash: files that change while they are read are refused.
    """
    found = corpus.find(data)
    more = [Path(data.tokenizer)] if data.tokenizer != "bytes" and os.path.isfile(data.tokenizer) else []
    with tokens.require_unchanged([*found.files, *more]) as stamps:
        known = corpus.identify(data, found)
        encode, size = tokenizer(data)
        if found.kind in ("text", "jsonl") and size > vocab:
            raise InputError(f"model.vocab: {vocab} is less than the {size} tokens of the tokenizer {data.tokenizer!r}")
        tokens.raise_open_file_limit(len(found.files))
        train, validation = (_segments(found, files, data, encode, stamps) for files in (found.train, found.validation))
    assert known.hash is not None
    if not validation:
        longest = max(train, key=lambda segment: len(segment.tokens))
        cut = len(longest.tokens) - len(longest.tokens) // TAIL_SHARE
        validation = [Segment(longest.name, longest.tokens[cut:])]
        train = [Segment(s.name, s.tokens[:cut]) if s is longest else s for s in train]
    splits = Split(train, vocab), Split(validation, vocab)
    for name, split in zip(("training", "validation"), splits, strict=True):
        if split.windows(context + 1) < 1:
            what = f"{split.total} {name} tokens; expected {context + 1} or more in one file, the context and one"
            raise InputError(f"data.source: {data.source}: {what}")
    return Tokens(*splits, hash=known.hash)


def tokenizer(data: Data) -> tuple[Encoder | None, int]:
    """Encoder (None for bytes) and its vocabulary size. Raises SetupError without the `hf` extra."""
    if data.tokenizer == "bytes":
        return None, 256
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SetupError("data.tokenizer: a tokenizer.json needs tokenizers: pip install tokenizers") from None
    try:
        loaded = Tokenizer.from_file(data.tokenizer)
    except Exception as error:  # tokenizers raises bare Exception
        raise SetupError(f"{data.tokenizer}: not a tokenizer.json: {error}") from None
    known = (loaded.token_to_id(word) for word in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"))
    end = [number for number in known if number is not None][:1]

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            found = loaded.encode_batch(texts)
        except Exception as error:  # bare Exception again, from a tokenizer that loads but is incomplete
            raise SetupError(f"{data.tokenizer}: can't encode the text: {error}") from None
        return [[*one.ids, *end] for one in found]

    return encode, loaded.get_vocab_size()


def _segments(
    found: Corpus, files: list[Path], data: Data, encode: Encoder | None, stamps: dict[Path, Stamp]
) -> list[Segment]:
    if not files:
        return []
    if found.kind in ("nanogpt", "llmc"):
        return [Segment(str(path), _token_file(path, found.kind, stamps[path])) for path in files]
    if encode is None and found.kind == "text" and len(files) == 1:
        if not stamps[files[0]].size_bytes:
            raise InputError(f"{files[0]}: the file is empty")
        return [Segment(str(files[0]), TokenFile(StampedFile(files[0], stamps[files[0]]), "u1"))]
    parts = list(encode_files(found.kind, files, data, encode))
    return [Segment(str(found.root), np.concatenate(parts) if parts else np.zeros(0, np.uint8))]


def encode_files(kind: str, files: list[Path], data: Data, encode: Encoder | None) -> Iterator[NDArray[Any]]:
    """Tokens of text or JSONL files, document by document, each with the separator that follows it."""
    texts = documents(kind, files, data)
    if encode is None:
        for text in texts:
            yield np.frombuffer(text + bytes([SEPARATOR_BYTE]), np.uint8)
        return
    while batch := [text.decode("utf-8", "replace") for text in islice(texts, ENCODED_AT_ONCE)]:
        yield from (np.array(ids, np.uint32) for ids in encode(batch))


def documents(kind: str, files: list[Path], data: Data) -> Iterator[bytes]:
    """Texts of text or JSONL files, as bytes.

    Raises InputError naming file and line of a bad JSONL record, SetupError where a file can't be read.
    """
    for path in files:
        with naming_read_errors(path), path.open("rb") as lines:
            if kind == "text":
                yield lines.read()
                continue
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)[data.field].encode()
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    what = f"no text under {data.field!r} in this line; expected JSON with its text under data.field"
                    raise InputError(f"{path}:{number}: {what}") from None


def _token_file(path: Path, kind: str, stamp: Stamp) -> TokenFile:
    """A file of uint16 tokens. nanoGPT: raw; llm.c: a header of 256 int32 (magic, version, count), then tokens."""
    file, size, start = StampedFile(path, stamp), stamp.size_bytes, 0
    if kind == "llmc":
        header = np.asarray(TokenFile(file, "<i4")[:256])
        if len(header) < 256 or header[0] != corpus.LLMC_MAGIC or header[1] != 1:
            raise SetupError(f"{path}: not an llm.c shard of version 1")
        start = LLMC_HEADER_BYTES
        if size != start + 2 * int(header[2]):
            what = f"its header counts {header[2]} tokens, it holds {(size - start) / 2:g}"
            raise SetupError(f"{path}: a corrupt token file: {what}")
    if (size - start) % 2 or size == start:
        raise SetupError(f"{path}: a corrupt token file: {size} bytes are not uint16 tokens")
    return TokenFile(file, "<u2", start)


def prepare(data: Data, directory: Path, progress: Callable[[str, int], None]) -> dict[str, int]:
    """Write train.bin and val.bin (nanoGPT: raw uint16) of a text corpus, split as `load` splits it; counts of tokens.

    `progress(name, tokens)` reports each file's tokens so far. Raises InputError for data that are not text or need larger tokens.
    """
    found = corpus.find(data)
    if found.kind not in ("text", "jsonl"):
        raise InputError(f"data.source: {data.source}: already holds tokens ({found.kind}); expected text or JSONL")
    encode, vocab = tokenizer(data)
    if vocab > 2**16:
        raise InputError(f"data.tokenizer: {data.tokenizer}: {vocab} tokens don't fit a .bin file's uint16")
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".") as aside:
        train, validation = Path(aside, "train.bin"), Path(aside, "val.bin")
        counts = [
            _write(path, encode_files(found.kind, files, data, encode), progress)
            for path, files in ((train, found.train), (validation, found.validation))
        ]
        if not found.validation:
            tail = counts[0] // TAIL_SHARE
            if not tail:
                raise InputError(f"data.source: {data.source}: {counts[0]} tokens are too few for a validation split")
            counts = [counts[0] - tail, tail]
            validation.write_bytes(np.fromfile(train, "<u2", offset=2 * counts[0]).tobytes())
            os.truncate(train, 2 * counts[0])
        for path in (validation, train):
            path.replace(directory / path.name)
    return {"train": counts[0], "validation": counts[1], "vocab": vocab}


def _write(path: Path, parts: Iterator[NDArray[Any]], progress: Callable[[str, int], None]) -> int:
    count = 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part.astype("<u2").tobytes())
            count += len(part)
            progress(path.stem, count)
    return count
