"""Folders as people have them: which files are data, which split they are, and the hash of how they are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning.spec import Data
from tests.conftest import real_text
from tests.fuzzing import tries
from tests.test_data import loaded
from tests.test_data_formats import write

SPLITS = {
    "train": ("train", "training", "Train"),
    "validation": ("validation", "valid", "val", "dev", "VALID"),
    "test": ("test", "testing", "eval", "evaluation", "Test"),
}
TEXT, LINES = real_text(3000), b'{"text": "some words of a document"}\n' * 50


def made(folder: Path, *names: str, content: bytes = TEXT) -> Data:
    """A folder of files; JSONL where their names say so."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, LINES if ".json" in name else content)
    return Data(source=str(folder))


def split_of(found: corpus.Corpus) -> dict[str, list[str]]:
    return {"train": found.names(found.train), "validation": found.names(found.validation)}


def first_split(data: Data) -> dict[str, list[str]]:
    """What the first reader did."""
    found = corpus._first_reader(data)
    assert found is not None
    return split_of(found)


NAMES = [
    "{}-00000-of-00001.{}",
    "wiki.{}.{}",
    "x_{}_0.{}",
    "{}.{}",
    "{}/0000.{}",
    "en/{}/a.{}",
    "{}0.{}",
    "{} 1.{}",
    "corpus-{}/a.{}",
]


class TestSplits:
    @given(data=st.data(), name=st.sampled_from(NAMES), suffix=st.sampled_from(["txt", "jsonl"]))
    @tries(80)
    def test_go_by_the_words_of_the_hub(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, suffix: str
    ) -> None:
        words = {split: data.draw(st.sampled_from(choices)) for split, choices in SPLITS.items()}
        paths = {split: name.format(word, suffix) for split, word in words.items()}
        section = made(tmp_path_factory.mktemp("folder"), *paths.values())
        found = corpus.find(section)
        assert split_of(found) == {"train": [paths["train"]], "validation": [paths["validation"]]}
        assert found.names(list(found.left_out)) == [paths["test"]] and found.why == "by their names"
        assert f"left out: {paths['test']} (a test split; it is never trained on)" in found.lines()[1]
        before = first_split(section)
        assert paths["test"] in before["train"] + before["validation"]  # the control: it was read
        assert corpus.identify(section).hash != corpus.content_hash(corpus._first_reader(section))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "name",
        ["latest.txt", "contest.txt", "devil.txt", "evaluate.txt", "trainer.txt", "medieval.txt", "interval.txt"],
    )
    def test_are_whole_words(self, tmp_path: Path, name: str) -> None:
        found = corpus.find(made(tmp_path, name, "a.txt", "b.txt"))
        assert len(found.files) == 3 and found.why.startswith("about one file in twenty")

    def test_the_word_nearest_to_the_file_decides_but_for_test(self, tmp_path: Path) -> None:
        found = corpus.find(
            made(tmp_path, "train/val.txt", "val/train.txt", "train/test.txt", "test/train.txt", "other.txt")
        )
        assert split_of(found) == {"train": ["other.txt", "val/train.txt"], "validation": ["train/val.txt"]}

    def test_a_test_split_alone_is_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(
            InputError, match=r"no data in it; test\.txt: a test split; it is never trained on; expected"
        ):
            corpus.find(made(tmp_path, "test.txt"))

    def test_named_itself_it_is_read_and_said(self, tmp_path: Path) -> None:
        made(tmp_path, "wiki.test.txt")
        (line,) = corpus.find(Data(source=str(tmp_path / "wiki.test.txt"))).lines()
        assert "by its name it is a test split" in line


