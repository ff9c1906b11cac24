"""What a model is scored on: the documents of a corpus one by one, without separators, and the bytes of their text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from supar_cli.data import corpus, documents, tokenizer, tokens
from supar_cli.data.batches import TAIL_SHARE
from supar_cli.data.corpus import Corpus
from supar_cli.data.splits import split_word
from supar_cli.data.tokens import StampedFile, TokenFile
from supar_cli.planning.plan import Data


class Passage(NamedTuple):
    """A document, or a part of one. `bytes_of(n)`: the bytes of its first n tokens; None where only tokens are known."""

    tokens: NDArray[Any] | TokenFile
    bytes_of: Callable[[int], int] | None

    def part(self, start: int, stop: int) -> Passage:
        """The tokens from `start` to `stop`."""
        whole = self.bytes_of
        own = None if whole is None else lambda count: whole(start + count) - whole(start)
        return Passage(self.tokens[start:stop], own)


class Passages(NamedTuple):
    """Passages in order. `separator` is the token between them, by its text and its id, None where there is none."""

    passages: list[Passage]
    separator: int | None
    separator_text: str | None
    hash: str
    warnings: list[str]


def find(data: Data, held_out: bool) -> Corpus:
    """The corpus of a data section, which says what of it is to be scored: what a run holds out of it, or else the validation
    split that a folder names, else its test split, else all. Raises InputError.
    """
    if held_out:
        found = corpus.find(data)
        return replace(found, why=f"what the run holds out: {found.why}")
    found = corpus.find(data, to_score=True)
    words = {split_word(path.relative_to(found.root)) for path in found.files}
    (word, *others) = words
    is_split = not others and word in ("validation", "test")
    return replace(found, why=f"the {word} split, by its name" if is_split else "all of it")


def read(found: Corpus, data: Data, vocab: int, held_out: bool, limit: int | None = None) -> Passages:
    """The documents of a corpus that are to be scored, up to a number of tokens.

    Raises InputError for the wrong data or a tokenizer with more than `vocab` tokens, SetupError for data that can't be used.
    """
    named = [corpus.tokenizer_file(data)] if data.tokenizer != "bytes" else []
    encoder = tokenizer.load(data) if found.is_text or named else None
    separator = text = None
    if encoder is not None:
        tokenizer.require_fits(encoder, data, vocab)
        separator, text = encoder.separator, encoder.separator_text
    is_tail = held_out and not found.validation
    files = found.validation if held_out and not is_tail else found.files
    with tokens.require_unchanged([*found.files, *named]) as stamps:
        known = corpus.identify(data, found)
        tokens.raise_open_file_limit(len(files))
        decoding = documents.decoding_of(found.kind, data)
        if found.is_text:
            assert encoder is not None
            whole = _of_texts(documents.texts(found.kind, files, data, decoding), encoder)
            whole = _tail(list(whole), int(separator is not None), not decoding.is_raw) if is_tail else whole
        else:
            stored = (tokens.open_tokens(StampedFile(path, stamps[path]), found.kind, data.dtype) for path in files)
            ends = (one[len(one) - len(one) // TAIL_SHARE :] if is_tail else one for one in stored)
            whole = (part for one in ends for part in _split(one, separator))
        passages = list(_first(whole, limit))
        warnings = decoding.warnings() + (encoder.warnings() if encoder else [])
    assert known.hash is not None
    return Passages(passages, separator, text, known.hash, warnings)


def _of_texts(texts: Iterator[str], encoder: tokenizer.Tokenizer) -> Iterator[Passage]:
    read = deque[str]()

    def kept() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    for ids in encoder.encode(kept()):
        text, content = read.popleft(), ids if encoder.separator is None else ids[:-1]
        whole, size_bytes = len(content), len(text.encode("utf-8", "surrogateescape"))

        def bytes_of(count: int, text: str = text, whole: int = whole, size_bytes: int = size_bytes) -> int:
            return size_bytes if count == whole else encoder.bytes_of(text, count)

        yield Passage(content, bytes_of)


def _tail(whole: list[Passage], gap: int, ends_with_gap: bool) -> Iterator[Passage]:
    """What lies in the last tenth of all tokens, as `batches.load` holds it out of one file; `gap` tokens follow a document."""
    total = sum(len(one.tokens) + gap for one in whole) - gap * (not ends_with_gap)
    left = total - total // TAIL_SHARE  # tokens that are trained on
    for one in whole:
        if left < len(one.tokens):
            yield one.part(max(0, left), len(one.tokens))
        left -= len(one.tokens) + gap


def _split(stored: TokenFile, separator: int | None) -> Iterator[Passage]:
    """The documents between the separators of a file, or all of it."""
    at, ends = 0, [-1]
    for chunk in tokens.chunks(stored) if separator is not None else ():
        ends += (np.flatnonzero(chunk == separator) + at).tolist()
        at += len(chunk)
    for before, end in pairwise([*ends, len(stored)]):
        yield Passage(stored[before + 1 : end], None)


def _first(whole: Iterator[Passage], limit: int | None) -> Iterator[Passage]:
    """The passages with any tokens or text, up to a number of tokens."""
    for one in whole:
        if limit is not None and limit <= 0:
            return
        count = len(one.tokens)
        if limit is not None:
            one, limit = (one if count <= limit else one.part(0, limit)), limit - count
        if count or (one.bytes_of is not None and one.bytes_of(0)):
            yield one
