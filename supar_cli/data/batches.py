"""Token streams and batches. A batch is a pure function of (seed, step), so resuming needs nothing but a counter."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from supar_cli.data import corpus, documents, tokenizer, tokens
from supar_cli.data.corpus import Corpus
from supar_cli.data.documents import Decoding
from supar_cli.data.tokens import Stamp, StampedFile, TokenFile
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.plan import Data
from supar_cli.streams import stream

TAIL_SHARE = 10  # chosen: a corpus of one file holds out its last tenth
ALL = slice(None)
DRAWS = 2**64  # the number of values of a draw


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
        self._ends_of = cache(lambda length: list(accumulate(max(0, tokens_ - length + 1) for tokens_ in lengths)))

    def count(self, token: int) -> int:
        """How often a token stands in it."""
        return sum(int((chunk == token).sum()) for one in self.segments for chunk in tokens.chunks(one.tokens))

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
        found = np.asarray(segment.tokens[start : start + length]).astype(np.int64)
        if found.max() >= self.vocab or found.min() < 0:
            wrong = int(np.argmax((found >= self.vocab) | (found < 0)))
            what = f"token {start + wrong} is {found[wrong]}; expected less than the vocabulary size {self.vocab}"
            raise SetupError(f"{segment.name}: {what} (a corrupt file, or one made with another tokenizer)")
        return found

    def batch(self, seed: int, step: int, rows: int, context: int, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, each (rows, context) int64, at windows drawn from (seed, step).

        `share` selects the rows to return; the batch itself does not depend on it.
        """
        draws = stream(seed, "batch", step).random_raw(rows)[share]
        available = np.uint64(self.windows(context + 1))
        return _pair([self.window(int(draw % available), context + 1) for draw in draws])

    def evaluation(self, index: int, count: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `count` evenly spaced evaluation batches, the same at every evaluation."""
        available = self.windows(context + 1)
        starts = [(index * rows + row) * available // (count * rows) for row in range(rows)]
        return _pair([self.window(start, context + 1) for start in starts])


class Mixture:
    """Splits of several sources: each row of a batch is drawn from one of them, with its weight for a probability."""

    def __init__(self, splits: list[Split], weights: list[float]) -> None:
        self.splits = splits
        exact = [Fraction(weight) for weight in weights]
        self._ends: list[Fraction] = [end / sum(exact) for end in accumulate(exact)]  # the last is 1
        for at, weight in enumerate(exact):
            if weight * DRAWS < sum(exact):
                what = f"{weights[at]} is less than one draw in 2^64 of the sum"
                raise InputError(f"data.sources[{at}].weight: {what}; expected a larger weight, or no such source")
        self._last_draws = np.array([int(end * DRAWS) - 1 for end in self._ends], np.uint64)

    @property
    def total(self) -> int:
        return sum(split.total for split in self.splits)

    @property
    def segments(self) -> list[Segment]:
        return [segment for split in self.splits for segment in split.segments]

    def windows(self, length: int) -> int:
        """The most rows of an evaluation for which each source has windows of its own."""
        shares = [end - start for start, end in zip([Fraction(0), *self._ends], self._ends, strict=False)]
        return min(int(split.windows(length) / share) for split, share in zip(self.splits, shares, strict=True))

    def batch(self, seed: int, step: int, rows: int, context: int, share: slice = ALL) -> tuple[Tensor, Tensor]:
        """As that of a split; the source of each row is drawn from (seed, step) too."""
        chosen = np.searchsorted(self._last_draws, stream(seed, "source", step).random_raw(rows)[share])
        draws = stream(seed, "batch", step).random_raw(rows)[share]
        return _pair([self._window(int(at), int(draw), context) for at, draw in zip(chosen, draws, strict=True)])

    def evaluation(self, index: int, count: int, rows: int, context: int) -> tuple[Tensor, Tensor]:
        """As that of a split: the rows are shared out among the sources by weight, and evenly spaced in each."""
        found, total = [], count * rows
        for row in range(index * rows, (index + 1) * rows):
            at = next(at for at, end in enumerate(self._ends) if Fraction(row, total) < end)
            start, split = self._ends[at - 1] if at else Fraction(0), self.splits[at]
            place = (Fraction(row, total) - start) / (self._ends[at] - start)  # from 0 up to 1
            found.append(split.window(int(place * split.windows(context + 1)), context + 1))
        return _pair(found)

    def _window(self, at: int, draw: int, context: int) -> NDArray[np.int64]:
        split = self.splits[at]
        return split.window(draw % split.windows(context + 1), context + 1)


def _pair(windows: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of windows of one token more."""
    windows_BT = torch.from_numpy(np.stack(windows))
    return windows_BT[:, :-1].contiguous(), windows_BT[:, 1:].contiguous()


@dataclass(frozen=True)
class Tokens:
    """Tokens to train on and to validate with, and the hash of the data.

    `documents` counts those of each split, where tokens were made of text here. `lines` says which files were read and how
    they were split, `warnings` what is wrong with them.
    """

    train: Split | Mixture
    validation: Split | Mixture
    hash: str
    documents: dict[str, int] = field(default_factory=dict)
    decoding: Decoding = field(default_factory=Decoding)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load(data: Data, *, vocab: int | None, context: int) -> Tokens:
    """Tokens of a data section, of a vocabulary or, with None, of any. They match the given hash.

    Raises InputError for the wrong data, SetupError for data that can't be used, such as files that change while they are read.
    """
    if data.sources:
        return _load_mixture(data, vocab, context)
    found = corpus.find(data)
    more = [corpus.tokenizer_file(data)] if data.tokenizer != "bytes" else []
    encoder = tokenizer.load(data) if found.is_text else None
    with tokens.require_unchanged([*found.files, *more]) as stamps:
        known = corpus.identify(data, found)
        if encoder is not None and vocab is not None:
            tokenizer.require_fits(encoder, data, vocab)
        tokens.raise_open_file_limit(len(found.files))
        reader = _Reader(found, data, encoder, stamps, vocab)
        train, validation = reader.segments("train", found.train), reader.segments("validation", found.validation)
        warnings = reader.decoding.warnings() + (encoder.warnings() if encoder else [])
    if not validation:
        longest = max(train, key=lambda segment: len(segment.tokens))
        cut = len(longest.tokens) - len(longest.tokens) // TAIL_SHARE
        validation = [Segment(longest.name, longest.tokens[cut:])]
        train = [Segment(s.name, s.tokens[:cut]) if s is longest else s for s in train]
    splits = Split(train, reader.vocab), Split(validation, reader.vocab)
    for name, split in zip(("training", "validation"), splits, strict=True):
        if split.windows(context + 1) < 1:
            size = sum(stamps[path].size_bytes for path in found.files)
            what = f"{split.total} {name} tokens; expected {context + 1} or more in one file, the context and one"
            raise InputError(f"data.source: {data.source}: {size} bytes are too few: {what}")
    assert known.hash is not None
    return Tokens(*splits, known.hash, dict(reader.documents), reader.decoding, found.lines(), warnings)


def _load_mixture(data: Data, vocab: int | None, context: int) -> Tokens:
    parts = corpus.parts(data)
    loaded = [load(part, vocab=vocab, context=context) for _, part in parts]
    found = [part.model_copy(update={"hash": one.hash}) for (_, part), one in zip(parts, loaded, strict=True)]
    hash_ = corpus.identify_mixture(data, found).hash
    assert hash_ is not None
    weights = [weight for weight, _ in parts]
    train, validation = (Mixture([getattr(one, name) for one in loaded], weights) for name in ("train", "validation"))
    lines, warnings = ([line for one in loaded for line in getattr(one, name)] for name in ("lines", "warnings"))
    return Tokens(train, validation, hash_, lines=lines, warnings=warnings)


class _Reader:
    """Makes the segments of a corpus, and keeps count of documents and of what could not be decoded."""

    def __init__(
        self,
        found: Corpus,
        data: Data,
        encoder: tokenizer.Tokenizer | None,
        stamps: dict[Path, Stamp],
        vocab: int | None,
    ) -> None:
        self._found, self._data, self._encoder, self._stamps = found, data, encoder, stamps
        self._asked = vocab
        self.vocab = vocab or (encoder.vocab if encoder else 2**63 - 1)
        self.decoding = documents.decoding_of(found.kind, data)
        self.documents: Counter[str] = Counter()

    def segments(self, split: str, files: list[Path]) -> list[Segment]:
        """The segments of a split: one of all texts, or one a token file."""
        if not files:
            return []
        if self._encoder is None:
            return [Segment(str(path), self._token_file(path)) for path in files]
        if self.decoding.is_raw and len(files) == 1 and not self._found.is_packed:  # not in memory
            (path,) = files
            if not self._stamps[path].size_bytes:
                raise InputError(f"{path}: the file is empty")
            documents.check_text(path, self.decoding)
            self.documents[split] = 1
            return [Segment(str(path), TokenFile(StampedFile(path, self._stamps[path]), "u1"))]
        texts = documents.texts(self._found.kind, files, self._data, self.decoding)
        parts = list(self._encoder.encode(texts))
        self.documents[split] = len(parts)
        if self.decoding.is_raw and len(files) == 1:  # the same tokens, packed or not: one document has no end within
            parts = [parts[0][:-1]]
        return [Segment(str(self._found.root), np.concatenate(parts) if parts else np.zeros(0, np.uint8))]

    def _token_file(self, path: Path) -> TokenFile:
        made = tokens.open_tokens(StampedFile(path, self._stamps[path]), self._found.kind, self._data.dtype)
        if made.dtype.itemsize == 2 and (self._asked or 0) > 2**16:
            what = f"{self._asked}, yet {path} holds 16-bit integers, which count to 65,536"
            raise InputError(
                f"model.vocab: {what}; expected data.dtype: uint32 if they are wider, or a smaller vocabulary"
            )
        return made