FOLDERS: dict[str, tuple[list[str], dict[str, Any], list[str], list[str]]] = {
    "nanoGPT's": (
        ["train.bin", "val.bin", "prepare.py", "readme.md", "input.txt", "meta.pkl"],
        {},
        ["train.bin"],
        ["val.bin"],
    ),
    "prepared here": (["train.npy", "val.npy", "docs.txt"], {}, ["train.npy"], ["val.npy"]),
    "a data set's": (
        ["README.md", "LICENSE", ".gitattributes", "data/train-0.jsonl", "data/validation-0.jsonl"],
        {},
        ["data/train-0.jsonl"],
        ["data/validation-0.jsonl"],
    ),
    "hidden files": ([".git/a.txt", ".cache/b.txt", "__pycache__/c.py", ".d.txt", "e.txt"], {}, ["e.txt"], []),
    "a script beside text": (["prepare.py", "notes.md", "input.txt"], {}, ["notes.md"], ["input.txt"]),
    "documents of code": (["a.py", "b/c.py", "README.md"], {}, ["a.py"], ["b/c.py"]),
    "documents in Markdown": (["a.md", "LICENSE.md", "b.md"], {}, ["a.md"], ["b.md"]),
    "a format is given": (["a.jsonl", "b.txt", "c.bin"], {"format": "jsonl"}, ["a.jsonl"], []),
    "another is": (["a.jsonl", "b.txt", "c.bin"], {"format": "text"}, ["b.txt"], []),
    "JSON beside data": (["stats.json", "a.jsonl"], {}, ["a.jsonl"], []),
    "JSON alone": (["train.json", "dev.json", "config.json"], {}, ["train.json"], ["dev.json"]),
    "images beside data": (["a.png", "a.txt"], {}, ["a.txt"], []),
}


class TestFolders:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_hold_data_and_other_files(self, tmp_path: Path, name: str) -> None:
        names, section, train, validation = FOLDERS[name]
        made(
            tmp_path, *names, content=bytes(200) if any(one.endswith(".bin") for one in names) and not section else TEXT
        )
        if "train.npy" in names:
            for one in ("train", "val"):
                np.save(tmp_path / f"{one}.npy", np.arange(100))
        found = corpus.find(Data(source=str(tmp_path), **section))
        assert split_of(found) == {"train": train, "validation": validation}
        before = corpus._first_reader(Data(source=str(tmp_path), **section))
        same = before is not None and split_of(before) == split_of(found)
        assert same == (name in ("JSON beside data", "images beside data"))  # the control: the others were not read so
        visible = {one for one in names if not one.startswith((".", "__"))}
        assert {*found.names([*found.left_out, *found.files])} == visible  # each is read or said to be left out

    def test_of_save_to_disk(self, tmp_path: Path) -> None:
        table = pa.table({"text": ["some words of a document"] * 50})
        made(
            tmp_path,
            "dataset_dict.json",
            *(f"{split}/{name}" for split in ("train", "test") for name in ("state.json", "dataset_info.json")),
        )
        for name in (
            "train/data-00000-of-00002",
            "train/data-00001-of-00002",
            "test/data-00000-of-00001",
            "train/cache-1f",
        ):
            with (
                pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as writer,
            ):
                writer.write_table(table)
        found = corpus.find(Data(source=str(tmp_path)))
        assert found.kind == "arrow" and {path.name for path in found.files} == {
            "data-00000-of-00002.arrow",
            "data-00001-of-00002.arrow",
        }
        assert loaded(tmp_path).documents == {"train": 50, "validation": 50}

    def test_of_several_formats_are_asked_about(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"several formats \(jsonl, text\); expected data\.format \(--format\)"):
            corpus.find(made(tmp_path, "a.txt", "b.jsonl"))

    def test_one_file_that_is_not_what_its_name_says_is_named(self, tmp_path: Path) -> None:
        made(tmp_path, "a.txt", "b.txt")
        write(tmp_path / "b.txt", b"%PDF-1.4")
        with pytest.raises(InputError, match=r"b\.txt: is a PDF"):
            corpus.find(Data(source=str(tmp_path)))

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        made(tmp_path, "corpus/a.txt")
        assert corpus.find(Data(source="~/corpus")).names(corpus.find(Data(source="~/corpus")).files) == ["a.txt"]


def plain_hash(folder: Path, *names: str, tokenizer: Path | None = None) -> str:
    """The hash of the first reader, computed apart."""
    total = hashlib.sha256()
    files = [*((name, folder / name) for name in sorted(names)), *([("/tokenizer", tokenizer)] if tokenizer else [])]
    for name, path in files:
        total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return "sha256:" + total.hexdigest()


