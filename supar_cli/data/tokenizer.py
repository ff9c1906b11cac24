"""Tokenizers: bytes, or the vocabulary of a tokenizer.json, without what that file adds for inference."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supar_cli.data import corpus
from supar_cli.data.documents import REPLACEMENT
from supar_cli.errors import InputError, SetupError
from supar_cli.files import naming_read_errors
from supar_cli.planning.plan import Data

SEPARATOR_BYTE = 0  # chosen: NUL separates documents in byte tokens; no text contains it
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]")
ENCODED_AT_ONCE = 256  # chosen: documents per batch, enough for the tokenizer's threads, few enough for memory
SAMPLED = 10**6  # chosen: characters of which the lost ones are counted, a tenth of a second of work
LOST_NAMED = 3  # chosen: enough to know a script by
NEVER = -1e4  # chosen: log-probability of a special token in text, far below that of any piece of a unigram vocabulary


class Bytes:
    """A token a byte. `separator` is the token between documents, or None."""

    vocab = 256
    dtype: Any = np.uint8

    def __init__(self, data: Data) -> None:
        given = b"\0" if data.separator is None else data.separator.encode()
        if len(given) != 1:
            raise InputError(f"data.separator: {data.separator!r} is not one byte; expected one where tokens are bytes")
        self.separator: int | None = given[0]
        self.separator_text = data.separator or "\\0"
        self._within = 0  # documents that hold the separator

    def encode(self, texts: Iterator[str]) -> Iterator[NDArray[Any]]:
        """The tokens of each document and the separator that follows it."""
        for text in texts:
            # undecodable bytes come as surrogates where they are to be kept
            content, end = text.encode("utf-8", "surrogateescape"), bytes([self.separator or 0])
            self._within += end in content
            yield np.frombuffer(content + end, np.uint8)

    def bytes_of(self, text: str, count: int) -> int:
        """The bytes of a text's first tokens."""
        return count

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token completes, whole characters, and what is left; U+FFFD for what is no UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([min(token, 255)]))  # 255 is never part of a character
        yield decoder.decode(b"", final=True)

    def warnings(self) -> list[str]:
        """What to say of the separator."""
        return _separators_within(self._within, self.separator_text)


