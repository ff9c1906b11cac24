"""Files that look like what they are not, and settings that change the tokens: refused or said, never read in silence.

Each table is of members of a kind that an earlier reader took for tokens, text or the same data.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supar_cli.data import batches, corpus, formats
from supar_cli.errors import InputError, SuparError
from supar_cli.planning.spec import Data
from tests.conftest import real_text
from tests.fuzzing import tries
from tests.test_data import loaded, text_of
from tests.test_data_folders import made, plain_hash, split_of
from tests.test_data_formats import write

NOISE = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
TEXT = real_text(4000)
LINES = b'{"text": "some words of a document"}\n' * 50
REMEDY = r"which gives other tokens; expected a document made anew, or `-s data\.hash=null`"


def kind(path: Path, **section: Any) -> str:
    return corpus.find(Data(source=str(path), **section)).kind


class TestHash:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.ndjson", "a"])
    def test_covers_the_format(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name, LINES)
        made_as = {one: Data(source=str(tmp_path / name), format=one) for one in ("text", "jsonl")}
        hashes = {one: corpus.identify(data).hash for one, data in made_as.items()}
        first = "jsonl" if name == "a.jsonl" else "text"  # what the first reader took it for
        assert hashes[first] == plain_hash(tmp_path, name) != hashes["jsonl" if first == "text" else "text"]
        for one, data in made_as.items():
            for other, known in hashes.items():
                if one == other:
                    assert corpus.identify(data.model_copy(update={"hash": known})).hash == known
                else:  # the control: the first reader's hash, which was the same for both
                    with pytest.raises(InputError, match=r"data\.hash: "):
                        corpus.identify(data.model_copy(update={"hash": known}))
        with pytest.raises(InputError, match=rf"reads its files as {'jsonl' if first == 'text' else 'text'}, {REMEDY}"):
            corpus.identify(
                made_as["jsonl" if first == "text" else "text"].model_copy(update={"hash": plain_hash(tmp_path, name)})
            )

    @pytest.mark.parametrize("names", [["a.txt"], ["a.jsonl"], ["a.bin"], ["a.jsonl", "b.jsonl"], ["a.parquet"]])
    def test_is_the_same_where_the_format_is_named_that_is_found(self, tmp_path: Path, names: list[str]) -> None:
        section = made(tmp_path, *names, content=bytes(200) if names == ["a.bin"] else TEXT)
        if names == ["a.parquet"]:
            pa.parquet.write_table(pa.table({"text": ["a"] * 9}), tmp_path / "a.parquet")
        found = corpus.find(section).kind
        known = corpus.identify(section).hash
        assert corpus.identify(section.model_copy(update={"format": found})).hash == known
        assert (known == plain_hash(tmp_path, *names)) == (names != ["a.parquet"])

    @pytest.mark.parametrize("names", [("utf-8", "UTF-8", "utf8", "U8"), ("latin-1", "latin1", "ISO-8859-1")])
    def test_has_one_value_for_an_encoding_by_any_name(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        write(tmp_path / "a.txt", b"\xef\xbb\xbf" + TEXT.replace(b"e", "é".encode()))
        section = Data(source=str(tmp_path / "a.txt"))
        found = [section.model_copy(update={"encoding": name}) for name in names]
        assert len({corpus.identify(one).hash for one in found}) == 1
        assert len({text_of(loaded(tmp_path / "a.txt", encoding=name).train) for name in names}) == 1

    def test_names_a_tokenizer_that_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "t.json"
        path.write_text("{}")
        section = made(tmp_path / "data", "a.jsonl").model_copy(update={"tokenizer": str(path)})
        known = corpus.identify(section)
        path.write_text("{ }")
        with pytest.raises(InputError, match=r"a document was made|or the tokenizer .*t\.json or the way of reading"):
            corpus.identify(known)


WIDER = {"int32": "<i4", "uint32": "<u4", "int64": "<i8", "uint64": "<u8"}


class TestTokens:
    @given(
        seed=st.integers(0, 2**32),
        vocab=st.sampled_from([3, 65, 257, 50_257]),
        zeros=st.sampled_from([0.0, 0.1, 0.6]),
        width=st.sampled_from(sorted(WIDER)),
    )
    @tries(60)
    def test_wider_integers_are_refused_with_ids_of_zero_too(
        self, tmp_path: Path, seed: int, vocab: int, zeros: float, width: str
    ) -> None:
        draw = np.random.default_rng(seed)
        ids = draw.integers(0, vocab, 400) * (draw.random(400) >= zeros)
        write(tmp_path / "x.bin", ids.astype(WIDER[width]).tobytes())
        with pytest.raises(InputError, match=r"as if the integers were wider; expected .*data\.dtype: uint"):
            kind(tmp_path / "x.bin")
        low = np.frombuffer(ids.astype(WIDER[width]).tobytes(), "<u2")[::2]
        if width in ("int64", "uint64") and not zeros and vocab < 2**16:
            assert 2 * np.count_nonzero(low) <= len(low)  # the control: the rule was that most of these are not 0
        assert kind(tmp_path / "x.bin", dtype="uint16") == "nanogpt"

    @given(seed=st.integers(0, 2**32), vocab=st.sampled_from([65, 50_257]), width=st.sampled_from(["<f4", "<f8"]))
    @tries(20)
    def test_floats_are_refused(self, tmp_path: Path, seed: int, vocab: int, width: str) -> None:
        draw = np.random.default_rng(seed)
        for numbers in (draw.integers(0, vocab, 400), draw.normal(size=400)):
            write(tmp_path / "x.bin", numbers.astype(width).tobytes())
            with pytest.raises(InputError, match=r"x\.bin: holds floats; expected integers"):
                kind(tmp_path / "x.bin")

    @pytest.mark.parametrize("sample", ["Où est l’été ? \n", "漢字とかな、文章。\n", "mostly ASCII — with dashes\n"])
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
    def test_text_in_utf_16_is_refused(self, tmp_path: Path, sample: str, encoding: str) -> None:
        if encoding == "utf-16-be" and "漢" in sample:
            sample = "plain words\n"  # without a mark, only what is mostly ASCII is known in this order
        write(tmp_path / "x.bin", (sample * 100).encode(encoding))
        for section in ({}, {"format": "nanogpt"}):
            with pytest.raises(InputError, match=r"x\.bin: is text in UTF-16; expected .*data\.encoding: utf-16"):
                kind(tmp_path / "x.bin", **section)
        assert kind(tmp_path / "x.bin", dtype="uint16") == "nanogpt"  # as all of it was

    def test_bytes_as_tokens_are_not_such_text(self, tmp_path: Path) -> None:
        """`data prepare` writes them, and a mark apart they are ASCII in UTF-16 bit for bit: the tokens are the text."""
        write(tmp_path / "x.bin", np.frombuffer(TEXT, np.uint8).astype("<u2").tobytes())
        assert kind(tmp_path / "x.bin") == "nanogpt"

    @given(seed=st.integers(0, 2**32), vocab=st.sampled_from([300, 1000, 8000, 32_000, 50_257, 65_536]))
    @tries(60)
    def test_ids_as_frequent_as_words_are_tokens(self, tmp_path: Path, seed: int, vocab: int) -> None:
        draw = np.random.default_rng(seed)
        ids = draw.permutation(vocab)[np.minimum(draw.zipf(1.2, 4000), vocab) - 1]
        write(tmp_path / "x.bin", ids.astype("<u2").tobytes())
        assert kind(tmp_path / "x.bin") == "nanogpt"

    @pytest.mark.parametrize("order", ["<i4", ">i4"])
    @pytest.mark.parametrize("date", [20240520, 20250520, 20270101])
    def test_headers_of_llmc_in_another_version_or_byte_order(self, tmp_path: Path, date: int, order: str) -> None:
        ids = np.random.default_rng(0).integers(0, 50_257, 4000)
        header = np.array([date, 1, len(ids)] + [0] * 253, order)
        write(tmp_path / "x.bin", header.tobytes() + ids.astype(f"{order[0]}u2").tobytes())
        if (date, order) == (20240520, "<i4"):
            assert kind(tmp_path / "x.bin") == "llmc"
        else:
            with pytest.raises(InputError, match=r"has a header of llm\.c with another version or byte order"):
                kind(tmp_path / "x.bin")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_stream_of_arrow_is_one_by_any_name(self, tmp_path: Path, legacy: bool) -> None:
        table, sink = pa.table({"text": ["some words"] * 50}), io.BytesIO()
        options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        for name in ("x.bin", "x.arrow", "x.txt"):
            write(tmp_path / name, sink.getvalue())
            assert kind(tmp_path / name) == "arrow" and loaded(tmp_path / name).documents == {"train": 50}
        write(tmp_path / "ids.bin", b"\xff\xff\xff\xff" + NOISE)  # the last id of a vocabulary of 65,536, twice
        assert kind(tmp_path / "ids.bin") == "nanogpt"

    @given(count=st.integers(1, 40), integer=st.sampled_from(["<u2", "<i4", "<i8"]))
    @tries(20)
    def test_an_array_with_more_behind_it_is_refused(self, tmp_path: Path, count: int, integer: str) -> None:
        sink = io.BytesIO()
        np.save(sink, np.arange(100, dtype=integer))
        write(tmp_path / "x.npy", sink.getvalue())
        loaded(tmp_path / "x.npy")
        write(tmp_path / "x.npy", sink.getvalue() + bytes(count))
        with pytest.raises(SuparError, match=rf"x\.npy: holds {count} bytes after the array of its header"):
            loaded(tmp_path / "x.npy")


FOREIGN = {
    **{f"pickle {at}": pickle.dumps(list(range(2000)), at) + bytes(at % 2) for at in range(1, 6)},
    **{f"pickle of text {at}": pickle.dumps([TEXT.decode()] * 3, at) for at in range(2, 6)},
    **{f"pickle of an array {at}": pickle.dumps(np.arange(2000, dtype="u2"), at) for at in range(2, 6)},
    "torch": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + NOISE,
    "bz2": bz2.compress(NOISE),
    "xz": lzma.compress(NOISE),
    "lzma": lzma.compress(NOISE, format=lzma.FORMAT_ALONE),
    "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7" + NOISE,
    "snappy": b"\xff\x06\0\0sNaPpY" + NOISE,
    "rar": b"Rar!\x1a\x07\x01\0" + NOISE,
    "7z": b"7z\xbc\xaf\x27\x1c" + NOISE,
    "jpeg": b"\xff\xd8\xff\xe1" + NOISE,
    "bmp": b"BM\xee\x0b\0\0\0\0\0\0" + NOISE,
    "tiff": b"II*\0" + NOISE,
    "mp3": b"ID3\x03\0\0\0\0" + NOISE,
    "flac": b"fLaC\0\0\0\x22" + NOISE,
    "ogg": b"OggS\0\2" + NOISE,
    "wav": b"RIFF\x24\x10\0\0WAVEfmt " + NOISE,
    "mp4": b"\0\0\0\x20ftypisom" + NOISE,
    "mkv": b"\x1a\x45\xdf\xa3" + NOISE,
    "exe": b"MZ\x90\0\3\0" + NOISE,
    "macho": b"\xcf\xfa\xed\xfe\7\0" + NOISE,
    "class": b"\xca\xfe\xba\xbe\0\0\0\x34" + NOISE,
    "wasm": b"\0asm\1\0\0\0" + NOISE,
    "pyc": b"\xa7\r\r\n\0\0\0\0" + NOISE,
    "ggml": b"lmgg" + NOISE,
    "ggjt": b"tjgg\3\0\0\0" + NOISE,
    "orc": b"ORC\x08" + NOISE,
    "avro": b"Obj\1" + NOISE,
    "feather": b"FEA1\0\0\0\0" + NOISE,
    "idx": b"MMIDIDX\0\0\1" + NOISE,
    "safetensors": (41).to_bytes(8, "little") + b' {"a": {"dtype": "F32"}}' + NOISE,
    "rtf": b"{\\rtf1\\ansi " + TEXT,
    "html": b"<!DOCTYPE html><html>" + TEXT,
    "latin-1": "Où est l'été dernier ? ".encode("latin-1") * 100,
}


class TestForeign:
    @pytest.mark.parametrize("name", FOREIGN)
    def test_is_named_and_never_tokens(self, tmp_path: Path, name: str) -> None:
        content = FOREIGN[name]
        write(tmp_path / "x.bin", content + b"\n" * (len(content) % 2))
        for section in ({}, {"format": "nanogpt"}):
            with pytest.raises(InputError, match=r"x\.bin: (is|holds) .*; expected ") as refused:
                kind(tmp_path / "x.bin", **section)
            assert not re.search("wider|UTF-16|floats", str(refused.value))
        assert corpus._first_reader(Data(source=str(tmp_path / "x.bin"))).kind == "nanogpt"  # type: ignore[union-attr]  # the control

    @given(seed=st.integers(0, 2**32))
    @tries(200)
    def test_chance_forms_none_of_them(self, tmp_path: Path, seed: int) -> None:
        draw = np.random.default_rng(seed)
        start = draw.choice([b"\x80\x04", b"BM", b"]\0\0", b"\xff\xd8", b"\xff\xff\xff\xff", b"ID3\3", b"\0\0\0\0"])
        content = start + draw.integers(0, 256, 2000, np.uint8).tobytes()
        write(tmp_path / "x.bin", content[: len(content) // 2 * 2])
        assert kind(tmp_path / "x.bin") == "nanogpt"

    @pytest.mark.parametrize("name", ["x", "x.txt", "x.md", "x.json", "x.jsonl"])
    @pytest.mark.parametrize("indent", [None, 1, 4])
    def test_an_array_of_records_is_no_text(self, tmp_path: Path, name: str, indent: int | None) -> None:
        write(tmp_path / name, json.dumps([{"text": 'a "word"'}] * 9, indent=indent).encode())
        with pytest.raises(InputError, match=rf"{name}: is a JSON array; expected JSON lines"):
            kind(tmp_path / name)
        assert kind(tmp_path / name, format="text") == "text"  # who wants it says so

    @pytest.mark.parametrize("start", [b"[a list]", b"[{", b"[ {a: 1} ]", b'["a"]', b"[1] {x}"])
    def test_other_brackets_are(self, tmp_path: Path, start: bytes) -> None:
        write(tmp_path / "x.txt", start + TEXT)
        assert kind(tmp_path / "x.txt") == "text"


class TestFolders:
    @pytest.mark.parametrize("special", ["fifo", "link", "loop"])
    def test_what_is_no_file_is_left_out_by_name(self, tmp_path: Path, special: str) -> None:
        made(tmp_path / "data", "a.txt", "b.txt")
        made(tmp_path / "other", "c.txt")
        path = tmp_path / "data" / "x.txt"
        if special == "fifo":
            os.mkfifo(path)  # the control: opening it waited for ever
        else:
            path.symlink_to(tmp_path / ("other" if special == "link" else "data"))
        found = corpus.find(Data(source=str(tmp_path / "data")))
        assert found.names(found.files) == ["a.txt", "b.txt"]
        assert found.by_reason() == {"neither files nor folders" if special == "fifo" else "links to folders": "x.txt"}

    @pytest.mark.parametrize("source", ["/dev/null", "/dev/zero"])
    def test_a_device_is_no_source(self, source: str) -> None:
        with pytest.raises(InputError, match="neither a file nor a folder"):
            corpus.find(Data(source=source))

    @pytest.mark.parametrize("names", [("validation.txt", "test.txt"), ("val.txt",), ("dev/a.txt", "dev/b.txt")])
    def test_a_validation_split_is_not_trained_on(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        """The control: all of it was shared out, by hash or as the last tenth of a file."""
        with pytest.raises(InputError, match=r"no training split, only one for validation \(.*; expected a training"):
            corpus.find(made(tmp_path, *names))

    @pytest.mark.parametrize("name", ["metadata.jsonl", "dataset_info.jsonl", "metadata.jsonl.gz", "Metadata.txt"])
    def test_files_about_data_are_none(self, tmp_path: Path, name: str) -> None:
        found = corpus.find(made(tmp_path, "train.jsonl", "val.jsonl", name))
        assert split_of(found) == {"train": ["train.jsonl"], "validation": ["val.jsonl"]}


class TestMarks:
    @pytest.mark.parametrize("order", ["le", "be"])
    @pytest.mark.parametrize("width", [16, 32])
    @pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl"])
    def test_of_the_byte_order_are_heeded(self, tmp_path: Path, width: int, order: str, name: str) -> None:
        text = LINES.decode() if name == "x.jsonl" else TEXT.decode()
        content = f"\ufeff{text}".encode(f"utf-{width}-{order}")
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        found = loaded(tmp_path / name, encoding=f"utf-{width}-{order}")
        assert "\ufeff".encode() not in text_of(found.train)  # the control: it was a character of the text
        other = f"utf-{width}-{'be' if order == 'le' else 'le'}"
        with pytest.raises(InputError, match=rf"{name}: its mark .* not that of {other}; expected .*: utf-{width}"):
            loaded(tmp_path / name, encoding=other)
        found_too = loaded(tmp_path / name, encoding=f"utf-{width}")
        assert text_of(found_too.train) == text_of(found.train)


class TestMixture:
    @pytest.mark.parametrize("at", [0, 1, 2])
    @pytest.mark.parametrize("weight", [1e-20, 1e-300, 5e-324])
    def test_a_weight_that_no_draw_meets_is_refused(self, tmp_path: Path, at: int, weight: float) -> None:
        """The control: OverflowError where it was the first, and no draw from it elsewhere."""
        made(tmp_path, "a.txt", "b.txt", "c.txt")
        weights = [1.0, 1.0, 1.0]
        weights[at] = weight
        sources = [
            {"source": str(tmp_path / name), "weight": one}
            for name, one in zip(("a.txt", "b.txt", "c.txt"), weights, strict=True)
        ]
        with pytest.raises(InputError, match=rf"data\.sources\[{at}\]\.weight: {weight} is less than one draw"):
            batches.load(Data(sources=sources), vocab=256, context=8)
        sources[at]["weight"] = 1e-18
        batches.load(Data(sources=sources), vocab=256, context=8).train.batch(0, 0, 4, 8)


class TestLoss:
    @pytest.mark.parametrize(("share", "times"), [(0, 0), (10, 1), (50, 5)])
    def test_of_characters_by_a_tokenizer_is_said(self, tmp_path: Path, share: int, times: int) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        letters = tokenizers.models.BPE({"a": 0, "b": 1, "</s>": 2}, [])
        words = tokenizers.models.WordLevel({"ab": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]")
        text = "漢" * times + "ab" * ((10 - times) // 2) + "a" * ((10 - times) % 2)
        for model, said in ((letters, f"{share}.00% of the first"), (words, "% of the tokens")):
            tokenizer = tokenizers.Tokenizer(model)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            tokenizer.save(str(tmp_path / "t.json"))
            write(
                tmp_path / "x.jsonl",
                json.dumps({"text": text if model is letters else "ab 漢" if times else "ab"}).encode() + b"\n",
            )
            write(tmp_path / "x.jsonl", (tmp_path / "x.jsonl").read_bytes() * 50)
            found = loaded(tmp_path / "x.jsonl", tokenizer=str(tmp_path / "t.json"), context=1).warnings
            assert len(found) == bool(times) and all(said in one for one in found)

    @given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=5, max_size=40))
    @tries(60)
    def test_is_none_with_bytes_below(self, tmp_path: Path, text: str) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        made_ = tokenizers.Tokenizer(tokenizers.models.BPE({one: at for at, one in enumerate([*alphabet, "</s>"])}, []))
        made_.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made_.save(str(tmp_path / "t.json"))
        (tmp_path / "x.jsonl").write_text((json.dumps({"text": text}) + "\n") * 20)
        assert loaded(tmp_path / "x.jsonl", 1, 300, tokenizer=str(tmp_path / "t.json")).warnings == []

    @pytest.mark.parametrize("separator", ["\n", " ", "e"])
    def test_of_the_ends_of_documents_is_said(self, tmp_path: Path, separator: str) -> None:
        lines = [f"one{separator}two", "three"] if separator != "e" else ["one", "word"]
        write(tmp_path / "x.jsonl", b"".join(json.dumps({"text": one}).encode() + b"\n" for one in lines * 20))
        (said,) = loaded(tmp_path / "x.jsonl", separator=separator).warnings
        assert f"data.separator: 20 texts hold {separator!r} themselves" in said
        assert loaded(tmp_path / "x.jsonl", separator="|").warnings == []


def test_the_table_of_first_bytes_is_not_matched_by_nothing() -> None:
    assert not any(re.match(pattern, b"", re.DOTALL) for pattern in formats._FOREIGN)


def test_the_default_corpus_has_its_hash_in_its_own_format_too() -> None:
    """Documents of the first reader that name the format of `stdlib` go on."""
    hashes = [corpus.identify(Data(source="stdlib", format=word)).hash for word in ("auto", "text")]  # type: ignore[arg-type]
    assert hashes[0] == hashes[1] == corpus.content_hash(corpus.find(Data(source="stdlib")))