class TestHash:
    @pytest.mark.parametrize(
        "names",
        [["a.txt"], ["a.jsonl"], ["a.bin"], ["a.txt", "b.txt", "c.md"], ["a.py", "b.md"], ["x_train.txt", "x_val.txt"]],
    )
    def test_readings_that_give_the_same_tokens_keep_it(self, tmp_path: Path, names: list[str]) -> None:
        section = made(tmp_path, *names, content=bytes(200) if names == ["a.bin"] else TEXT)
        known = corpus.identify(section)
        assert known.hash == plain_hash(tmp_path, *names) and corpus.identify(known) == known

    def test_of_the_standard_library_too(self) -> None:
        found = corpus.find(Data())
        assert corpus.identify(Data()).hash == plain_hash(found.root, *found.names(found.files))

    def test_how_files_are_read_is_part_of_it(self, tmp_path: Path, tokenizer_file: Path) -> None:
        made(tmp_path / "data", "a.jsonl")
        source = str(tmp_path / "data" / "a.jsonl")
        ways: list[dict[str, Any]] = [
            {},
            {"field": "body"},
            {"encoding": "latin-1"},
            {"separator": "\n"},
            {"tokenizer": str(tokenizer_file)},
        ]
        ways += [{"tokenizer": str(tokenizer_file), "field": "body"}]
        assert len({corpus.identify(Data(source=source, **way)).hash for way in ways}) == len(ways)

    def test_a_document_of_the_first_reader_is_refused_where_tokens_are_others(
        self, tmp_path: Path, tokenizer_file: Path
    ) -> None:
        section = made(tmp_path / "data", "train.jsonl", "test.jsonl")
        old = plain_hash(tmp_path / "data", "train.jsonl", "test.jsonl")
        remedy = r"which gives other tokens; expected a document made anew, or `-s data\.hash=null`"
        with pytest.raises(InputError, match=rf"data\.hash: .* supar now reads its files otherwise, {remedy}"):
            corpus.identify(section.model_copy(update={"hash": old}))
        made(tmp_path / "one", "a.jsonl")
        section = Data(source=str(tmp_path / "one" / "a.jsonl"), tokenizer=str(tokenizer_file))
        old = plain_hash(tmp_path / "one", "a.jsonl", tokenizer=tokenizer_file)
        with pytest.raises(
            InputError, match=rf"supar now reads the text alone, without what tokenizer\.json adds .*, {remedy}"
        ):
            corpus.identify(section.model_copy(update={"hash": old}))
        with pytest.raises(InputError, match="is not the data this document was made with"):
            corpus.identify(section.model_copy(update={"hash": "sha256:" + "0" * 64}))

    def test_one_that_names_another_field_goes_on_with_its_hash(self, tmp_path: Path) -> None:
        """The first reader's hash did not cover the field, and its tokens are the same."""
        made(tmp_path, "a.jsonl")
        old = Data(source=str(tmp_path), field="body", hash=plain_hash(tmp_path, "a.jsonl"))
        assert corpus.identify(old) == old

    def test_of_a_mixture_names_the_source_that_changed(self, tmp_path: Path) -> None:
        made(tmp_path, "a.txt", "b.jsonl")
        sources = [{"source": str(tmp_path / name), "weight": 1.5} for name in ("a.txt", "b.jsonl")]
        known = corpus.identify(Data(sources=sources))
        assert corpus.identify(known) == known and [one.hash for one in known.sources] == [
            plain_hash(tmp_path, name) for name in ("a.txt", "b.jsonl")
        ]
        sources[0]["weight"] = 2.0
        assert corpus.identify(Data(sources=sources)).hash != known.hash
        write(tmp_path / "b.jsonl", LINES[:-40])
        with pytest.raises(InputError, match=r"data\.hash: .*b\.jsonl is not the data"):
            corpus.identify(known)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<unk>": 0, "some": 1, "</s>": 2}, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["truncation"] is None
    return tmp_path / "tokenizer.json"