class Vocabulary:
    """The tokens of a tokenizer.json. Raises SetupError for one that can't be used, InputError for an unknown separator."""

    dtype: Any = np.uint32

    def __init__(self, data: Data) -> None:
        self.path = corpus.tokenizer_file(data)
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise SetupError("data.tokenizer: a tokenizer.json needs tokenizers: pip install tokenizers") from None
        try:
            with naming_read_errors(self.path):
                document = json.loads(self.path.read_bytes())
            special = {token["content"] for token in document.get("added_tokens") or [] if token.get("special")}
            self._tokenizer = Tokenizer.from_str(json.dumps(_without_inference(document, special)))
        except SetupError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise SetupError(f"{self.path}: not a tokenizer.json: {error}") from None
        self._tokenizer.encode_special_tokens = True  # as text
        ids = self._tokenizer.get_vocab()
        self.vocab = max(ids.values(), default=-1) + 1
        known = [data.separator] if data.separator is not None else [word for word in ENDS if word in ids]
        if known and known[0] not in ids:
            raise InputError(
                f"data.separator: {known[0]!r} is not a token of {self.path}; expected one such as {ENDS[0]}"
            )
        self.separator: int | None = ids[known[0]] if known else None
        self.separator_text = known[0] if known else None
        model = document["model"]
        self._unknown = ids.get(model.get("unk_token"), model.get("unk_id"))
        self._tokens = self._unknowns = self._within = 0
        self._sampled, self._letters = 0, Counter[str]()  # characters
        self._is_reserved = bool(known) and (known[0] in special or known[0] in ENDS)

    def encode(self, texts: Iterator[str]) -> Iterator[NDArray[Any]]:
        """The tokens of each document and the separator that follows it."""
        end = [] if self.separator is None else [self.separator]
        while batch := list(islice(texts, ENCODED_AT_ONCE)):
            try:
                found = self._tokenizer.encode_batch(batch, add_special_tokens=False)
            except Exception as error:  # bare Exception again, from a tokenizer that loads but is incomplete
                raise SetupError(f"{self.path}: can't encode the text: {error}") from None
            for text, one in zip(batch, found, strict=True):
                if self._sampled < SAMPLED:
                    self._sampled += len(text)
                    self._letters.update(text)
                content = one.ids
                self._tokens += len(content)
                self._unknowns += content.count(self._unknown)
                self._within += self.separator in content
                ids = np.array([*content, *end], np.uint32)
                if self._is_reserved and self._within:
                    what = f"a text holds {self.separator_text!r}, which this tokenizer reads as the separator"
                    raise InputError(f"{self.path}: {what}; expected texts without it, or another data.separator")
                yield ids

    def bytes_of(self, text: str, count: int) -> int:
        """The bytes of a text's first tokens, whole characters."""
        ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        return len(text[: ends[count - 1]].encode()) if count else 0

    def decode(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text that each token completes, whole characters, and what is left; U+FFFD for what has no text."""
        # not by DecodeStream, which raises where a byte spoils bytes that were characters before
        window, done = list[int](), 0  # tokens whose text depends on each other's, and how many of them have come
        for token in tokens:
            if self._tokenizer.id_to_token(token) is None:
                yield REPLACEMENT
                continue
            window.append(token)
            before, after = self._text(window[:done]), self._text(window)
            if is_whole := not after.endswith(REPLACEMENT):
                window, done = window[done:], len(window) - done
            yield after[len(before) :] if is_whole else ""
        yield self._text(window)[len(self._text(window[:done])) :]

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)  # type: ignore[no-any-return]

    def warnings(self) -> list[str]:
        """What to say of the tokenizer."""
        found = []
        if self.separator is None:
            what = "no token of it is known to separate documents, so they run into each other"
            found.append(f"{self.path}: {what}; data.separator names one")
        found += _separators_within(self._within, self.separator_text)
        if self._unknowns:
            share = f"{self._unknowns / self._tokens:.2%} of the tokens ({self._unknowns:,})"
            found.append(f"{self.path}: {share} are its token for unknown text; another tokenizer may keep the text")
        if lost := {letter: count for letter, count in self._letters.items() if self._is_lost(letter)}:
            share = f"{sum(lost.values()) / self._sampled:.2%} of the first {self._sampled:,} characters"
            letters = ", ".join(map(repr, islice(lost, LOST_NAMED)))
            found.append(f"{self.path}: {share} are in no token and lost, such as {letters}")
        return found

    def _is_lost(self, letter: str) -> bool:
        """Whether a character, white space apart, adds no token to a text."""
        if letter.isspace() or not letter.isprintable():
            return False
        once, twice = (self._tokenizer.encode(text, add_special_tokens=False).ids for text in (letter, 2 * letter))
        return bool(once == twice and self._unknown not in once)


def _separators_within(count: int, separator: str | None) -> list[str]:
    """What to say of texts that hold the separator themselves."""
    what = f"data.separator: {count:,} texts hold {separator!r} themselves, and seem to end there"
    return [f"{what}; a separator that no text holds is better"] if count else []


def _without_inference(document: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """A tokenizer.json that makes the same tokens of the same text each time, all of it and nothing more."""
    model = dict(document["model"])
    if model.get("dropout") is not None:
        model["dropout"] = None
    if isinstance(model.get("vocab"), list):  # of a unigram model, which finds special tokens in texts by itself
        unknown = model.get("unk_id")
        model["vocab"] = [
            [piece, NEVER if piece in special and at != unknown else score]
            for at, (piece, score) in enumerate(model["vocab"])
        ]
    return {**document, "model": model, "truncation": None, "padding": None, "post_processor": None}


Tokenizer = Bytes | Vocabulary


def load(data: Data) -> Tokenizer:
    """The tokenizer of a data section. Raises InputError, SetupError."""
    return Bytes(data) if data.tokenizer == "bytes" else Vocabulary(data)


def require_fits(encoder: Tokenizer, data: Data, vocab: int) -> None:
    """Raise InputError for a tokenizer with more tokens than a model's vocabulary."""
    if encoder.vocab > vocab:
        raise InputError(
            f"model.vocab: {vocab} is less than the {encoder.vocab} tokens of the tokenizer {data.tokenizer!r}"
        )
