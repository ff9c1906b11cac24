"""What a model is scored on: what a run holds out is what the trainer does, and of other corpora what their names say."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli.data import batches, passages
from supar_cli.data.passages import Passages
from supar_cli.planning.spec import Data
from tests.conftest import real_text

SOURCE = real_text(6_000).decode()
TEXTS = [*(SOURCE[90 * n : 90 * n + 7 * n % 41 + 1] for n in range(40)), "", "naïve café 日本語 " * 9]
IDS = np.arange(1, 500, dtype="<u2") % 251


def read(data: Data, held_out: bool = False, limit: int | None = None) -> Passages:
    return passages.read(passages.find(data, held_out), data, 300, held_out, limit)


def tokens_of(found: Passages) -> list[list[int]]:
    return [np.asarray(one.tokens).tolist() for one in found.passages]


def jsonl(folder: Path) -> Data:
    (folder / "a.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in TEXTS))
    return Data(source=str(folder / "a.jsonl"), field="page")


def with_vocabulary(folder: Path, end: str = "</s>") -> Data:
    pytest.importorskip("tokenizers")
    from tests.test_tokenizer import plain

    plain(end).save(str(folder / "tokenizer.json"))
    return jsonl(folder).model_copy(update={"tokenizer": str(folder / "tokenizer.json")})


def without_separator(folder: Path) -> Data:
    return with_vocabulary(folder, "<fin>")


def text(folder: Path) -> Data:
    (folder / "a.txt").write_text(SOURCE)
    return Data(source=str(folder / "a.txt"))


def packed(folder: Path) -> Data:
    (folder / "a.txt.gz").write_bytes(gzip.compress(SOURCE.encode()))
    return Data(source=str(folder / "a.txt.gz"))


def folder_of_texts(folder: Path, prefix: str = "") -> Data:
    (folder / "texts").mkdir()
    for at, one in enumerate(TEXTS):
        (folder / f"texts/{prefix * (at % 3 == 0)}{at}.txt").write_text(one * 9)
    return Data(source=str(folder / "texts"))


def named_split(folder: Path) -> Data:
    return folder_of_texts(folder, "val-")


def token_file(folder: Path) -> Data:
    IDS.tofile(folder / "a.bin")
    return Data(source=str(folder / "a.bin"))


def token_files(folder: Path) -> Data:
    (folder / "ids").mkdir()
    for name in ("train", "val"):
        IDS.tofile(folder / f"ids/{name}.bin")
    return Data(source=str(folder / "ids"))


KINDS = [jsonl, with_vocabulary, without_separator, text, packed, folder_of_texts, named_split, token_file, token_files]


class TestHeldOut:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_what_the_trainer_holds_out(self, tmp_path: Path, kind: Callable[[Path], Data]) -> None:
        """Files, or the last tenth of one, in the very tokens of the trainer's split, which has separators between."""
        data = kind(tmp_path)
        segments = batches.load(data, vocab=300, context=1).validation.segments
        wanted = [token for one in segments for token in np.asarray(one.tokens).tolist()]
        found = read(data, held_out=True)
        is_one = kind in (text, packed)  # a document that nothing ends
        between = [] if is_one or found.separator is None else [found.separator]
        scored = [token for one in tokens_of(found) for token in [*one, *between]]
        assert scored == wanted
        assert [*scored[1:], 0] != wanted  # the control: one token further on

    @pytest.mark.parametrize("kind", [jsonl, with_vocabulary, text])
    def test_has_the_bytes_of_its_text(self, tmp_path: Path, kind: Callable[[Path], Data]) -> None:
        """The first document begins within a text, whose other bytes are not counted; TEXTS ends in three bytes a letter."""
        data = kind(tmp_path)
        whole, found = read(data), read(data, held_out=True)
        (first, *_), last = found.passages, whole.passages[-1]
        assert 0 < len(first.tokens) < len(last.tokens)
        skipped = len(last.tokens) - len(first.tokens)
        assert first.bytes_of is not None and last.bytes_of is not None
        assert first.bytes_of(len(first.tokens)) == last.bytes_of(len(last.tokens)) - last.bytes_of(skipped)
        sizes = [one.bytes_of(len(one.tokens)) for one in whole.passages if one.bytes_of]
        assert sizes == ([len(one.encode()) for one in TEXTS if one] if kind != text else [len(SOURCE)])


class TestOther:
    @pytest.mark.parametrize(
        ("names", "scored", "part"),
        [
            ("train.txt val.txt test.txt", "val.txt", "the validation split"),
            ("train.txt test.txt", "test.txt", "the test split"),
            ("valid/a.txt valid/b.txt", "valid/a.txt valid/b.txt", "the validation split"),
            ("test/a.txt README.md", "test/a.txt", "the test split"),
            ("a.txt b.txt train.txt", "a.txt b.txt train.txt", "all of it"),
        ],
    )
    def test_of_a_folder_the_split_that_it_names(self, tmp_path: Path, names: str, scored: str, part: str) -> None:
        for name in names.split():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"this is {name}")
        data = Data(source=str(tmp_path))
        found = [bytes(ids).decode() for ids in tokens_of(read(data))]
        assert found == [f"this is {name}" for name in scored.split()]
        assert passages.find(data, held_out=False).why.startswith(part)

    @pytest.mark.parametrize(("name", "part"), [("test", "the test split"), ("a", "all of it"), ("train", "all of it")])
    def test_of_a_file_all(self, tmp_path: Path, name: str, part: str) -> None:
        (tmp_path / f"{name}.txt").write_text(SOURCE)
        data = Data(source=str(tmp_path / f"{name}.txt"))
        assert tokens_of(read(data)) == [list(SOURCE.encode())]
        assert passages.find(data, held_out=False).why.startswith(part)

    @pytest.mark.parametrize("limit", [1, 50, 51, 10**6])
    @pytest.mark.parametrize("kind", [jsonl, with_vocabulary, token_file])
    def test_the_first_tokens(self, tmp_path: Path, kind: Callable[[Path], Data], limit: int) -> None:
        data = kind(tmp_path)
        whole, found = (sum(tokens_of(read(data, limit=most)), list[int]()) for most in (None, limit))
        assert found == whole[:limit]


def test_the_bytes_of_some_tokens_are_whole_characters(tmp_path: Path) -> None:
    """A byte-level vocabulary splits a letter of three bytes in three tokens, each of which has all of it."""
    data = with_vocabulary(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"page": "hell 日"}))
    (one,) = read(data).passages
    assert one.bytes_of is not None
    found: list[Any] = [one.bytes_of(count) for count in range(len(one.tokens) + 1)]
    assert found == [0, 4, 5, 8, 8, 8]
